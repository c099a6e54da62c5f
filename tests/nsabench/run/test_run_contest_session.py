"""What a comparison asks of a session: sides that are built apart, an order of its own for each process, a
device that is steady.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsabench.measure.canary import Settled
from nsabench.plan import Cell
from nsabench.plan.sides import compared, parse_side
from nsabench.run import Policy, session
from nsabench.run.session import measure_group
from nsabench.run.workload import Workload

MakeCell = Callable[..., Cell]


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.said: list[str] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None:
        self.said.append(text)

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.rows.append(dict(row))
        self.samples += [{"cell_id": row["cell_id"], **sample} for sample in samples]


def measured(cells: list[Cell], policy: Policy, process: int = 0) -> Kept:
    kept = Kept()
    measure_group(cells, policy, kept, process=process)
    return kept


def test_sides_of_other_sizes_are_built_apart(make_cell: MakeCell, quick: Policy) -> None:
    sides = [parse_side(text) for text in ("sdpa", "sdpa,dtype=fp64", "sdpa,S=20", "dense")]
    kept = measured(compared(make_cell(), sides, different_work=True), quick)
    assert [row["status"] for row in kept.rows] == ["ok"] * 5, [row["reason"] for row in kept.rows]
    flops = [row["flops"] for row in kept.rows]
    assert flops[0] == flops[1] == flops[4] > flops[2]
    assert kept.rows[1]["rel_err"] < 1e-3 * kept.rows[0]["rel_err"]
    in_round = [sample for sample in kept.samples if sample["round"] == 0]
    assert sorted(sample["position"] for sample in in_round) == [0, 1, 2, 3, 4]


def test_twins_share_what_they_time(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Cell] = []
    build = session.workload_for

    def counted(cell: Cell) -> Workload:
        built.append(cell)
        return build(cell)

    monkeypatch.setattr(session, "workload_for", counted)
    sides = [parse_side("auto"), parse_side("sdpa"), parse_side("auto")]
    assert len(measured(compared(make_cell(), sides), quick).rows) == 4
    assert len(built) == 1


def test_every_process_has_an_order_of_its_own(make_cell: MakeCell, quick: Policy) -> None:
    cells = compared(make_cell(), [parse_side("auto"), parse_side("sdpa")])

    def order(process: int) -> list[Any]:
        samples = measured(cells, replace(quick, rounds=12), process).samples
        return sorted((s["round"], s["position"], s["cell_id"]) for s in samples)

    assert order(0) == order(0) != order(1)


@pytest.mark.parametrize("settles", [True, False])
def test_rounds_wait_for_a_steady_device_where_asked(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch, settles: bool
) -> None:
    monkeypatch.setattr(session, "settle", lambda read, limit_s: Settled(False, 1.0, 9, 0.5))
    kept = measured([make_cell(), make_cell(route="sdpa", impl="nsa")], replace(quick, settle=settles))
    assert [row.get("canary_spread_pct") for row in kept.rows] == [50.0 if settles else None] * 2
    assert ("waiting for a steady device" in kept.said) == settles


def test_no_memory_for_the_canary_is_no_failure(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(device: str) -> Callable[[], float]:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(session, "canary", full)
    (row,) = measured([make_cell()], replace(quick, settle=True)).rows
    assert (row["status"], row.get("canary_spread_pct")) == ("ok", None)
