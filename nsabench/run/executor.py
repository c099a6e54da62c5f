"""Who measures groups of cells and tells what became of them: on this machine, one worker for each device."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import count
from multiprocessing.connection import wait
from typing import Protocol

from nsabench.plan import Cell
from nsabench.run.desk import Desk
from nsabench.run.jobs import Began, Doing, Done, Event, Job, Over, Slot
from nsabench.run.process import WorkerError, WorkerProcess
from nsabench.run.worker import MEASURE

__all__ = [
    "Began",
    "Doing",
    "Done",
    "Event",
    "Executor",
    "Job",
    "LocalExecutor",
    "Over",
    "Slot",
    "WorkerError",
    "local_slots",
]


class Executor(Protocol):
    """Measures jobs somewhere. Every cell of a job becomes a Done, unless Over says that it is left."""

    @property
    def slots(self) -> Sequence[Slot]:
        """How many jobs go on at once, and where."""

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        """The events of all jobs. A job is taken when a slot is free. The measurement waits until the next
        event is asked for, so that what is done with a row does not disturb it.

        Closing the generator ends what runs and leaves no process behind.
        """


def local_slots(cells: Iterable[Cell]) -> tuple[Slot, ...]:
    """Where the cells are measured on this machine.

    Cells that all say ``cuda``: one slot for each GPU of the default one's kind, so that a sweep has them
    all. Cells that name GPUs: one for each named. One for all where a CPU is among them: what a CPU measures
    wants a quiet machine.
    """
    devices = dict.fromkeys(cell.device for cell in cells)
    if list(devices) == ["cuda"] and len(gpus := _gpus_alike()) > 1:
        return tuple(
            Slot(number, frozenset(devices), (uuid,), alone=True) for number, uuid in enumerate(gpus)
        )
    named = {device: _uuid(device) for device in devices}
    known = list(dict.fromkeys(uuid for uuid in named.values() if uuid is not None))
    if None in named.values():
        return (Slot(0, frozenset(devices), tuple(known)),)
    return tuple(
        Slot(number, frozenset(device for device in devices if named[device] == uuid), (uuid,))
        for number, uuid in enumerate(known)
    )


def _gpus_alike() -> list[str]:
    from nsabench.measure import MeasureError, gpus_alike

    try:
        return gpus_alike()
    except MeasureError:
        return []


def _uuid(device: str) -> str | None:
    if device == "cpu":
        return None
    from nsabench.measure import MeasureError, gpu_uuid, resolve_device

    try:
        return gpu_uuid(resolve_device(device))
    except MeasureError:
        return None


class LocalExecutor:
    """Workers of this machine: spawned, used again while they are well, replaced when lost.

    A worker that dies, hangs (no progress for half of the policy's limit) or exceeds the limit costs the cell
    that it was at its row, which says so; the other cells of the group are measured again by a fresh one.

    ``measure``: the function that measures a group, as ``module:name``. ``process``: number of the first
    worker among the processes of a run. A GPU is measured on by one nsabench at a time.
    """

    def __init__(self, slots: Sequence[Slot], *, measure: str = MEASURE, process: int = 0) -> None:
        self.slots = tuple(slots)
        self._measure = measure
        self._numbers = count(process)

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        """As `Executor.run`. WorkerError when workers do not start, or cannot be ended."""
        began = time.perf_counter()
        desks = [Desk(slot, self._hire, began) for slot in self.slots]
        try:
            waiting: Job | None = None
            while True:
                while any(desk.job is None for desk in desks):
                    waiting = waiting or next(jobs, None)
                    free = waiting and _free(desks, waiting)
                    if not waiting or not free:
                        break
                    free.take(waiting)
                    waiting = None
                busy = [desk for desk in desks if desk.job is not None]
                if not busy:
                    return
                wait([file for desk in busy for file in desk.files()], min(desk.patience() for desk in busy))
                for desk in busy:
                    yield from desk.advance()
        finally:
            for desk in desks:
                desk.close()

    def _hire(self, slot: Slot) -> WorkerProcess:
        return WorkerProcess(self._measure, next(self._numbers), slot.gpus if slot.alone else ())


def _free(desks: Sequence[Desk], job: Job) -> Desk | None:
    """The desk for a job; None while those that it may go to have another.

    A GPU on which another nsabench measures is waited for only when there is no other to wait for.
    """
    able = [desk for desk in desks if job.cells[0].device in desk.slot.devices] or desks[:1]
    free = [desk for desk in able if desk.job is None]
    ready = next((desk for desk in free if desk.reserve()), None)
    return ready or (free[0] if len(free) == len(able) else None)
