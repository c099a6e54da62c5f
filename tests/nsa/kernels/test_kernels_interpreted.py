"""Every kernel runs on every machine: in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsa.kernels._installed import missing, provider
from nsa.routes import TABLE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = sorted(
    file.stem.removeprefix("test_kernels_")
    for file in HERE.glob("test_kernels_*.py")
    if file.name != Path(__file__).name and "pytest.mark.interpret" in file.read_text()
)
BRANCH = {"cmp": "compressed", "score": "selection", "sel": "selected", "win": "sliding"}


def test_every_kernel_of_the_table_has_such_tests() -> None:
    named = {BRANCH[row.branch] for row in TABLE if row.backend.startswith("triton")}
    assert named
    assert named <= set(KERNELS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted(kernel: str) -> None:
    if missing():
        pytest.skip(str(missing()))
    version = str(provider()).split()[-1]
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 7):
        pytest.skip(f"Triton {version}'s interpreter cannot count to a number in a kernel with numpy 2.4")
    # Not this run's plugins and options: the other run is one process, and decides what it takes.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted_rows.py"), kernel],
        cwd=ROOT,
        env={**env, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
