"""Rounds on a CPU take turns on tensors that lie elsewhere: equal, their own, and checked."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsabench.measure import PeakMemory
from nsabench.plan import Cell
from nsabench.run import Policy, arm, placement
from nsabench.run.placement import LINE_BYTES, PLACES, scatter
from nsabench.run.session import measure_group
from nsabench.run.workload import CoreWorkload, Workload, workload_for

MakeCell = Callable[..., Cell]

BRIEF = Policy(rounds=12, sample_ms=0.1, shares=False, alone=False, memory=False)


class Sink:
    """Keeps the rows and what was said."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.said: list[str] = []

    def doing(self, text: str) -> None:
        self.said.append(text)

    def mark(self, cell: Cell | None) -> None: ...

    def done(self, row: Any, samples: Any, telemetry: Any = (), kernels: Any = ()) -> None:
        self.rows.append({**row, "samples": list(samples)})


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm, "peak_memory", lambda step, device: PeakMemory(1000, None))


def test_everything_moves_and_is_as_it_was() -> None:
    whole = torch.arange(600.0)
    layer = torch.nn.Linear(3, 5)
    with torch.inference_mode():
        frozen = torch.ones(7)
    thing = SimpleNamespace(
        layer=layer,
        parts=(whole[:300].view(3, 100), [whole[100:]]),
        table={"short": torch.arange(9, dtype=torch.int8)[1::2], "empty": torch.empty(0)},
        frozen=frozen,
        word="text",
        itself=None,
    )
    thing.itself = thing
    held = [*layer.parameters(), thing.parts[0], thing.parts[1][0], thing.table["short"], frozen]
    before = [t.detach().clone() for t in held]
    places = [t.data_ptr() for t in held]
    assert scatter(thing, random.Random(0)) == 5, "two weights, one shared storage, the table, the frozen one"
    assert all(torch.equal(t, value) for t, value in zip(held, before, strict=True))
    assert all(t.data_ptr() != place for t, place in zip(held, places, strict=True))
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert layer.weight.requires_grad
    assert all((t.data_ptr() - t.storage_offset() * t.element_size()) % 8 == 0 for t in held)
    thing.parts[0][1, 0] = -1.0
    assert thing.parts[1][0][0] == -1.0, "what shared memory shares it still"
    layer(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_places_differ_by_lines_and_by_chance() -> None:
    def places(seed: int) -> list[int]:
        found, chance = [], random.Random(seed)
        for _ in range(20):
            thing = [torch.zeros(64)]
            scatter(thing, chance)
            start = thing[0].storage_offset() * 4
            assert start % LINE_BYTES == 0
            found.append(start)
        return found

    assert places(1) == places(1) != places(2)
    assert len(set(places(1))) > 15


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the queries that each attention read."""
    addresses: list[int] = []
    plain = CoreWorkload._forward_step

    def watched(self: CoreWorkload, step: Any, route: str) -> Callable[[], torch.Tensor]:
        run = plain(self, step, route)

        def forward() -> torch.Tensor:
            addresses.append(self.given["q"].data_ptr())
            return run()

        return forward

    monkeypatch.setattr(CoreWorkload, "_forward_step", watched)
    return addresses


def test_rounds_take_turns_on_all_places(make_cell: MakeCell, seen: list[int]) -> None:
    cells = [make_cell(scope="core", route=route) for route in ("auto", "win=reference")]
    sink = Sink()
    measure_group(cells, BRIEF, sink)
    assert [(row["status"], row["copies"]) for row in sink.rows] == [("ok", PLACES)] * 2
    assert len(set(seen)) == PLACES, "the routes of a shape share every place"
    assert [len(row["samples"]) for row in sink.rows] == [12, 12]
    turns = list(dict.fromkeys(seen))
    rounds = seen[-sum(one["iters"] for row in sink.rows for one in row["samples"]) :]
    assert list(dict.fromkeys(rounds)) == turns, "in order, round by round"
    assert any("5 copies of the tensors of auto" in text for text in sink.said)


@pytest.mark.parametrize("what", [{"passes": "fwd_bwd"}, {"phase": "decode"}, {"impl": "dense"}], ids=str)
def test_every_kind_of_step_is_right_everywhere(make_cell: MakeCell, what: dict[str, Any]) -> None:
    sink = Sink()
    measure_group([make_cell(**what)], BRIEF, sink)
    assert [(row["status"], row["reason"], row["copies"]) for row in sink.rows] == [("ok", "", PLACES)]


def test_a_copy_that_computes_something_else_is_wrong(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(thing: Any, chance: random.Random) -> int:
        thing.given["v_win"].data += 1.0
        return 1

    monkeypatch.setattr(placement, "scatter", spoilt)
    sink = Sink()
    measure_group([make_cell(scope="core")], BRIEF, sink)
    (row,) = sink.rows
    assert row["status"] == "wrong"
    assert "in a copy; allowed" in row["reason"]


def _shallow(self: Workload, memo: Any) -> Any:
    raise TypeError("no copy of this")


@pytest.mark.parametrize("why", ["memory", "uncopied", "backward", "one round"])
def test_where_copies_cannot_be_there_is_one_place(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    policy, what = BRIEF, {}
    if why == "memory":
        monkeypatch.setattr(placement, "available_bytes", lambda device: 1000)
    elif why == "uncopied":
        monkeypatch.setattr(Workload, "__deepcopy__", _shallow, raising=False)
    elif why == "backward":
        what = {"passes": "bwd"}
    else:
        policy = Policy(rounds=1, sample_ms=0.1, shares=False, alone=False, memory=False)
    sink = Sink()
    measure_group([make_cell(**what)], policy, sink)
    (row,) = sink.rows
    assert (row["status"], row["copies"]) == ("ok", 1)


def test_fewer_places_where_memory_is_short(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = make_cell(scope="core")
    each = placement.copy_bytes(workload_for(cell))
    monkeypatch.setattr(placement, "available_bytes", lambda device: 4 * each)
    sink = Sink()
    measure_group([cell], BRIEF, sink)
    assert sink.rows[0]["copies"] == 3
