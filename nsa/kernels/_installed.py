"""Whether Triton is installed, which one, and whether it interprets. Imports no Triton to say so."""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from importlib.util import find_spec

# In the words Triton itself takes for true.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: TRITON_INTERPRET as it was when first
    asked, since kernels are bound to one or the other when their module is imported.
    """
    return _INTERPRETED


@cache
def missing() -> str | None:
    """Why no kernel can be built, and the line that changes it; None where Triton is installed."""
    if find_spec("triton") is not None:
        return None
    return "needs Triton, which is not installed: pip install triton"


@cache
def provider() -> str | None:
    """``triton`` and its version, e.g. ``triton 3.7.1``; None without it."""
    for name in ("triton", "pytorch-triton"):
        for found in metadata.distributions(name=name):
            return f"triton {found.version}"
    return None
