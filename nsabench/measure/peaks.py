"""What a device can do at most, measured: the rates that a result is held against.

A rate is the best of several tries, since a limit is what the device can do, not what it does on average.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch

from nsabench.measure.device import MeasureError, cache_bytes, resolve_device
from nsabench.measure.timers import CpuTimer, EventTimer, GraphTimer, HostTimer, Timer

TOLERANCE = 1.05
"""A result this much above a measured limit cannot be true."""

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_TRIES = 10
_TRY_S = 2.0  # a rate is settled after this long, however few tries that were
_LONG_S = 0.05  # a product that takes this long is large enough
_COPY_CACHES = 8  # a copied tensor is at least this many times the last-level cache
_COPY_LEAST, _COPY_MOST = 64 * 2**20, 2**30
_MATRIX_FROM, _MATRIX_TO = 256, {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Peaks:
    """Measured limits of one device.

    ``copy_gbps``: bytes read and written by a large copy, 1e9 bytes/s. ``matmul_tflops``: by dtype, 1e12
    FLOP/s, a multiply-add being two. ``cache_bytes``: of the last-level cache. ``clock_us``: step of the
    host's clock. ``launch_us, event_us, graph_us``: host time of one launch, least time between two events,
    time of an empty captured step; None on a CPU. ``threads``: of torch, on a CPU. ``read_gbps``: bytes that
    a kernel which only reads can take in, on a GPU; None where it was not measured.
    """

    device: str
    copy_gbps: float
    matmul_tflops: dict[str, float]
    cache_bytes: int
    clock_us: float
    launch_us: float | None
    event_us: float | None
    graph_us: float | None
    threads: int | None
    read_gbps: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a file; `from_dict` takes it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Peaks:
        """Peaks as stored; MeasureError where a field is unknown or missing."""
        try:
            return cls(**stored)
        except TypeError as error:
            raise MeasureError(f"peaks are damaged: {error}; calibrate again") from None

    def rate(self, dtype: str) -> float | None:
        """TFLOP/s that inputs of ``dtype`` may reach, in fp32 where that is faster; None if not measured."""
        usable = (dtype, "fp32") if dtype in ("fp16", "bf16") else (dtype,)
        return max((self.matmul_tflops[name] for name in usable if name in self.matmul_tflops), default=None)

    def limit_ms(self, flops: float, moved_bytes: float, dtype: str, *, cold: bool) -> float | None:
        """Least time for this much work; None for a dtype without a measured rate.

        What fits into the last-level cache moves at an unknown rate unless it is ``cold``; only its FLOPs
        count.
        """
        rate = self.rate(dtype)
        if rate is None:
            return None
        compute = flops / (rate * 1e9)
        memory = moved_bytes / (self.copy_gbps * 1e6) if self._from_memory(moved_bytes, cold) else 0.0
        return max(compute, memory)

    def impossible(
        self, ms: float, flops: float, moved_bytes: float, dtype: str, *, cold: bool
    ) -> str | None:
        """Why a time of ``ms`` for this much work cannot be true, or None."""
        tflops, gbps = flops / ms * 1e-9, moved_bytes / ms * 1e-6
        rate = self.rate(dtype)
        if rate is not None and tflops > TOLERANCE * rate:
            return f"impossible: {tflops:.3g} TFLOP/s, this device was measured at {rate:.3g} in {dtype}"
        if self._from_memory(moved_bytes, cold) and gbps > TOLERANCE * self.copy_gbps:
            return f"impossible: {gbps:.3g} GB/s, this device was measured at {self.copy_gbps:.3g}"
        return None

    def _from_memory(self, moved_bytes: float, cold: bool) -> bool:
        return cold or moved_bytes > _COPY_CACHES * self.cache_bytes


def calibrate(
    device: str | torch.device, *, tell: Callable[[str], None] = lambda text: None, api: Any = torch.cuda
) -> Peaks:
    """Measure the limits of ``cpu`` or ``cuda[:N]``, in seconds to a minute. ``tell`` hears what is measured.

    MeasureError where the device is not there, or its memory does not hold the copy.
    """
    where = resolve_device(device, api=api)
    cache = cache_bytes(where, api=api)
    timer = _timer_for(where, api)
    size = max(_COPY_LEAST, min(_COPY_MOST, _COPY_CACHES * cache))
    copy_gbps, read_gbps = _bandwidths(where, size, timer, tell)
    rates = {}
    for name in DTYPES:
        tell(f"matrix rate in {name}")
        rates[name] = _matrix_rate(where, name, timer)
    launch, event, graph = (None, None, None) if where.type == "cpu" else _overheads_us(where, api)
    return Peaks(
        device=str(where),
        copy_gbps=copy_gbps,
        matmul_tflops=rates,
        cache_bytes=cache,
        clock_us=clock_resolution_us(),
        launch_us=launch,
        event_us=event,
        graph_us=graph,
        threads=torch.get_num_threads() if where.type == "cpu" else None,
        read_gbps=read_gbps,
    )


def clock_resolution_us(clock: Callable[[], float] = time.perf_counter, reads: int = 1000) -> float:
    """Least step of the host's clock that can be seen, in microseconds; inf where it never moves."""
    best, before = math.inf, clock()
    for _ in range(reads):
        now = clock()
        if now > before:
            best = min(best, now - before)
        before = now
    return best * 1e6


def _timer_for(device: torch.device, api: Any) -> Timer:
    return CpuTimer() if device.type == "cpu" else EventTimer(device, api=api)


def _best_s(timer: Timer, step: Callable[[], object]) -> float:
    """Seconds of the fastest of several tries of a step that takes long beside the timer."""
    timer.prepare(step)
    best, spent = math.inf, 0.0
    for _ in range(_TRIES):
        taken = timer.sample(1) * 1e-3
        best, spent = min(best, taken), spent + taken
        if spent > _TRY_S:
            break
    return best


def _copy_gbps(device: torch.device, size: int, timer: Timer) -> float:
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best_s(timer, lambda: target.copy_(source)) * 1e-9


def _bandwidths(
    device: torch.device, size: int, timer: Timer, tell: Callable[[str], None]
) -> tuple[float, float | None]:
    """GB/s of a copy, on a GPU by torch or by this project's kernel, whichever is faster; and of reading."""
    tell("copy bandwidth")
    copied = _copy_gbps(device, size, timer)
    if device.type == "cpu":
        return copied, None
    if find_spec("triton") is None:
        tell("no read bandwidth: Triton is not installed")
        return copied, None
    # Imported late: Triton need not be there to measure anything else.
    from nsabench.measure.probe_kernels import copy, read_sum

    tell("read bandwidth")
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target, total = torch.ones_like(source), torch.zeros(1, dtype=torch.int32, device=device)
    own = 2 * size / _best_s(timer, lambda: copy(source, target)) * 1e-9
    return max(copied, own), size / _best_s(timer, lambda: read_sum(source, total)) * 1e-9


def _matrix_rate(device: torch.device, dtype: str, timer: Timer) -> float:
    """TFLOP/s of square products, the best of growing sizes: not every dtype has a fast product."""
    size, best = _MATRIX_FROM, 0.0
    while True:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
        taken = _best_s(timer, lambda a=a, b=b: a @ b)  # type: ignore[misc]
        best = max(best, 2 * size**3 / taken * 1e-12)
        if taken > _LONG_S or size >= _MATRIX_TO[device.type]:
            return best
        size *= 2


def _overheads_us(device: torch.device, api: Any) -> tuple[float, float, float]:
    """Host time of a launch, least time between two events, time of one tiny captured kernel."""
    tiny = torch.zeros(1, device=device)

    def launch() -> torch.Tensor:
        return tiny.add_(1)

    host = HostTimer(device, regime="sustained", api=api)
    host.prepare(launch)
    launch_us = min(host.sample(1000) for _ in range(_TRIES)) * 1e3
    nothing = EventTimer(device, api=api)
    nothing.prepare(lambda: None)
    event_us = min(nothing.sample(10) for _ in range(_TRIES)) * 1e3
    graph = GraphTimer(device, api=api)
    graph.prepare(launch)
    graph_us = min(graph.sample(10) for _ in range(_TRIES)) * 1e3
    return launch_us, event_us, graph_us
