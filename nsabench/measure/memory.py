"""Peak memory of a call: what torch's allocators handed out above what was held at entry, and where."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from nsabench.measure.device import resolve_device
from nsabench.measure.profiling import profile, recorded
from nsabench.measure.stages import Hook

_STAGE = "nsa::"
_NODE = "autograd::engine::evaluate_function"
BACKWARD, OTHER = "backward", "other"


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the moment of most memory in use."""

    alloc_bytes: int
    """Held by tensors above what was held at entry, C++ temporaries included."""
    reserved_bytes: int | None
    """The CUDA allocator's whole pool at its largest, what was there before included; None on a CPU."""
    stage: str = ""
    """The stage of that moment, `backward` (on a CPU; on a GPU it is `other`) or `other`; empty without a
    hook.
    """


def peak_memory(
    fn: Callable[[], object], device: str | torch.device, *, hook: Hook | None = None, api: Any = torch.cuda
) -> PeakMemory:
    """Run `fn` once and return its peak. Call `fn` once before: first calls fill caches and workspaces.

    `hook` shows the stages of `fn`. On a CPU every allocation of torch's CPU allocator counts, to the byte;
    scratch memory that a library takes from the system by itself is not seen, and freeing a tensor made
    before gives nothing back.
    """
    where = resolve_device(device, api=api)
    gc.collect()
    if where.type == "cuda":
        with api.device(where):
            return _peak_on_gpu(fn, hook, api)
    with hook(_stage_range) if hook else nullcontext(), profile(memory=True) as profiler:
        fn()
    allocations, stages = read_allocations(profiler)
    peak, at = peak_of(allocations)
    return PeakMemory(peak, None, stage_at(at, stages) if hook else "")


def peak_of(events: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """Largest sum of live bytes over events `(time, address, size)`, and when it was first reached.

    A negative size frees its address; freeing one that was not allocated in these events counts for nothing.
    """
    live: dict[int, int] = {}
    held = peak = at = 0
    for time, address, size in sorted(events, key=lambda event: event[0]):
        if size < 0:
            held -= live.pop(address, 0)
            continue
        # An address that comes again without its release: that release was not seen.
        held += size - live.get(address, 0)
        live[address] = size
        if held > peak:
            peak, at = held, time
    return peak, at


def available_bytes(device: str | torch.device, *, root: Path = Path("/"), api: Any = torch.cuda) -> int:
    """Memory that may still be taken: the machine's, or the control group's where that allows less; for a GPU
    what its driver says is free.
    """
    where = resolve_device(device, api=api)
    if where.type == "cuda":
        return int(api.mem_get_info(where)[0])
    free = int(psutil.virtual_memory().available)
    return min([free, *_group_leaves(root)])


def _group_leaves(root: Path) -> Iterator[int]:
    """What each version of control groups leaves to this process; nothing where there is no limit."""
    group = root / "sys/fs/cgroup"
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, taken = (group / limit).read_text(), int((group / used).read_text())
            lines = (group / stat).read_text().splitlines()
        except (OSError, ValueError):
            continue
        if most.strip().isdigit():
            # Pages of files that nobody has used of late are given back when memory is asked for.
            idle = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
            yield max(0, int(most) - taken + idle)


def _peak_on_gpu(fn: Callable[[], object], hook: Hook | None, api: Any) -> PeakMemory:
    api.synchronize()
    api.empty_cache()
    api.reset_peak_memory_stats()
    held = api.memory_allocated()
    stages = _StagePeaks(api)
    with hook(stages.factory) if hook else nullcontext():
        fn()
    api.synchronize()
    found = stages.close()
    return replace(found, alloc_bytes=found.alloc_bytes - held, stage=found.stage if hook else "")


class _StagePeaks:
    """The allocator's peak in each stage: it hands out memory in the host's time, not the device's."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._stage = OTHER
        self._found: list[PeakMemory] = []

    @contextmanager
    def factory(self, name: str) -> Iterator[None]:
        outer = self._stage
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        api = self._api
        peak = PeakMemory(api.max_memory_allocated(), api.max_memory_reserved(), self._stage)
        self._found.append(peak)
        self._stage = name
        api.reset_peak_memory_stats()

    def close(self) -> PeakMemory:
        self._enter(OTHER)
        most = max(self._found, key=lambda peak: peak.alloc_bytes)
        return replace(most, reserved_bytes=max(peak.reserved_bytes or 0 for peak in self._found))


def _stage_range(name: str) -> AbstractContextManager[object]:
    return torch.profiler.record_function(_STAGE + name)


_Range = tuple[int, int, str]


def read_allocations(
    profiler: torch.profiler.profile,
) -> tuple[list[tuple[int, int, int]], list[_Range]]:
    """Allocations on the CPU, (time in ns, address, bytes), negative where they end; and the ranges of stages
    and of backward nodes, (start, end, name).
    """
    allocations: list[tuple[int, int, int]] = []
    ranges: list[_Range] = []
    waiting = list(recorded(profiler).experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag.name == "Allocation":
            fields: Any = event.extra_fields
            if fields.device.type == "cpu":
                allocations.append((int(event.start_time_ns), int(fields.ptr), int(fields.alloc_size)))
        elif event.name.startswith((_STAGE, _NODE)):
            name = event.name.removeprefix(_STAGE) if event.name.startswith(_STAGE) else BACKWARD
            ranges.append((int(event.start_time_ns), int(event.end_time_ns), name))
    return allocations, ranges


def stage_at(time: int, ranges: Iterable[_Range]) -> str:
    """The innermost range around a moment."""
    around = [(start, name) for start, end, name in ranges if start <= time <= end]
    return max(around)[1] if around else OTHER
