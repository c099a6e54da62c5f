"""`suites/gpu.sh`: each step runs whatever became of the one before, and leaves its log."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]

SCRIPT = Path(__file__).resolve().parents[1] / "suites" / "gpu.sh"


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """``call(arguments, failing)``: the script, with commands that note their arguments, store a file where
    they are told to, and fail if they are named ``failing``.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("python", "pytest", "nsabench"):
        (commands / name).write_text(
            "#!/usr/bin/env bash\n"
            f'echo "{name} $*" >>"$CALLS"\n'
            "while [ $# -gt 0 ]; do\n"
            '    [ "$1" = --out ] && mkdir -p "$2/run" && echo row >"$2/run/cells.csv"\n'
            "    shift\n"
            "done\n"
            f'[ "$FAILING" != {name} ]\n'
        )
        (commands / name).chmod(0o755)

    def run(*arguments: str, failing: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {"PATH": f"{commands}:/usr/bin:/bin", "CALLS": str(calls), "FAILING": failing}
        done = subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True)
        return done, [line.split()[0] for line in calls.read_text().splitlines()]

    return run


def test_all_steps_run_and_what_they_store_is_kept(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done, calls = call("check", str(out), failing="pytest")
    assert done.returncode == 1
    assert calls == ["python", "pytest", "pytest", "nsabench"]
    assert done.stdout.count("exit code 1") == 2
    assert done.stdout.count("exit code 0") == 1
    assert {file.name for file in out.iterdir()} == {"tests.log", "kernels.log", "verify.log", "check.tar.gz"}
    with tarfile.open(out / "check.tar.gz") as archive:
        assert "./results/run/cells.csv" in archive.getnames()


def test_a_call_that_goes_well(call: Call, tmp_path: Path) -> None:
    for what, commands in (("measure", ["python", "nsabench"]), ("tune", ["python", "python"])):
        done, calls = call(what, str(tmp_path / what))
        assert (done.returncode, calls) == (0, commands), done.stderr


def test_without_a_gpu_nothing_is_called_green(call: Call, tmp_path: Path) -> None:
    done, calls = call("check", str(tmp_path / "out"), failing="python")
    assert (done.returncode, calls) == (2, ["python"])
    assert done.stderr == "suites/gpu.sh: torch sees no CUDA device here\n"


@pytest.mark.parametrize("arguments", [(), ("check",), ("all", "out"), ("check", "out", "more")])
def test_bad_usage(arguments: tuple[str, ...], call: Call) -> None:
    done, calls = call(*arguments)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == "usage: suites/gpu.sh check|measure|tune OUT\n"
