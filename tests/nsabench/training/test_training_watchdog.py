from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nsabench.store.training import load_training, read_heartbeat
from nsabench.training import last_word, watchdog
from nsabench.training.heartbeat import KEPT, Heartbeat, Mark
from nsabench.training.last_word import heartbeat_file, last_sign, note_hang, now_file, stacks_file
from nsabench.training.loop import Trainer
from nsabench.training.observe import Observers
from nsabench.training.watchdog import EXIT_CODE, Watchdog, on_device
from tests.nsabench.training.small import RandomBytes, new_run, settings

ROOT = Path(__file__).resolve().parents[3]
NO_MODEL = nn.Module()


HANGS = ("data", "sleeping", "lock", "keeping")


@dataclass(frozen=True)
class Hung:
    """What a training that hung left: its exit code, its stderr, and its run."""

    code: int
    stderr: str
    run: Path


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hung]:
    """Trainings that hang, all at once."""
    folder = tmp_path_factory.mktemp("hung")
    command = [sys.executable, "-m", "tests.nsabench.training.hanging", str(folder), *HANGS]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    codes = dict(line.split() for line in ended.stdout.splitlines())
    found = {}
    for how in HANGS:
        (run,) = (folder / how).iterdir()
        found[how] = Hung(int(codes[how]), (folder / f"{how}.stderr").read_text(), run)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("how", "where", "frame"),
    [
        ("data", "step 3, data", "in batch"),
        ("sleeping", "step 3, forward: layer 0, win", "in sleeping_attention"),
        ("lock", "step 3, backward: gradient of layer 0", "in blocked_lock"),
    ],
)
def test_a_hang_is_ended_and_told(how: str, where: str, frame: str, hung: dict[str, Hung]) -> None:
    left = hung[how]
    assert left.code == EXIT_CODE
    found = load_training(left.run)
    assert found.info["status"] == "hang"
    reason = found.info["reason"]
    assert re.fullmatch(rf"no sign of life for \d+ s at {where}", reason)
    for text in ((left.run / stacks_file(0)).read_text(), left.stderr):
        assert text.startswith(f"{reason}\n")
        assert frame in text
        assert "in _watch" in text
    beat = found.heartbeat[-1]
    assert f"step {beat['step']}, {beat['stage']}" == where.partition(":")[0]
    assert [row["step"] for row in found.steps] == [1, 2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hang_that_keeps_the_interpreter_is_ended_and_told(hung: dict[str, Hung]) -> None:
    left = hung["keeping"]
    assert left.code == EXIT_CODE
    stacks = (left.run / stacks_file(0)).read_text()
    assert stacks.startswith("Timeout (")
    assert "in keeping_attention" in stacks
    until = time.monotonic() + 30
    while load_training(left.run).info["status"] == "running" and time.monotonic() < until:
        time.sleep(0.1)
    info = load_training(left.run).info
    assert info["status"] == "hang"
    assert info["reason"] == (
        "no sign of life since step 3, forward: layer 0, win; a call does not give the interpreter back"
    )


class Pack:
    """Heartbeats and watchdogs of ranks that share a folder, in one process; `ends` has what they ended."""

    def __init__(self, folder: Path, timeout_s: float, world: int = 1) -> None:
        self.ends: list[int] = []
        self.notes: list[tuple[str, str]] = []
        self.hearts = [Heartbeat(folder, rank=rank, inside=False, every_s=0) for rank in range(world)]
        self._dogs = [
            Watchdog(heart, timeout_s, self._note(rank), rank=rank, world=world, end=self._end(rank))
            for rank, heart in enumerate(self.hearts)
        ]
        for dog in self._dogs:
            dog.begin(NO_MODEL, 1)

    def _note(self, rank: int) -> Callable[[str, str], None] | None:
        return None if rank else lambda status, reason: self.notes.append((status, reason))

    def _end(self, rank: int) -> Callable[[int], None]:
        return lambda code: self.ends.append(rank)

    def until_all_ended(self) -> None:
        until = time.monotonic() + 60
        while len(self.ends) < len(self.hearts) and time.monotonic() < until:
            time.sleep(0.02)

    def close(self) -> None:
        for dog in self._dogs:
            dog.finish()


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Callable[..., Pack]]:
    packs: list[Pack] = []

    def make(*given: Any) -> Pack:
        packs.append(Pack(tmp_path, *given))
        return packs[-1]

    yield make
    for one in packs:
        one.close()


def test_what_is_slow_but_alive_is_not_ended(pack: Any) -> None:
    """Marks within one stage are life enough."""
    alive = pack(1.5)
    alive.hearts[0].stage("forward")
    until = time.monotonic() + 3
    while time.monotonic() < until:
        time.sleep(0.1)
        alive.hearts[0].mark("layer 0")
    assert alive.ends == []


def test_a_rank_that_waits_for_a_living_one_is_not_ended(pack: Any) -> None:
    alive = pack(1.5, 2)
    for heart in alive.hearts:
        heart.stage("eval")
    until = time.monotonic() + 3
    while time.monotonic() < until:
        time.sleep(0.1)
        alive.hearts[1].mark()
    assert alive.ends == []


def test_the_rank_that_stopped_first_is_named(
    pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GRACE_S", 2.0)
    stuck = pack(1.5, 2)
    stuck.hearts[1].begin_step(7)
    stuck.hearts[1].stage("data")
    time.sleep(0.3)
    stuck.hearts[0].begin_step(7)
    stuck.hearts[0].stage("backward")
    stuck.until_all_ended()
    assert stuck.ends == [0, 1], "the others wait until the first has stored the status"
    ((status, reason),) = stuck.notes
    assert status == "hang"
    assert reason.endswith(" at step 7, backward; rank 1 stopped first, at step 7, data")
    assert "at step 7, data" in (tmp_path / stacks_file(1)).read_text()


def test_a_training_that_hangs_before_its_first_mark(pack: Any) -> None:
    stuck = pack(0.5)
    stuck.until_all_ended()
    assert stuck.notes[0][1].endswith(" at the start")


def test_the_file_of_an_end_that_is_no_hang_is_removed(pack: Any, tmp_path: Path) -> None:
    alive = pack(60.0)
    assert (tmp_path / stacks_file(0)).read_text() == ""
    alive.close()
    assert not (tmp_path / stacks_file(0)).exists()


def test_heartbeats_of_a_training(tmp_path: Path) -> None:
    options = settings(steps=2)
    with new_run(tmp_path) as run:
        heart = Heartbeat(run.path, every_s=0)
        trainer = Trainer(options, RandomBytes(options), run, lambda trainer: Observers([heart]))
        trainer.train()
    beats = [(beat["step"], beat["stage"]) for beat in read_heartbeat(run.path)]
    stages = ["data", "forward", "backward", "optimizer"]
    assert list(dict.fromkeys(beats)) == [
        *((step, stage) for step in (1, 2) for stage in stages),
        (2, "checkpoint"),
    ]
    details = [mark.detail for mark in heart.marks if (mark.step, mark.stage) == (2, "forward")]
    inside = ["proj", "compress", "cmp", "score", "sel", "win", "gate", "proj"]
    assert details == [
        "",
        *(text for layer in (0, 1) for text in (f"layer {layer}", *(f"layer {layer}, {s}" for s in inside))),
    ]
    details = [mark.detail for mark in heart.marks if (mark.step, mark.stage) == (2, "backward")]
    assert details == ["", "gradient of layer 1", "gradient of layer 0"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


def test_the_file_of_heartbeats_stays_small(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, inside=False, every_s=1000)
    for step in range(1, 100):
        heart.begin_step(step)
        for stage in ("data", "forward"):
            heart.stage(stage)
    lines = (tmp_path / heartbeat_file(0)).read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["data", "forward"]
    assert (tmp_path / now_file(0)).read_text().strip() == "step 99, forward"
    heart.finish()
    heart.finish()
    assert not (tmp_path / now_file(0)).exists()
    sign = last_sign(tmp_path, 0)
    assert sign is not None
    assert sign.step == 99
    assert len((tmp_path / heartbeat_file(0)).read_text().splitlines()) == 3
    assert len(heart.marks) == KEPT


def test_a_half_written_heartbeat_is_no_sign(tmp_path: Path) -> None:
    assert last_sign(tmp_path, 1) is None
    path = tmp_path / heartbeat_file(1)
    path.write_text('{"t": "2026-')
    assert last_sign(tmp_path, 1) is None
    heart = Heartbeat(tmp_path, rank=1, inside=False)
    heart.begin_step(4)
    path.unlink()
    heart.stage("eval")
    with path.open("a") as file:
        file.write('{"t": "2026-')
    sign = last_sign(tmp_path, 1)
    assert sign is not None
    assert (sign.rank, sign.step, sign.stage) == (1, 4, "eval")
    assert 0 <= sign.age < 60


def test_only_a_hang_gets_a_last_word(tmp_path: Path) -> None:
    with closing(new_run(tmp_path)) as run:
        stacks = run.path / stacks_file(0)
        stacks.write_text("")
        Heartbeat(run.path, inside=False).stage("eval")
    note_hang(run.path)
    assert load_training(run.path).info["status"] == "running"
    stacks.write_text("Timeout (0:05:00)!\n")
    note_hang(run.path)
    info = load_training(run.path).info
    assert info["status"] == "hang"
    assert info["reason"].startswith("no sign of life since step 0, eval; ")
    with new_run(tmp_path, status="nan") as run:
        (run.path / stacks_file(0)).write_text("Timeout (0:05:00)!\n")
    note_hang(run.path)
    assert load_training(run.path).info["status"] == "nan"


def test_a_last_word_waits_for_the_lock_of_the_ended(tmp_path: Path) -> None:
    """The kernel closes the pipes of an ended process before it gives the process's locks back."""
    run = new_run(tmp_path)
    (run.path / stacks_file(0)).write_text("Timeout (0:05:00)!\n")
    Heartbeat(run.path, inside=False).stage("eval")
    command = [sys.executable, "-m", last_word.__name__, str(run.path)]
    beside = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        beside.wait(3)
    run.note(loss=1.5)
    run.close()
    assert beside.communicate(timeout=60) == (None, b"")
    info = load_training(run.path).info
    assert (info["status"], info["loss"]) == ("hang", 1.5)


def test_a_last_word_that_cannot_be_stored_is_told(tmp_path: Path) -> None:
    (tmp_path / stacks_file(0)).write_text("Timeout (0:05:00)!\n")
    command = [sys.executable, "-m", last_word.__name__, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.fullmatch(r"cannot store that the training hung: .* no run.*\n", ended.stderr), ended.stderr


class Event:
    def __init__(self, done: bool | None) -> None:
        self._done = done

    def query(self) -> bool:
        if self._done is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return self._done


def marks(*done: bool | None) -> list[Mark]:
    stages = ("proj", "sel", "win")
    return [
        Mark(0, 0, 5, "forward", f"layer 1, {stage}", Event(one))
        for stage, one in zip(stages, done, strict=True)
    ]


def test_how_far_the_device_came() -> None:
    assert on_device([Mark(0, 0, 5, "forward")]) == []
    assert on_device(marks(True, False, False)) == [
        "device: came to step 5, forward: layer 1, proj; what was queued after it runs or waits",
        "device: not yet at step 5, forward: layer 1, sel",
        "device: not yet at step 5, forward: layer 1, win",
    ]
    assert on_device(marks(True, True, True)) == [
        "device: has finished what was queued up to step 5, forward: layer 1, win"
    ]
    assert on_device(marks(False, False, False))[0].startswith("device: came to none of the marks kept")
    assert on_device(marks(True, None, True)) == [
        "device: CUDA error: an illegal memory access was encountered"
    ]


@pytest.mark.gpu
def test_on_a_gpu_the_device_is_asked(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, device="cuda", inside=False)
    heart.stage("forward")
    torch.cuda._sleep(2_000_000_000)
    heart.mark("layer 0, sel")
    (first, *rest) = on_device(list(heart.marks))
    assert first.startswith("device: came to step 0, forward; ")
    assert rest == ["device: not yet at step 0, forward: layer 0, sel"]
    torch.cuda.synchronize()
    assert on_device(list(heart.marks))[0].startswith("device: has finished")
