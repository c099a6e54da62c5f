"""`nsabench compare`: sides, runs, exit codes; times are made up by workers that need no torch."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nsabench.store.runs
from nsabench.commands import _contest
from nsabench.commands._compare_options import part_of_one
from nsabench.plan import PlanError
from nsabench.run import comparison
from nsabench.run.executor import LocalExecutor, WorkerError
from nsabench.store import Run, load_run

Call = Callable[..., Any]
TheRun = Callable[[], Run]

MEASURE = "tests.nsabench.run.planted_times:measure"
SHAPE = "--device cpu --S 64 --dim 32 --heads 2 --groups 1 --dk 8 --l 8 --d 4 --l-sel 8 --n-sel 4 --w 16"
ARGUMENTS = [*SHAPE.split(), "--rounds", "8", "--budget", "1s", "--no-plots"]


NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, NoTorch())
"""


@pytest.fixture
def compare(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`nsabench compare` with the made-up times of its first argument."""
    monkeypatch.setattr(_contest, "LocalExecutor", functools.partial(LocalExecutor, measure=MEASURE))

    def run(times: str, *arguments: str) -> Any:
        monkeypatch.setenv("PLANTED_TIMES", times)
        return call("compare", *ARGUMENTS, *arguments)

    return run


def test_two_routes(compare: Call, the_run: TheRun) -> None:
    done = compare("sdpa=1.41;noise=0.001", "auto", "sdpa", "--tag", "nightly")
    assert (done.code, done.err) == (0, "")
    run = the_run()
    lines = done.out.splitlines()
    assert lines[0] == (
        "prefill on cpu, 1 shape: timer cpu, latency, warm cache; at least 3 processes of 8 rounds, until "
        "each interval is within 0.5 % or 1 s are spent"
    )
    assert lines[1] == "[1/1] S=64 auto, sdpa: 3 processes, 3 ok"
    assert lines[2] == f"results: results/{run.run_id}"
    assert lines[-1] == "sdpa is SLOWER than auto by 41 %"
    told = run.info["comparison"]
    assert told["groups"] == [[row["cell_id"] for row in run.rows]]
    assert {k: v for k, v in told.items() if k != "groups"} == {
        "sides": ["auto", "sdpa"],
        "delta": 0.01,
        "correct": "bh",
        "width": 0.005,
        "processes": 3,
        "budget_s": 1.0,
    }
    assert (run.info["name"], run.info["tags"], run.info["policy"]["settle"]) == (
        "compare",
        ["nightly"],
        True,
    )
    assert (run.info["policy"]["shares"], run.info["policy"]["alone"]) == (False, False)
    assert [(row["route"], row["twin"]) for row in run.rows] == [("auto", 0), ("sdpa", 0), ("auto", 1)]
    assert sorted(run.samples["process"].unique()) == [0, 1, 2]


def test_one_comparison_for_each_shape(compare: Call, the_run: TheRun) -> None:
    done = compare("dense=0.5;noise=0.001", "auto", "dense", "--S", "32,64", "--processes", "1")
    assert done.code == 0
    assert len(the_run().rows) == 6
    assert done.out.splitlines()[-1].startswith("dense over 2 shapes: 0.50")


def test_json_is_one_object_a_verdict(compare: Call) -> None:
    done = compare("sdpa=2;dense=0.5;noise=0.001", "auto", "sdpa", "dense", "--processes", "1", "--json")
    assert [(one["side"], one["verdict"]) for one in done.rows] == [("sdpa", "SLOWER"), ("dense", "FASTER")]
    first = done.rows[0]
    assert first["ratio"]["lo"] < first["ratio"]["point"] < first["ratio"]["hi"]
    assert (first["shape"]["S"], first["paired"], first["said"]) == (
        64,
        True,
        "sdpa is SLOWER than auto by 100 %",
    )
    assert "sdpa" in done.err


@pytest.mark.parametrize(
    ("times", "fail_if", "code"),
    [
        ("sdpa=1.4", None, 0),
        ("sdpa=1.4", "slower", 1),
        ("sdpa=1.4", "faster", 0),
        ("sdpa=1.4", "different", 1),
        ("sdpa=0.6", "slower", 0),
        ("sdpa=0.6", "faster", 1),
        ("sdpa=0.6", "different", 1),
        ("sdpa=1.0", "different", 0),
        ("sdpa=1.0;noise=0.2", "different", 3),
        ("sdpa=wrong", None, 3),
        ("auto=wrong", "slower", 3),
        ("sdpa=1.4;again=1.1", "slower", 3),
    ],
)
def test_exit_codes(compare: Call, times: str, fail_if: str | None, code: int) -> None:
    wanted = [] if fail_if is None else ["--fail-if", fail_if]
    times = times if "noise" in times else f"{times};noise=0.0005"
    assert compare(times, "auto", "sdpa", "--processes", "1", *wanted).code == code


def test_too_few_rounds_are_inconclusive(compare: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MOST_PROCESSES", 1)
    done = compare("sdpa=1.4", "auto", "sdpa", "--processes", "1", "--rounds", "5")
    assert done.code == 3
    assert done.out.splitlines()[-1] == "sdpa beside auto: INCONCLUSIVE, 5 rounds give no interval; 6 do"


def test_a_verdict_beside_other_processes_is_none(compare: Call, the_run: TheRun) -> None:
    done = compare("sdpa=0.4;load=4;load@1=52", "auto", "sdpa", "--json", "--fail-if", "faster")
    (one,) = done.rows
    assert (done.code, one["verdict"]) == (3, "INVALID")
    assert one["why"] == "other processes used 52 % of the cores"
    assert [row["neighbour_load_pct"] for row in the_run().rows] == [52.0] * 3


def test_some_load_is_told_with_the_verdict(compare: Call) -> None:
    done = compare("sdpa=1.4;load=14;noise=0.001", "auto", "sdpa", "--json")
    (one,) = done.rows
    assert (done.code, one["verdict"]) == (0, "SLOWER")
    assert one["why"].endswith("; other processes used 14 % of the cores")
    assert "cores" not in compare("sdpa=1.4;load=9;noise=0.001", "auto", "sdpa", "--json").rows[0]["why"]


def test_each_process_waits_for_quiet_within_the_budget(compare: Call, the_run: TheRun) -> None:
    compare("sdpa=1.4;noise=0.001", "auto", "sdpa", "--processes", "1")
    assert the_run().info["policy"]["quiet_s"] == _contest.WAITED * 1.0


def test_dropped_rounds_are_told_and_too_many_are_invalid(compare: Call, the_run: TheRun) -> None:
    done = compare("sdpa=1.4;drop@0=1;noise=0.001", "auto", "sdpa")
    assert done.code == 0
    assert "1 of 24 rounds dropped for hw_thermal" in done.out
    assert done.out.splitlines()[-1] == "sdpa is SLOWER than auto by 40 %"
    assert [row["dropped_rounds"] for row in the_run().rows] == [1] * 3


def test_a_gpu_that_slows_down_too_often_gives_no_verdict(compare: Call, the_run: TheRun) -> None:
    done = compare("sdpa=1.4;drop=2;noise=0.001", "auto", "sdpa", "--json")
    assert (done.code, done.rows[0]["verdict"]) == (3, "INVALID")
    assert done.rows[0]["why"] == ("auto is invalid: 6 of 24 rounds dropped for hw_thermal; allowed 20 %")
    assert {row["status"] for row in the_run().rows} == {"invalid"}
    assert len(the_run().samples) == 72


def test_a_device_that_disappears_is_exit_code_4(compare: Call, the_run: TheRun) -> None:
    lost = ";".join(f"{arm}@{process}=lost" for arm in ("auto", "sdpa", "again") for process in range(3, 9))
    done = compare(f"sdpa=1.4;noise=0.001;{lost}", "auto", "sdpa", "--S", "32,64")
    run = the_run()
    why = "the device was lost: it has fallen off the bus"
    assert (done.code, done.err) == (
        4,
        f"nsabench: none can be measured any more: {why}; "
        f"what was measured is kept in results/{run.run_id}\n",
    )
    assert [row["status"] for row in run.rows] == ["ok"] * 3 + ["error"] * 3
    assert {row["reason"] for row in run.rows[3:]} == {why}
    assert "sdpa is SLOWER than auto by 40 %" in done.out


def test_a_side_that_breaks_the_device_costs_itself(compare: Call, the_run: TheRun) -> None:
    done = compare("dense=lost;sdpa=1.4;noise=0.001", "auto", "dense", "sdpa", "--json")
    assert (done.code, [one["verdict"] for one in done.rows]) == (0, ["INVALID", "SLOWER"])
    assert done.rows[0]["why"] == "dense is error: the device was lost: it has fallen off the bus"


def test_a_full_disk_is_exit_code_4_and_keeps_what_is_safe(
    compare: Call, the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, written = nsabench.store.runs.append, []

    def full(path: Path, data: bytes) -> int:
        written.append(path.name)
        if written.count("cells.csv") == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(path, data)

    monkeypatch.setattr(nsabench.store.runs, "append", full)
    done = compare("sdpa=1.4;noise=0.001", "auto", "sdpa", "--S", "32,64", "--processes", "1")
    assert done.code == 4
    assert done.err.endswith("No space left on device; 3 finished cells are safe\n")
    assert [(row["S"], row["status"]) for row in the_run().rows] == [(32, "ok")] * 3


def test_an_arm_beside_itself_is_never_faster_or_slower(compare: Call) -> None:
    done = compare("noise=0.001", "auto", "auto", "--processes", "2", "--json")
    assert [(one["first"], one["side"], one["verdict"]) for one in done.rows] == [("auto", "auto #2", "SAME")]


def test_a_worker_that_dies_costs_its_side_alone(compare: Call, the_run: TheRun) -> None:
    done = compare("dense@0=die;sdpa=1.5;noise=0.001", "auto", "sdpa", "dense", "--json")
    assert [(one["side"], one["verdict"]) for one in done.rows] == [("sdpa", "SLOWER"), ("dense", "INVALID")]
    assert "dense is error: the worker ended with exit code 3" in done.rows[1]["why"]
    sdpa = next(row for row in the_run().rows if row["route"] == "sdpa")
    assert sdpa["status"] == "ok"


def test_a_machine_that_fails_is_exit_code_4(
    compare: Call, the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(LocalExecutor):
        def run(self, jobs: Any) -> Any:
            if next(self._numbers) >= 1:
                raise WorkerError("workers do not start here: no reason")
            return LocalExecutor(self.slots, measure=MEASURE).run(jobs)

    monkeypatch.setattr(_contest, "LocalExecutor", Broken)
    done = compare("", "auto", "sdpa", "--S", "32,64", "--processes", "1")
    run = the_run()
    assert done.code == 4
    assert done.err == (
        f"nsabench: workers do not start here: no reason; what was measured is kept in results/{run.run_id}\n"
    )
    assert [row["status"] for row in run.rows] == ["ok"] * 3 + ["error"] * 3
    assert "INVALID" in done.out


def test_the_same_cell_in_two_comparisons_is_measured_in_both(compare: Call, the_run: TheRun) -> None:
    sides = ("auto", "auto,S=128", "--allow-different-work")
    assert compare("noise=0.001", *sides, "--S", "32,64", "--processes", "1").code == 0
    assert [(row["S"], row["twin"]) for row in the_run().rows] == [
        (32, 0),
        (128, 0),
        (32, 1),
        (64, 0),
        (128, 1),
        (64, 1),
    ]


def test_the_forest_is_drawn_and_drawn_again(
    call: Call, compare: Call, the_run: TheRun, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.nsabench.commands.test_commands_compare.ARGUMENTS", ARGUMENTS[:-1])
    done = compare("sdpa=1.4", "auto", "sdpa", "--processes", "1")
    run = the_run()
    assert done.out.splitlines()[-1] == f"plots:   plots/{run.run_id} (2 files)"
    assert (folder / "plots" / run.run_id / "compare.png").stat().st_size > 1000
    assert f"again/{run.run_id}/compare.png" in call("plot", str(run.path), "--out", "again").out.splitlines()


def test_a_comparison_is_never_resumed(call: Call, compare: Call, the_run: TheRun) -> None:
    compare("", "auto", "sdpa", "--processes", "1")
    done = call("resume", str(the_run().path))
    assert done.code == 2
    assert done.err.endswith("is a comparison, which is never resumed: measure it anew\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["auto"], "compare needs at least two sides, got 1"),
        (["auto", "sdpaa"], "side 'sdpaa': "),
        (
            ["auto", "dytpe=bf16"],
            "side 'dytpe=bf16': 'dytpe' cannot differ between sides; did you mean dtype?",
        ),
        (["auto", "S=128"], "the sides do different work: S is 64 and 128; --allow-different-work"),
        (["auto", "fa2"], "side 'fa2' cannot run here: "),
        (["auto", "dk=7", "--allow-different-work"], "side 'dk=7': dk is 7, odd"),
        (["auto", "groups=3", "--allow-different-work"], "side 'groups=3': "),
        (["auto", "selection=chance"], "selection is 'chance'; allowed: natural, random, overlap=X"),
        (
            ["auto", "passes=bwd", "--phase", "decode", "--allow-different-work"],
            "side 'passes=bwd': decode has only fwd, batched",
        ),
        (["auto", "sdpa", "--phase", "train"], "--phase: 'train' is unknown; allowed: prefill, decode"),
        (["auto", "sdpa", "--phase", "decode", "--passes", "bwd"], "--passes: decode has only fwd"),
        (["auto", "sdpa", "--delta", "1"], "--delta: '1' is not allowed; allowed: 1% or 0.01"),
        (["auto", "sdpa", "--width", "wide"], "--width: 'wide' is not allowed"),
        (["auto", "sdpa", "--processes", "21"], "--processes: '21' is not allowed; allowed: 1 to 20"),
        (["auto", "sdpa", "--processes", "0"], "--processes: '0' is too small"),
        (["auto", "sdpa", "--correct", "none"], "--correct: 'none' is unknown; allowed: bh, holm"),
        (
            ["auto", "sdpa", "--fail-if", "slow"],
            "--fail-if: 'slow' is unknown; allowed: slower, faster, different",
        ),
        (["auto", "sdpa", "--across-machines"], "--across-machines: only with the folders of two runs"),
        (["auto", "results/gone"], "side 'results/gone' is neither a route nor the folder of a run"),
        (["auto", "sdpa", "--tag", "two words"], "--tag: 'two words'"),
    ],
)
def test_bad_usage_is_one_line_and_measures_nothing(
    compare: Call, folder: Path, arguments: list[str], said: str
) -> None:
    done = compare("", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not (folder / "results").exists()


@pytest.fixture
def runs(folder: Path, finished: Path) -> tuple[Path, Path]:
    """Two runs of one plan; the second a thousand times as slow: no noise of this machine hides that."""
    old = Path(shutil.copytree(finished, Path("results") / finished.name))
    new = Path(shutil.copytree(finished, Path("results") / "new"))
    for file in ("run.json", "cells.csv", "samples.csv"):
        (new / file).write_text((new / file).read_text().replace(finished.name, "20990101T000000Z-new"))
    lines = (new / "samples.csv").read_text().splitlines()
    place = lines[0].split(",").index("ms")
    slower = [line.split(",") for line in lines[1:]]
    text = [",".join([*row[:place], str(1000 * float(row[place])), *row[place + 1 :]]) for row in slower]
    (new / "samples.csv").write_text("\n".join([lines[0], *text]) + "\n")
    (new / "journal.jsonl").unlink()
    return old, new


def change(run: Path, what: Callable[[dict[str, Any]], None]) -> None:
    info = json.loads((run / "run.json").read_text())
    what(info)
    (run / "run.json").write_text(json.dumps(info))


def test_two_runs_are_unpaired(call: Call, runs: tuple[Path, Path], folder: Path) -> None:
    change(runs[1], lambda info: info["environment"].update(commit="f" * 40))
    done = call("compare", *map(str, runs), "--fail-if", "slower", "--json")
    assert done.code == 1
    assert len(done.rows) == 4
    assert {one["verdict"] for one in done.rows} == {"SLOWER"}
    assert all(one["why"].startswith("UNPAIRED; ") and not one["paired"] for one in done.rows)
    assert done.err.startswith("UNPAIRED: ")
    (drawn,) = (folder / "plots").iterdir()
    assert {file.name for file in drawn.iterdir()} == {"compare.png", "compare.svg"}
    assert len(list((folder / "results").iterdir())) == 2


def test_runs_of_two_machines_are_refused_unless_asked_for(call: Call, runs: tuple[Path, Path]) -> None:
    change(runs[1], lambda info: info["environment"]["cpu"].update(model="another"))
    done = call("compare", *map(str, runs), "--no-plots")
    assert (done.code, done.out) == (2, "")
    assert "differ in CPU: " in done.err
    assert done.err.endswith("--across-machines compares them\n")
    assert call("compare", *map(str, runs), "--no-plots", "--across-machines").code == 0
    change(runs[1], lambda info: info.update(environment=None))
    assert "do not both say where they were measured" in call("compare", *map(str, runs), "--no-plots").err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["auto"], "is a run and 'auto' is none; compare two runs, or sides to measure"),
        (["RUN"], "compare takes two runs, got 3"),
        (["--S", "64"], "--S: not with the folders of runs, which are compared as they are"),
        (["--l-sel", "64"], "--l-sel: not with the folders of runs"),
        (["--budget", "1s"], "--budget: not with the folders of runs"),
        (["--shares"], "--shares: not with the folders of runs"),
        (["--tag", "x"], "--tag: not with the folders of runs"),
        (["--phase", "decode"], "--phase: not with the folders of runs"),
        (["--allow-different-work"], "--allow-different-work: not with the folders of runs"),
    ],
)
def test_what_runs_cannot_be_asked(call: Call, runs: tuple[Path, Path], more: list[str], said: str) -> None:
    given = [str(runs[0]) if word == "RUN" else word for word in more]
    done = call("compare", *map(str, runs), *given)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_runs_need_no_torch(call_apart: Call, runs: tuple[Path, Path]) -> None:
    done = call_apart("compare", *map(str, runs), "--no-plots", before=NO_TORCH)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02), (" 99.9% ", 0.999)]
)
def test_percent(text: str, value: float) -> None:
    assert part_of_one(text, "--delta") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "0", "100%", "1", "-1%", "nan", "inf", "1%%"])
def test_what_is_no_percent(text: str) -> None:
    with pytest.raises(PlanError, match="--delta: "):
        part_of_one(text, "--delta")


def test_a_comparison_that_is_truly_measured(call_apart: Call, the_run: TheRun) -> None:
    arguments = [*SHAPE.split(), "--rounds", "6", "--processes", "1", "--budget", "1s", "--sample-ms", "0.5"]
    done = call_apart("compare", "auto", "dense", "auto,dtype=fp64", *arguments, "--no-plots", "--shares")
    assert done.code in (0, 3), done.err
    run = the_run()
    assert [row["status"] for row in run.rows] == ["ok"] * 4
    assert all(row["canary_spread_pct"] is not None and row["aa_lo"] is not None for row in run.rows)
    for row in (run.rows[0], run.rows[-1]):
        measured = all(row[f"ms_{stage}"] is not None for stage in ("proj", "sel", "other"))
        # Beside other work an instrumented step may take twice as long as a timed one: then the row says so.
        assert measured or "the instrumented step took" in row["shares_note"]
    assert load_run(run.path).info["comparison"]["sides"] == ["auto", "dense", "auto,dtype=fp64"]
