"""What every meter asks of a device: which one it is, its cache, and a queue the host stays ahead of."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

FLUSH_FACTOR = 2
"""A flush writes this many times the size of the cache."""

UNKNOWN_CACHE_BYTES = 64 * 2**20
"""What a CPU's last-level cache is taken for where the system does not say."""

_LEAD = 2.0  # the device is kept busy this many times as long as the host needs to queue a step
_LEAD_TRIES = 3  # each twice as long as the one before
_LEAD_LIMIT_MS = 100.0
_PROBE_CYCLES = 1_000_000


class MeasureError(ValueError):
    """A measurement that was asked for and cannot be made. One line."""


def resolve_device(device: str | torch.device, *, api: Any = torch.cuda) -> torch.device:
    """The torch device named `cpu`, `cuda` or `cuda:N`, with its index filled in; it must exist.

    `api` is `torch.cuda` or something that answers like it.
    """
    text = str(device)
    kind, colon, number = text.partition(":")
    if text == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise MeasureError(f"device is {text!r}; allowed: cpu, cuda, cuda:N")
    if not api.is_available():
        raise MeasureError(f"device is {text!r}, but torch sees no CUDA device here")
    index = int(number) if colon else int(api.current_device())
    if index >= api.device_count():
        raise MeasureError(f"device is {text!r}, but torch sees {api.device_count()} CUDA device(s)")
    return torch.device("cuda", index)


def gpu_uuid(device: torch.device, *, api: Any = torch.cuda) -> str:
    """The GPU's UUID as NVML writes it: `GPU-` and 36 characters (`MIG-` for a slice)."""
    uuid = str(api.get_device_properties(device).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def gpus_alike(*, api: Any = torch.cuda) -> list[str]:
    """UUIDs of the GPUs that torch sees and that are of the default one's model and memory, it first.

    MeasureError without a GPU.
    """
    default = resolve_device("cuda", api=api).index
    numbers = sorted(range(api.device_count()), key=lambda number: number != default)
    seen = {number: api.get_device_properties(torch.device("cuda", number)) for number in numbers}
    kind = {number: (properties.name, properties.total_memory) for number, properties in seen.items()}
    return [gpu_uuid(torch.device("cuda", n), api=api) for n in numbers if kind[n] == kind[default]]


def cache_bytes(device: torch.device, *, api: Any = torch.cuda) -> int:
    """Bytes of the cache between a device and its memory: L2 of a GPU, the last level of a CPU."""
    if device.type == "cuda":
        return int(api.get_device_properties(device).L2_cache_size)
    return last_level_cache_bytes()


def last_level_cache_bytes(
    root: Path = Path("/sys/devices/system/cpu"), cpus: Iterable[int] | None = None
) -> int:
    """Bytes of last-level cache that this process can reach, each shared cache once.

    `cpus` defaults to the process's affinity. `UNKNOWN_CACHE_BYTES` where the system does not say.
    """
    if cpus is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    sizes: dict[tuple[int, str], int] = {}
    for cpu in cpus:
        for index in (root / f"cpu{cpu}" / "cache").glob("index*"):
            try:
                if (index / "type").read_text().strip() == "Instruction":
                    continue
                level = int((index / "level").read_text())
                sharers = (index / "shared_cpu_list").read_text().strip()
                sizes[level, sharers] = _parse_size((index / "size").read_text().strip())
            except (OSError, ValueError):
                continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or UNKNOWN_CACHE_BYTES


def _parse_size(text: str) -> int:
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:])
    return int(text[:-1]) * unit if unit else int(text)


def cache_flush(device: torch.device, *, api: Any = torch.cuda) -> Callable[[], None]:
    """A call that evicts the device's cache by rewriting `FLUSH_FACTOR` times its size of memory."""
    buffer = _flush_buffer(device, FLUSH_FACTOR * cache_bytes(device, api=api))

    def flush() -> None:
        # Not zero_(): a memset may bypass the cache, a read-modify-write cannot.
        buffer.add_(1)

    return flush


_buffers: WeakValueDictionary[tuple[str, int], torch.Tensor] = WeakValueDictionary()


def _flush_buffer(device: torch.device, size: int) -> torch.Tensor:
    """One for all flushes of a device: each timer of a group has its own, a buffer is twice the cache."""
    buffer = _buffers.get((str(device), size))
    if buffer is None:
        buffer = torch.zeros(size, dtype=torch.int8, device=device)
        _buffers[str(device), size] = buffer
    return buffer


def no_flush() -> None:
    """Leave the cache as it is."""


@dataclass(frozen=True)
class Span:
    """Two events on the device around what was queued, both complete."""

    start: Any
    end: Any
    gated: int
    """Steps that the device reached before the host had queued all of them: their time holds host time."""

    @property
    def ms(self) -> float:
        return float(self.start.elapsed_time(self.end))


class QueueAhead:
    """Times queued steps by CUDA events while a spin kernel keeps the host ahead of the device.

    `before` runs ahead of the first event, outside the time. Call everything with the device current.
    """

    def __init__(
        self,
        *,
        before: Callable[[], None] = no_flush,
        api: Any = torch.cuda,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._before = before
        self._api = api
        self._clock = clock
        self.cycles = 0
        """Length of the spin for one step in device clock cycles; 0 when nothing is queued ahead."""
        self._most_cycles = 0

    def calibrate(self, enqueue: Callable[[], object]) -> bool:
        """Set the spin from what the host needs to queue one step, and try it.

        False, and no spin, if the host cannot stay ahead: the step waits for the device, or is too long.
        """
        host_ms = min(self._host_ms(enqueue) for _ in range(2))
        rate = self._cycles_per_ms()
        self._most_cycles = int(rate * _LEAD_LIMIT_MS)
        for attempt in range(_LEAD_TRIES):
            self.cycles = max(1, int(rate * min(host_ms * _LEAD * 2**attempt, _LEAD_LIMIT_MS)))
            if not self.measure(enqueue).gated:
                return True
        self.cycles = 0
        return False

    def measure(self, enqueue: Callable[[], object], steps: int = 1) -> Span:
        """Queue `steps` steps back to back between two events, wait for them and return the span.

        A step counts as gated unless its first event is still pending once all of it is queued: only then
        did the spin, or the step before, outlast the queueing.
        """
        marks = [self._api.Event(enable_timing=True) for _ in range(steps + 1)]
        if self.cycles:
            self._api._sleep(max(self.cycles, min(self.cycles * steps, self._most_cycles)))
        self._before()
        marks[0].record()
        gated = 0
        for began, ended in pairwise(marks):
            enqueue()
            ended.record()
            gated += bool(began.query())
        marks[-1].synchronize()
        return Span(marks[0], marks[-1], gated)

    def _host_ms(self, enqueue: Callable[[], object]) -> float:
        self._api.synchronize()
        began = self._clock()
        self._before()
        enqueue()
        return (self._clock() - began) * 1e3

    def _cycles_per_ms(self) -> float:
        self._api.synchronize()
        for _ in range(2):  # the first launch loads the kernel
            start, end = self._api.Event(enable_timing=True), self._api.Event(enable_timing=True)
            start.record()
            self._api._sleep(_PROBE_CYCLES)
            end.record()
            end.synchronize()
        return _PROBE_CYCLES / float(start.elapsed_time(end))
