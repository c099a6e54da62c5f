"""decode and prefill from the command line to stored files and figures."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nsabench.store.runs
from nsabench.commands import _execute
from nsabench.commands._execute import exit_code
from nsabench.run import arm
from nsabench.store import Run

Call = Callable[..., Any]
TheRun = Callable[[], Run]
Plant = Callable[[str, Callable[..., Any]], None]

SLIDING = "backends.sdpa:sliding_attention"


def one_line(text: str) -> str:
    """The text is one line, said by nsabench, and no traceback."""
    assert text.startswith("nsabench: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text.removeprefix("nsabench: ").strip()


def test_decode_with_everything_on(
    call: Call, tiny: list[str], the_run: TheRun, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm, "SHARES_WITHIN", 1000.0)  # a busy machine may take its time
    everything = [option for option in tiny if not option.startswith("--no-")]
    done = call("decode", *everything, "--S", "64,96")
    run = the_run()
    assert done.code == 0
    assert done.err == ""
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    assert lines[0] == "decode on cpu: dim 32, 2 heads, 1 KV heads, dk 8, dv 8, fp32"
    assert lines[1] == (
        "blocks l 8, d 4, l' 8, n 4, w 16; selection natural; "
        "timer cpu, latency, warm cache, 6 rounds, seed 0"
    )
    assert lines[2].startswith("[1/2] decode fwd S=64 B=1 auto: ok, ")
    assert lines[3].startswith("[2/2] decode fwd S=96 B=1 auto: ok, ")
    assert lines[4].startswith("2 of 2 cells (2 ok) in ")
    assert lines[5] == f"results: results/{run.run_id}"
    assert lines[6] == f"plots:   plots/{run.run_id} (8 files)"
    names = {file.name for file in (folder / "plots" / run.run_id).iterdir()}
    assert names == {
        f"{what}.{kind}"
        for what in ("decode-time", "decode-shares", "decode-memory", "telemetry")
        for kind in ("png", "svg")
    }
    assert [(row["S"], row["status"], row["reads_tokens"]) for row in run.rows] == [
        (64, "ok", 15 + 32 + 16),
        (96, "ok", 23 + 32 + 16),
    ]
    for row in run.rows:
        assert (row["cache"], row["timer"], row["n_rounds"]) == ("warm", "cpu", 6)
        assert row["ms_lo"] <= row["ms_total"] <= row["ms_hi"]
        assert row["ms_emit"] > 0
        assert row["ms_plain"] > 0
        assert min(row[f"ms_alone_{b}"] for b in ("cmp", "sel", "win")) > 0
        assert row["kv_cache_bytes"] > 0
        assert row["peak_alloc_bytes"] > 0
    assert run.info["argv"] == ["decode", *everything, "--S", "64,96"]
    assert run.info["repro"].startswith("nsabench decode --device cpu --S 64 --dim 32 ")
    assert run.info["policy"]["rounds"] == 6
    assert run.info["environment"]["cpu"]["model"]


def test_decode_is_cold_and_prefill_is_warm_unless_told(
    call: Call, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        _execute, "run_plan", lambda cells, policy, *_, **__: asked.append(policy.cache_for(cells[0]))
    )
    at = tiny.index("--cache")
    without = tiny[:at] + tiny[at + 2 :]
    for command in ("decode", "prefill"):
        call(command, *without)
        for cache in ("warm", "cold"):
            call(command, *without, "--cache", cache)
    assert asked == ["cold", "warm", "cold", "warm", "warm", "cold"]


@pytest.mark.parametrize("mode", ["batched", "chunked=7", "stepwise"])
def test_prefill_with_each_pass(call: Call, tiny: list[str], the_run: TheRun, mode: str) -> None:
    done = call("prefill", *tiny, "--S", "12", "--mode", mode, "--passes", "fwd,bwd,fwd_bwd")
    assert done.code == 0
    rows = the_run().rows
    assert [(row["passes"], row["mode"], row["status"]) for row in rows] == [
        (passes, mode, "ok") for passes in ("fwd", "bwd", "fwd_bwd")
    ]
    forward, backward, both = (row["flops"] for row in rows)
    assert forward + backward == both
    assert [row["kv_cache_bytes"] is None for row in rows] == [False, True, True]


def test_routes_side_by_side_have_a_ratio(call: Call, tiny: list[str], the_run: TheRun, folder: Path) -> None:
    drawn = [option for option in tiny if option != "--no-plots"]
    done = call("prefill", *drawn, "--routes", "auto; cmp=reference, win=reference ;sel=sdpa", "--B", "1,2")
    assert done.code == 0
    lines = [line for line in done.out.splitlines() if line.startswith("[")]
    assert len(lines) == 6
    for line in lines:
        assert ("x the speed of auto" in line) == (" auto: ok" not in line)
    run = the_run()
    routes = ["auto", "cmp=reference,win=reference", "sel=sdpa"]
    assert [(row["B"], row["route"]) for row in run.rows] == [(b, r) for b in (1, 2) for r in routes]
    first, named, other = (row["win_backend"] for row in run.rows[:3])
    assert first == other != named == "reference"
    assert len({row["cell_id"] for row in run.rows}) == 6
    assert (folder / "plots" / run.run_id / "prefill-speed.svg").is_file()
    for row in run.rows[:3]:
        mine = run.samples[run.samples["cell_id"] == row["cell_id"]]
        assert sorted(mine["round"]) == list(range(6))
    places = run.samples[run.samples["cell_id"].isin([r["cell_id"] for r in run.rows[:3]])]
    assert [sorted(p) for _, p in places.groupby("round")["position"]] == [[0, 1, 2]] * 6


def test_json_is_one_object_a_cell_and_nothing_else(call: Call, tiny: list[str], the_run: TheRun) -> None:
    done = call("decode", *tiny, "--routes", "auto;sel=reference;fa2", "--json")
    assert done.code == 0
    rows = the_run().rows
    assert [row["route"] for row in done.rows] == ["auto", "sel=reference", "fa2"]
    assert [row["status"] for row in done.rows] == ["ok", "ok", "unsupported"]
    for printed, stored in zip(done.rows, rows, strict=True):
        assert printed == {name: None if value == "" else value for name, value in stored.items()}
    assert f"results: results/{the_run().run_id}" in done.err
    assert "3 of 3 cells (2 ok, 1 unsupported)" in done.err


def test_a_refused_route_beside_a_good_one_is_a_row(call: Call, tiny: list[str], the_run: TheRun) -> None:
    done = call("decode", *tiny, "--routes", "fa2;auto")
    assert done.code == 0
    refused, good = the_run().rows
    assert (refused["status"], good["status"]) == ("unsupported", "ok")
    assert "needs a CUDA GPU, got cpu" in refused["reason"]
    assert refused["ms_total"] is None
    assert "fa2: unsupported: cmp=fa2: needs a CUDA GPU, got cpu" in done.out


@pytest.mark.parametrize(
    ("lengths", "code", "statuses"), [("64,1048576m", 0, ["ok", "oom"]), ("1048576m", 3, ["oom"])]
)
def test_a_length_beyond_the_memory_is_a_row(
    call: Call, tiny: list[str], the_run: TheRun, lengths: str, code: int, statuses: list[str]
) -> None:
    done = call("decode", *tiny, "--S", lengths)
    assert done.code == code
    assert [row["status"] for row in the_run().rows] == statuses
    assert f"needs at least {2**40 * (5 * 8 + 3 * 8) * 4 / 2**30:.1f} GiB, " in the_run().rows[-1]["reason"]


def window_off_by_one(true: Any, q: Any, k: Any, v: Any, config: Any, **more: Any) -> Any:
    return true(q, k, v, replace(config, window_size=config.window_size - 1), **more)


@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_a_wrong_backend_has_no_latency_and_exit_code_1(
    call: Call, tiny: list[str], the_run: TheRun, plant: Plant, command: str
) -> None:
    plant(SLIDING, window_off_by_one)
    done = call(command, *tiny, "--in-process", "--routes", "win=sdpa;win=reference")
    assert done.code == 1
    wrong, right = the_run().rows
    assert (wrong["status"], wrong["ms_total"], wrong["tokens_per_s"]) == ("wrong", None, None)
    assert "differs from the specification" in wrong["reason"]
    assert right["status"] == "ok"
    assert "the speed of" not in done.out


def test_a_gradient_one_percent_off_has_exit_code_1(
    call: Call, tiny: list[str], the_run: TheRun, plant: Plant
) -> None:
    def bug(true: Any, q: Any, *given: Any, **more: Any) -> Any:
        if q.requires_grad:
            q = q.clone()
            q.register_hook(lambda grad: grad * 1.01)
        return true(q, *given, **more)

    plant(SLIDING, bug)
    assert call("prefill", *tiny, "--in-process", "--routes", "win=sdpa", "--passes", "fwd,bwd").code == 1
    assert [row["status"] for row in the_run().rows] == ["ok", "wrong"]
    assert "gradient of q differs" in the_run().rows[1]["reason"]


def test_what_is_not_a_number_has_exit_code_1(
    call: Call, tiny: list[str], the_run: TheRun, plant: Plant
) -> None:
    plant(SLIDING, lambda true, *given, **more: (true(*given, **more)[0] * float("nan"), None))
    assert call("decode", *tiny, "--in-process", "--routes", "win=sdpa").code == 1
    assert [row["status"] for row in the_run().rows] == ["nan"]


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["ok"], 0),
        (["ok", "unsupported", "oom"], 0),
        (["ok", "invalid"], 3),
        (["oom"], 3),
        (["invalid", "oom"], 3),
        ([], 3),
        *((["ok", status], 1) for status in ("wrong", "nan", "error", "hang")),
        (["invalid", "wrong"], 1),
    ],
)
def test_exit_codes(statuses: list[str], code: int) -> None:
    assert exit_code([{"status": status} for status in statuses]) == code


def test_figures_that_cannot_be_written_do_not_cost_the_results(
    call: Call, tiny: list[str], the_run: TheRun
) -> None:
    drawn = [option for option in tiny if option != "--no-plots"]
    done = call("decode", *drawn, "--plots", "/dev/null/plots")
    assert done.code == 2
    run = the_run()
    assert [row["status"] for row in run.rows] == ["ok"]
    said = one_line(done.err)
    assert said.startswith("cannot write /dev/null/plots/")
    assert said.endswith(f"the results are safe: nsabench plot results/{run.run_id}")
    assert done.out.splitlines()[-1] == f"results: results/{run.run_id}"


def test_figures_that_cannot_be_written_do_not_hide_a_wrong_result(
    call: Call, tiny: list[str], plant: Plant
) -> None:
    plant(SLIDING, window_off_by_one)
    drawn = [option for option in tiny if option != "--no-plots"]
    done = call(
        "decode", *drawn, "--routes", "win=sdpa;win=reference", "--plots", "/dev/null/plots", "--in-process"
    )
    assert done.code == 1


def test_no_figure_is_drawn_where_nothing_is_ok(call: Call, tiny: list[str], folder: Path) -> None:
    drawn = [option for option in tiny if option != "--no-plots"]
    assert call("decode", *drawn, "--S", "1048576m").code == 3
    assert sorted(p.name for p in folder.iterdir()) == ["results"]


def test_a_full_disk_ends_the_sweep_with_exit_code_4(
    call: Call, tiny: list[str], the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = nsabench.store.runs.append

    def full(path: Any, data: bytes) -> int:
        journal = path.with_name("journal.jsonl")
        if journal.stat().st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(path, data)

    monkeypatch.setattr(nsabench.store.runs, "append", full)
    done = call("decode", *tiny, "--S", "32,64,96")
    assert done.code == 4
    said = one_line(done.err)
    assert "No space left on device; 1 finished cells are safe, resume to go on" in said
    assert [row["S"] for row in the_run().rows] == [32]


def test_env_is_spelled_out_in_the_plan(
    call: Call, tiny: list[str], the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_WIN_FORCE_DENSE", "1")
    assert call("decode", *tiny, "--routes", "env").code == 0
    assert [row["route"] for row in the_run().rows] == ["win=sdpa"]


def test_dv_follows_dk_unless_it_is_given(call: Call, tiny: list[str], the_run: TheRun) -> None:
    assert call("decode", *tiny, "--dk", "16").code == 0
    assert (the_run().rows[0]["dk"], the_run().rows[0]["dv"]) == (16, 16)


def test_sizes_may_be_written_short(call: Call, tiny: list[str], the_run: TheRun) -> None:
    assert call("decode", *tiny, "--w", "1k", "--S", "0032", "--seed", "7").code == 0
    assert [(row["w"], row["S"], row["seed"]) for row in the_run().rows] == [(1024, 32, 7)]


@pytest.mark.parametrize("dtype", ["fp64", "bf16", "fp16"])
def test_every_dtype(call: Call, tiny: list[str], the_run: TheRun, dtype: str) -> None:
    assert call("decode", *tiny, "--dtype", dtype).code == 0
    assert the_run().rows[0]["dtype"] == dtype


def test_the_defaults_are_a_small_model_here(
    call: Call, the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call("prefill", "--S", "40", "--rounds", "1", "--no-shares", "--no-alone", "--no-plots")
    assert done.code == 0
    assert "dim 256, 8 heads, 2 KV heads, dk 32, dv 32, fp32 (a small model for a CPU)" in done.out
    row = the_run().rows[0]
    assert (row["l"], row["d"], row["l_sel"], row["n_sel"], row["w"]) == (32, 16, 64, 16, 512)
    assert (row["device"], row["ms_lo"]) == ("cpu", None)


def test_ctrl_c_says_how_to_go_on(
    call: Call, tiny: list[str], the_run: TheRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = _execute.run_plan

    def interrupted(cells: Any, *given: Any, **more: Any) -> None:
        measure(cells[:1], *given, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(_execute, "run_plan", interrupted)
    done = call("decode", *tiny, "--S", "32,64")
    assert done.code == 130
    run = the_run()
    assert one_line(done.err) == (
        f"interrupted; 1 of 2 cells are finished and kept, nsabench resume results/{run.run_id} goes on"
    )
    assert [row["S"] for row in run.rows] == [32]
    assert done.out.splitlines()[-1].startswith("1 of 2 cells (1 ok) in ")


def test_a_pipe_gets_plain_lines(call_apart: Call, tiny: list[str]) -> None:
    """As in `nsabench decode | tee log`, also where colour is forced off."""
    done = call_apart("decode", *tiny, before="import os; os.environ['NO_COLOR'] = '1'")
    assert done.code == 0
    assert done.err == ""
    assert "\x1b" not in done.out
    assert done.out.splitlines()[2].startswith("[1/1] decode fwd S=64 B=1 auto: ok, ")
