"""Tests of kernels: what is marked `interpret` runs on a GPU, or where Triton interprets, on the CPU."""

from __future__ import annotations

import pytest

from nsa.kernels._installed import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("interpret")]
    if not marked or interpreted():
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device, and TRITON_INTERPRET is not 1"))


@pytest.fixture
def kernel_device() -> str:
    """Where a kernel runs here: `cpu` in the interpreter, else `cuda`."""
    return "cpu" if interpreted() else "cuda"
