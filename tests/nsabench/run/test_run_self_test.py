"""What the self-test plants is what it says, and goes through the machinery that everything goes through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil
import pytest

import nsa.routes
from nsabench.plan import Cell
from nsabench.run import self_test, spinner
from nsabench.run.executor import Done, Job, LocalExecutor, local_slots
from nsabench.run.impl import IMPLS
from nsabench.run.self_test import BASE, Plant, Planted, measure, measure_fallback, plants
from nsabench.run.work import count_dense_work
from nsabench.run.workload import workload_for

SHORT = replace(self_test.POLICY, rounds=1, sample_ms=0.5, settle=False)
PLANTS = {plant.name: plant for plant in plants("cpu")}


class Rows:
    """A sink that keeps rows by impl and route."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, int], dict[str, Any]] = {}

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.found[row["impl"], row["route"], row["twin"]] = dict(row)


@pytest.fixture(autouse=True)
def _known_here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in dict.fromkeys(IMPLS):
        monkeypatch.setitem(IMPLS, name, IMPLS[name])
    for kind in ("100", "100b", "101", "102", "105", "wrong", "hang", "crash"):
        monkeypatch.setitem(IMPLS, f"planted:{kind}", "nsabench.run.self_test:Planted")


def rows_of(plant: Plant, run: Any = measure) -> list[dict[str, Any]]:
    sink = Rows()
    cells = plant.cells("cpu", 0)
    run(cells, SHORT, sink, process=0, clock=time.perf_counter)
    return [sink.found[cell.impl, cell.route, cell.twin] for cell in cells]


@pytest.mark.parametrize(
    ("kind", "times"), [("100", 100), ("100b", 100), ("101", 101), ("102", 102), ("105", 105)]
)
def test_a_step_is_slower_by_the_work_that_it_does(
    kind: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    true = self_test.scaled_dot_product_attention
    monkeypatch.setattr(
        self_test, "scaled_dot_product_attention", lambda *given: done.append(given) or true(*given)
    )
    workload = workload_for(replace(BASE, impl=f"planted:{kind}"))
    workload.variants("auto")[0].step()
    assert len(done) == times
    assert len({tuple(t.data_ptr() for t in given) for given in done}) == 1
    once = count_dense_work(BASE, 0)
    assert workload.work("auto").flops == times * once.flops
    assert workload.work("auto").bytes == once.bytes


@pytest.mark.parametrize("name", ["equal work", "5 % slower", "2 % slower", "1 % slower", "neighbour"])
def test_what_is_only_slower_is_right(name: str) -> None:
    rows = rows_of(PLANTS[name])
    assert [row["status"] for row in rows] == ["ok"] * 3, rows
    assert all(row["ms_total"] > 0 for row in rows)
    assert len({row["cell_id"] for row in rows}) == 3


def test_a_planted_wrong_result_is_wrong_by_the_specification() -> None:
    rows = rows_of(PLANTS["wrong result"])
    assert [row["status"] for row in rows] == ["ok", "wrong", "ok"]
    assert "differs from the specification" in rows[1]["reason"]


def test_a_planted_fallback_is_told_from_what_ran() -> None:
    before = nsa.routes.TABLE
    rows = rows_of(PLANTS["fallback"], measure_fallback)
    assert [row["status"] for row in rows] == ["ok", "invalid", "ok"]
    assert "fell back" in rows[1]["reason"]
    assert nsa.routes.TABLE is before
    assert [row["status"] for row in rows_of(PLANTS["fallback"])] == ["ok"] * 3


def measured(cells: Sequence[Cell], measure: str, timeout_s: float) -> dict[str, dict[str, Any]]:
    """Rows by impl, as workers leave them."""
    job = Job(tuple(cells), replace(SHORT, timeout_s=timeout_s), 0)
    executor = LocalExecutor(local_slots(cells), measure=measure)
    return {
        event.row["impl"]: dict(event.row) for event in executor.run(iter([job])) if isinstance(event, Done)
    }


def test_a_planted_crash_costs_no_one_else_his_row() -> None:
    crash = PLANTS["crash"]
    rows = measured(crash.cells("cpu", 0)[:2], crash.measure, 600.0)
    assert {impl: row["status"] for impl, row in rows.items()} == {
        "planted:100": "ok",
        "planted:crash": "error",
    }
    assert crash.says in rows["planted:crash"]["reason"]


def test_a_planted_hang_hangs() -> None:
    hang = PLANTS["hang"]
    rows = measured(hang.cells("cpu", 0)[1:2], hang.measure, 4.0)
    assert {impl: row["status"] for impl, row in rows.items()} == {"planted:hang": "hang"}


def test_every_kind_is_measured_in_fresh_workers_by_a_function_that_exists() -> None:
    assert {plant.measure for plant in PLANTS.values()} == {
        f"nsabench.run.self_test:{function.__name__}" for function in (measure, measure_fallback)
    }
    assert all(plant.processes >= 3 for plant in PLANTS.values() if not plant.is_fault)
    assert {plant.name for plant in PLANTS.values() if plant.neighbour} == {"neighbour"}


def test_numbers_change_inputs_and_order() -> None:
    first, second = (PLANTS["5 % slower"].cells("cpu", number) for number in range(2))
    assert len({cell.cell_id for cell in [*first, *second]}) == 6
    assert [cell.impl for cell in first] == ["planted:100", "planted:105", "planted:100"]
    a, b = (workload_for(cells[0]).given["q"] for cells in (first, second))  # type: ignore[attr-defined]
    assert not a.equal(b)


def test_a_gpu_has_to_find_one_percent() -> None:
    on_gpu = {plant.name: plant for plant in plants("cuda:1")}
    assert on_gpu["1 % slower"].least == 0.9
    assert PLANTS["1 % slower"].least is None
    (cell, *_) = on_gpu["1 % slower"].cells("cuda:1", 0)
    assert (cell.device, cell.dtype) == ("cuda:1", "bf16")


@pytest.mark.parametrize(("asked", "expected"), [(1, (1, 1, 1)), (20, (20, 10, 1)), (200, (200, 100, 10))])
def test_as_many_as_asked_for(asked: int, expected: tuple[int, ...]) -> None:
    kinds: Sequence[str] = ("equal work", "2 % slower", "hang")
    assert tuple(PLANTS[name].runs(asked) for name in kinds) == expected


def test_planted_work_has_no_layer() -> None:
    with pytest.raises(NotImplementedError):
        Planted(BASE).forward(None, None, None, "auto")  # type: ignore[arg-type]


def _spinning() -> set[int]:
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if any("sum(range(10**6))" in part for part in process.info["cmdline"] or ()):
            found.add(process.pid)
    return found


def test_a_neighbour_is_there_is_not_ours_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinner, "_cores", lambda: 1)
    before = _spinning()
    with spinner.neighbour("cpu"):
        (pid,) = _spinning() - before
        ours = {child.pid for child in psutil.Process().children(recursive=True)}
        assert pid not in ours
    assert pid not in _spinning()


def test_a_neighbour_goes_with_whoever_fails_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinner, "_cores", lambda: 1)
    before = _spinning()
    with pytest.raises(ValueError, match="beside"), spinner.neighbour("cpu"):
        raise ValueError("beside")
    assert not _spinning() - before


def test_a_neighbour_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinner, "_SPIN", "raise SystemExit")
    with pytest.raises(spinner.NoNeighbour, match="ended before it was ready"), spinner.neighbour("cpu"):
        pytest.fail("there is none")
    monkeypatch.setattr(spinner, "_LAUNCH", "raise SystemExit(3)")
    with pytest.raises(spinner.NoNeighbour, match="cannot be started"), spinner.neighbour("cpu"):
        pytest.fail("there is none")
