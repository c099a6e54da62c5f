"""The search for the longest sequence: where it ends, what it counts, and what it never does."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsabench.plan import Cell
from nsabench.run import capacity
from nsabench.run.capacity import (
    FAR_OVER,
    Capacity,
    Limits,
    Try,
    account,
    far_over,
    find_capacity,
    grain,
    memory_text,
    probe,
    search,
)
from nsabench.run.executor import Done, Event, Job, Over, Slot
from nsabench.run.gate import Refused

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]
MIB = 2**20


class Here:
    """An executor that tries in this process, and a sink that keeps what it is told."""

    slots = (Slot(0, frozenset({"cpu"})),)

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.row: dict[str, Any] = {}

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        for job in jobs:
            self.jobs.append(job)
            yield from self.answer(job)

    def answer(self, job: Job) -> Iterator[Event]:
        assert isinstance(job.policy, Limits)
        probe(job.cells, job.policy, self)
        yield Done(0, self.row)
        yield Over(0, job, ())

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: Any, *more: Any) -> None:
        self.row = dict(row)


def bounded(limit: int, need: Callable[[int], int]) -> Callable[[int], Try]:
    def attempt(S: int) -> Try:
        return Try(S, "ok" if need(S) <= limit else "oom", "" if need(S) <= limit else "full", need(S))

    return attempt


@given(border=st.integers(1, 10**6), start=st.integers(1, 10**5), aim=st.none() | st.integers(-5, 2 * 10**6))
def test_the_border_is_found_to_the_resolution(border: int, start: int, aim: int | None) -> None:
    tries: list[Try] = []
    best, failed, exact = search(bounded(border, lambda S: S), start, tries, lambda: aim)
    assert exact
    assert failed is not None
    low = best.S if best else 0
    assert low <= border < failed.S
    assert failed.S - low <= grain(low) <= max(1, low // capacity.RESOLUTION)
    lengths = [t.S for t in tries]
    assert len(set(lengths)) == len(lengths) < 60
    assert min(lengths) >= 1


def test_a_right_guess_saves_tries() -> None:
    counts = []
    for guess in (lambda: None, lambda: 700_000):
        tries: list[Try] = []
        search(bounded(700_000, lambda S: S), 512, tries, guess)
        counts.append(len(tries))
    assert counts[1] < counts[0] - 1


@pytest.mark.parametrize("status", ["timeout", "error", "unsupported", "wrong"])
def test_any_other_failure_ends_the_search(status: str) -> None:
    tries: list[Try] = []
    best, failed, exact = search(lambda S: Try(S, "ok") if S <= 1000 else Try(S, status, "no"), 100, tries)
    assert best is not None
    assert failed is not None
    assert (best.S, failed.S, exact) == (800, 1600, False)
    assert len(tries) == 5


def test_a_search_without_end_has_one() -> None:
    best, failed, exact = search(lambda S: Try(S, "ok"), 512, [])
    assert best is not None
    assert (best.S, failed, exact) == (capacity.MOST_TOKENS, None, False)


def test_what_is_hopeless_is_not_tried() -> None:
    known = [Try(1000, "ok", need_bytes=100 * MIB), Try(2000, "ok", need_bytes=190 * MIB)]
    assert far_over(known[:1], 4000, 1) is None
    assert far_over(known, 4000, int(370 * MIB / FAR_OVER) + 1) is None
    hopeless = far_over(known, 4000, int(370 * MIB / FAR_OVER) - 1)
    assert hopeless is not None
    assert (hopeless.S, hopeless.status, hopeless.need_bytes) == (4000, "oom", None)
    assert hopeless.reason.startswith(
        "not tried: would need about 370.0 MiB, by what shorter ones need; 296.0"
    )
    longer = Try(8000, "oom", need_bytes=1)
    assert far_over([*known, longer], 4000, 1) is not None


def test_what_holds_the_memory_adds_up_to_the_peak() -> None:
    held = {"weights": 10, "inputs": 0, "cache sel": 30}
    found = account(held, 35, 60, "win", 100)
    assert found["need_bytes"] == sum(found["parts"].values()) == 100
    assert found["parts"] == {"weights": 10, "cache sel": 30, "temporaries": 60}
    assert found["peak_stage"] == "win"
    assert account(held, 101, 60, "win", 101) == {
        "need_bytes": 101,
        "parts": {"weights": 10, "cache sel": 30, "building": 61},
        "peak_stage": "building",
    }
    with pytest.raises(Refused, match=r"^needs 100 bytes, most in win; 99 bytes may be used$"):
        account(held, 35, 60, "win", 99)


@pytest.mark.parametrize(
    ("what", "cached"),
    [
        ({"phase": "decode"}, ["cache cmp", "cache sel", "cache win"]),
        ({"phase": "decode", "impl": "dense"}, ["cache kv"]),
        ({}, ["cache cmp", "cache sel", "cache win"]),
        ({"impl": "dense"}, ["cache kv"]),
        ({"passes": "fwd_bwd"}, []),
        ({"passes": "bwd", "impl": "dense"}, []),
    ],
    ids=str,
)
def test_a_try_says_what_a_length_needs(make_cell: MakeCell, what: dict[str, Any], cached: list[str]) -> None:
    here, S = Here(), 300
    cell = make_cell(S=S, dim=32, **what)
    list(here.run(iter([Job((cell,), Limits(memory_bytes=64 * MIB), 0)])))
    row = here.row
    assert (row["status"], row["reason"]) == ("ok", "")
    assert row["need_bytes"] == sum(row["parts"].values())
    assert {name for name in row["parts"] if name.startswith("cache")} == set(cached)
    assert row["parts"]["weights"] > 0
    assert ("inputs" in row["parts"]) == (cell.phase != "decode")
    need = row["need_bytes"]
    for limit, status in ((need, "ok"), (need - 1, "oom")):
        list(here.run(iter([Job((cell,), Limits(memory_bytes=limit), 0)])))
        # A second build finds tables and workspaces that the first one made.
        assert here.row["status"] in ("ok", status)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (RuntimeError("std::bad_alloc"), "oom"),
        (RuntimeError("index too large"), "error"),
    ],
)
def test_what_stops_a_try_is_its_status(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def fail(cell: Cell) -> None:
        raise error

    monkeypatch.setattr(capacity, "workload_for", fail)
    here = Here()
    list(here.run(iter([Job((make_cell(),), Limits(memory_bytes=MIB), 0)])))
    assert here.row["status"] == status
    assert here.row["reason"].startswith(f"{type(error).__name__}: ")
    assert "\n" not in here.row["reason"]


def test_the_allocator_refuses_what_goes_far_beyond(make_cell: MakeCell) -> None:
    pytest.importorskip("resource")
    taken: list[torch.Tensor] = []
    with (
        pytest.raises(RuntimeError, match="can't allocate memory"),
        capacity._bounded("cpu", 64 * MIB),
    ):
        taken.append(torch.empty(2**31, dtype=torch.uint8))
    taken.append(torch.empty(2**31, dtype=torch.uint8))  # afterwards nothing is refused


def found(make_cell: MakeCell, here: Here, *, limit: int | None = 4 * MIB, **what: Any) -> Capacity:
    return find_capacity(make_cell(**what), here, limit_bytes=limit, timeout_s=60)


@pytest.mark.parametrize("impl", ["nsa", "dense"])
def test_a_capacity_lies_between_what_fits_and_what_does_not(make_cell: MakeCell, impl: str) -> None:
    here = Here()
    capacity = found(make_cell, here, impl=impl, S=256, dim=32)
    assert capacity.exact
    assert capacity.best is not None
    assert capacity.failed is not None
    assert capacity.best.need_bytes is not None
    assert capacity.best.need_bytes <= 4 * MIB
    assert capacity.best.S > 256
    assert capacity.failed.status == "oom"
    assert capacity.resolution == capacity.failed.S - capacity.best.S
    assert capacity.limit_bytes == 4 * MIB
    policies = [job.policy for job in here.jobs]
    assert [p.check for p in policies if isinstance(p, Limits)] == [True] + [False] * (len(policies) - 1)
    assert {p.timeout_s for p in policies} == {60}


def test_a_wrong_arm_has_no_capacity(make_cell: MakeCell, plant: Plant) -> None:
    def wrong(true: Any, *given: Any, **more: Any) -> Any:
        out, lse = true(*given, **more)
        return out * 1.5, lse

    here = Here()
    with plant("backends.sdpa:sliding_attention", wrong):
        capacity = found(make_cell, here)
    assert capacity.best is None
    assert capacity.failed is not None
    assert capacity.failed.status == "wrong"
    assert capacity.failed.reason.startswith("output differs from the specification")
    assert len(here.jobs) == 1


def test_an_arm_that_cannot_run_says_why(make_cell: MakeCell) -> None:
    capacity = found(make_cell, Here(), route="win=fa2")
    assert capacity.failed is not None
    assert capacity.failed.status == "unsupported"
    assert capacity.failed.reason.startswith("win=fa2: needs a CUDA GPU")


def test_no_try_takes_more_than_is_free(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_bytes", lambda device: 2 * MIB)
    for limit in (None, 100 * MIB):
        here = Here()
        assert found(make_cell, here, limit=limit).limit_bytes == int(capacity.CPU_SHARE * 2 * MIB)
        sizes = {job.policy.memory_bytes for job in here.jobs if isinstance(job.policy, Limits)}
        assert sizes == {int(capacity.CPU_SHARE * 2 * MIB)}


@pytest.mark.parametrize("status", ["timeout", "hang"])
def test_a_try_that_takes_too_long_makes_the_answer_a_lower_bound(make_cell: MakeCell, status: str) -> None:
    class Slow(Here):
        def answer(self, job: Job) -> Iterator[Event]:
            if job.cells[0].S < 100:
                yield from super().answer(job)
            else:
                yield Done(0, {"cell_id": "x", "status": status, "reason": "not finished within its limit"})

    capacity = found(make_cell, Slow(), S=40)
    assert capacity.best is not None
    assert capacity.failed is not None
    assert (capacity.best.S, capacity.failed.S, capacity.exact) == (80, 160, False)
    assert capacity.failed.status == "timeout"
    assert capacity.resolution is None


def test_a_worker_that_says_nothing_is_an_error(make_cell: MakeCell) -> None:
    class Silent(Here):
        def answer(self, job: Job) -> Iterator[Event]:
            yield Over(0, job, job.cells)

    capacity = found(make_cell, Silent())
    assert capacity.failed is not None
    assert (capacity.failed.status, capacity.failed.reason) == ("error", "its worker ended without an answer")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (100 * MIB, "100.0 MiB"),
        (1.5 * 2**30, "1.50 GiB"),
    ],
)
def test_memory_in_words(size: float, text: str) -> None:
    assert memory_text(size) == text


def test_limits_are_a_policy_that_travels() -> None:
    limits = Limits(memory_bytes=5, check=True, timeout_s=3.0)
    assert replace(limits, check=False).memory_bytes == 5
    assert limits.timeout_s == 3.0
