"""A plan, carried out: group after group, each arm gated and timed in interleaved rounds, each row durable
at once.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import psutil
import torch

from nsabench.measure import MeasureError, NvmlSampler, open_sampler
from nsabench.plan import Cell, groups
from nsabench.run.arm import Arm
from nsabench.run.gate import Refused, refuse_wrong_cache
from nsabench.run.policy import Policy
from nsabench.run.workload import Workload, least_bytes
from nsabench.store import RunDir
from nsabench.store.schema import without_performance

Fields = dict[str, Any]


class Observer(Protocol):
    """Who watches a sweep: a live table, plain lines, a test."""

    def begin(self, group: list[Cell], activity: str) -> None: ...

    def activity(self, text: str) -> None: ...

    def row(self, row: dict[str, Any]) -> None: ...


def run_plan(
    cells: list[Cell],
    policy: Policy,
    run: RunDir,
    observer: Observer,
    *,
    process: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure every cell that ``run`` has not finished. A failed cell is a row with a status; the sweep goes
    on.

    ``process`` numbers the process that measures: samples of two processes were never taken in turn.

    Raises:
        DiskError: the disk refuses; what was finished is safe.
    """
    began = clock()
    session = _Session(policy, run, observer, process, lambda: clock() - began)
    for group in groups(cells):
        todo = [cell for cell in group if cell.cell_id not in run.finished]
        if todo:
            observer.begin(todo, "building")
            session.measure(todo)
            gc.collect()


@dataclass(frozen=True)
class _Session:
    policy: Policy
    run: RunDir
    observer: Observer
    process: int
    clock: Callable[[], float]
    """Seconds since the session began."""

    def measure(self, group: list[Cell]) -> None:
        failed: Fields = {}
        try:
            with _failures(failed):
                _refuse_hopeless(group[0])
                workload = Workload(group[0])
                refuse_wrong_cache(workload)
        except _Failed:
            for cell in group:
                self._store({**cell.to_dict(), "cell_id": cell.cell_id, **failed}, [])
            return
        arms = [Arm(cell, workload, self.policy, self.clock, self.process) for cell in group]
        for arm in arms:
            self.observer.activity(f"checking {arm.cell.route} against the specification")
            _guard(arm, arm.prepare)
        with open_sampler(group[0].device, clock=self.clock) as sampler:
            began = self.clock()
            self._rounds(arms, sampler)
            ended = self.clock()
        telemetry = sampler.readings
        for arm in arms:
            if arm.fields["status"] == "ok":
                self.observer.activity(f"stages, branches and memory of {arm.cell.route}")
            _guard(arm, arm.finish)
            arm.fields |= sampler.summary(began, ended) | sampler.validity(began, ended)
            arm.release()
            self._store(arm.fields, arm.samples, telemetry if arm is arms[0] else ())

    def _rounds(self, arms: list[Arm], sampler: NvmlSampler) -> None:
        """Visit every living arm once a round, in a seeded random order, so that drift falls on all alike."""
        shuffle = random.Random(arms[0].cell.seed)
        for number in range(self.policy.rounds):
            living = [arm for arm in arms if arm.fields["status"] == "ok"]
            if not living:
                return
            shuffle.shuffle(living)
            self.observer.activity(f"round {number + 1} of {self.policy.rounds}")
            sampler.edge()
            for position, arm in enumerate(living):
                _guard(arm, partial(arm.sample, number, position))
        sampler.edge()

    def _store(self, fields: Fields, samples: Sequence[Fields], telemetry: Sequence[Fields] = ()) -> None:
        row = fields if fields["status"] == "ok" else without_performance(fields)
        self.run.append(row, samples, telemetry)
        self.observer.row(self.run.finished[row["cell_id"]])


class _Failed(Exception):
    """A failure that has become a status and a reason."""


def _guard(arm: Arm, act: Callable[[], None]) -> None:
    if arm.fields["status"] != "ok":
        return
    try:
        with _failures(arm.fields):
            act()
    except _Failed:
        arm.release()


@contextmanager
def _failures(fields: dict[str, Any]) -> Iterator[None]:
    """Turn whatever stops a cell into its status and reason; Ctrl-C is not the cell's."""
    try:
        yield
        return
    except Refused as error:
        fields |= {"status": error.status, "reason": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        fields |= {"status": "oom", "reason": _line(error)}
    except MeasureError as error:
        fields |= {"status": "invalid", "reason": str(error)}
    except Exception as error:
        out_of_memory = "can't allocate memory" in str(error) or "not enough memory" in str(error)
        fields |= {"status": "oom" if out_of_memory else "error", "reason": _line(error)}
    raise _Failed


def _line(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"


def _refuse_hopeless(cell: Cell) -> None:
    """Refuse a cell whose tensors cannot fit before a build drives the machine into swap or the OOM
    killer.
    """
    if cell.device == "cpu":
        free = psutil.virtual_memory().available
    else:
        free = torch.cuda.mem_get_info(torch.device(cell.device))[0]
    needed = least_bytes(cell)
    if needed > free:
        raise Refused("oom", f"needs at least {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
