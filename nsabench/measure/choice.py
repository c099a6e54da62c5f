"""Which timer, and how many steps a sample."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from nsabench.measure.device import MeasureError, resolve_device
from nsabench.measure.kineto import KinetoTimer
from nsabench.measure.timers import CpuTimer, EventTimer, GraphTimer, HostTimer, Timer

TIMERS = ("cpu", "host", "event", "graph", "kineto")

_ON_GPU: dict[str, type[HostTimer] | type[EventTimer] | type[KinetoTimer]] = {
    "host": HostTimer,
    "event": EventTimer,
    "graph": GraphTimer,
    "kineto": KinetoTimer,
}


def make_timer(
    kind: str,
    device: str | torch.device,
    cache: str,
    regime: str = "latency",
    *,
    flush: Callable[[], None] | None = None,
    api: Any = torch.cuda,
    clock: Callable[[], float] = time.perf_counter,
) -> Timer:
    """The timer of that name for a device: `cpu` for the CPU, all others for a GPU.

    `kineto` is for cross-checks: it counts what kernels take, not the gaps between them.
    """
    if kind not in TIMERS:
        raise MeasureError(f"timer is {kind!r}; allowed: {', '.join(TIMERS)}")
    if kind == "cpu":
        if resolve_device(device, api=api).type != "cpu":
            raise MeasureError(
                f"timer is 'cpu', but device is {str(device)!r}; allowed: {', '.join(TIMERS[1:])}"
            )
        return CpuTimer(cache=cache, regime=regime, flush=flush, clock=clock)
    return _ON_GPU[kind](device, cache=cache, regime=regime, flush=flush, api=api, clock=clock)


def choose_iters(step_ms: float, target_ms: float, *, limit: int = 10_000) -> int:
    """Steps that fill `target_ms` when one takes `step_ms`: at least 1, at most `limit`."""
    if not (math.isfinite(step_ms) and step_ms > 0):
        raise MeasureError(f"a step takes {step_ms} ms; it must be finite and above 0")
    return max(1, min(limit, math.ceil(target_ms / step_ms)))
