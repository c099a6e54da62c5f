"""Steps too short for a graph of their own: several in one graph, cold ones each on tensors of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from nsabench.measure import available_bytes
from nsabench.measure.device import cache_bytes
from nsabench.run.arm import Arm
from nsabench.run.workload import Workload

SHORT_MS = 0.020
"""A step shorter than this is timed several to a graph, and with it all graphs of its rounds."""

REPLAY_MS = 0.005
REPLAY_PART = 0.01
"""Starting a graph costs about `REPLAY_MS` beside its kernels; a step may hold this part of its own time."""

COLD_CACHES = 5
"""The copies of a cold step read this many times the cache before the first one comes again."""

MOST_STEPS = 1000
"""Steps of a graph at most."""

MEMORY_PART = 0.5
"""Of the free memory, what copies may take."""


def steps_in_graph(step_ms: float, moved_bytes: float, cache: int, *, cold: bool) -> int:
    """How many steps of ``step_ms`` that move so many bytes a graph holds, beside a ``cache`` of bytes."""
    amortised = math.ceil(REPLAY_MS / (REPLAY_PART * step_ms))
    # Each replay follows a flush, so a long step needs no more copies than the graph's start asks for.
    evicting = math.ceil(COLD_CACHES * cache / moved_bytes) if cold and step_ms < SHORT_MS else 1
    return max(1, min(MOST_STEPS, max(amortised, evicting)))


def rotation(arms: Iterable[Arm]) -> dict[Arm, int]:
    """The steps of a graph for every arm that wants several; none where no step of these is short.

    Where the copies cannot be had, no arm has any, lest two arms be timed in two ways; their rows say why.
    """
    living = [arm for arm in arms if arm.fields["status"] == "ok" and arm.fields["timer"] == "graph"]
    if not any(arm.step_ms < SHORT_MS for arm in living):
        return {}
    cache = cache_bytes(torch.device(living[0].cell.device))
    counts = {
        arm: steps_in_graph(arm.step_ms, arm.fields["bytes"], cache, cold=arm.fields["cache"] == "cold")
        for arm in living
    }
    if why := _make_copies(counts):
        for arm in living:
            arm.note(f"steps under {1e3 * SHORT_MS:g} us are timed one to a graph: {why}")
        return {}
    return {arm: count for arm, count in counts.items() if count > 1}


def _make_copies(counts: dict[Arm, int]) -> str:
    """Copy the workloads of the cold arms; returns why that cannot be."""
    wanted: dict[Workload, int] = {}
    for arm, count in counts.items():
        if arm.fields["cache"] == "cold":
            wanted[arm.workload] = max(count, wanted.get(arm.workload, 1))
    if not wanted:
        return ""
    needed = sum((count - 1) * copy_bytes(workload) for workload, count in wanted.items())
    free = available_bytes(next(iter(counts)).cell.device)
    if needed > MEMORY_PART * free:
        return f"copies need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    try:
        for workload, count in wanted.items():
            workload.copies(count)
    except (RuntimeError, TypeError) as error:  # no memory, or tensors that torch does not copy
        for workload in wanted:
            workload.forget_copies()
        return f"copies cannot be made: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return ""


def copy_bytes(workload: Workload) -> int:
    """Bytes of one more copy: what it holds, and a cache for each of its steps."""
    caches: Sequence[int] = list(workload.cache_bytes().values())
    return sum(workload.held_bytes().values()) + len(workload.steps) * sum(caches)
