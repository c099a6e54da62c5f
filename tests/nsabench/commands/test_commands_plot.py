"""Figures from stored files alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.store import Run, load_run

Call = Callable[..., Any]
TheRun = Callable[[], Run]

NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, NoTorch())
"""


@pytest.fixture
def run(folder: Path, finished: Path) -> Run:
    return load_run(shutil.copytree(finished, Path("results") / finished.name))


def test_figures_of_a_run(call: Call, run: Run, folder: Path) -> None:
    done = call("plot", str(run.path), "--out", "drawn")
    assert (done.code, done.err) == (0, "")
    figures = ("decode-time", "decode-memory", "decode-speed", "telemetry")
    names = [f"{what}.{kind}" for what in figures for kind in ("png", "svg")]
    assert done.out.splitlines() == [f"drawn/{run.run_id}/{name}" for name in names]
    for name in names:
        start = (folder / "drawn" / run.run_id / name).read_bytes()[:8]
        assert start == (b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<?xml ve")


def test_one_format(call: Call, run: Run, folder: Path) -> None:
    assert call("plot", str(run.path), "--formats", " svg").code == 0
    assert {path.suffix for path in (folder / "plots").rglob("*.*") if path.is_file()} == {".svg"}


def test_two_runs_share_figures(call: Call, run: Run, folder: Path) -> None:
    other = folder / "results" / "other"
    shutil.copytree(run.path, other)
    for file in ("run.json", "journal.jsonl", "samples.csv"):
        (other / file).write_text((other / file).read_text().replace(run.run_id, "another-" + run.run_id[8:]))
    done = call("plot", str(run.path), str(other), "--formats", "svg")
    assert done.code == 0
    assert done.out.splitlines()[0] == f"plots/{run.run_id}+another-{run.run_id[8:]}/decode-time.svg"


def test_it_needs_neither_torch_nor_the_machine(call_apart: Call, run: Run, folder: Path) -> None:
    done = call_apart("plot", str(run.path), "--formats", "png", before=NO_TORCH)
    assert (done.code, done.err) == (0, "")
    assert len(list((folder / "plots" / run.run_id).iterdir())) == 4


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["plot", "--help"], ["decode", "--help"]])
def test_help_needs_no_torch(call_apart: Call, arguments: list[str]) -> None:
    assert call_apart(*arguments, before=NO_TORCH).code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--formats", "gif"], "format is 'gif'; allowed: png, svg"),
        (["--formats", ""], "format is ''; allowed: png, svg"),
        (["--out", "/dev/null/plots"], "cannot write /dev/null/plots/"),
    ],
)
def test_what_cannot_be_drawn_or_written(call: Call, run: Run, arguments: list[str], said: str) -> None:
    done = call("plot", str(run.path), *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_run_with_nothing_to_draw(call: Call, tiny: list[str], the_run: TheRun, folder: Path) -> None:
    assert call("decode", *tiny, "--S", "1048576m").code == 3
    done = call("plot", str(the_run().path))
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert not os.path.exists("plots")
