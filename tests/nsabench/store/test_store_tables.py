"""Runs whose rows are no cells: written row by row, cut clean when reopened, refused for cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsabench.store import RunDir, StoreError, TableRun, load_run, read_table
from nsabench.store.schema import Column

COLUMNS = (
    Column("run_id", "str", "text", "the run"),
    Column("step", "int", "1", "number"),
    Column("loss", "float", "nats", "mean over tokens"),
    Column("note", "str", "text", "words"),
)
TABLES = {"training.csv": COLUMNS}


def create(root: Path, **facts: Any) -> TableRun:
    return TableRun.create(
        root,
        kind="train",
        name="train",
        argv=["train"],
        repro="nsabench train",
        environment={"commit": "0123456789"},
        tables=TABLES,
        **facts,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with create(tmp_path, steps=3) as run:
        run.append("training.csv", {"step": 0, "loss": 5.25, "note": 'a, "b"'}, {"step": 1, "loss": None})
        run.append_text("heartbeat.jsonl", '{"step": 0}')
        run.append_text("heartbeat.jsonl", '{"step": 1}')
        run.note(status="ok")
    rows = read_table(run.path, "training.csv", COLUMNS)
    assert rows == [
        {"run_id": run.run_id, "step": 0, "loss": 5.25, "note": 'a, "b"'},
        {"run_id": run.run_id, "step": 1, "loss": None, "note": ""},
    ]
    assert (run.path / "heartbeat.jsonl").read_text().splitlines() == ['{"step": 0}', '{"step": 1}']
    info = json.loads((run.path / "run.json").read_text())
    assert (info["kind"], info["status"], info["steps"], info["run_id"]) == ("train", "ok", 3, run.path.name)
    assert run.path.name.endswith("-train-0123456")
    assert read_table(run.path, "nothing.csv", COLUMNS) == []


def test_a_line_cut_short_is_not_there(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.append("training.csv", {"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0})
    with (run.path / "training.csv").open("a") as file:
        file.write(f"{run.run_id},2,3.")
    assert [row["step"] for row in read_table(run.path, "training.csv", COLUMNS)] == [0, 1]
    with TableRun.open(run.path, "train", TABLES) as again:
        again.append("training.csv", {"step": 2, "loss": 3.0})
        assert [row["step"] for row in read_table(run.path, "training.csv", COLUMNS)] == [0, 1, 2]
        again.keep("training.csv", 2)
        again.append("training.csv", {"step": 7, "loss": 3.0})
    assert [row["step"] for row in read_table(run.path, "training.csv", COLUMNS)] == [0, 1, 7]


def test_one_writer_at_a_time_and_only_of_its_kind(tmp_path: Path) -> None:
    with create(tmp_path) as run, pytest.raises(StoreError, match="being written by another process"):
        TableRun.open(run.path, "train", TABLES)
    with pytest.raises(StoreError, match=r"is a training \(nsabench train\); allowed here: a scorecard"):
        TableRun.open(run.path, "verify", TABLES)
    with pytest.raises(StoreError, match="is closed"):
        run.append("training.csv", {"step": 0})
    with pytest.raises(StoreError, match=r"is a training \(nsabench train\), which has no cells"):
        load_run(run.path)
    with pytest.raises(StoreError, match="which has no cells"):
        RunDir.open(run.path)


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.append("training.csv", {"step": 0, "loss": 1.0})
    file = run.path / "training.csv"
    file.write_text(file.read_text().replace("0,1.0", "x,1.0"))
    with pytest.raises(StoreError, match=r"is damaged: training\.csv"):
        read_table(run.path, "training.csv", COLUMNS)


def test_a_failed_creation_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"run\.json cannot hold"):
        create(tmp_path, odd=object())
    with pytest.raises(StoreError, match="tag 'a b' is not usable"):
        create(tmp_path, tags=["a b"])
    assert list(tmp_path.iterdir()) == []
