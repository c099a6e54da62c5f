"""`nsabench profile`: one cell looked into, and kernels compiled for GPUs that are not here."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nsabench.commands import _static
from nsabench.commands._profile import cell_command, ncu_command, ncu_name
from nsabench.commands._static import show_static
from nsabench.commands._sweep import Plan
from nsabench.measure import MeasureError
from nsabench.measure.static import StaticRow
from nsabench.plan import Cell, Suite
from nsabench.run import Policy, arm
from nsabench.store import capture_environment
from nsabench.store.machine import peaks_file, save_peaks

SMALL = "--device cpu --dim 32 --heads 2 --groups 1 --dk 8 --l 8 --d 4 --l-sel 8 --n-sel 4 --w 16"
SHAPE = SMALL.split()
ONE = ["prefill", "--S", "64", *SHAPE, "--rounds", "2", "--in-process"]
PEAKS = {
    "device": "cpu",
    "copy_gbps": 1e4,
    "matmul_tflops": {"fp32": 100.0},
    "cache_bytes": 2**20,
    "clock_us": 0.1,
    "launch_us": None,
    "event_us": None,
    "graph_us": None,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def _a_busy_machine_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step that was disturbed while it was looked into has no shares, and says so."""
    monkeypatch.setattr(arm, "SHARES_WITHIN", 1000.0)


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    save_peaks(peaks_file(capture_environment(), "cpu"), PEAKS)


def test_a_cell_is_looked_into_and_stored(call, folder: Path, the_run) -> None:  # type: ignore[no-untyped-def]
    done = call("profile", *ONE, "--top", "3", "--tag", "why")
    assert (done.code, done.err) == (0, "")
    run = the_run()
    assert (run.info["name"], run.info["tags"], len(run.cells)) == ("profile", ["why"], 1)
    assert len(run.kernels) > 3
    assert "kernels of a profiled step of" in done.out
    assert f"({len(run.kernels) - 3} more)" in done.out
    assert "peaks of cpu are not measured, so there are no roofs: nsabench doctor --calibrate" in done.out
    for name in ("trace.json.gz", "memory.json"):
        assert f"{run.path.relative_to(folder) / name} (" in done.out
    assert "torch has no snapshot for a CPU" in done.out
    assert "ncu looks into kernels of a GPU" in done.out
    figures = {path.name for path in (folder / "plots" / run.run_id).iterdir()}
    assert {"prefill-roofline.png", "prefill-shares.png"} <= figures
    again = call("plot", str(run.path), "--out", "again", "--formats", "png")
    assert again.code == 0
    assert "prefill-roofline.png" in again.out
    assert call("results", str(run.path)).code == 0


def test_json_holds_all_of_it(call, calibrated: None) -> None:  # type: ignore[no-untyped-def]
    done = call("profile", "decode", *ONE[1:], "--json", "--no-plots")
    (found,) = done.rows
    assert done.code == 0
    assert (found["status"], found["ncu"]) == ("ok", None)
    assert found["stages"][0]["stage"] == "whole step"
    assert {"proj", "cmp", "sel", "win"} <= {one["stage"] for one in found["stages"]}
    assert all(one["pct_of_roof"] > 0 for one in found["stages"])
    assert found["profile"]["note"] == ""
    assert sum(one["pct"] for one in found["kernels"]) == pytest.approx(100, abs=2)
    assert set(found["files"]) == {"trace", "memory"}
    assert all(Path(path).is_file() for path in found["files"].values())


def test_peaks_of_the_machine_stand_in_the_run(call, calibrated: None, the_run) -> None:  # type: ignore[no-untyped-def]
    assert call("profile", *ONE, "--no-plots").code == 0
    assert the_run().info["peaks"] == {"cpu": PEAKS}


def test_a_wrong_cell_is_not_looked_into(call, plant, the_run) -> None:  # type: ignore[no-untyped-def]
    plant("backends.sdpa:sliding_attention", lambda true, *a, **k: (true(*a, **k)[0] + 1, true(*a, **k)[1]))
    done = call("profile", *ONE, "--route", "sdpa")
    assert done.code == 1
    assert "kernels of" not in done.out
    assert (list(the_run().cells["status"]), len(the_run().kernels)) == (["wrong"], 0)


def test_a_profile_is_not_resumed(call, the_run) -> None:  # type: ignore[no-untyped-def]
    assert call("profile", *ONE, "--no-plots").code == 0
    done = call("resume", str(the_run().path))
    assert done.code == 2
    assert "is a profile of one cell, which is never resumed" in done.err


def test_in_a_worker_too(call_apart, folder: Path) -> None:  # type: ignore[no-untyped-def]
    done = call_apart("profile", *ONE[:-1], "--sample-ms", "1", "--no-plots")
    assert (done.code, done.err) == (0, "")
    (run,) = (folder / "results").iterdir()
    assert {"trace.json.gz", "memory.json", "profile.json"} <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "profile takes a phase (prefill or decode), or --static"),
        (("train",), "phase: 'train' is unknown; allowed: prefill, decode"),
        (("prefill", *SHAPE), "profile looks into one cell, not 3: give one value of --S"),
        (("prefill", *SHAPE, "--S", "64", "--B", "1,2"), "not 2: give one value of --B"),
        (("decode", *SHAPE, "--S", "64", "--baseline", "dense"), "not 2: give one value of --baseline"),
        (("decode", *SHAPE, "--S", "64", "--routes", "auto;sdpa"), "not 2: give one value of --routes"),
        (("decode", *SHAPE, "--S", "64", "--routes", "fa2"), "--routes: 'fa2' cannot run here"),
        (("decode", *SHAPE, "--S", "64", "--passes", "bwd"), "--passes: decode has only fwd"),
        (("prefill", "--arch", "sm_90"), "--arch: only with --static"),
        (("prefill", "--module", "x"), "--module: only with --static"),
        (("--static", "prefill"), "prefill: not with --static, which measures nothing"),
        (("--static", "--S", "64"), "--S: not with --static, which measures nothing"),
        (("--static", "--arch", "sm_9"), "--arch: 'sm_9' is unknown; did you mean sm_90?"),
        (("--static", "--arch", "sm_90,gfx942"), "--arch: 'gfx942' is unknown; known: sm_80, "),
        (("--static", "--module", "no.such"), "--static: module 'no.such' cannot be imported"),
    ],
)
def test_bad_usage_is_one_line(call, folder: Path, arguments: tuple[str, ...], why: str) -> None:  # type: ignore[no-untyped-def]
    if "no.such" in arguments:
        pytest.importorskip("triton")
    done = call("profile", *arguments)
    assert (done.code, done.out) == (2, "")
    assert why in done.err
    assert done.err.count("\n") == 1
    assert not (folder / "results").exists()


KERNEL = "void (anonymous namespace)::attend<float, at::Tensor<2>>(float const*, int)"
PLAIN = [
    {"kernel": name} for name in (KERNEL, "Memcpy DtoD", "_selected_kernel", KERNEL, "nsa::sel", "c", "d")
]


def plan_of(**changes: Any) -> Plan:
    what = {"phase": "decode", "passes": "fwd", "mode": "batched", "route": "cmp=fa2,win=sdpa"}
    sizes = {"S": 4096, "B": 1, "dim": 2560, "heads": 64, "groups": 4, "dk": 192, "dv": 128, "seed": 7}
    blocks = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512}
    where = {"dtype": "bf16", "device": "cuda:0", "selection": "random"}
    fields: dict[str, Any] = what | sizes | blocks | where
    return Plan(Suite("x", "x", ()), [Cell(**{**fields, **changes})], Policy(cache="auto"), None)


def test_the_ncu_line_names_the_heaviest_kernels_and_the_same_cell() -> None:
    plan = plan_of()
    line = ncu_command(plan.cells[0], plan, PLAIN)
    words = shlex.split(line)
    assert words[:5] == ["ncu", "--set", "full", "--target-processes", "all"]
    assert words[words.index("-k") + 1] == "regex:^(attend|_selected_kernel|c)$"
    assert "'regex:^(attend|_selected_kernel|c)$'" in line
    command = words[words.index("nsabench") :]
    assert command == cell_command(plan.cells[0], plan)
    told = dict(pairwise(command))
    assert (command[1], told["--S"], told["--dk"], told["--route"]) == (
        "decode",
        "4096",
        "192",
        "cmp=fa2,win=sdpa",
    )
    assert (told["--rounds"], told["--selection"], told["--seed"]) == ("1", "random", "7")
    assert "--in-process" in command
    assert "--passes" not in command


def test_the_ncu_line_measures_the_same_cell(call) -> None:  # type: ignore[no-untyped-def]
    sizes = {"S": 64, "dim": 32, "heads": 2, "groups": 1, "dk": 8, "dv": 8}
    blocks = {"l": 8, "d": 4, "l_sel": 8, "n_sel": 4, "w": 16}
    what = {"phase": "prefill", "dtype": "fp32", "device": "cpu", "route": "sdpa", "selection": "natural"}
    plan = plan_of(**sizes, **blocks, **what)
    done = call(*cell_command(plan.cells[0], plan)[1:], "--json")
    assert [row["cell_id"] for row in done.rows] == [plan.cells[0].cell_id]


def test_a_cpu_has_nothing_for_ncu() -> None:
    plan = plan_of(device="cpu")
    assert ncu_command(plan.cells[0], plan, PLAIN) == ""
    assert ncu_command(plan_of().cells[0], plan, PLAIN[1:2]) == ""


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (KERNEL, "attend"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::Add<float>>(int, Add)",
            "vectorized_elementwise_kernel",
        ),
        ("_attend_kernel", "_attend_kernel"),
        ("Memset (Device)", ""),
    ],
)
def test_what_ncu_calls_a_kernel(kernel: str, name: str) -> None:
    assert ncu_name(kernel) == name


GOOD = StaticRow(
    "m", "attend", "sm_90", "ok", "", {"B": 64}, 4, 3, 168, 0, 8, 16, 98304, "wgmma", 2, 12.5, "shared"
)
TOO_MUCH = StaticRow(
    "m", "attend", "sm_120", "unsupported", "needs too much", shared_bytes=200_000, matrix="mma"
)
BROKEN = StaticRow("m", "other", "sm_90", "error", "RuntimeError: no")


@pytest.mark.parametrize(("rows", "code"), [([GOOD, TOO_MUCH], 0), ([GOOD, BROKEN], 1), ([TOO_MUCH], 3)])
def test_static_rows_as_tables_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rows: list[StaticRow], code: int
) -> None:
    monkeypatch.setattr(_static, "compile_static", lambda modules, archs: rows)
    assert show_static(["sm_90", "sm_120"], ["m"], json_lines=True) == code
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        row.to_dict() for row in rows
    ]
    assert show_static(["sm_90", "sm_120"], ["m"], json_lines=False) == code
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    if GOOD in rows:
        assert ["sm_90", "4", "168", "24", "98304", "2", "12", "shared", "wgmma", "ok"] in shown
    if TOO_MUCH in rows:
        assert ["sm_120", "-", "-", "-", "200000", "-", "-", "mma", "(1)"] in shown
        assert ["(1)", "unsupported:", "needs", "too", "much"] in shown
    if BROKEN in rows:
        assert ["(1)", "error:", "RuntimeError:", "no"] in shown


def test_our_own_kernels_are_compiled_unless_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        _static, "compile_static", lambda modules, archs: asked.append((modules, archs)) or [GOOD]
    )
    show_static(["sm_90", " sm_90"], None, json_lines=True)
    ((modules, archs),) = asked
    assert "nsabench.measure.probe_kernels" in modules
    assert archs == ["sm_90"]


def test_without_triton_it_says_so(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def missing(*given: object) -> None:
        raise MeasureError("Triton is not installed, so there is nothing to compile with: pip install triton")

    monkeypatch.setattr(_static, "compile_static", missing)
    done = call("profile", "--static")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("nsabench: --static: Triton is not installed")
