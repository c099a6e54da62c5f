"""A stored training: reading it back, going back in it, and summing it up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsabench.store import StoreError, TableRun
from nsabench.store.training import (
    EVAL_FILE,
    GATES_FILE,
    HEARTBEAT_FILE,
    KIND,
    ROUTES_FILE,
    TRAINING_FILE,
    TRAINING_TABLES,
    load_training,
    rewind,
    summary_of,
)


def run_in(folder: Path, kind: str = KIND) -> TableRun:
    run = TableRun.create(
        folder,
        kind=kind,
        name="train",
        argv=[],
        repro="nsabench train",
        environment={},
        tables=TRAINING_TABLES,
        status="running",
    )
    for step in (1, 2, 3, 4):
        row = {
            "step": step,
            "loss": 6.0 - step,
            "tokens_per_s": 10.0 * step,
            "seconds": 2.0,
            "rss_bytes": step,
        }
        run.append(TRAINING_FILE, {**row, "rss_bytes": step})
    for step in (2, 4):
        run.append(EVAL_FILE, *(row_of(step, route) for route in ("auto", "sel=off")))
    run.append(GATES_FILE, {"step": 1, "layer": 0, "collapsed": 0, "entropy": 1.0})
    run.append(ROUTES_FILE, {"layer": 0, "branch": "sel", "backend": "gather", "calls": 4, "refused": 0})
    return run


def row_of(step: int, route: str) -> dict[str, Any]:
    return {"step": step, "what": "needle", "accuracy": 0.5, "chance": 0.1, "count": 8, "route": route}


def test_a_training_is_read_back(tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        run.append_text(HEARTBEAT_FILE, json.dumps({"t": "now", "step": 1, "stage": "data"}))
        with (run.path / HEARTBEAT_FILE).open("a") as file:
            file.write('{"t": "half')
    training = load_training(run.path)
    assert training.info["status"] == "running"
    assert [row["loss"] for row in training.steps] == [5.0, 4.0, 3.0, 2.0]
    assert training.steps[0]["grad_norm"] is None
    assert training.steps[0]["run_id"] == run.run_id
    assert [row["route"] for row in training.evaluation] == ["auto", "sel=off"] * 2
    assert training.evaluation[0]["distance"] is None
    assert (len(training.gates), len(training.routes), training.overlap) == (1, 1, [])
    assert training.heartbeat == [{"t": "now", "step": 1, "stage": "data"}]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is not a run: it has no run.json"):
        load_training(tmp_path)
    with run_in(tmp_path, kind="verify") as run:
        pass
    with pytest.raises(StoreError, match=r"is a scorecard .*; wanted here: a training"):
        load_training(run.path)


@pytest.mark.parametrize("line", ["{", "[1]", "7"])
def test_a_damaged_heartbeat_is_said(tmp_path: Path, line: str) -> None:
    with run_in(tmp_path) as run:
        run.append_text(HEARTBEAT_FILE, line)
    with pytest.raises(StoreError, match=r"is damaged: heartbeat.jsonl: "):
        load_training(run.path)


def test_going_back_cuts_what_came_after(tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        rewind(run, 2)
        found = load_training(run.path)
        assert [row["step"] for row in found.steps] == [1, 2]
        assert [row["step"] for row in found.evaluation] == [2, 2]
        assert (len(found.gates), found.routes) == (1, [])
        run.append(TRAINING_FILE, {"step": 3, "loss": 9.0})
        assert [row["step"] for row in load_training(run.path).steps] == [1, 2, 3]


def test_the_last_evaluation_of_a_training_that_ended_is_made_anew(tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        rewind(run, 4, ended=True)
        found = load_training(run.path)
    assert [row["step"] for row in found.evaluation] == [2, 2]
    assert len(found.steps) == 4


def test_a_summary(tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        run.append(TRAINING_FILE, {"step": 5, "loss": 4.0})
    found = summary_of(load_training(run.path))
    assert (found["step"], found["loss"], found["loss_first"]) == (5, 4.0, 5.0)
    assert found["loss_mean"] == pytest.approx(3.6)
    assert (found["tokens_per_s"], found["seconds"]) == (25.0, 8.0)
    assert (found["peak_rss_bytes"], found["peak_alloc_bytes"]) == (4, None)
    assert found["evaluation"] == [{"distance": None, **row_of(4, route)} for route in ("auto", "sel=off")]
    assert found["routes"][0]["backend"] == "gather"
    assert "run_id" not in found["gates"][0]
    json.dumps(found, allow_nan=False)


def test_a_summary_of_nothing(tmp_path: Path) -> None:
    with run_in(tmp_path) as run:
        rewind(run, 0)
    found = summary_of(load_training(run.path))
    assert (found["step"], found["loss"], found["loss_mean"], found["tokens_per_s"]) == (0, None, None, None)
    assert (found["evaluation"], found["gates"], found["routes"]) == ([], [], [])
