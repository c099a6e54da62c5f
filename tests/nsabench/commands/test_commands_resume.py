"""An interrupted run goes on where it stopped: no finished cell is repeated, none is lost."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.present.tables import cells_json
from nsabench.store import Run, RunDir, load_run
from nsabench.store.schema import SCHEMA_VERSION

Call = Callable[..., Any]
Begin = Callable[..., "subprocess.Popen[str]"]
TheRun = Callable[[], Run]


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def journal(path: Path) -> list[str]:
    return [json.loads(line)["cell_id"] for line in (path / "journal.jsonl").read_text().splitlines()]


def keep_cells(path: Path, count: int) -> None:
    """Make the run what it was when `count` cells were finished, and a write was cut short."""
    lines = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (path / "journal.jsonl").write_bytes(b"".join(lines[:count]) + lines[count][:40])


@pytest.fixture
def interrupted(folder: Path, finished: Path) -> Run:
    """Two lengths and two routes; three cells are finished."""
    path = shutil.copytree(finished, Path("results") / finished.name)
    keep_cells(path, 3)
    return load_run(path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    info = json.loads((path / "run.json").read_text())
    change(info)
    (path / "run.json").write_text(json.dumps(info))


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_repeats_and_loses_nothing(
    begin: Begin, folder: Path, tiny: list[str], the_run: TheRun
) -> None:
    sweep = ["decode", *tiny, "--S", "16:64:+8", "--routes", "auto;sel=reference", "--json", "--rounds", "2"]
    moments = random.Random(1)
    acknowledged: list[str] = []
    arguments = sweep
    for attempt in range(5):
        process = begin(arguments)
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(moments.randrange(2)):
            acknowledged.append(json.loads(process.stdout.readline())["cell_id"])
        if attempt % 2:
            process.stderr.readline()  # not before the run is open
        time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        rest = process.stdout.read()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        acknowledged += [json.loads(line)["cell_id"] for line in rest.splitlines() if line.endswith("}")]
        if (folder / "results").is_dir() and list((folder / "results").glob("[0-9]*")):
            run = the_run()
            stored = list(run.cells["cell_id"])
            assert set(acknowledged) <= set(stored)
            assert len(stored) == len(set(stored))
            arguments = ["resume", f"results/{run.run_id}", "--no-plots", "--json"]
    assert len(acknowledged) == len(set(acknowledged))

    process = begin(arguments)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    acknowledged += [json.loads(line)["cell_id"] for line in out.splitlines()]
    run = the_run()
    planned = [cell["route"] for cell in run.info["plan"]]
    assert len(planned) == 14
    assert [row["route"] for row in run.rows] == planned
    assert len(acknowledged) == len(set(acknowledged))
    assert journal(run.path) == list(run.cells["cell_id"])
    assert set(run.cells["status"]) == {"ok"}
    assert dict(run.samples.groupby("cell_id").size()) == dict.fromkeys(run.cells["cell_id"], 4)


def test_ctrl_c_in_a_real_sweep(
    begin: Begin, call: Call, folder: Path, tiny: list[str], the_run: TheRun
) -> None:
    process = begin(["decode", *tiny, "--S", "16:64:+8", "--json"])
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())["cell_id"]
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    run = the_run()
    done = [first, *(json.loads(line)["cell_id"] for line in rest.splitlines())]
    assert list(run.cells["cell_id"])[: len(done)] == done
    assert len(done) <= len(run.cells) <= min(len(done) + 1, 6)  # the signal may come before a row is printed
    assert re.fullmatch(
        rf"nsabench: interrupted; [{len(done)}{len(run.cells)}] of 7 cells are finished and kept, "
        rf"nsabench resume results/{run.run_id} goes on",
        err.splitlines()[-1],
    )


def test_a_run_goes_on_with_its_own_plan_and_settings(call: Call, interrupted: Run, the_run: TheRun) -> None:
    before = list(interrupted.cells["cell_id"])
    done = call("resume", str(interrupted.path), "--no-plots")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"resuming {interrupted.run_id}: 3 of 4 cells are finished"
    assert lines[1].startswith("[1/1] decode fwd S=64 B=1 sel=reference: ok, ")
    run = the_run()
    assert list(run.cells["cell_id"])[:3] == before
    assert run.rows[:3] == interrupted.rows
    assert [(row["S"], row["route"]) for row in run.rows] == [
        (cell["S"], cell["route"]) for cell in run.info["plan"]
    ]
    assert run.rows[3]["n_rounds"] == 6
    assert run.rows[3]["cache"] == "warm"


def test_cells_of_two_sessions_are_not_taken_for_interleaved(
    call: Call, interrupted: Run, the_run: TheRun
) -> None:
    assert call("resume", str(interrupted.path), "--no-plots").code == 0
    run = the_run()
    processes = run.samples.groupby("cell_id")["process"].unique()
    assert [list(processes[cell]) for cell in run.cells["cell_id"]] == [[0], [0], [0], [1]]
    speeds = [row["speed"] for row in cells_json(run.cells, run.samples)]
    assert speeds[1]["lo"] is not None
    assert speeds[3]["point"] > 0
    assert (speeds[3]["lo"], speeds[3]["n"]) == (None, 0)


@pytest.fixture
def complete(folder: Path, finished: Path) -> Run:
    return load_run(shutil.copytree(finished, Path("results") / finished.name))


def test_a_complete_run_is_left_as_it_is(call: Call, complete: Run) -> None:
    before = files(complete.path)
    done = call("resume", str(complete.path))
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"resuming {complete.run_id}: 4 of 4 cells are finished",
        f"results: {complete.path}",
        f"plots:   plots/{complete.run_id} (8 files)",
    ]
    assert files(complete.path) == before
    done = call("resume", str(complete.path), "--json", "--no-plots")
    assert (done.code, done.out) == (0, "")


def test_a_complete_run_may_be_looked_at_anywhere(call: Call, complete: Run) -> None:
    rewrite(complete.path, lambda info: info["environment"]["cpu"].update(model="Another CPU"))
    assert call("resume", str(complete.path), "--no-plots").code == 0


def test_a_complete_run_with_a_wrong_cell_still_fails(
    call: Call, tiny: list[str], the_run: TheRun, plant: Callable[..., None]
) -> None:
    plant("backends.sdpa:sliding_attention", lambda true, *given, **more: (true(*given, **more)[0] * 2, None))
    assert call("decode", *tiny, "--routes", "win=sdpa").code == 1
    assert call("resume", str(the_run().path), "--no-plots").code == 1


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("cpu", "model"), "Another CPU", "was begun with CPU 'Another CPU', here it is "),
        (("torch", "version"), "1.0", "was begun with torch '1.0', here it is "),
        (("torch", "threads"), 96, "was begun with torch threads 96, here it is 1; start a new run"),
        (("commit",), "0" * 40, f"was begun with commit '{'0' * 40}', here it is None; start a new run"),
        (("gpus",), [{"uuid": "GPU-1"}], "was begun with GPUs ['GPU-1'], here it is []; start a new run"),
        (("cpu",), None, "was begun with CPU None, here it is "),
    ],
)
def test_another_machine_is_refused_and_nothing_is_changed(
    call: Call, interrupted: Run, monkeypatch: pytest.MonkeyPatch, where: Any, value: Any, said: str
) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def change(info: dict[str, Any]) -> None:
        info["environment"]["torch"]["threads"] = 1
        tree = info["environment"]
        for name in where[:-1]:
            tree = tree[name]
        tree[where[-1]] = value

    rewrite(interrupted.path, change)
    before = files(interrupted.path)
    done = call("resume", str(interrupted.path))
    assert done.code == 2
    assert done.out == ""
    assert said in done.err
    assert done.err.count("\n") == 1
    assert files(interrupted.path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info.pop("plan"), "is damaged: run.json holds no plan to go on with"),
        (lambda info: info.update(plan=3), "is damaged: run.json holds no plan to go on with"),
        (lambda info: info.update(policy=None), "is damaged: run.json holds no plan to go on with"),
        (lambda info: info["plan"][0].pop("S"), "cell: S missing; needed: "),
        (lambda info: info["policy"].update(magic=1), "policy: unknown magic; known: "),
        (
            lambda info: info.update(schema_version=99),
            f"has schema 99; this nsabench reads {SCHEMA_VERSION}: upgrade nsabench",
        ),
        (lambda info: info.update(schema_version=1), "has schema 1, which can be read but not continued"),
        (lambda info: info.clear(), "is not a run: run.json is not nsabench's"),
    ],
)
def test_a_run_that_cannot_be_understood_is_refused_and_nothing_is_changed(
    call: Call, interrupted: Run, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    rewrite(interrupted.path, change)
    before = files(interrupted.path)
    done = call("resume", str(interrupted.path))
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert files(interrupted.path) == before


def test_a_damaged_journal_is_refused(call: Call, interrupted: Run) -> None:
    path = interrupted.path / "journal.jsonl"
    path.write_bytes(b"not json\n" + path.read_bytes())
    before = files(interrupted.path)
    done = call("resume", str(interrupted.path))
    assert done.code == 2
    assert "is damaged: line 1 of journal.jsonl" in done.err
    assert files(interrupted.path) == before


def test_a_run_that_is_being_written_is_refused(call: Call, interrupted: Run) -> None:
    with RunDir.open(interrupted.path):
        done = call("resume", str(interrupted.path))
    assert done.code == 2
    assert "is being written by another process (pid " in done.err


def test_a_folder_of_something_else_is_refused(call: Call, folder: Path) -> None:
    (folder / "run.json").write_text("{}")
    (folder / "keep").write_text("this")
    before = files(folder)
    done = call("resume", str(folder))
    assert done.code == 2
    assert done.err.endswith("is not a run: run.json is not nsabench's\n")
    assert files(folder) == before


def test_a_merged_run_is_not_continued(call: Call, interrupted: Run) -> None:
    other = shutil.copytree(interrupted.path, Path("other"))
    done = call("merge", str(interrupted.path), str(other), "--across", "--out", "merged")
    assert done.code == 0, done.err
    (merged,) = Path("merged").iterdir()
    done = call("resume", str(merged))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"nsabench: {merged} is merged from ")
    assert done.err.endswith("continue those, then merge\n")
