"""Killed at any moment, driver or worker: no finished cell is lost or measured again, no process is left."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nsabench.plan import Cell
from nsabench.run import Policy, run_plan
from nsabench.run.executor import LocalExecutor, Slot
from nsabench.store import RunDir, load_run

MakeCell = Callable[..., Cell]
CreateRun = Callable[[list[Cell]], RunDir]

ROOT = Path(__file__).resolve().parents[3]
KILLS = 50
SLOW = "tests.nsabench.run.planted:slow"

# What `nsabench resume` does, with cells that take ten milliseconds and need no torch.
DRIVER = """
import sys
sys.path[:] = {path!r}
from nsabench.plan import Cell
from nsabench.run import Policy, run_plan
from nsabench.run.executor import LocalExecutor, Slot
from nsabench.store import RunDir

class Teller:
    def begin(self, group, activity, worker=0): pass
    def activity(self, text, worker=0): pass
    def row(self, row, worker=0): print(row["cell_id"], flush=True)

with RunDir.open(sys.argv[1]) as run:
    cells = [Cell.from_dict(fields) for fields in run.info["plan"]]
    executor = LocalExecutor((Slot(0, frozenset(["cpu"])),), measure={measure!r}, process=int(sys.argv[2]))
    run_plan(cells, Policy(), run, Teller(), executor=executor)
print("complete", flush=True)
"""


def cells_of(make_cell: MakeCell, groups: int) -> list[Cell]:
    return [make_cell(S=8 * n, route=route) for n in range(1, groups + 1) for route in ("a", "b", "c")]


def none_left(pids: set[int]) -> bool:
    """Whether all of the processes end within a few seconds."""
    for _ in range(300):
        if not any(psutil.pid_exists(pid) and not is_zombie(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def is_zombie(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True


@pytest.mark.slow
def test_a_driver_killed_at_random_moments(make_cell: MakeCell, create_run: CreateRun) -> None:
    code = DRIVER.format(path=[str(ROOT), *sys.path], measure=SLOW)
    moments = random.Random(5)
    kills, runs = 0, 0
    while kills < KILLS:
        cells = cells_of(make_cell, 20)
        run = create_run(cells)
        run.close()
        shown: list[str] = []
        complete = False
        runs += 1
        for life in range(100):
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(run.path), str(life)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            if life < 8:
                time.sleep(moments.uniform(0.2, 0.9))
                workers = started_by(process.pid)
                process.kill()
                kills += 1
            told, _ = process.communicate(timeout=60)
            if life < 8:
                assert none_left(workers)
            lines = told.splitlines()
            complete = "complete" in lines
            shown += [line for line in lines if len(line) == 12]
            stored = list(load_run(run.path).cells["cell_id"])
            assert set(shown) <= set(stored)
            assert len(stored) == len(set(stored))
            if complete:
                break
        assert complete
        assert len(shown) == len(set(shown))
        check_complete(run.path, cells, {"ok"})
    assert runs > 1


def started_by(pid: int) -> set[int]:
    with suppress(psutil.NoSuchProcess):
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    return set()


@pytest.mark.slow
def test_a_worker_killed_at_random_moments(make_cell: MakeCell, create_run: CreateRun) -> None:
    cells = cells_of(make_cell, 1000)  # more than are measured while the killing lasts
    run = create_run(cells)
    moments = random.Random(6)
    killed: set[int] = set()
    over = threading.Event()
    in_a_row = 0

    def kill_now_and_then() -> None:
        nonlocal in_a_row
        while len(killed) < KILLS and not over.wait(moments.uniform(0.0, 0.4)):
            for worker in psutil.Process().children():
                # Three that do not even start would be taken for a broken machine.
                if worker.pid not in killed and in_a_row < 2:
                    in_a_row += 1
                    killed.add(worker.pid)
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()

    class Silent:
        def begin(self, group: list[Cell], activity: str, worker: int = 0) -> None: ...

        def activity(self, text: str, worker: int = 0) -> None: ...

        def row(self, row: dict[str, Any], worker: int = 0) -> None:
            nonlocal in_a_row
            in_a_row = 0

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        executor = LocalExecutor((Slot(0, frozenset({"cpu"})),), measure=SLOW)
        run_plan(cells, Policy(), run, Silent(), executor=executor, stop=lambda: not killer.is_alive())
    finally:
        over.set()
        killer.join()
    run.close()
    assert len(killed) >= KILLS
    assert none_left(killed)
    assert psutil.Process().children(recursive=True) == []
    measured = cells[: len(run.finished)]
    assert 0 < len(measured) < len(cells)
    assert len(measured) % 3 == 0
    stored = check_complete(run.path, measured, {"ok", "error"})
    broken = stored.cells[stored.cells["status"] == "error"]
    assert 0 < len(broken) <= len(killed)
    assert set(broken["reason"]) == {"the worker was killed by SIGKILL"}
    assert stored.samples["process"].nunique() > KILLS / 2


def check_complete(path: Path, cells: list[Cell], statuses: set[str]) -> Any:
    """One row for each cell, one sample for each good one."""
    stored = load_run(path)
    assert sorted(stored.cells["cell_id"]) == sorted(cell.cell_id for cell in cells)
    assert set(stored.cells["status"]) <= statuses
    good = stored.cells[stored.cells["status"] == "ok"]
    assert sorted(stored.samples["cell_id"]) == sorted(good["cell_id"])
    return stored
