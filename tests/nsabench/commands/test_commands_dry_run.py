"""--dry-run: the plan in its order, with what it would take and what cannot run; nothing is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


def test_a_dry_run_leaves_nothing_behind(call: Call, folder: Path, tiny: list[str]) -> None:
    done = call("decode", *tiny, "--S", "32,64", "--routes", "auto;fa2", "--baseline", "dense", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert list(folder.iterdir()) == []
    assert "decode: 6 cells in 2 groups" in done.out
    assert "auto, (fa2), dense" in " ".join(done.out.split())
    assert "cannot run here, in parentheses: fa2 (2 cells): cmp=fa2: needs a CUDA GPU, got cpu" in done.out
    assert "a guess good to a factor of two or three" in done.out


def test_json_is_one_object_a_cell_in_the_order_of_the_run(call: Call, folder: Path, tiny: list[str]) -> None:
    lengths, more = "16:256:x2", ["--routes", "auto;fa2", "--dry-run", "--json"]
    rows = call("prefill", *tiny, "--S", lengths, *more).rows
    assert [(row["group"], row["S"], row["route"]) for row in rows] == [
        (place, S, route) for place, S in enumerate((16, 32, 64, 128, 256), 1) for route in ("auto", "fa2")
    ]
    for row in rows:
        runs = row["route"] == "auto"
        assert (row["cannot_run"] is None) == runs
        assert (row["estimated_s"] is not None) == runs
        assert not runs or (row["estimated_s"] > 0 and row["estimated_bytes"] > 0)
        assert row["within_budget"] is None
    coarse = call("prefill", *tiny, "--S", lengths, "--budget", "1h", *more).rows
    assert [row["S"] for row in coarse if row["route"] == "auto"] == [16, 256, 64, 32, 128]
    assert all(row["within_budget"] for row in coarse)


def test_what_the_budget_has_no_room_for_is_named_and_a_smaller_group_may_fit(
    call: Call, folder: Path, tiny: list[str]
) -> None:
    arguments = ["prefill", *tiny, "--S", "16,1m,64", "--budget", "30s", "--dry-run"]
    rows = call(*arguments, "--json").rows
    assert [(row["S"], row["within_budget"]) for row in rows] == [(16, True), (2**20, False), (64, True)]
    assert "budget 30s: by these guesses there is no room for #2\n" in call(*arguments).out
    roomy = call("prefill", *tiny, "--S", "16,32", "--budget", "1h", "--dry-run")
    assert "budget 1h00m: by these guesses all of it fits\n" in roomy.out


def test_what_does_not_fit_into_memory_is_said(call: Call, folder: Path, tiny: list[str]) -> None:
    done = call("prefill", *tiny, "--S", "64,1024m", "--dry-run")
    assert done.code == 0
    assert "that are free on cpu: #2\n" in done.out


def test_a_device_that_is_not_there_is_planned_for(
    call: Call, folder: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = call("decode", *tiny, "--device", "cpu,cuda", "--dry-run")
    assert done.code == 0
    assert "cannot run here: 1 cell on 'cuda', but torch sees no CUDA device here\n" in done.out
    assert "132 multiprocessors of 1 TFLOP/s in half precision, as an H200 has" in done.out
    here, there = call("decode", *tiny, "--device", "cpu,cuda", "--dry-run", "--json").rows
    assert here["cannot_run"] is None
    assert there["cannot_run"] == "'cuda', but torch sees no CUDA device here"
    assert there["estimated_s"] > 0


def test_axes_that_vary_are_told_apart(call: Call, folder: Path, tiny: list[str]) -> None:
    done = call("decode", *tiny, "--dk", "8,16", "--scope", "module,core", "--dry-run", "--json")
    assert [(row["scope"], row["dk"]) for row in done.rows] == [
        *(("module", 8), ("core", 8), ("module", 16), ("core", 16)),
    ]
    shown = " ".join(call("decode", *tiny, "--dk", "8,16", "--scope", "module,core", "--dry-run").out.split())
    assert all(text in shown for text in ("core dk=8", "module dk=16"))


def test_nothing_that_can_run_is_still_a_plan_to_look_at(call: Call, folder: Path, tiny: list[str]) -> None:
    done = call("decode", *tiny, "--routes", "fa2", "--dry-run")
    assert done.code == 0
    assert "cannot run here, in parentheses: fa2 (1 cell): " in done.out
