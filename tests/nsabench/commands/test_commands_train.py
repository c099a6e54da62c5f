"""`nsabench train`: what it stores and shows, how it is interrupted and goes on, and what it refuses."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nsabench.commands import _train, _train_job
from nsabench.commands._train_options import LearnOptions, ModelOptions, StateOptions, WatchOptions
from nsabench.commands._train_options import settings_given as given_by
from nsabench.commands._train_view import TrainView, duration
from nsabench.store.training import Training, load_training
from nsabench.training import checkpoint, precision
from nsabench.training.checkpoint import checkpoints_in, load_checkpoint
from nsabench.training.loop import _stopped
from nsabench.training.observe import StepStats
from tests.nsabench.training.small import settings

MODEL = "--dim 16 --layers 1 --heads 2 --groups 1 --dk 8 --dv 8 --l 8 --d 4 --l-sel 8 --n-sel 2 --w 8"
HOW = "--device cpu --S 24 --batch 16 --warmup 2 --hang-timeout 0"
SMALL = [*MODEL.split(), *HOW.split()]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def text(folder: Path) -> str:
    (folder / "text.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    return "text.txt"


@pytest.fixture
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_train, "evaluate", lambda *given: [])


@pytest.fixture
def train(call: Any, text: str) -> Callable[..., Any]:
    """`nsabench train` on a small text."""
    return lambda *more: call("train", "--data", text, *SMALL, *more)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], object]) -> None:
    """Have something happen at the end of a step."""
    after_step = TrainView.after_step

    def then(view: TrainView, step: int, loss: float, stats: StepStats) -> None:
        after_step(view, step, loss, stats)
        if step == number:
            do()

    monkeypatch.setattr(TrainView, "after_step", then)


def the_training(folder: Path, out: str = "results") -> Training:
    (path,) = (folder / out).iterdir()
    return load_training(path)


def learned(training: Training) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in training.steps]


def test_a_training_is_stored_and_shown(train: Any, folder: Path) -> None:
    done = train("--steps", "3", "--tag", "why", "--evaluate-every", "2")
    assert (done.code, done.err) == (0, "")
    training = the_training(folder)
    info = training.info
    assert (info["kind"], info["name"], info["tags"]) == ("train", "train", ["why"])
    assert (info["status"], info["reason"], info["settings"]["S"]) == ("ok", "", 24)
    assert info["settings"]["weight_decay"] == 0.1  # as texts have it by default
    assert info["parameters"] > 1000
    assert [row["step"] for row in training.steps] == [1, 2, 3]
    assert info["summary"]["loss"] == training.steps[-1]["loss"]
    assert sorted({row["step"] for row in training.evaluation}) == [2, 3]
    assert {row["route"] for row in training.evaluation} == {"auto", "sel=off", "cmp=off", "win=off"}
    assert {row["branch"] for row in training.routes if row["calls"]} == {"cmp", "score", "sel", "win"}
    assert [path.name for path in checkpoints_in(training.path)] == ["checkpoint-000000003.pt"]
    assert training.heartbeat[0]["stage"] == "data"
    for words in (
        f"{info['parameters']:,} parameters",
        "step 1/3: loss ",
        "step 3/3: loss ",
        "evaluation after step 3",
        "gates after step 1",
        "passed over",
        f"results: {training.path.relative_to(folder)}",
    ):
        assert words in done.out, words


@pytest.mark.parametrize(("flag", "shared"), [("--shared-kv", True), ("--separate-kv", False)])
def test_keys_and_values_are_shared_or_not(train: Any, folder: Path, flag: str, shared: bool) -> None:
    done = train("--steps", "1", "--data", "synthetic", "--S", "110", "--n-local", "1", "--no-stats", flag)
    assert (done.code, done.err) == (0, "")
    assert the_training(folder).info["settings"]["shared_kv"] is shared


def test_json_is_one_object(train: Any, folder: Path, unjudged: None) -> None:
    done = train("--steps", "1", "--json", "--no-stats")
    (found,) = done.rows
    assert (done.code, found["status"], found["settings"]["stats"]) == (0, "ok", False)
    assert found["summary"]["loss"] == the_training(folder).steps[0]["loss"]
    assert found["summary"]["gates"] == []
    assert "step 1/1" in done.err


def test_ctrl_c_leaves_a_checkpoint_and_a_resumed_run_goes_on(
    train: Any, call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--steps", "5", "--out", "whole").code == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        done = train("--steps", "5")
    path = the_training(folder).path.relative_to(folder)
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        f"nsabench: interrupted after step 2; nsabench train --resume {path} goes on"
    )
    stopped = the_training(folder)
    assert (stopped.info["status"], stopped.evaluation) == ("interrupted", [])
    assert len(stopped.steps) == 2

    done = call("train", "--resume", str(path))
    assert (done.code, done.err) == (0, "")
    assert f"goes on after step 2, from {path}/checkpoint-000000002.pt" in done.out
    whole, rest = the_training(folder, "whole"), the_training(folder)
    assert learned(rest) == learned(whole)
    assert [row["calls"] for row in rest.routes] == [row["calls"] for row in whole.routes]
    assert rest.info["status"] == "ok"
    assert [one["step"] for one in rest.info["resumed"]] == [2]
    names = ("step", "what", "route", "accuracy")
    judged = [[[row[name] for name in names] for row in one.evaluation] for one in (rest, whole)]
    assert judged[0] == judged[1]

    before = {file: file.read_bytes() for file in rest.path.iterdir() if file.name != ".lock"}
    done = call("train", "--resume", str(path))
    assert (done.code, done.err) == (0, "")
    assert "nothing left to do: all 5 steps are done" in done.out
    assert before == {file: file.read_bytes() for file in rest.path.iterdir() if file.name != ".lock"}


KILL = """
import os, signal
from nsabench.commands import _train
from nsabench.commands._train_view import TrainView
def dies(view, step, loss, stats):
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
TrainView.after_step = dies
"""


def test_a_run_that_was_killed_goes_on(
    train: Any, call: Any, call_apart: Any, folder: Path, text: str, unjudged: None
) -> None:
    """Rows behind the last checkpoint are written again, and are the same."""
    assert train("--steps", "5", "--out", "whole").code == 0
    arguments = ["train", "--data", text, *SMALL, "--steps", "5", "--checkpoint-every", "2"]
    done = call_apart(*arguments, before=KILL)
    assert done.code == -signal.SIGKILL
    killed = the_training(folder)
    assert (killed.info["status"], len(killed.steps)) == ("running", 4)
    assert [path.name for path in checkpoints_in(killed.path)] == ["checkpoint-000000002.pt"]
    assert call("train", "--resume", str(killed.path)).code == 0
    assert learned(the_training(folder)) == learned(the_training(folder, "whole"))


def test_a_full_disk_leaves_the_last_checkpoint(
    train: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, unjudged: None
) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "checkpoint-000000004.pt":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", full)
    done = train("--steps", "5", "--checkpoint-every", "2")
    training = the_training(folder)
    assert done.code == 4
    assert done.err.splitlines()[-1].endswith("checkpoint-000000004.pt: No space left on device")
    assert training.info["status"] == "error"
    assert [path.name for path in checkpoints_in(training.path)] == ["checkpoint-000000002.pt"]
    assert load_checkpoint(checkpoints_in(training.path)[0]).step == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--data none.txt", "--data: none.txt does not exist"),
        ("--data empty.txt", "--data: empty.txt is empty"),
        ("--S 4k", "--data: text.txt has 1800 bytes"),
        ("--data synthetic --n-local 1 --S 8", "--S: 8 is too short for the synthetic task"),
        ("--S 1k --batch 0", "--batch: '0' is too small"),
        ("--steps x", "--steps: 'x' is not a whole number"),
        ("--lr fast", "--lr: 'fast' is not a number"),
        ("--lr 0", "--lr: 0.0 is not allowed; it must be a number above 0"),
        ("--lr nan", "--lr: nan is not allowed"),
        ("--precision fp8", "--precision: 'fp8' is unknown; allowed: fp32, bf16, fp16"),
        ("--mode chunked=4", "--mode: 'chunked=4' is unknown; allowed: batched, stepwise"),
        ("--mode stepwise --grad-checkpoint", "--grad-checkpoint: not with --mode stepwise"),
        ("--schedule linear", "--schedule: 'linear' is unknown"),
        ("--routes auto;sdpa", "--routes: a training takes one route, got 2"),
        ("--routes magic", "--routes: unknown route 'magic'"),
        ("--routes fa2", "--routes: cmp=fa2,sel=fa2,win=fa2 cannot train here: cmp=fa2: needs a CUDA GPU"),
        ("--routes cpp", "cannot train here: cmp=cpp: computes no gradient"),
        ("--device cuda:7", "--device: 'cuda:7'"),
        ("--heads 3 --groups 2", "heads"),
        ("--dk 7", "--dk: 7 is odd"),
        ("--n-initial 1 --n-local 2", "--n-sel: 2 is too few for the 1 first and 2 latest blocks"),
        ("--rope 0.5", "--rope: 0.5 is not allowed; allowed: 0 for none, or a base above 1"),
        ("--gate hard", "--gate: 'hard' is unknown; allowed: sigmoid, softmax"),
        ("--compress max", "--compress: 'max' is unknown; allowed: mean, conv, mlp"),
        ("--hang-timeout soon", "--hang-timeout: 'soon' is not a length of time"),
        ("--resume nowhere", "nowhere is neither a run's folder nor a checkpoint"),
        ("--replay nowhere", "--data: not with --replay, which repeats a step as it was"),
        ("--save-selection text.txt", "--save-selection: text.txt exists; name another file"),
        ("--tag two&words", "--tag: 'two&words'; allowed: words of"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(train: Any, folder: Path, arguments: str, why: str) -> None:
    (folder / "empty.txt").touch()
    done = train("--lr", "1e-3", *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert why in done.err
    assert done.err.count("\n") == 1
    assert not (folder / "results").exists()


def test_a_precision_that_cannot_run_is_refused(
    train: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(wanted: Any) -> None:
        raise RuntimeError('"addmm_impl_cpu_" not implemented for Half')

    monkeypatch.setattr(precision, "_small_step", refuses)
    done = train("--precision", "fp16")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        'nsabench: --precision: fp16 cannot run on this CPU: "addmm_impl_cpu_" not implemented for Half\n'
    )
    assert not (folder / "results").exists()


def test_compiling_needs_a_compiler(train: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_train_job.shutil, "which", lambda name: None)
    done = train("--compile")
    assert (done.code, done.err) == (
        2,
        "nsabench: --compile: torch.compile needs a C++ compiler on a CPU, and there is no g++ here\n",
    )


def test_a_compiler_that_fails_is_said_in_a_line() -> None:
    failing = type("CppCompileError", (Exception,), {"__module__": "torch._inductor.exc"})
    end = _stopped(1, failing("C++ compile error\n" + "g++ " * 500), settings(compile=True))
    assert (end.status, end.reason[:60]) == (
        "error",
        "--compile: torch.compile failed in step 1: C++ compile error g"[:60],
    )
    assert len(end.reason) < 400


@pytest.fixture
def stopped(train: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert train("--steps", "3").code == 130
    return the_training(folder).path


def test_a_resumed_run_refuses_other_options(
    stopped: Path, call: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {file: file.read_bytes() for file in stopped.iterdir()}
    for arguments, why in (
        ("--dim 32", "--dim: is 32, and R was trained with 16; leave it out to go on"),
        ("--routes sel=off", "--routes: is 'sel=off', and R was trained with 'auto'"),
        ("--steps 9", "--steps: is 9, and R was trained with 3, on which its cosine schedule depends"),
        ("--data synthetic", "--data: is 'synthetic', and R was trained with 'text.txt'"),
    ):
        done = call("train", "--resume", str(stopped), *arguments.split())
        assert (done.code, done.out) == (2, "")
        assert why.replace("R", str(stopped), 1) in done.err
        assert done.err.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        done = call("train", "--resume", str(stopped))
    assert (done.code, done.out) == (2, "")
    assert "--nproc-per-node: is 2, and" in done.err
    assert "torchrun --nproc-per-node 1" in done.err
    (folder / "text.txt").write_text("something else " * 99)
    done = call("train", "--resume", str(stopped))
    assert (done.code, done.out) == (2, "")
    assert "--data: text.txt has other content than what" in done.err
    assert content == {file: file.read_bytes() for file in stopped.iterdir()}


def test_a_checkpoint_of_another_run_is_refused(stopped: Path, call: Any, train: Any, folder: Path) -> None:
    assert train("--steps", "2", "--dim", "32", "--out", "wide").code == 0
    (wide,) = checkpoints_in(the_training(folder, "wide").path)
    foreign = stopped / wide.name
    foreign.write_bytes(wide.read_bytes())
    done = call("train", "--resume", str(stopped))
    assert (done.code, done.out) == (2, "")
    assert f"--dim: is 16, and {foreign} was written with 32" in done.err
    foreign.write_bytes(b"torn")
    done = call("train", "--resume", str(stopped))
    assert f"{foreign} is damaged or no checkpoint" in done.err
    # The one before is named to go on from it.
    done = call("train", "--resume", str(checkpoints_in(stopped)[0]))
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in checkpoints_in(stopped)] == ["checkpoint-000000003.pt"]


def test_a_nan_ends_it_and_can_be_repeated(
    train: Any, call: Any, folder: Path, plant: Any, unjudged: None
) -> None:
    def bug(true: Any, *given: Any, **more: Any) -> Any:
        o, lse = true(*given, **more)
        return o * math.nan, lse

    plant("backends.sdpa:sliding_attention", bug)
    done = train("--steps", "3")
    training = the_training(folder)
    assert done.code == 1
    assert (training.info["status"], training.steps) == ("nan", [])
    assert checkpoints_in(training.path) == []
    assert "layer 0, win, forward" in training.info["reason"]
    assert training.info["reason"] in done.err
    done = call("train", "--replay", str(training.path / "replay.pt"))
    assert done.code == 1
    assert "layer 0, win, forward" in done.out.splitlines()[-1]
    assert done.out.splitlines()[-1].endswith("(the same place)")
    done = call("train", "--replay", str(training.path / "replay.pt"), "--json")
    assert (done.code, done.rows[0]["same"], done.rows[0]["step"]) == (1, True, 1)


HANG = """
import time
from nsabench.training.loop import Objective
def hangs(*given):
    time.sleep(300)
Objective.forward = hangs
"""


def test_a_hang_ends_it(call_apart: Any, folder: Path, text: str) -> None:
    began = time.monotonic()
    done = call_apart("train", "--data", text, *SMALL, "--hang-timeout", "1", before=HANG)
    assert done.code == 1
    assert time.monotonic() - began < 100
    training = the_training(folder)
    assert training.info["status"] == "hang"
    assert "step 1, forward" in training.info["reason"]
    assert "in hangs" in (training.path / "stacks.txt").read_text()


def test_a_selection_is_saved(train: Any, folder: Path, unjudged: None) -> None:
    done = train("--steps", "1", "--save-selection", "blocks.npz")
    assert (done.code, done.err) == (0, "")
    assert (folder / "blocks.npz").stat().st_size > 100
    assert "selection: blocks.npz (" in done.out


def test_switches_of_an_earlier_code_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(**learn: str) -> dict[str, Any]:
        return given_by(LearnOptions(**learn), ModelOptions(), StateOptions(), WatchOptions())

    monkeypatch.setenv("NSA_DETECT_ANOMALY", "1")
    monkeypatch.setenv("NSA_DISABLE_AUX_STATS", "true")
    monkeypatch.setenv("NSA_WIN_FORCE_DENSE", "1")
    monkeypatch.setenv("NSA_PREFILL_BATCHED", "0")
    assert given() == {}
    assert given(routes="env", mode="env") == {
        "route": "win=sdpa",
        "mode": "stepwise",
        "detect_anomaly": True,
        "stats": False,
    }


def test_a_bar_on_a_terminal() -> None:
    screen = io.StringIO()
    view = TrainView(Console(file=screen, force_terminal=True, width=100, color_system=None), steps=10)
    view.begin(None, 4)
    view.after_step(4, 2.5, StepStats(2.5, 1.0, 1e-3, 12345.6, 0.1, overflows=2))
    view.finish()
    assert "4/10" in screen.getvalue()
    assert "loss 2.5000, 12,346 tokens/s" in screen.getvalue()
    assert "left, 2 overflows" in screen.getvalue()
    assert [duration(seconds) for seconds in (0.4, 59.6, 125, 7509)] == ["0s", "1m00s", "2m05s", "2h05m"]


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    page, now = io.StringIO(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    view = TrainView(Console(file=page, width=40), steps=100)
    view.begin(None, 1)
    for step in range(1, 101):
        now[0] += 1.0
        view.after_step(step, 1 / step, StepStats(1 / step, 1.0, 1e-3, 1000.0, 1.0))
    lines = page.getvalue().splitlines()
    assert lines[0] == "step 1/100: loss 1.0000, 1,000 tokens/s, 1m39s left"
    assert lines[-1] == "step 100/100: loss 0.0100, 1,000 tokens/s, 0s left"
    assert len(lines) == 11


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nsabench", "--version"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "nsabench")


def test_bad_usage_on_several_ranks_is_said_once(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        done = train("--data", "none.txt")
        assert (done.code, done.out) == (2, "")
        said.append(done.err)
    assert said == ["nsabench: --data: none.txt does not exist; allowed: synthetic, or a file\n", ""]


@pytest.mark.slow
def test_torchrun_trains_and_stores_once(folder: Path, text: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Behind "--", because torchrun would take --l and --d for options of its own.
    command = [*torchrun, "-m", "--", "nsabench", "train", "--data", text, *SMALL]
    done = subprocess.run(
        [*command, "--routes", "score=chunked", "--steps", "2", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    (found,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (found["status"], found["settings"]["world"]) == ("ok", 2)
    training = the_training(folder)
    assert [row["step"] for row in training.steps] == [1, 2]
    assert (training.path / "heartbeat.rank1.jsonl").exists()
    (last,) = checkpoints_in(training.path)
    assert len(load_checkpoint(last).rng) == 2
