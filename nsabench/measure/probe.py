"""Whether a flush empties the cache: a marker that was in it is read afterwards, beside as much memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsabench.measure.choice import make_timer
from nsabench.measure.device import cache_bytes, cache_flush, resolve_device

COLDEST = 1.15
"""A marker read at more than this many times memory's rate was still in the cache."""

MARKER_PART = 4
"""The marker is this part of the cache: it fits, whatever else is there."""

MEMORY_CACHES = 5
"""Memory is read from buffers that are this many times the cache together, each in its turn."""

TRIES = 5
"""Readings of each kind, taken in turn. The fastest counts: a pause makes one slower, never faster."""

ATTEMPTS = 5
"""A busy machine may spoil all tries of one kind; a marker that is in the cache is found there each time."""


@dataclass(frozen=True)
class ColdProbe:
    """``rate``: that of re-reading the marker after a flush over that of memory; None where ``note`` says why
    nothing can be said.
    """

    rate: float | None
    note: str = ""

    @property
    def warm(self) -> bool:
        """Whether the marker was found in the cache."""
        return self.rate is not None and self.rate > COLDEST

    @classmethod
    def of(cls, *, memory_ms: float, flushed_ms: float, cached_ms: float) -> ColdProbe:
        """From the times of reading as many bytes from memory, from the marker after a flush, and from the
        marker in the cache. Where the last is no faster than the first, the marker proves nothing.
        """
        if memory_ms <= COLDEST * cached_ms:
            return cls(None, "cold is not proved: a cached read takes as long as one from memory")
        return cls(memory_ms / flushed_ms)


def probe_cold(
    device: str | torch.device,
    *,
    flush: Callable[[], None] | None = None,
    api: Any = torch.cuda,
    clock: Callable[[], float] = time.perf_counter,
) -> ColdProbe:
    """Read a marker after a flush on ``cpu`` or ``cuda[:N]``: a second at most on a quiet machine, and five
    times the cache of memory. ``flush`` is what is put to the proof.
    """
    where = resolve_device(device, api=api)
    size = cache_bytes(where, api=api)
    try:
        flush = flush or cache_flush(where, api=api)
        shape = MEMORY_CACHES * MARKER_PART, max(1, size // MARKER_PART // 4)
        marker, *others = torch.ones(shape, device=where)
    except torch.OutOfMemoryError:
        return ColdProbe(None, "cold is not proved: no memory is left for a marker")
    turns = itertools.cycle(others)

    def cache() -> None:
        marker.sum()
        marker.sum()

    def cache_and_flush() -> None:
        cache()
        flush()

    def timed(read: Callable[[], object], before: Callable[[], None]) -> Callable[[], float]:
        kind = "cpu" if where.type == "cpu" else "event"
        timer = make_timer(kind, where, "cold", flush=before, api=api, clock=clock)
        timer.prepare(read)
        return lambda: timer.sample(1)

    # After the same flush: the read differs in nothing but where its bytes can be.
    return prove(
        memory=timed(lambda: next(turns).sum(), cache_and_flush),
        flushed=timed(marker.sum, cache_and_flush),
        cached=timed(marker.sum, cache),
    )


def prove(
    *, memory: Callable[[], float], flushed: Callable[[], float], cached: Callable[[], float]
) -> ColdProbe:
    """The first attempt that finds the marker gone, else the coldest. Each reading gives milliseconds."""
    found: list[ColdProbe] = []
    for _ in range(ATTEMPTS):
        turns = [(memory(), flushed(), cached()) for _ in range(TRIES)]
        memory_ms, flushed_ms, cached_ms = map(min, zip(*turns, strict=True))
        found.append(ColdProbe.of(memory_ms=memory_ms, flushed_ms=flushed_ms, cached_ms=cached_ms))
        if not found[-1].warm:
            break
    return min(found, key=lambda one: one.rate or 0.0)
