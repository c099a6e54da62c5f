"""Importing the package asks for neither pynvml nor a GPU, and knows nothing of what is measured."""

from __future__ import annotations

import subprocess
import sys

import nsabench.measure


def test_imports_without_pynvml_and_without_its_neighbours() -> None:
    code = """
import sys
sys.modules["pynvml"] = None
import nsabench.measure
loaded = [m for m in sys.modules if m == "nsa" or m.startswith(("nsa.", "nsabench."))]
print(*(m for m in loaded if not m.startswith("nsabench.measure")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_is_public_is_there() -> None:
    for name in nsabench.measure.__all__:
        assert getattr(nsabench.measure, name) is not None
