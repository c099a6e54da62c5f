"""A step's device time as torch.profiler sees it: when kernels ran, and no gap between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from nsabench.measure.device import MeasureError
from nsabench.measure.profiling import profile
from nsabench.measure.timers import Step, check_setting, flush_for, gpu_of, ready, warm_up
from nsabench.measure.trace import Kernel, Op, read_profile

MARK = "nsabench::timed"
"""The range around each step in a profile."""

Traced = tuple[Sequence[Op], Sequence[Kernel]]


class KinetoTimer:
    """The union of the times of a step's kernels, from a profile of their own: what the device was busy.

    A cross-check, and no headline: gaps between kernels do not count, and profiling slows short kernels
    down. Each step is waited for, so that its kernels lie within its range; of a `sustained` sample, too.
    `cold`: the cache is flushed before each step, outside its range.
    """

    name = "kineto"

    def __init__(
        self,
        device: str | torch.device = "cuda",
        *,
        cache: str = "warm",
        regime: str = "latency",
        flush: Callable[[], None] | None = None,
        api: Any = torch.cuda,
        clock: Callable[[], float] = time.perf_counter,
        record: Callable[[], AbstractContextManager[Any]] = lambda: profile(cuda=True),
        read: Callable[[Any], Traced] = read_profile,
    ) -> None:
        """`record` and `read`: what takes a profile, and what makes ops and kernels of it."""
        check_setting(cache, regime)
        self.device = gpu_of(device, self.name, api)
        self.cache = cache
        self.regime = regime
        self.warmup_ms = 0.0
        self.output: object = None
        self.steps = self.gated_steps = 0
        self._flush = flush_for(cache, self.device, flush, api)
        self._api, self._clock, self._record, self._read = api, clock, record, read
        self._step: Step | None = None

    def prepare(self, step: Step) -> None:
        self.output = None
        began = self._clock()
        with self._api.device(self.device):
            self.output = warm_up(step, self._clock, self._api.synchronize)
        self.warmup_ms = (self._clock() - began) * 1e3
        self._step = step

    def sample(self, iters: int) -> float:
        step = ready(self._step, iters)
        with self._api.device(self.device), self._record() as profiler:
            for _ in range(iters):
                self._flush()
                self._api.synchronize()
                self.output = None
                with torch.profiler.record_function(MARK):
                    self.output = step()
                    self._api.synchronize()
        self.steps += iters
        return busy_ms(*self._read(profiler)) / iters


def busy_ms(ops: Iterable[Op], kernels: Iterable[Kernel]) -> float:
    """Milliseconds in which at least one kernel ran that began within a range of the profile's steps.

    MeasureError where none did: the profiler sees no kernels here.
    """
    marks = sorted((op.start, op.end) for op in ops if op.name == MARK)
    timed = sorted((k.start, k.end) for k in kernels if any(a <= k.start <= b for a, b in marks))
    if not timed:
        raise MeasureError("torch.profiler saw no kernel of the step")
    busy, until = 0.0, float("-inf")
    for start, end in timed:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy
