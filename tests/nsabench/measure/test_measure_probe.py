"""The proof that a flush empties the cache, on made-up readings, and once on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nsabench.measure import probe
from nsabench.measure.probe import ATTEMPTS, COLDEST, TRIES, ColdProbe, probe_cold, prove


def readings(*values: float) -> Callable[[], float]:
    """The values over and over."""
    turns = itertools.cycle(values)
    return lambda: next(turns)


@pytest.mark.parametrize(
    ("flushed_ms", "rate", "warm"),
    [(1.0, 1.0, False), (0.88, 1 / 0.88, False), (0.8, 1.25, True), (0.25, 4.0, True)],
)
def test_a_marker_faster_than_memory_was_in_the_cache(flushed_ms: float, rate: float, warm: bool) -> None:
    found = ColdProbe.of(memory_ms=1.0, flushed_ms=flushed_ms, cached_ms=0.25)
    assert found.rate == pytest.approx(rate)
    assert (found.warm, found.note) == (warm, "")


def test_a_cache_as_slow_as_memory_proves_nothing() -> None:
    found = ColdProbe.of(memory_ms=1.0, flushed_ms=1.0, cached_ms=1 / COLDEST)
    assert (found.rate, found.warm) == (None, False)
    assert found.note == "cold is not proved: a cached read takes as long as one from memory"


def test_a_pause_spoils_one_reading_and_no_proof() -> None:
    slow = [1.0] * (TRIES - 1)
    found = prove(memory=readings(9.0, *slow), flushed=readings(*slow, 7.0), cached=readings(0.2))
    assert found.rate == pytest.approx(1.0)


@pytest.mark.parametrize(("noisy", "warm"), [(ATTEMPTS - 1, False), (ATTEMPTS, True)])
def test_a_busy_machine_is_tried_again_and_a_warm_cache_found_each_time(noisy: int, warm: bool) -> None:
    asked: list[int] = []

    def memory() -> float:
        asked.append(1)
        return 2.0 if len(asked) <= noisy * TRIES else 1.0

    found = prove(memory=memory, flushed=readings(1.0), cached=readings(0.2))
    assert found.warm == warm
    assert len(asked) == TRIES * ATTEMPTS


class Memory:
    """A device that reads memory in 1 ms and the cache in 0.1 ms; `flushes`: whether a flush works."""

    def __init__(self, flushes: bool) -> None:
        self.flushes, self.cached, self.now_ms = flushes, set[int](), 0.0

    def timer(self, kind: str, device: Any, cache: str, *, flush: Any, **more: Any) -> Any:
        memory = self

        class Timer:
            def prepare(self, step: Callable[[], object]) -> None:
                self.step = step
                step()

            def sample(self, iters: int) -> float:
                flush()
                memory.now_ms = 0.0
                self.step()
                return memory.now_ms

        return Timer()

    def read(self, row: torch.Tensor) -> None:
        self.now_ms += 0.1 if row.data_ptr() in self.cached else 1.0
        self.cached.add(row.data_ptr())

    def flush(self) -> None:
        if self.flushes:
            self.cached.clear()


@pytest.mark.parametrize(("flushes", "rate"), [(True, 1.0), (False, 10.0)])
def test_what_is_read_when(monkeypatch: pytest.MonkeyPatch, flushes: bool, rate: float) -> None:
    memory = Memory(flushes)

    class Row:
        def __init__(self, row: torch.Tensor) -> None:
            self.row = row

        def sum(self) -> None:
            memory.read(self.row)

    made: list[Sequence[int]] = []

    def ones(shape: Sequence[int], device: Any) -> list[Row]:
        made.append(shape)
        return [Row(row) for row in torch.zeros(tuple(shape))]

    monkeypatch.setattr(probe, "ATTEMPTS", 1)  # this cache is endless: no row may come a second time
    monkeypatch.setattr(probe, "cache_bytes", lambda device, api: 4096)
    monkeypatch.setattr(probe, "make_timer", memory.timer)
    monkeypatch.setattr(probe.torch, "ones", ones)
    found = probe_cold("cpu", flush=memory.flush)
    assert found.rate == pytest.approx(rate)
    ((rows, columns),) = made
    assert columns * 4 == 1024, "the marker is a quarter of the cache"
    assert rows * columns * 4 == 5 * 4096, "memory is five caches"


def test_no_memory_for_a_marker_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(probe.torch, "ones", full)
    found = probe_cold("cpu", flush=lambda: None)
    assert (found.rate, found.note) == (None, "cold is not proved: no memory is left for a marker")


def test_this_machine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TRIES", 1)
    monkeypatch.setattr(probe, "ATTEMPTS", 1)
    monkeypatch.setattr(probe, "cache_bytes", lambda device, api: 2**20)
    found = probe_cold("cpu", flush=lambda: None)
    assert (found.rate is None) == bool(found.note)
