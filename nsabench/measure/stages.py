"""Shares of the stages in one step: exclusive times between stage borders, and `other` for the rest."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from nsabench.measure.device import MeasureError, QueueAhead, cache_flush, no_flush, resolve_device

STAGES = ("proj", "compress", "cmp", "score", "sel", "win", "gate", "other")
"""The stages of a step, in order. `other` is what runs in none."""

CLOSING = 0.01
"""Shares must add up to the measured total within this part of it."""

Hook = Callable[[Callable[[str], AbstractContextManager[object]]], AbstractContextManager[object]]
"""Takes a factory and returns a context inside which every stage runs as `with factory(name):`."""


@dataclass(frozen=True)
class Shares:
    """Where a step's time went. `ms` is None where that cannot be said; then `note` says why."""

    total_ms: float
    """Mean time of the instrumented step; the headline time comes from a timer."""
    ms: dict[str, float] | None
    """The stages that ran, in the order of STAGES, and `other`; they add up to `total_ms`."""
    note: str = ""

    @classmethod
    def closing(cls, total_ms: float, ms: Mapping[str, float]) -> Shares:
        """Shares of the stages' times; `other` is what is left. No shares where they exceed the total."""
        inside = math.fsum(ms.values())
        if not ms:
            return cls(total_ms, None, "the step entered no stage")
        if total_ms <= 0 or min(ms.values()) < -CLOSING * total_ms or inside > (1 + CLOSING) * total_ms:
            return cls(total_ms, None, f"stages take {inside:.4g} ms of a total of {total_ms:.4g} ms")
        times = {stage: max(0.0, ms[stage]) for stage in STAGES if stage in ms}
        times["other"] = max(0.0, total_ms - math.fsum(times.values()))
        return cls(total_ms, _to_sum(times, total_ms))

    @classmethod
    def mean(cls, runs: list[Shares]) -> Shares:
        """The mean share of each stage times the mean total. The first run without shares speaks for all."""
        total = math.fsum(run.total_ms for run in runs) / len(runs)
        times = dict.fromkeys(STAGES, 0.0)
        seen = {"other"}
        for run in runs:
            if run.ms is None:
                return cls(total, None, run.note)
            seen |= run.ms.keys()
            for stage, ms in run.ms.items():
                times[stage] += ms / run.total_ms
        return cls(total, _to_sum({stage: times[stage] for stage in STAGES if stage in seen}, total))

    def scaled(self, total_ms: float) -> Shares:
        """The same shares of another total, such as the headline time of the step."""
        return Shares(total_ms, None if self.ms is None else _to_sum(self.ms, total_ms), self.note)

    def plus(self, other: Shares) -> Shares:
        """The shares of two passes run one after the other, such as forward and backward."""
        total = self.total_ms + other.total_ms
        if self.ms is None or other.ms is None:
            return Shares(total, None, self.note or other.note)
        first, second = self.ms, other.ms
        both = {s: first.get(s, 0.0) + second.get(s, 0.0) for s in STAGES if s in first or s in second}
        return Shares(total, both)

    @property
    def pct(self) -> dict[str, float] | None:
        """Percent of the total, by stage."""
        if self.ms is None:
            return None
        return {stage: 100 * ms / self.total_ms for stage, ms in self.ms.items()}


def _to_sum(times: dict[str, float], total: float) -> dict[str, float]:
    factor = total / math.fsum(times.values())
    return {stage: ms * factor for stage, ms in times.items()}


_Mark = tuple[Any, str]  # a border: its stamp, and the stage that begins there


class StageRecorder:
    """Times the stages of a forward step at their borders.

    On a CPU by the host's clock; on a GPU by CUDA events, with the step queued ahead so that the borders
    hold no launch gaps. `cache="cold"` flushes before each step, outside its time.
    `queue_ahead=False` takes the gaps as part of the stages: for a step that waits for the device itself.
    """

    def __init__(
        self,
        device: str | torch.device,
        *,
        cache: str = "warm",
        queue_ahead: bool = True,
        flush: Callable[[], None] | None = None,
        api: Any = torch.cuda,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if cache not in ("cold", "warm"):
            raise MeasureError(f"cache is {cache!r}; allowed: cold, warm")
        self.device = resolve_device(device, api=api)
        self._flush = no_flush if cache == "warm" else flush or cache_flush(self.device, api=api)
        self._queue_ahead = queue_ahead
        self._api = api
        self._clock = clock
        self._marks: list[_Mark] | None = None
        self._open: list[str] = []
        self._thread = 0

    def factory(self, name: str) -> AbstractContextManager[None]:
        """The context of one stage. Inside another one it interrupts it; outside `run` it does nothing."""
        if name not in STAGES:
            raise MeasureError(f"stage is {name!r}; allowed: {', '.join(STAGES)}")
        if self._marks is None or threading.get_ident() != self._thread:
            return nullcontext()
        return _Stage(self, name)

    def run(self, step: Callable[[], object], hook: Hook, n: int = 5) -> Shares:
        """Mean shares over `n` runs of `step` under `hook`, after one that does not count."""
        if n < 1:
            raise MeasureError(f"n is {n}; it must be at least 1")
        self._thread = threading.get_ident()
        on_gpu = self.device.type == "cuda"
        with hook(self.factory), self._api.device(self.device) if on_gpu else nullcontext():
            step()
            return self._on_gpu(step, n) if on_gpu else Shares.mean([self._on_host(step) for _ in range(n)])

    def _on_host(self, step: Callable[[], object]) -> Shares:
        marks: list[_Mark] = []
        self._flush()
        began = self._clock()
        self._record(step, marks)
        total_ms = (self._clock() - began) * 1e3
        return _between(marks, total_ms, lambda stamp: (stamp - began) * 1e3)

    def _on_gpu(self, step: Callable[[], object], n: int) -> Shares:
        ahead = QueueAhead(before=self._flush, api=self._api, clock=self._clock)
        if self._queue_ahead:
            ahead.calibrate(partial(self._record, step, []))
        runs = []
        gated = 0
        for _ in range(n):
            marks: list[_Mark] = []
            span = ahead.measure(partial(self._record, step, marks))
            gated += span.gated
            self._api.synchronize()  # a border on another stream may be behind the span's end
            runs.append(_between(marks, span.ms, span.start.elapsed_time))
        shares = Shares.mean(runs)
        if gated and self._queue_ahead:
            note = f"the device waited for the host in {gated} of {n} runs: borders would hold launch gaps"
            return Shares(shares.total_ms, None, note)
        return shares

    def _record(self, step: Callable[[], object], marks: list[_Mark]) -> None:
        self._marks = marks
        try:
            step()
        finally:
            self._marks = None
            self._open.clear()

    def _enter(self, name: str) -> None:
        self._open.append(name)
        self._border()

    def _leave(self) -> None:
        if self._open:
            self._open.pop()
        self._border()

    def _border(self) -> None:
        if self._marks is None:
            return
        if self.device.type == "cpu":
            stamp: Any = self._clock()
        else:
            stamp = self._api.Event(enable_timing=True)
            stamp.record()
        self._marks.append((stamp, self._open[-1] if self._open else "other"))


class _Stage(AbstractContextManager[None]):
    # A class, not a generator: its cost falls into the measured step.
    __slots__ = ("_name", "_recorder")

    def __init__(self, recorder: StageRecorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def __enter__(self) -> None:
        self._recorder._enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._recorder._leave()


def _between(marks: list[_Mark], total_ms: float, since_start: Callable[[Any], float]) -> Shares:
    times: dict[str, float] = {}
    at = [float(since_start(stamp)) for stamp, _ in marks] + [total_ms]
    for (_, stage), (began, ended) in zip(marks, pairwise(at), strict=True):
        if ended < began - CLOSING * total_ms:
            return Shares(total_ms, None, f"the end of {stage!r} comes before its start: not on one stream")
        if stage != "other":
            times[stage] = times.get(stage, 0.0) + ended - began
    return Shares.closing(total_ms, times)
