"""What every test may count on: one seed, no display, no switch from your shell, a GPU if it asks for one."""

from __future__ import annotations

import os
import random
import sys

import hypothesis
import numpy as np
import pytest

# Read by libraries when they are imported, and inherited by every worker process a test starts.
os.environ["MPLBACKEND"] = "Agg"
for _name in list(os.environ):
    if _name.startswith("NSA_") or _name in {"FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS"}:
        del os.environ[_name]

# No per-example deadline: the machine is shared. The same examples every time: a red test stays red.
hypothesis.settings.register_profile("nsabench", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nsabench")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed every generator, so that no test depends on which ran before it."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
