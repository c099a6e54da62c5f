"""Functions for a worker to measure with that need no torch: each cell does what its route says."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nsabench.plan import Cell
from nsabench.run import worker
from nsabench.run.worker import Sink

PRINTED_BYTES = 4 * 2**20


def folder() -> Path:
    """Where a cell leaves what a test looks at."""
    return Path(os.environ["PLANTED"])


def row_of(cell: Cell, status: str = "ok", reason: str = "") -> dict[str, Any]:
    return {**cell.to_dict(), "cell_id": cell.cell_id, "status": status, "reason": reason}


def measure(
    cells: Sequence[Cell], policy: object, sink: Sink, *, process: int, clock: Callable[[], float]
) -> None:
    for cell in cells:
        sink.mark(cell)
        sink.doing(f"measuring {cell.route}")
        at = clock()
        ACTS.get(cell.route.partition(":")[0], lambda cell, sink: None)(cell, sink)
        sample = {"round": 0, "position": 0, "variant": "", "iters": 1, "ms": 1.0, "t_s": at}
        sink.done(row_of(cell), [{"process": process, **sample}])
        if cell.route == "mark-after":
            (folder() / "after").touch()


def by_length(
    cells: Sequence[Cell], policy: object, sink: Sink, *, process: int, clock: Callable[[], float]
) -> None:
    """As `measure`, but a cell does what PLANTED_ACTS names for its length, as ``64=hang,96=leave``."""
    acts = dict(pair.split("=") for pair in os.environ.get("PLANTED_ACTS", "").split(",") if pair)
    for cell in cells:
        sink.mark(cell)
        sink.doing(f"measuring {cell.S}")
        ACTS.get(acts.get(str(cell.S), ""), lambda cell, sink: None)(cell, sink)
        sink.done({**row_of(cell), "ms_total": 1.0})


def slow(
    cells: Sequence[Cell], policy: object, sink: Sink, *, process: int, clock: Callable[[], float]
) -> None:
    """As `measure`, ten milliseconds a cell."""
    for cell in cells:
        time.sleep(0.01)
        measure([cell], policy, sink, process=process, clock=clock)


def broken_build(
    cells: Sequence[Cell], policy: object, sink: Sink, *, process: int, clock: Callable[[], float]
) -> None:
    """Die before any cell is at fault more than another."""
    sink.mark(None)
    os.abort()


def tell_driver(cells: Sequence[Cell], policy: object, sink: Sink, **more: Any) -> None:
    """Say which process this one measures for."""
    sink.doing(f"driver {worker.driver()}")
    sink.done(row_of(cells[0]))


def forgetful(cells: Sequence[Cell], policy: object, sink: Sink, **more: Any) -> None:
    """Return without a row for the last cell."""
    for cell in cells[:-1]:
        sink.mark(cell)
        sink.done(row_of(cell))


def lost_device(cells: Sequence[Cell], policy: object, sink: Sink, **more: Any) -> None:
    """Hand on the row of a cell, then find that this process is good for nothing more."""
    sink.mark(cells[0])
    bad = cells[0].route == "lost"
    sink.done(row_of(cells[0], "error", "illegal memory access") if bad else row_of(cells[0]))
    if bad:
        raise RuntimeError("the device was lost")
    for cell in cells[1:]:
        sink.mark(cell)
        sink.done(row_of(cell))


def _segfault(cell: Cell, sink: Sink) -> None:
    print("about to read address 0")
    ctypes.string_at(0)


def _killed(cell: Cell, sink: Sink) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(cell: Cell, sink: Sink) -> None:
    os._exit(3)


def _raise(cell: Cell, sink: Sink) -> None:
    raise ValueError("planted")


def _hang(cell: Cell, sink: Sink) -> None:
    (folder() / "hanging").touch()
    time.sleep(1000)


def _hang_with_the_interpreter(cell: Cell, sink: Sink) -> None:
    _fork_sleeping(cell, sink)
    (folder() / "hanging").touch()
    ctypes.PyDLL(None).sleep(1000)


def _crawl(cell: Cell, sink: Sink) -> None:
    while True:
        sink.mark(cell)
        time.sleep(0.01)


def _flood(cell: Cell, sink: Sink) -> None:
    line = "flood " * 100 + "\n"
    for _ in range(PRINTED_BYTES // len(line)):
        sys.stdout.write(line)
    os.write(2, b"the last line\n")


def _flood_and_leave(cell: Cell, sink: Sink) -> None:
    _flood(cell, sink)
    os._exit(1)


def _fork(cell: Cell, sink: Sink) -> None:
    """Both sides go on as if they were the worker."""
    os.fork()


def _fork_sleeping(cell: Cell, sink: Sink) -> None:
    child = os.fork()
    if not child:
        time.sleep(1000)
    (folder() / "child").write_text(str(child))


def _fork_and_leave(cell: Cell, sink: Sink) -> None:
    _fork_sleeping(cell, sink)
    os._exit(4)


def _mute(cell: Cell, sink: Sink) -> None:
    """Close both ends of what is printed to."""
    os.close(1)
    os.close(2)
    time.sleep(0.3)


def _wait(cell: Cell, sink: Sink) -> None:
    """Say so, and wait until told to go on."""
    (folder() / "waiting").touch()
    while not (folder() / "go").exists():
        time.sleep(0.01)


def _meet(cell: Cell, sink: Sink) -> None:
    """Wait until the other one is here, too."""
    (folder() / cell.device).touch()
    while len(list(folder().glob("cuda:*"))) < 2:
        time.sleep(0.01)


def _meet_alone(cell: Cell, sink: Sink) -> None:
    """As `_meet`, by the GPU that this worker sees."""
    (folder() / f"sees-{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    while len(list(folder().glob("sees-*"))) < 2:
        time.sleep(0.01)


ACTS: dict[str, Callable[[Cell, Sink], None]] = {
    "segfault": _segfault,
    "killed": _killed,
    "leave": _leave,
    "raise": _raise,
    "hang": _hang,
    "hang-with-the-interpreter": _hang_with_the_interpreter,
    "crawl": _crawl,
    "flood": _flood,
    "flood-and-leave": _flood_and_leave,
    "fork": _fork,
    "fork-sleeping": _fork_sleeping,
    "fork-and-leave": _fork_and_leave,
    "mute": _mute,
    "wait": _wait,
    "meet": _meet,
    "meet-alone": _meet_alone,
}
