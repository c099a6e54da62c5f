"""Timers: how long one step takes, by the host's clock, by CUDA events, or by replays of a CUDA graph."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from nsabench.measure.device import MeasureError, QueueAhead, cache_flush, no_flush, resolve_device

Step = Callable[[], object]

_WARM_UP_STEPS = 3
_WARM_UP_S = 1.0


class CaptureError(MeasureError):
    """A step that cannot be captured in a CUDA graph."""


class Timer(Protocol):
    """Times one step. One timer an arm: several may be prepared at once and sampled in turn."""

    name: str
    """`cpu`, `host`, `event`, `graph` or `kineto`."""
    cache: str
    """`cold` or `warm`."""
    regime: str
    """`latency`: every step timed by itself; `sustained`: the steps of a sample back to back."""
    warmup_ms: float
    """Host time of `prepare`: compilation, first calls, capture, calibration."""
    output: object
    """What the last step returned; for `graph` the captured result of the first copy, which every replay
    rewrites.
    """
    steps: int
    """Steps in all samples so far."""
    gated_steps: int
    """Of these, steps whose device time holds host time, because the host was late; 0 by a host clock."""

    def prepare(self, step: Step) -> None:
        """Warm up `step` (and capture it). It must do the same work at every call."""

    def sample(self, iters: int) -> float:
        """Milliseconds a step, mean over `iters` steps."""


class CpuTimer:
    """The host's clock around a step that runs on the CPU. `cold`: the cache is flushed before each step."""

    name = "cpu"

    def __init__(
        self,
        *,
        cache: str = "warm",
        regime: str = "latency",
        flush: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_setting(cache, regime)
        self.cache = cache
        self.regime = regime
        self.warmup_ms = 0.0
        self.output: object = None
        self.steps = self.gated_steps = 0
        self._flush = flush_for(cache, torch.device("cpu"), flush)
        self._clock = clock
        self._wait: Callable[[], None] = no_flush
        self._step: Step | None = None

    def prepare(self, step: Step) -> None:
        self.output = None
        began = self._clock()
        self.output = warm_up(step, self._clock, self._wait)
        self.warmup_ms = (self._clock() - began) * 1e3
        self._step = step

    def use(self, step: Step) -> None:
        """Time this one from now on: it does what the prepared one did, and is as warm."""
        self._step = step

    def sample(self, iters: int) -> float:
        step = ready(self._step, iters)
        batches = (iters, 1) if self.regime == "latency" else (1, iters)
        total = 0.0
        with _collector_off():
            for _ in range(batches[0]):
                self._flush()
                self._wait()
                self.output = None
                began = self._clock()
                for _ in range(batches[1]):
                    self.output = step()
                self._wait()
                total += self._clock() - began
        self.steps += iters
        return total * 1e3 / iters


class HostTimer(CpuTimer):
    """The host's clock around a step on a GPU and the wait for its end: launches, gaps and all."""

    name = "host"

    def __init__(
        self,
        device: str | torch.device = "cuda",
        *,
        cache: str = "warm",
        regime: str = "latency",
        flush: Callable[[], None] | None = None,
        api: Any = torch.cuda,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        where = gpu_of(device, self.name, api)
        super().__init__(cache=cache, regime=regime, flush=flush_for(cache, where, flush, api), clock=clock)
        self._wait = lambda: api.synchronize(where)


class EventTimer:
    """CUDA events around a step, with the whole step queued before the device reaches it.

    The host being late, for a step longer to launch than to run or one that waits for the device itself,
    is counted in `gated_steps`, never hidden. `cold`: L2 is flushed before each step, outside the events.
    """

    name = "event"

    def __init__(
        self,
        device: str | torch.device = "cuda",
        *,
        cache: str = "warm",
        regime: str = "latency",
        flush: Callable[[], None] | None = None,
        api: Any = torch.cuda,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_setting(cache, regime)
        self.device = gpu_of(device, self.name, api)
        self.cache = cache
        self.regime = regime
        self.warmup_ms = 0.0
        self.output: object = None
        self.steps = self.gated_steps = 0
        self._api = api
        self._clock = clock
        self._ahead = QueueAhead(before=flush_for(cache, self.device, flush, api), api=api, clock=clock)
        self._enqueue: Step | None = None
        self._at_once = 1  # steps that are queued by one call

    def prepare(self, step: Step) -> None:
        self.output = self._enqueue = None
        began = self._clock()
        with self._api.device(self.device):
            enqueue = self._make_enqueue(step)
            self._ahead.calibrate(enqueue)
        self.warmup_ms = (self._clock() - began) * 1e3
        self._enqueue = enqueue

    def sample(self, iters: int) -> float:
        enqueue = ready(self._enqueue, iters)
        calls = -(-iters // self._at_once)
        spans, calls_each = (calls, 1) if self.regime == "latency" else (1, calls)
        total = 0.0
        with self._api.device(self.device):
            for _ in range(spans):
                span = self._ahead.measure(enqueue, calls_each)
                total += span.ms
                self.gated_steps += span.gated * self._at_once
        self.steps += calls * self._at_once
        return total / (calls * self._at_once)

    def _make_enqueue(self, step: Step) -> Step:
        warm_up(step, self._clock, self._api.synchronize)

        def enqueue() -> None:
            self.output = None
            self.output = step()

        return enqueue


class GraphTimer(EventTimer):
    """As `EventTimer`, around replays of one step captured in a CUDA graph: no launch cost of its kernels.

    `prepare` raises CaptureError for a step that a graph cannot hold (it waits for the device, copies to
    the host, allocates outside torch). The step's Python code does not run again after that.

    Of a step shorter than a few replays cost, `prepare(step, *copies)` puts several into one graph, one after
    the other: a step's time is that of the graph over their number, and `sample` takes whole graphs.
    """

    name = "graph"

    def prepare(self, step: Step, *copies: Step) -> None:
        self._copies, self._at_once = copies, 1 + len(copies)
        self.outputs: tuple[object, ...] = ()
        """What each of the steps in the graph returned."""
        super().prepare(step)

    def captured(self, step: Step) -> Step:
        """What replays ``step`` alone, captured now, for who times it otherwise."""
        self._copies = ()
        with self._api.device(self.device):
            return self._make_enqueue(step)

    def _make_enqueue(self, step: Step) -> Step:
        api = self._api
        steps = (step, *self._copies)
        side = api.Stream()
        side.wait_stream(api.current_stream())
        with api.stream(side):
            warm_up(step, self._clock, api.synchronize)
            for copy in dict.fromkeys(self._copies):
                copy()
        api.current_stream().wait_stream(side)
        graph = api.CUDAGraph()
        failure: Exception | None = None
        try:
            with api.graph(graph):
                try:
                    self.outputs = tuple(one() for one in steps)
                except Exception as error:
                    failure = error  # leaving the capture fails as well then, and hides why
                    raise
        except Exception as error:
            failure = failure or error
            if isinstance(failure, torch.OutOfMemoryError) or not isinstance(failure, RuntimeError):
                raise failure from None
            raise CaptureError(f"a CUDA graph cannot hold the step: {_first_line(failure)}") from failure
        self.output = self.outputs[0]
        replay: Step = graph.replay
        return replay


def check_setting(cache: str, regime: str) -> None:
    """MeasureError for a cache state or a regime that is none, and for two that exclude each other."""
    if cache not in ("cold", "warm"):
        raise MeasureError(f"cache is {cache!r}; allowed: cold, warm")
    if regime not in ("latency", "sustained"):
        raise MeasureError(f"regime is {regime!r}; allowed: latency, sustained")
    if cache == "cold" and regime == "sustained":
        raise MeasureError(
            "cache is 'cold' and regime is 'sustained': back to back, a step finds its own data"
        )


def gpu_of(device: str | torch.device, timer: str, api: Any) -> torch.device:
    """The GPU a timer is for; MeasureError where `device` is none."""
    where = resolve_device(device, api=api)
    if where.type != "cuda":
        raise MeasureError(f"timer is {timer!r}, but device is {str(device)!r}; allowed: cuda, cuda:N")
    return where


def flush_for(
    cache: str, device: torch.device, flush: Callable[[], None] | None, api: Any = torch.cuda
) -> Callable[[], None]:
    """What empties the cache before a step: nothing for `warm`."""
    if cache != "cold":
        return no_flush
    return flush or cache_flush(device, api=api)


def ready(step: Step | None, iters: int) -> Step:
    """The prepared step; MeasureError where there is none, or no steps are asked for."""
    if iters < 1:
        raise MeasureError(f"iters is {iters}; it must be at least 1")
    if step is None:
        raise MeasureError("sample() before prepare()")
    return step


def warm_up(step: Step, clock: Callable[[], float], wait: Callable[[], object]) -> object:
    """Run the step three times, or fewer once a second has passed."""
    began = clock()
    for _ in range(_WARM_UP_STEPS):
        output = step()
        wait()
        if clock() - began >= _WARM_UP_S:
            break
    return output


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
