"""One slot at work: its worker, the job at hand, and which of its cells have no row yet."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from nsabench.plan import Cell
from nsabench.run.death import cause, last_words, oom_kills, whereabouts
from nsabench.run.jobs import Began, Doing, Done, Event, Job, Over, Slot
from nsabench.run.process import WorkerError, WorkerProcess
from nsabench.run.worker import Board

STARTS = 3
"""How often in a row a worker may fail to start before the machine is blamed."""

STARTS_WITHIN_S = 300.0
LOOKS_EVERY_S = 0.5
"""Where nothing wakes who waits: for another nsabench's lock, for a death where the system has no pidfd."""


class Desk:
    """Takes a job when it has none, and advances it whenever something may have happened.

    ``hire`` starts a slot's worker; ``began`` is the start of the run on this process's perf_counter.
    """

    def __init__(self, slot: Slot, hire: Callable[[Slot], WorkerProcess], began: float) -> None:
        self.slot = slot
        self.job: Job | None = None
        self._hire, self._began = hire, began
        self._worker: WorkerProcess | None = None
        self._locks = [filelock.FileLock(lock_file(uuid), mode=0o666) for uuid in slot.gpus]
        self._left: list[Cell] = []
        self._until: float | None = None
        self._said = ""
        self._announced = False
        self._failed_starts = 0
        self._forget()

    def _forget(self) -> None:
        """No worker has anything of ours."""
        self._sent: tuple[Cell, ...] = ()
        self._ready = False
        self._since = time.monotonic()

    def reserve(self) -> bool:
        """Lock its GPUs, or keep them; False while another nsabench measures on one."""
        return all(_try(lock) for lock in self._locks)

    def take(self, job: Job) -> None:
        """Begin a job; events come from `advance`."""
        self.job, self._left, self._announced = job, list(job.cells), False
        self._until = None if job.seconds is None else time.monotonic() + job.seconds
        self._sent = ()

    def files(self) -> list[Any]:
        """What to wait for."""
        return [] if self._worker is None else self._worker.files

    def patience(self) -> float:
        """Seconds after which to look even if nothing is heard."""
        if self._worker is None:
            return LOOKS_EVERY_S if self._said else 0.0
        if not self._sent and self._ready:
            return 0.0
        looks = [self._deadline()]
        if self._until is not None:
            looks.append(self._until)
        patience = max(0.0, min(looks) - time.monotonic())
        return min(patience, LOOKS_EVERY_S) if self._worker.silent_deaths else patience

    def advance(self) -> Iterator[Event]:
        """What has happened since the last call. The worker goes on after each event."""
        if self._worker is not None:
            for message in self._worker.read():
                yield from self._hear(*message)
        if self.job is None:
            return
        if self._until is not None and time.monotonic() >= self._until:
            self._dismiss()
            yield self._over()
        elif self._worker is None:
            yield from self._staff()
        elif self._worker.ended():
            yield from self._lost()
        elif self._ready and not self._sent:
            yield from self._send()
        elif time.monotonic() >= self._deadline():
            yield from self._overdue()

    def close(self) -> None:
        """End the worker, if any, and let others measure here."""
        try:
            self._dismiss()
        finally:
            for lock in self._locks:
                lock.release()

    def _staff(self) -> Iterator[Event]:
        if not self.reserve():
            if not self._said:
                self._said = f"waiting for {' and '.join(self.slot.gpus)}: another nsabench measures on it"
                yield Doing(self.slot.number, self._said)
            return
        self._said = ""
        yield Doing(self.slot.number, "starting a worker")
        self._worker = self._hire(self.slot)
        self._forget()

    def _send(self) -> Iterator[Event]:
        assert self.job is not None
        assert self._worker is not None
        if not self._announced:
            self._announced = True
            yield Began(self.slot.number, self.job)
        self._sent, self._since = tuple(self._left), time.monotonic()
        self._kills = oom_kills()
        at = time.perf_counter() - self._began
        self._worker.begin(self._sent, self.job.policy, self._worker.number, at)

    def _hear(self, what: str, *said: Any) -> Iterator[Event]:
        assert self._worker is not None
        if what == "ready":
            self._ready = True
            return
        self._failed_starts = 0
        if what == "over":
            if self._left:
                yield from self._fail(self._left, "error", "its measurement ended without a row")
            if self.job is not None:
                yield self._over()
        else:
            if what == "doing":
                yield Doing(self.slot.number, *said)
            else:
                self._strike_off(said[0]["cell_id"])
                yield Done(self.slot.number, *said)
            self._worker.send("go on")
            self._since = time.monotonic()

    def _lost(self) -> Iterator[Event]:
        """The worker has ended by itself."""
        assert self._worker is not None
        worker, kills = self._worker, oom_kills()
        code = worker.kill()
        if not self._sent or worker.board.place == Board.UNTOUCHED:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                status, why = cause(code, worker.printed, killed_for_memory=False)
                raise WorkerError(f"workers do not start here: {why}")
            self._dismiss()
            return
        status, why = cause(code, worker.printed, killed_for_memory=kills != self._kills)
        yield from self._blame(worker, status, why)

    def _deadline(self) -> float:
        """When the worker is overdue."""
        assert self._worker is not None
        if not self._sent:
            return self._since + STARTS_WITHIN_S
        assert self.job is not None
        limit, board = self.job.policy.timeout_s, self._worker.board
        progress = max(self._since, board.marked)
        return progress + min(limit / 2, limit - board.spent)

    def _overdue(self) -> Iterator[Event]:
        assert self._worker is not None
        assert self.job is not None
        worker, limit = self._worker, self.job.policy.timeout_s
        if not self._sent:
            said = last_words(worker.printed)
            raise WorkerError(f"a worker has not started within {STARTS_WITHIN_S:g} s; it printed: {said}")
        hangs = limit - worker.board.spent > limit / 2
        worker.dump_stacks()
        worker.kill()
        where = whereabouts(worker.printed)
        if hangs:
            why = f"no progress for {limit / 2:g} s, half of its limit of {limit:g} s"
            yield from self._blame(worker, "hang", why + (f"; it was{where}" if where else ""))
        else:
            why = f"not finished within its limit of {limit:g} s"
            yield from self._blame(worker, "timeout", why + (f"; it was{where}" if where else ""))

    def _blame(self, worker: WorkerProcess, status: str, reason: str) -> Iterator[Event]:
        """Give the cell that the dead worker was at its row; the rest of the group is measured again."""
        place, sent = worker.board.place, self._sent
        self._failed_starts = 0
        self._dismiss()
        guilty = sent if place == Board.EVERY else sent[place : place + 1]
        yield from self._fail([cell for cell in guilty if cell in self._left], status, reason)

    def _fail(self, cells: list[Cell], status: str, reason: str) -> Iterator[Event]:
        for cell in tuple(cells):
            self._strike_off(cell.cell_id)
            row = {**cell.to_dict(), "cell_id": cell.cell_id, "status": status, "reason": reason}
            yield Done(self.slot.number, row)
        if not self._left:
            yield self._over()

    def _strike_off(self, cell_id: str) -> None:
        self._left = [cell for cell in self._left if cell.cell_id != cell_id]

    def _over(self) -> Over:
        assert self.job is not None
        over = Over(self.slot.number, self.job, tuple(self._left))
        self.job, self._left = None, []
        return over

    def _dismiss(self) -> None:
        worker, self._worker = self._worker, None
        self._forget()
        if worker is not None:
            worker.kill()


def lock_file(uuid: str) -> Path:
    """What who measures on a GPU holds locked, for all users of the machine."""
    return Path(tempfile.gettempdir()) / f"nsabench-{uuid}.lock"


def _try(lock: filelock.BaseFileLock) -> bool:
    """Take a lock, or keep it; False while another has it, WorkerError where it cannot be had at all."""
    if lock.is_locked:
        return True
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    except OSError as error:
        raise WorkerError(f"cannot lock {lock.lock_file}: {error.strerror or error}") from error
    return True
