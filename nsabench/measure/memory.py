"""Peak memory of a call: what torch's allocators handed out above what was held at entry."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from nsabench.measure.device import resolve_device
from nsabench.measure.profiling import profile, recorded


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the moment of most memory in use."""

    alloc_bytes: int
    """Held by tensors above what was held at entry, C++ temporaries included."""
    reserved_bytes: int | None
    """The CUDA allocator's whole pool at its largest, what was there before included; None on a CPU."""


def peak_memory(fn: Callable[[], object], device: str | torch.device, *, api: Any = torch.cuda) -> PeakMemory:
    """Run `fn` once and return its peak. Call `fn` once before: first calls fill caches and workspaces.

    On a CPU every allocation of torch's CPU allocator counts, to the byte; scratch memory that a library
    takes from the system by itself is not seen, and freeing a tensor made before gives nothing back.
    """
    where = resolve_device(device, api=api)
    gc.collect()
    if where.type == "cpu":
        with profile(memory=True) as profiler:
            fn()
        return PeakMemory(peak_of(_allocations(profiler)), None)
    with api.device(where):
        api.synchronize()
        api.empty_cache()
        api.reset_peak_memory_stats()
        held = api.memory_allocated()
        fn()
        api.synchronize()
        return PeakMemory(api.max_memory_allocated() - held, api.max_memory_reserved())


def peak_of(events: Iterable[tuple[int, int, int]]) -> int:
    """Largest sum of live bytes over events `(time, address, size)`; a negative size frees its address.

    Freeing an address that was not allocated in these events counts for nothing.
    """
    live: dict[int, int] = {}
    held = peak = 0
    for _, address, size in sorted(events, key=lambda event: event[0]):
        if size < 0:
            held -= live.pop(address, 0)
            continue
        # An address that comes again without its release: that release was not seen.
        held += size - live.get(address, 0)
        live[address] = size
        peak = max(peak, held)
    return peak


def _allocations(profiler: torch.profiler.profile) -> list[tuple[int, int, int]]:
    found = []
    waiting = list(recorded(profiler).experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        fields: Any = event.extra_fields
        if event.tag.name == "Allocation" and fields.device.type == "cpu":
            found.append((int(event.start_time_ns), int(fields.ptr), int(fields.alloc_size)))
    return found
