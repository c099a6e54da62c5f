"""torch.profiler as the meters use it: quiet, one pass, no schedule."""

from __future__ import annotations

import os
from typing import Any

import torch

from nsabench.measure.device import MeasureError


def profile(*, cuda: bool = False, memory: bool = False) -> torch.profiler.profile:
    """A profiler context over host ops, and kernels with `cuda`, and every allocation with `memory`."""
    # Kineto reads this at its first use and otherwise writes start and stop lines to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, profile_memory=memory, acc_events=True)


def recorded(profiler: torch.profiler.profile) -> Any:
    """What a finished profiler recorded, one entry an event. MeasureError if it recorded nothing."""
    inner = profiler.profiler
    if inner is None or inner.kineto_results is None:
        raise MeasureError("torch.profiler recorded nothing; is another profiler active?")
    return inner.kineto_results


def operators(profiler: torch.profiler.profile) -> list[str]:
    """Names of the torch operators that ran, without their namespace, in the order they began."""
    names = [event.name() for event in recorded(profiler).events()]
    return [name.removeprefix("aten::") for name in names if name.startswith("aten::")]
