"""A plan, carried out: what comes next, each finished cell on disk at once, and when to stop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

from nsabench.plan import Cell, groups
from nsabench.run.budget import Agenda
from nsabench.run.jobs import Began, Doing, Done, Job, Over
from nsabench.run.policy import Policy
from nsabench.run.worker import Fields
from nsabench.store import RunDir
from nsabench.store.schema import without_performance

if TYPE_CHECKING:
    from nsabench.run.executor import Executor


class Observer(Protocol):
    """Who watches a sweep: a live table, plain lines, a test. ``worker`` is the number of a slot."""

    def begin(self, group: list[Cell], activity: str, worker: int = 0) -> None: ...

    def activity(self, text: str, worker: int = 0) -> None: ...

    def row(self, row: dict[str, Any], worker: int = 0) -> None: ...


def run_plan(
    cells: list[Cell],
    policy: Policy,
    run: RunDir,
    observer: Observer,
    *,
    executor: Executor | None = None,
    process: int = 0,
    budget_s: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure every cell that ``run`` has not finished. A failed cell is a row with a status; the sweep goes
    on.

    ``executor`` measures; without one it is done in this process, which a crash ends and no limit of time
    guards, its samples numbered ``process`` and timed by ``clock``. ``budget_s``: measure what fits into so
    many seconds, in the order of ``cells``, and leave the rest unfinished. ``stop``: asked before each group;
    true leaves the rest unfinished.

    Raises:
        DiskError: the disk refuses; what was finished is safe.
        WorkerError: the executor cannot measure here.
    """
    todo = [[cell for cell in group if cell.cell_id not in run.finished] for group in groups(cells)]
    agenda = Agenda([group for group in todo if group], budget_s, _estimate(policy))
    if executor is None:
        _in_process(agenda, policy, run, observer, process, stop, clock)
        return
    began: dict[int, float] = {}
    with closing(executor.run(_jobs(agenda, policy, stop))) as events:
        for event in events:
            match event:
                case Began(worker, job):
                    began[job.number] = time.monotonic()
                    observer.begin(list(job.cells), "building", worker=worker)
                case Doing(worker, text):
                    observer.activity(text, worker=worker)
                case Done(worker, row, samples, telemetry, kernels):
                    _Recorder(run, observer, worker).done(row, samples, telemetry, kernels)
                case Over(worker, job, left):
                    if not left:
                        agenda.took(job.cells, time.monotonic() - began[job.number])
                    if len(executor.slots) > 1:
                        observer.activity("", worker=worker)


def _jobs(agenda: Agenda, policy: Policy, stop: Callable[[], bool]) -> Iterator[Job]:
    number = 0
    while not stop() and (group := agenda.next()):
        yield Job(tuple(group), policy, number, seconds=agenda.left_s)
        number += 1


def _estimate(policy: Policy) -> Callable[[list[Cell]], float]:
    def seconds(group: list[Cell]) -> float:
        # Imported late: it brings torch, which a run without a budget has no use for here.
        from nsabench.run.estimate import estimate_group

        return estimate_group(group, policy).seconds

    return seconds


class _Recorder:
    """Where rows go. As a sink it serves a measurement in this process."""

    def __init__(
        self,
        run: RunDir,
        observer: Observer,
        worker: int = 0,
        until: float | None = None,
    ) -> None:
        self._run, self._observer, self._worker, self._until = run, observer, worker, until

    def mark(self, cell: Cell | None) -> None:
        if self._until is not None and time.monotonic() >= self._until:
            raise _Spent

    def doing(self, text: str) -> None:
        self._observer.activity(text, worker=self._worker)

    def done(
        self,
        row: Fields,
        samples: Sequence[Fields] = (),
        telemetry: Sequence[Fields] = (),
        kernels: Sequence[Fields] = (),
    ) -> None:
        row = row if row["status"] == "ok" else without_performance(row)
        self._run.append(row, samples, telemetry, kernels)
        self._observer.row(self._run.finished[row["cell_id"]], worker=self._worker)


class _Spent(BaseException):
    """The budget is; not an error of the cell that happens to be measured."""


def _in_process(
    agenda: Agenda,
    policy: Policy,
    run: RunDir,
    observer: Observer,
    process: int,
    stop: Callable[[], bool],
    clock: Callable[[], float],
) -> None:
    from nsabench.run.session import DeviceLost, measure_group

    began = clock()
    for job in _jobs(agenda, policy, stop):
        observer.begin(list(job.cells), "building")
        start = time.monotonic()
        recorder = _Recorder(run, observer, until=None if job.seconds is None else start + job.seconds)
        try:
            measure_group(job.cells, policy, recorder, process=process, clock=lambda: clock() - began)
        except _Spent:
            return
        except DeviceLost as error:
            for cell in job.cells:
                if cell.cell_id not in run.finished:
                    row = {**cell.to_dict(), "cell_id": cell.cell_id, "status": "error", "reason": str(error)}
                    recorder.done(row)
        agenda.took(job.cells, time.monotonic() - start)
        gc.collect()
