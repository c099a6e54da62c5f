"""The command line, called in this process or in one of its own, in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import nsa.refusals
from nsabench.cli import app
from nsabench.commands import _execute
from nsabench.run import Policy
from nsabench.store import Run, load_run

ROOT = Path(__file__).resolve().parents[3]

SHAPE = "--device cpu --S 64 --dim 32 --heads 2 --groups 1 --dk 8 --l 8 --d 4 --l-sel 8 --n-sel 4 --w 16"
QUICK = "--rounds 6 --cache warm --no-shares --no-alone --no-plots"
TINY = [*SHAPE.split(), *QUICK.split()]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What --json printed: every line an object."""
        return [json.loads(line) for line in self.out.splitlines()]


Call = Callable[..., Done]


def hide_git(patch: pytest.MonkeyPatch, folders: pytest.TempPathFactory) -> None:
    """Put a git that knows nothing before the true one; compilers are found as ever."""
    git = folders.mktemp("bin") / "git"
    git.write_text("#!/bin/sh\nexit 1\n")
    git.chmod(0o755)
    patch.setenv("PATH", str(git.parent), prepend=os.pathsep)


def no_workers(*given: Any, **more: Any) -> None:
    """In place of an executor: what a test plants in this process is not in another."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run to copy: decode of two lengths and two routes."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        hide_git(patch, tmp_path_factory)
        patch.setattr(_execute, "LocalExecutor", no_workers)
        patch.setitem(Policy.__init__.__kwdefaults__, "sample_ms", 0.5)
        arguments = ["decode", *TINY, "--S", "32,64", "--routes", "auto;sel=reference"]
        patch.setattr(sys, "argv", ["nsabench", *arguments])
        assert CliRunner().invoke(app, arguments).exit_code == 0
    (run,) = (folder / "results").iterdir()
    return run


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, on a machine without git: a commit made meanwhile is not this test's."""
    monkeypatch.chdir(tmp_path)
    hide_git(monkeypatch, tmp_path_factory)
    return tmp_path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`nsabench` in this process, without workers, with samples of half a millisecond instead of twenty."""
    monkeypatch.setattr(_execute, "LocalExecutor", no_workers)
    monkeypatch.setitem(Policy.__init__.__kwdefaults__, "sample_ms", 0.5)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["nsabench", *arguments])
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


def start(arguments: Sequence[str], before: str = "", **more: Any) -> subprocess.Popen[str]:
    """`nsabench` in a process of its own, after the code `before`."""
    code = f"{before}\nfrom nsabench.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        **more,
    )


@pytest.fixture
def call_apart(folder: Path) -> Call:
    """`nsabench` in a process of its own."""

    def run(*arguments: str, before: str = "") -> Done:
        process = start(arguments, before)
        out, err = process.communicate(timeout=100)
        return Done(process.returncode, out, err)

    return run


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Replace the function behind a target, such as `backends.sdpa:sliding_attention`, by one that gets the
    true function first."""

    def planted(target: str, bug: Callable[..., Any]) -> None:
        load = nsa.refusals.load
        true = load(f"nsa.{target}")

        def broken(*given: Any, **more: Any) -> Any:
            return bug(true, *given, **more)

        monkeypatch.setattr(
            nsa.refusals, "load", lambda name: broken if name == f"nsa.{target}" else load(name)
        )

    return planted


@pytest.fixture
def the_run(folder: Path) -> Callable[[], Run]:
    """The one run in `results`."""

    def load() -> Run:
        (path,) = (folder / "results").iterdir()
        return load_run(path)

    return load


@pytest.fixture
def tiny() -> list[str]:
    return list(TINY)


@pytest.fixture
def begin() -> Callable[..., subprocess.Popen[str]]:
    return start
