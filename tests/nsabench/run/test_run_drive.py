"""A plan, carried out by workers: rows on disk, stops, budgets, and disks that refuse."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import nsabench.store.runs
from nsabench.plan import Cell
from nsabench.run import Policy, drive, run_plan, session
from nsabench.run.budget import Agenda
from nsabench.run.executor import Event, Executor, Job, LocalExecutor, Slot
from nsabench.store import DiskError, RunDir, load_run

MakeCell = Callable[..., Cell]
CreateRun = Callable[[list[Cell]], RunDir]
Watched = tuple[str, int]

POLICY = Policy(timeout_s=60.0)


@pytest.fixture(autouse=True)
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where planted cells leave what a test looks at. No test may leave a process behind."""
    monkeypatch.setenv("PLANTED", str(tmp_path))
    yield tmp_path
    assert psutil.Process().children(recursive=True) == []


class Watcher:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def begin(self, group: list[Cell], activity: str, worker: int = 0) -> None:
        self.told.append(f"begin {group[0].S}")

    def activity(self, text: str, worker: int = 0) -> None:
        self.told.append(f"{worker}: {text}" if worker else text)

    def row(self, row: dict[str, Any], worker: int = 0) -> None:
        self.told.append(f"row {row['S']} {row['route']}")
        self.rows.append(row)


def local(name: str = "measure", **more: Any) -> LocalExecutor:
    slots = (Slot(0, frozenset({"cpu"})),)
    return LocalExecutor(slots, measure=f"tests.nsabench.run.planted:{name}", **more)


def statuses(run: RunDir) -> dict[tuple[int, str], str]:
    return {(row["S"], row["route"]): row["status"] for row in run.finished.values()}


def test_rows_of_workers_are_on_disk_before_they_are_shown(
    make_cell: MakeCell, create_run: CreateRun
) -> None:
    cells = [make_cell(S=S, route=route) for S in (8, 16) for route in ("a", "leave", "b")]
    run = create_run(cells)

    class Reader(Watcher):
        def row(self, row: dict[str, Any], worker: int = 0) -> None:
            super().row(row)
            assert list(load_run(run.path).cells["cell_id"])[-1] == row["cell_id"]

    watcher = Reader()
    run_plan(cells, POLICY, run, watcher, executor=local(process=7))
    assert watcher.told == [
        *("starting a worker", "begin 8", "measuring a", "row 8 a", "measuring leave", "row 8 leave"),
        *("starting a worker", "measuring b", "row 8 b"),
        *("begin 16", "measuring a", "row 16 a", "measuring leave", "row 16 leave"),
        *("starting a worker", "measuring b", "row 16 b"),
    ]
    assert [row["cell_id"] for row in watcher.rows] == [cell.cell_id for cell in cells]
    stored = load_run(run.path)
    assert list(stored.cells["status"]) == ["ok", "error", "ok"] * 2
    assert list(stored.samples["process"]) == [7, 8, 8, 9]
    assert list(stored.samples["t_s"]) == sorted(stored.samples["t_s"])


def test_finished_cells_are_not_measured_again(make_cell: MakeCell, create_run: CreateRun) -> None:
    cells = [make_cell(S=S, route=route) for S in (8, 16) for route in ("a", "b")]
    run = create_run(cells)
    run_plan(cells[:1], POLICY, run, Watcher(), executor=local())
    watcher = Watcher()
    run_plan(cells, POLICY, run, watcher, executor=local(process=1))
    assert [row["cell_id"] for row in watcher.rows] == [cell.cell_id for cell in cells[1:]]
    run_plan(cells, POLICY, run, watcher, executor=local("broken_build"))
    assert len(watcher.rows) == 3


@pytest.mark.parametrize("isolated", [True, False])
def test_a_stop_finishes_the_group_and_leaves_the_rest(
    make_cell: MakeCell,
    create_run: CreateRun,
    quick: Policy,
    monkeypatch: pytest.MonkeyPatch,
    isolated: bool,
) -> None:
    monkeypatch.setattr(session, "measure_group", in_this_process)
    cells = [make_cell(S=S, route=route) for S in (8, 16, 24) for route in ("a", "b")]
    run = create_run(cells)
    watcher = Watcher()
    executor = local() if isolated else None
    run_plan(cells, quick, run, watcher, executor=executor, stop=lambda: len(watcher.rows) >= 3)
    assert list(statuses(run)) == [(8, "a"), (8, "b"), (16, "a"), (16, "b")]


def in_this_process(cells: Any, policy: Policy, sink: Any, **more: Any) -> None:
    from tests.nsabench.run.planted import measure

    measure(cells, policy, sink, process=more["process"], clock=more["clock"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_of_the_watcher_ends_the_worker(
    make_cell: MakeCell, create_run: CreateRun, error: type[BaseException]
) -> None:
    cells = [make_cell(route=route) for route in ("a", "fork-sleeping", "hang")]
    run = create_run(cells)

    class Impatient(Watcher):
        def row(self, row: dict[str, Any], worker: int = 0) -> None:
            super().row(row)
            if len(self.rows) == 2:
                raise error

    with pytest.raises(error):
        run_plan(cells, POLICY, run, Impatient(), executor=local())
    run.close()
    assert list(load_run(run.path).cells["route"]) == ["a", "fork-sleeping"]


def test_a_disk_that_refuses_ends_the_worker(
    make_cell: MakeCell, create_run: CreateRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [make_cell(S=S, route=route) for S in (8, 16) for route in ("a", "b")]
    run = create_run(cells)
    append = nsabench.store.runs.append

    def full(path: Any, data: bytes) -> int:
        if len(run.finished) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(path, data)

    monkeypatch.setattr(nsabench.store.runs, "append", full)
    with pytest.raises(DiskError, match="No space left on device; 3 finished cells are safe"):
        run_plan(cells, POLICY, run, Watcher(), executor=local())
    run.close()
    assert len(load_run(run.path).cells) == 3


def test_a_bad_row_has_no_numbers(make_cell: MakeCell, create_run: CreateRun) -> None:
    cell = make_cell()

    class Sloppy:
        slots = (Slot(0, frozenset({"cpu"})),)

        def run(self, jobs: Iterator[Job]) -> Any:
            (job,) = jobs
            row = {**cell.to_dict(), "cell_id": cell.cell_id, "status": "wrong", "reason": "by 3"}
            yield drive.Began(0, job)
            yield drive.Done(0, {**row, "ms_total": 1.0, "flops": 3})
            yield drive.Over(0, job, ())

    run = create_run([cell])
    executor: Executor = Sloppy()
    run_plan([cell], POLICY, run, Watcher(), executor=executor)
    (row,) = run.finished.values()
    assert (row["ms_total"], row["flops"]) == (None, 3)


def test_idle_workers_are_said_to_be(make_cell: MakeCell, create_run: CreateRun) -> None:
    class Two:
        slots = tuple(Slot(number, frozenset({f"cuda:{number}"})) for number in range(2))

        def run(self, jobs: Iterator[Job]) -> Iterator[Event]:
            for job in jobs:
                yield drive.Began(1, job)
                yield drive.Over(1, job, ())

    watcher = Watcher()
    cell = make_cell()
    executor: Any = Two()
    executor.run = lambda jobs: (event for event in Two.run(executor, jobs))
    run_plan([cell], POLICY, create_run([cell]), watcher, executor=executor)
    assert watcher.told == ["begin 40", "1: "]


def test_a_group_that_overruns_the_budget_is_left(
    make_cell: MakeCell, create_run: CreateRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "_estimate", lambda policy: lambda group: 0.01)
    cells = [make_cell(S=8), make_cell(S=16, route="hang"), make_cell(S=24)]
    run = create_run(cells)
    run_plan(cells, POLICY, run, Watcher(), executor=local(), budget_s=1.5)
    assert statuses(run) == {(8, "auto"): "ok"}
    run_plan(cells[2:], POLICY, run, Watcher(), executor=local())
    assert statuses(run) == {(8, "auto"): "ok", (24, "auto"): "ok"}


def test_a_budget_holds_in_this_process_too(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crawl(cells: Any, policy: Policy, sink: Any, **more: Any) -> None:
        if cells[0].S == 8:
            return in_this_process(cells, policy, sink, **more)
        while True:
            sink.mark(cells[0])

    monkeypatch.setattr(session, "measure_group", crawl)
    monkeypatch.setattr(drive, "_estimate", lambda policy: lambda group: 0.01)
    cells = [make_cell(S=S) for S in (8, 16, 24)]
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher(), budget_s=0.3)
    assert statuses(run) == {(8, "auto"): "ok"}


def test_a_device_lost_in_this_process_leaves_no_cell_without_a_row(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(cells: Any, policy: Policy, sink: Any, **more: Any) -> None:
        in_this_process(cells[:1], policy, sink, **more)
        raise session.DeviceLost("the device was lost when b failed: CUDA error")

    monkeypatch.setattr(session, "measure_group", lose)
    cells = [make_cell(S=S, route=route) for S in (8, 16) for route in ("a", "b")]
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher())
    assert list(statuses(run).values()) == ["ok", "error"] * 2
    assert run.finished[cells[1].cell_id]["reason"] == "the device was lost when b failed: CUDA error"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def by_length(make_cell: MakeCell) -> Callable[..., list[list[Cell]]]:
    return lambda *lengths, **more: [[make_cell(S=S, **more)] for S in lengths]


def quadratic(group: list[Cell]) -> float:
    return float(group[0].S) ** 2 / 100


def test_without_a_budget_all_comes_in_order(by_length: Callable[..., list[list[Cell]]]) -> None:
    groups = by_length(3, 1, 2)
    agenda = Agenda(groups, None, quadratic)
    assert agenda.left_s is None
    assert [agenda.next() for _ in range(4)] == [*groups, None]


def test_what_does_not_fit_is_passed_over(by_length: Callable[..., list[list[Cell]]]) -> None:
    clock = Clock()
    short, long, middle = by_length(10, 100, 20)
    agenda = Agenda([short, long, middle], 6.0, quadratic, clock=clock)
    assert agenda.next() == short
    clock.at += 1
    assert agenda.left_s == 5.0
    assert agenda.next() == middle  # 4 s, while the long one needs 100 s
    clock.at += 10
    assert agenda.left_s == 0.0
    assert agenda.next() is None


def test_what_was_measured_beats_the_estimate(by_length: Callable[..., list[list[Cell]]]) -> None:
    a, b, c, d = by_length(10, 20, 40, 80)
    (other,) = by_length(40, passes="bwd")
    agenda = Agenda([], 1000.0, quadratic)
    assert agenda.expected_s(c) == quadratic(c)
    agenda.took(a, 100.0)
    assert agenda.expected_s(c) == pytest.approx(1600.0)
    agenda.took(b, 8.0)  # the nearer one
    assert agenda.expected_s(c) == pytest.approx(32.0)
    assert agenda.expected_s(d) == pytest.approx(128.0)
    assert agenda.expected_s(other) == quadratic(other)


def test_a_slower_machine_than_estimated_leaves_more_out(by_length: Callable[..., list[list[Cell]]]) -> None:
    clock = Clock()
    groups = by_length(10, 20, 40)
    agenda = Agenda(groups, 30.0, quadratic, clock=clock)
    first = agenda.next()
    assert first == groups[0]
    clock.at += 10  # ten times as long as estimated
    agenda.took(first, 10.0)
    assert agenda.next() is None  # 40 s and 160 s


def test_estimates_come_from_the_cells(make_cell: MakeCell, quick: Policy) -> None:
    small, large = (drive._estimate(quick)([make_cell(S=S)]) for S in (64, 65536))
    assert 0 < small < large
