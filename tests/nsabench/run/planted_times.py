"""A measurement with made-up times that needs no torch, and an executor that needs no worker."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from nsabench.plan import Cell
from nsabench.run.executor import Began, Doing, Done, Event, Job, Over
from nsabench.run.policy import Policy
from nsabench.run.worker import DEVICE_LOST, Sink


def planted() -> dict[str, str]:
    """What each arm does, from ``PLANTED_TIMES``, as ``sdpa=1.4;dense=wrong;sdpa@1=oom``: its time in ms, or
    its status (``lost``: and the device with it), in every process or in that one; ``again`` is the arm that
    is its own control. ``noise`` is the standard deviation of the log of one time. ``load`` is what other
    processes used, in percent, and ``drop`` in how many first rounds the hardware slowed down, in every
    process or (``drop@1``) in that one.
    """
    return dict(part.split("=") for part in os.environ.get("PLANTED_TIMES", "").split(";") if part)


def name_of(cell: Cell) -> str:
    if cell.twin:
        return "again"
    return cell.impl if cell.impl != "nsa" else cell.route


def measure(
    cells: Sequence[Cell], policy: Policy, sink: Sink, *, process: int, clock: Callable[[], float]
) -> None:
    """One sample a round and cell, in a random order."""
    told = planted()
    shuffle = random.Random(f"{process} {cells[0].S}")
    noise = float(told.get("noise", 0.001))
    dropped = int(told.get(f"drop@{process}", told.get("drop", 0)))
    samples: dict[str, list[dict[str, Any]]] = {cell.cell_id: [] for cell in cells}
    sink.mark(None)
    sink.doing("round 1")
    for number in range(policy.rounds):
        order = list(cells)
        shuffle.shuffle(order)
        for position, cell in enumerate(order):
            what = told.get(name_of(cell), "1.0")
            ms = float(what) if what[0].isdigit() else 1.0
            place = {"process": process, "round": number, "position": position, "variant": "", "iters": 1}
            ms *= cell.S * shuffle.lognormvariate(0, noise)
            why = "hw_thermal" if number < dropped else ""
            samples[cell.cell_id].append(
                {**place, "ms": ms * (2 if why else 1), "t_s": clock(), "dropped": why}
            )
    for cell in cells:
        sink.mark(cell)
        name = name_of(cell)
        what = told.get(f"{name}@{process}", told.get(name, "1.0"))
        if what == "die":
            os._exit(3)
        if what == "lost":
            lost = {"status": "error", "reason": f"{DEVICE_LOST}: it has fallen off the bus"}
            sink.done(row_of(cell, process) | lost, samples[cell.cell_id])
            raise RuntimeError("good for nothing more")
        row = row_of(cell, process) | {"dropped_rounds": dropped}
        row["neighbour_load_pct"] = float(told.get(f"load@{process}", told.get("load", 0.0)))
        if not what[0].isdigit():
            row |= {"status": what, "reason": f"planted in process {process}"}
        elif dropped > 0.2 * policy.rounds:
            why = f"{dropped} of {policy.rounds} rounds dropped for hw_thermal; allowed 20 %"
            row |= {"status": "invalid", "reason": why}
        sink.done(row, samples[cell.cell_id])


def row_of(cell: Cell, process: int) -> dict[str, Any]:
    """A row as an arm leaves it, less what comes from the samples."""
    how = {"timer": "cpu", "regime": "latency", "cache": "warm", "flops": 4_000_000, "bytes": 2_000_000}
    memory = {"peak_alloc_bytes": 100 + process, "energy_j": 2.0, "max_abs_err": 1e-6 * (process + 1)}
    shares = {"share_sel_pct": 60.0 + 10 * (process % 2), "share_other_pct": 40.0 - 10 * (process % 2)}
    known = {"cell_id": cell.cell_id, "status": "ok", "reason": "", "canary_spread_pct": 0.5}
    return {**cell.to_dict(), **known, **how, **memory, **shares}


class _Collected:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None:
        self.events.append(Doing(0, text))

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.events.append(Done(0, row, samples, [{"t_s": 0.25, "power_w": 100.0}]))


class Executor:
    """Measures in this process, with made-up times; a second of made-up time for each process."""

    slots = ()

    def __init__(self, process: int, now: list[float]) -> None:
        self._process, self._now = process, now

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        for job in jobs:
            yield Began(0, job)
            collected = _Collected()
            measure(job.cells, job.policy, collected, process=self._process, clock=lambda: 0.5)
            self._now[0] += 1.0
            yield from collected.events
            yield Over(0, job, ())
