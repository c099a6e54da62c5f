"""Sweeps that survive, from the command line: crashes, Ctrl-C once and twice, a full disk, a budget."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nsabench.commands import _execute
from nsabench.run import drive
from nsabench.store import Run

Call = Callable[..., Any]
Begin = Callable[..., "subprocess.Popen[str]"]
TheRun = Callable[[], Run]

PLANTED = """
import functools
from nsabench.commands import _execute
_execute.LocalExecutor = functools.partial(_execute.LocalExecutor, measure={measure!r})
"""
BY_LENGTH = PLANTED.format(measure="tests.nsabench.run.planted:by_length")


@pytest.fixture
def acts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What the worker does at which length, in place of measuring."""
    monkeypatch.setenv("PLANTED", str(folder))
    return lambda text: monkeypatch.setenv("PLANTED_ACTS", text)


def appears(path: Path) -> bool:
    for _ in range(2000):
        if path.exists():
            return True
        time.sleep(0.02)
    return False


def gone(pids: set[int]) -> bool:
    """Whether the processes end within a few seconds; what nobody waits for counts as ended."""
    for _ in range(300):
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        if all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in alive):
            return True
        time.sleep(0.02)
    return False


def lengths(run: Run) -> list[tuple[int, str]]:
    return [(row["S"], row["status"]) for row in run.rows]


def test_a_crash_and_a_hang_leave_a_complete_table(
    call_apart: Call, tiny: list[str], the_run: TheRun, acts: Callable[[str], None]
) -> None:
    acts("32=segfault,48=hang,64=leave")
    done = call_apart("decode", *tiny, "--S", "16:80:+16", "--timeout", "2s", before=BY_LENGTH)
    assert (done.code, done.err) == (1, "")
    assert lengths(the_run()) == [(16, "ok"), (32, "error"), (48, "hang"), (64, "error"), (80, "ok")]
    lines = done.out.splitlines()
    assert "S=32 B=1 auto: error: the worker was killed by SIGSEGV at ctypes/__init__.py" in lines[3]
    assert "S=48 B=1 auto: hang: no progress for 1 s, half of its limit of 2 s; it was at " in lines[4]
    assert "S=64 B=1 auto: error: the worker ended with exit code 3" in lines[5]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(
    begin: Begin,
    call: Call,
    tiny: list[str],
    the_run: TheRun,
    folder: Path,
    acts: Callable[[str], None],
    times: int,
) -> None:
    """Once finishes the cells in progress, twice does not; what is left can be measured by resume."""
    acts("32=wait")
    process = begin(["decode", *tiny, "--S", "16,32,48"], BY_LENGTH)
    assert appears(folder / "waiting")
    (worker,) = psutil.Process(process.pid).children()
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    said = process.stderr.readline()
    assert said == "nsabench: finishing the cells in progress; Ctrl-C again stops now\n"
    if times == 2:
        process.send_signal(signal.SIGINT)
    else:
        (folder / "go").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert gone({worker.pid})
    run = the_run()
    assert lengths(run) == [(16, "ok"), (32, "ok")][: 3 - times]
    assert err == (
        f"nsabench: interrupted; {3 - times} of 3 cells are finished and kept, "
        f"nsabench resume results/{run.run_id} goes on\n"
    )
    assert out.splitlines()[-1].startswith(f"{3 - times} of 3 cells ({3 - times} ok) in ")
    assert call("resume", str(run.path), "--no-plots").code == 0
    assert lengths(the_run()) == [(16, "ok"), (32, "ok"), (48, "ok")]


def test_ctrl_c_in_the_last_cells_changes_nothing(
    begin: Begin, tiny: list[str], the_run: TheRun, folder: Path, acts: Callable[[str], None]
) -> None:
    acts("32=wait")
    process = begin(["decode", *tiny, "--S", "16,32"], BY_LENGTH)
    assert appears(folder / "waiting")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    process.stderr.readline()
    (folder / "go").touch()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    assert lengths(the_run()) == [(16, "ok"), (32, "ok")]


def test_a_full_disk_ends_the_worker(
    begin: Begin, tiny: list[str], the_run: TheRun, folder: Path, acts: Callable[[str], None]
) -> None:
    acts("32=wait")
    full = """
import errno, os
import nsabench.store.runs
append = nsabench.store.runs.append
def full(path, data):
    if path.with_name("journal.jsonl").stat().st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return append(path, data)
nsabench.store.runs.append = full
"""
    process = begin(["decode", *tiny, "--S", "16,32,48"], BY_LENGTH + full)
    assert appears(folder / "waiting")
    (worker,) = psutil.Process(process.pid).children()
    (folder / "go").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "No space left on device; 1 finished cells are safe, resume to go on" in err
    assert err.count("\n") == 1
    assert gone({worker.pid})
    assert lengths(the_run()) == [(16, "ok")]


def test_a_machine_without_workers_is_exit_code_4(call_apart: Call, tiny: list[str], the_run: TheRun) -> None:
    done = call_apart("decode", *tiny, before=PLANTED.format(measure="nowhere:measure"))
    assert done.code == 4
    said = done.err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("nsabench: workers do not start here: the worker ended with exit code 1; ")
    assert said[0].endswith(
        "No module named 'nowhere'; 0 of 1 cells are finished and kept, "
        f"nsabench resume results/{the_run().run_id} goes on"
    )


def test_what_does_not_fit_into_the_budget_is_left_for_resume(
    call: Call, tiny: list[str], the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(drive, "_estimate", lambda policy: lambda group: 1.0 if group[0].S < 48 else 1e6)
        done = call("decode", *tiny, "--S", "32,48,64", "--budget", "60s")
    run = the_run()
    assert (done.code, done.err) == (0, "")
    assert lengths(run) == [(32, "ok")]
    left = f"left out: 2 cells (S 48, 64) do not fit into the budget; nsabench resume {Path('results')}"
    assert f"{left}/{run.run_id} measures them" in done.out.splitlines()
    done = call("resume", str(run.path), "--no-plots")
    assert done.code == 0
    assert "left out" not in done.out
    assert sorted(lengths(the_run())) == [(32, "ok"), (48, "ok"), (64, "ok")]


def test_in_process_starts_no_worker(
    call: Call, tiny: list[str], the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_execute, "LocalExecutor", None)
    assert call("decode", *tiny, "--in-process").code == 0
    assert call("resume", str(the_run().path), "--in-process", "--no-plots").code == 0


def test_a_run_keeps_its_tags(
    call: Call, tiny: list[str], the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_execute, "run_plan", lambda *given, **more: None)
    call("decode", *tiny, "--tag", "mine", "--tag", "quick")
    assert the_run().info["tags"] == ["mine", "quick"]
    assert the_run().info["suite"] is None
