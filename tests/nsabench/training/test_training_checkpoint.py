"""Checkpoints: exact resume, and files that are whole whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsabench.plan import PlanError
from nsabench.plan.training import Settings, resumed
from nsabench.store import DiskError, StoreError
from nsabench.training import checkpoint as module
from nsabench.training.checkpoint import (
    Checkpoint,
    check_fits,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    path_of,
    remove_unfinished,
    save_checkpoint,
)
from nsabench.training.loop import Trainer
from nsabench.training.observe import Observer
from tests.nsabench.training.small import RandomBytes, new_run, settings

SIZE = 300_000


def state(step: int = 1, **given: Any) -> Checkpoint:
    """A checkpoint that is large enough to be written in several pieces."""
    content: dict[str, Any] = {
        "settings": settings().to_dict(),
        "data": "",
        "model": {"weight": torch.full((SIZE,), float(step))},
        "optimizer": {},
        "scaler": {},
        "overflows": 0,
        "rng": [],
        "observers": {},
    }
    return Checkpoint(step=step, **{**content, **given})


def weight_of(path: Path) -> float:
    return float(load_checkpoint(path).model["weight"].unique())


class Draws(Observer):
    """Draws from torch's generator in each step, and keeps a count of its own."""

    def __init__(self) -> None:
        self.drawn: list[float] = []
        self.count = 0
        self.losses: list[float] = []

    def begin_step(self, step: int) -> None:
        self.count += 1
        self.drawn.append(float(torch.rand(())))

    def after_step(self, step: int, loss: float, stats: Any) -> None:
        self.losses.append(loss)

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def train(
    wanted: Settings, folder: Path, start: Path | None = None, change: Callable[[Trainer], object] = id
) -> tuple[Draws, Trainer]:
    draws, run = Draws(), new_run(folder)
    with run:
        found = None if start is None else load_checkpoint(start)
        trainer = Trainer(wanted, RandomBytes(wanted), run, observers=lambda made: draws, start=found)
        change(trainer)
        assert trainer.train().status == "ok"
    return draws, trainer


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"precision": "bf16", "accumulate": 2},
        {"precision": "fp16", "compress": "mlp"},
        {"mode": "stepwise", "S": 12, "layers": 1},
    ],
    ids=["fp32", "bf16", "fp16", "stepwise"],
)
def test_a_resumed_training_goes_on_bit_for_bit(tmp_path: Path, given: dict[str, Any]) -> None:
    wanted = settings(steps=6, lr=1e-2, warmup=2, checkpoint_every=3, keep=9, **given)

    def skips_a_step(trainer: Trainer) -> None:
        if wanted.precision == "fp16":
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**34)

    whole, first = train(wanted, tmp_path / "whole", change=skips_a_step)
    assert first.run is not None
    middle = path_of(first.run.path, 3)
    torch.manual_seed(99)
    rest, second = train(wanted, tmp_path / "rest", middle)
    assert second.run is not None
    assert rest.losses == whole.losses[3:]
    assert rest.drawn == whole.drawn[3:]
    assert rest.count == whole.count == 6
    assert second.overflows == first.overflows
    assert (wanted.precision == "fp16") == (first.overflows > 0)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name
    assert first.scaler.state_dict() == second.scaler.state_dict()
    ends = [load_checkpoint(path_of(one.run.path, 6)) for one in (first, second) if one.run is not None]
    for a, b in zip(*(end.optimizer["state"].values() for end in ends), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_the_last_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert checkpoints_in(tmp_path) == [path_of(tmp_path, 3), path_of(tmp_path, 4)]
    assert find_checkpoint(tmp_path) == path_of(tmp_path, 4)
    assert find_checkpoint(path_of(tmp_path, 3)) == path_of(tmp_path, 3)


def test_a_future_that_was_given_up_is_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, state(step), keep=9)
    save_checkpoint(tmp_path, state(3), keep=1)
    assert checkpoints_in(tmp_path) == [path_of(tmp_path, 3)]


def fails_to_replace(*paths: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fails_to_write(content: Any, file: Any) -> None:
    file.write(b"half")
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0") from error


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [(module.os, "replace", fails_to_replace), (module.torch, "save", fails_to_write)],
    ids=["replace", "write"],
)
def test_a_full_disk_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, fault: Any
) -> None:
    save_checkpoint(tmp_path, state(1))
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fault)
        with pytest.raises(
            DiskError, match=r"cannot write .*checkpoint-000000002.pt: No space left on device"
        ):
            save_checkpoint(tmp_path, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000001.pt"]
    assert weight_of(find_checkpoint(tmp_path)) == 1.0


KILLED = """
import os, signal, sys, io, pathlib
from pathlib import Path
from tests.nsabench.training.test_training_checkpoint import SIZE, save_checkpoint, state

folder, where = Path(sys.argv[1]), sys.argv[2]
save_checkpoint(folder, state(1))
kill = lambda *ignored: os.kill(os.getpid(), signal.SIGKILL)
if where == "rename":
    os.replace = kill
else:
    whole = pathlib.Path.open

    class Dies(io.FileIO):
        def write(self, data):
            done = super().write(bytes(data)[:4096])
            if self.tell() > SIZE:  # a quarter of the weights
                kill()
            return done

    pathlib.Path.open = lambda path, mode: io.BufferedWriter(Dies(path, "w")) if mode == "wb" else whole(path)
print("writing", flush=True)
save_checkpoint(folder, state(2))
"""


@pytest.mark.parametrize("where", ["write", "rename"])
def test_kill_9_leaves_the_one_before(tmp_path: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), where], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "writing\n", "")
    left = tmp_path / ".checkpoint-000000002.pt.new"
    size = left.stat().st_size
    assert (size > SIZE and size < 2 * SIZE) if where == "write" else size > 4 * SIZE
    assert checkpoints_in(tmp_path) == [path_of(tmp_path, 1)]
    assert weight_of(find_checkpoint(tmp_path)) == 1.0
    remove_unfinished(tmp_path)
    assert not left.exists()
    save_checkpoint(tmp_path, state(2))
    assert weight_of(find_checkpoint(tmp_path)) == 2.0


@pytest.mark.parametrize("size", [0, 10, 5000, SIZE])
def test_a_torn_file_is_said_to_be_damaged(tmp_path: Path, size: int) -> None:
    path = save_checkpoint(tmp_path, state())
    os.truncate(path, size)
    with pytest.raises(StoreError, match=r"checkpoint-000000001.pt is damaged or no checkpoint"):
        load_checkpoint(path)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Runs()}, tmp_path / "bad.pt")
    with pytest.raises(StoreError, match=r"bad.pt is damaged or no checkpoint"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no checkpoint to go on from"):
        find_checkpoint(tmp_path)
    with pytest.raises(StoreError, match="neither a run's folder nor a checkpoint"):
        find_checkpoint(tmp_path / "none")
    for content, why in (
        ({"a": 1}, "is no checkpoint of nsabench train"),
        ([1], "is no checkpoint of nsabench train"),
        ({"format": 7}, "has format 7; this nsabench reads 1"),
        ({"format": 1}, "is damaged: it has no 'step'"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(StoreError, match=why):
            load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"dim": 64}, "--dim: is 64, and .* was written with 32"),
        ({"route": "sel=off"}, "--routes: is 'sel=off', and .* was written with 'auto'"),
        ({"lr": 1.0}, "--lr: is 1.0, and .* was written with 0.001"),
        ({"world": 2}, "--nproc-per-node: is 2, and .* was written with 1"),
        ({"steps": 2}, "--steps: 2 is less than what is done already: .* is of step 3"),
    ],
)
def test_other_settings_are_named(given: dict[str, Any], why: str) -> None:
    wanted = settings(steps=9)
    checkpoint = state(3, settings=wanted.to_dict())
    check_fits(checkpoint, settings(steps=9, keep=4, stats=False), "", Path("c.pt"))
    with pytest.raises(PlanError, match=why):
        check_fits(checkpoint, settings(**{"steps": 9, **given}), "", Path("c.pt"))


def test_other_data_is_named() -> None:
    wanted = settings(data="text.txt")
    checkpoint = replace(state(1, settings=wanted.to_dict()), data="abc")
    check_fits(checkpoint, wanted, "abc", Path("c.pt"))
    with pytest.raises(PlanError, match=r"--data: text.txt has other content than what c.pt was trained on"):
        check_fits(checkpoint, wanted, "xyz", Path("c.pt"))


def test_another_shape_is_named_and_changes_nothing() -> None:
    model = torch.nn.Linear(2, 3)
    before = model.weight.detach().clone()
    for weights, why in (
        (
            {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)},
            r"is \(3, 4\), this model's is \(3, 2\)",
        ),
        ({"weight": torch.zeros(3, 2)}, "it has no bias"),
        ({**model.state_dict(), "scale": torch.zeros(1)}, "it has a foreign scale"),
    ):
        with pytest.raises(StoreError, match=why):
            load_weights(model, weights, Path("c.pt"))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            {"lr": 0.5},
            "--lr: is 0.5, and R was trained with 0.001; leave it out to go on, or begin",
        ),
        ({"l_sel": 16}, "--l-sel: is 16, and R was trained with 8"),
        ({"steps": 9}, "--steps: is 9, and R was trained with 3, on which its cosine schedule depends"),
        ({"device": "cuda"}, "--device: is 'cuda', and R was trained with 'cpu'"),
    ],
)
def test_a_resumed_training_keeps_its_options(given: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        resumed(settings(), given, "R")


def test_a_resumed_training_may_change_what_is_not_learned() -> None:
    stored = settings(schedule="constant")
    found = resumed(stored, {"steps": 9, "keep": 3, "lr": 0.001, "hang_timeout": 0.0}, "R")
    assert (found.steps, found.keep, found.hang_timeout) == (9, 3, 0.0)
    assert found.model == stored.model
    with pytest.raises(PlanError, match="--steps: is 2, and R was trained with 3; allowed: more steps"):
        resumed(stored, {"steps": 2}, "R")
    assert Settings.of(stored.to_dict()) == stored
