"""`suites/tune.py`: every kernel at every launch is checked before it is timed."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig

pytest.importorskip("triton")

from nsa.kernels._tiles import Launch
from nsa.kernels.work import Call

ROOT = Path(__file__).resolve().parents[3]
TINY = ["--dtype", "fp16", "--S", "40", "--heads", "2", "--groups", "2", "--dk", "16", "--rounds", "1"]


@pytest.fixture
def tuning() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "suites" / "tune.py"))


@pytest.mark.interpret
def test_every_kernel_is_right_at_another_launch(tuning: dict[str, Any], kernel_device: str) -> None:
    config = NSAConfig(2, 2, 16)
    prompt = tuning["Prompt"].drawn(config, 40, torch.float16, kernel_device, 0.9)
    for name, kernel in tuning["KERNELS"].items():
        asked: list[Launch] = []

        def choose(launch: Launch, *given: Any, choice: Any = kernel.choice, asked: Any = asked) -> Any:
            asked.append(launch)
            return choice(launch, *given)

        launch = Launch(*kernel.others[0], "")
        with replace(kernel, choice=choose).at(launch):
            assert tuning["fault"](kernel, prompt) == "", name
        assert set(asked) == {launch}, name


@pytest.mark.interpret
def test_launches_are_told_by_their_ratio(
    tuning: dict[str, Any], tmp_path: Path, kernel_device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning["KERNELS"]["win"] = replace(tuning["KERNELS"]["win"], others=((128, 64, 8, 2),))
    out = tmp_path / "rows.jsonl"
    arguments = [*TINY, "--device", kernel_device, "--kernels", "win", "--json", str(out)]
    assert tuning["main"](arguments) == 0
    own, other = (json.loads(line) for line in out.read_text().splitlines())
    assert (own["launch"], other["launch"]) == ("its own", "128x64, 8 warps, 2 stages")
    assert own["why"] == other["why"] == ""
    assert other["ratio"] == pytest.approx(other["ms"] / own["ms"])
    assert "ratio" not in own
    assert capsys.readouterr().out.count("\n") == 4


@pytest.mark.interpret
def test_a_wrong_launch_has_no_time(
    tuning: dict[str, Any], tmp_path: Path, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tuning["KERNELS"]["win"]

    def fail(prompt: Any) -> Any:
        raise RuntimeError("does not fit")

    for run, why in ((lambda prompt: kernel.run(prompt) + 1, "off by"), (fail, "RuntimeError: does not fit")):
        tuning["KERNELS"]["win"] = replace(kernel, run=run, others=())
        out = tmp_path / f"{len(why)}.jsonl"
        arguments = [*TINY, "--device", kernel_device, "--kernels", "win", "--json", str(out)]
        assert tuning["main"](arguments) == 1
        (row,) = [json.loads(line) for line in out.read_text().splitlines()]
        assert row["why"].startswith(why)
        assert "ms" not in row


@pytest.mark.interpret
def test_what_had_no_time_says_so(tuning: dict[str, Any], tmp_path: Path, kernel_device: str) -> None:
    tuning["KERNELS"]["win"] = replace(tuning["KERNELS"]["win"], others=())
    out = tmp_path / "rows.jsonl"
    arguments = [*TINY, "--device", kernel_device, "--kernels", "win", "--json", str(out), "--budget", "1ms"]
    assert tuning["main"](arguments) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["why"], "ms" in row) == ("no time left", False)


@pytest.mark.interpret
def test_a_launch_is_told_by_what_it_declares(tuning: dict[str, Any], kernel_device: str) -> None:
    config = NSAConfig(16, 1, 128)
    call, kernel = Call(config, 2048, 2048), tuning["KERNELS"]["union"]
    found = []
    for launch in (Launch(64, 64, 4, 3, ""), Launch(128, 64, 8, 2, "")):
        with kernel.at(launch):
            found.append(tuning["work_of"](kernel, call, torch.device("cpu")).l2_bytes)
    assert 1.3 < found[0] / found[1] < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--kernels win,selecetd", "--kernels: 'selecetd'; allowed: cmp, win, lse, scores, union, kv_outer"),
        ("--device cpu --S nothing", "--S: 'nothing'"),
        ("--device cpu --S 16", "--S"),
        ("--device cpu --budget soon", "'soon'"),
        ("--device cpu --rounds 0", "--rounds: at least 1, got 0"),
        ("--device cpu --heads 6 --groups 4", "num_heads"),
        ("--device moon", "moon"),
    ],
)
def test_bad_input(
    arguments: str, message: str, tuning: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tuning["main"](arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
