"""routes, doctor, --version, --help: what can run here, and what stands in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import typer

from nsa.backends import _cpp_library
from nsa.routes import BRANCHES, TABLE, Request, backends, resolve
from nsabench import __version__
from nsabench.cli import app
from nsabench.commands import _diagnosis

Call = Callable[..., Any]


def test_version(call: Call) -> None:
    assert call("--version").out == f"nsabench {__version__}\n"


def test_no_argument_shows_the_commands(call: Call) -> None:
    done = call()
    assert done.code == 2
    shown = done.out + done.err
    for name in ("decode", "prefill", "compare", "resume", "plot", "routes", "doctor", "suite"):
        assert f" {name} " in shown


COMMANDS = ["decode", "prefill", "compare", "resume", "plot", "routes", "doctor", "suite"]
COMMANDS += [f"suite {name}" for name in ("list", "show", "schema", "run")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(call: Call, command: str) -> None:
    found: Any = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    for option in found.params:
        assert option.help, f"{command} {option.opts}"
    done = call(*command.split(), "--help")
    assert done.code == 0
    assert "Usage: nsabench" in done.out


def test_help_tells_the_defaults(call: Call) -> None:
    def text(command: str) -> str:
        return " ".join(call(command, "--help").out.replace("│", " ").split())

    decode, prefill = text("decode"), text("prefill")
    sizes = ("256 on a CPU, 2560 on a GPU", "fp32 on a CPU, bf16 on a GPU", "as --dk")
    for said in (*sizes, "512,1024,2048", "auto: cold for decode, else warm."):
        assert said in decode
        assert said in prefill
    panels = ["Options", "Shape", "Measuring", "Output"]
    assert [part.split(" ")[0] for part in decode.split("╭─ ")[1:]] == panels


def test_routes_tell_what_runs_here_and_why_not(call: Call) -> None:
    done = call("routes", "--device", "cpu", "--S", "4k", "--json")
    assert done.code == 0
    assert [(row["branch"], row["backend"]) for row in done.rows] == [(r.branch, r.backend) for r in TABLE]
    from nsa import NSAConfig

    taken = resolve("auto", Request("cpu", torch.float32, 4096, 4096, False, NSAConfig(8, 2, 32)))
    assert {row["branch"]: row["backend"] for row in done.rows if row["auto"]} == {
        branch: taken.backend(branch) for branch in BRANCHES
    }
    for row in done.rows:
        assert (row["device"], row["dtype"]) == ("cpu", "fp32")
        if row["backend"].startswith(("fa2", "fa3", "fa4", "triton")):
            assert row["refuses"] == "needs a CUDA GPU, got cpu"
        elif row["backend"] == "flex":
            assert row["refuses"].endswith("flex:eager does, without a kernel")
        elif row["backend"] != "cpp":  # for which there may be no compiler
            assert row["refuses"] is None
        assert (row["passed_over"] is None) == (row["auto"] or row["refuses"] is not None)


def test_a_short_prompt_takes_another_row(call: Call) -> None:
    def taken(S: str) -> str:
        rows = call("routes", "--device", "cpu", "--dtype", "fp64", "--S", S, "--json").rows
        (backend,) = [row["backend"] for row in rows if row["auto"] and row["branch"] == "sel"]
        return backend

    assert (taken("1k"), taken("1025")) == ("sdpa", "gather")


def test_routes_as_a_table(call: Call) -> None:
    done = call("routes", "--device", "cpu", "--dtype", "fp64")
    assert done.code == 0
    assert "routes on cpu, fp64, S = 2048" in done.out
    assert "\x1b" not in done.out
    text = " ".join(done.out.replace("│", " ").split())
    assert "cmp fa2 fwd bwd needs a CUDA GPU, got cpu" in text
    assert "cmp cpp fwd takes fp32, fp16 and bf16, got fp64" in text
    assert "win sdpa fwd bwd runs, auto takes it" in text
    assert "score chunked fwd runs, auto takes it" in text


def test_routes_name_the_library_of_each_backend(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpp_library, "_outcome", lambda: (None, None))
    monkeypatch.setattr(_cpp_library, "_compiler", lambda: "c++")
    monkeypatch.setattr(_cpp_library, "_version", lambda compiler: "g++ 12.2.0")
    assert call("routes", "--device", "cpu").out.splitlines()[-1] == "cpp runs through g++ 12.2.0"


def test_the_matrix_is_the_same_everywhere(call: Call) -> None:
    done = call("routes", "--markdown")
    lines = done.out.splitlines()
    assert lines[0] == "| backend | compressed | scores and top-n | selected | sliding |"
    assert [line.split("`")[1] for line in lines[2:]] == backends()
    assert {line.count("|") for line in lines} == {6}
    for row in TABLE:
        cell = lines[2 + backends().index(row.backend)].split("|")[2 + BRANCHES.index(row.branch)]
        assert ", ".join(row.passes) in cell


def test_doctor(call: Call) -> None:
    done = call("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert set(found) == {"machine", "findings"}
    assert found["machine"]["nsabench"].startswith(__version__)
    assert found["machine"]["torch"].startswith(torch.__version__)
    assert {finding["level"] for finding in found["findings"]} <= {"ok", "info", "warn"}
    shown = call("doctor")
    assert shown.code == 0
    assert "this machine" in shown.out
    assert "\x1b" not in shown.out
    for name in found["machine"]:
        assert name in shown.out


def told(level: str) -> list[str]:
    return [f["text"] for f in _diagnosis.diagnose()["findings"] if f["level"] == level]


def test_doctor_warns_of_what_spoils_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_diagnosis.psutil, "cpu_percent", lambda interval: 63.0)
    environment = _diagnosis.capture_environment()
    environment["torch"]["threads"] = 8
    environment["cpu"]["affinity"] = 2
    monkeypatch.setattr(_diagnosis, "capture_environment", lambda: environment)
    assert told("warn") == [
        "the CPU is 63 % busy with other work: intervals will be wide; wait or stop it",
        "torch uses 8 threads on 2 usable cores: set OMP_NUM_THREADS=2",
    ]
    assert told("info")[0] == "no GPU is visible to torch: measuring on the CPU"
    environment["torch"]["threads"] = 2
    monkeypatch.setattr(_diagnosis.psutil, "cpu_percent", lambda interval: 1.0)
    assert told("warn") == []


class Sampler:
    def __init__(self, reading: dict[str, Any], reason: str = "") -> None:
        self.reading, self.reason = reading, reason

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None: ...

    def edge(self) -> dict[str, Any]:
        return self.reading


def test_doctor_reads_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = _diagnosis.capture_environment()
    gpu = {"name": "GPU X", "sm_count": 132, "memory_bytes": 80 * 2**30}
    environment["gpus"] = [gpu, gpu]
    environment["packages"] = {}
    readings = {
        "cuda:0": Sampler({"t_s": 1.0, "gpu_uuid": "GPU-0", "power_w": 71.5, "util_pct": 35.0}),
        "cuda:1": Sampler({}, "NVML: not found"),
    }
    monkeypatch.setattr(_diagnosis, "capture_environment", lambda: environment)
    monkeypatch.setattr(_diagnosis, "open_sampler", readings.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 * 2**30, 80 * 2**30))
    found = _diagnosis.diagnose()
    assert found["machine"]["gpus"] == "GPU X (132 SMs, 80 GiB); GPU X (132 SMs, 80 GiB)"
    texts = [(f["level"], f["text"]) for f in found["findings"]]
    assert ("ok", "cuda:0 GPU X: 60.0 of 80.0 GiB are free") in texts
    assert ("info", "cuda:0: power_w 71.5, util_pct 35.0") in texts
    assert ("warn", "cuda:0 is 35 % busy with other work") in texts
    assert (
        "warn",
        "cuda:1: no NVML readings (NVML: not found); power and clocks stay empty",
    ) in texts
    instead = "flash_attn is not installed: fa2 routes use the FlashAttention-2 kernels inside torch"
    assert any(instead in text for _, text in texts)
