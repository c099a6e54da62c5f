"""Lists of runs, and cells of many runs for other programs."""

from __future__ import annotations

import builtins
import csv
import dataclasses
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from nsabench.present.catalog import collect, counts_text, runs_table, summarise, when_text
from nsabench.present.export import FLAT_COLUMNS, export_cells, export_runs, kind_of, write
from nsabench.present.frame import PresentError
from nsabench.present.tables import cells_json
from nsabench.store import Run, StoreError
from nsabench.store.schema import CELL_COLUMNS

MakeRun = Callable[..., Run]


@pytest.fixture
def runs(make_run: MakeRun) -> list[Run]:
    return [
        make_run(run_id="first", tags=["cpu", "night"], baselines=("dense",), S=(1024, 2048)),
        make_run(
            run_id="second",
            commit="b" * 40,
            phase="prefill",
            S=(1024,),
            failed={("gather", 1024): ("oom", 'too | "little"')},
        ),
    ]


def merged(runs: list[Run]) -> Run:
    return Run(
        info={"run_id": "both", "plan": runs[0].info["plan"], "sources": [run.info for run in runs]},
        cells=pd.concat([run.cells for run in runs]),
        samples=pd.concat([run.samples for run in runs]),
        telemetry=runs[0].telemetry,
        kernels=runs[0].kernels,
        path=runs[0].path,
    )


def show(table: Any, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    return file.getvalue()


def test_a_run_in_one_line(runs: list[Run]) -> None:
    first, second = map(summarise, runs)
    assert first.to_dict() == {
        "run_id": "first",
        "path": str(runs[0].path),
        "kind": "cells",
        "status": "ok",
        "outcome": "6 ok",
        "created": "2025-01-02T03:04:05Z",
        "name": "decode",
        "tags": ["cpu", "night"],
        "suite": None,
        "machines": ["AMD EPYC 7B13"],
        "commits": ["1a2b3c4"],
        "merged_from": None,
        "planned": 6,
        "cells": {"ok": 6},
    }
    assert counts_text(second) == "1 ok, 1 oom"
    both = summarise(merged(runs))
    assert both.commits == ("1a2b3c4", "bbbbbbb")
    assert both.to_dict()["merged_from"] == 2
    assert counts_text(both) == "7 ok, 1 oom, merged from 2 runs"
    assert when_text(first.created) == "2025-01-02 03:04"


def test_missing_cells_are_counted_unless_only_some_were_looked_for(runs: list[Run]) -> None:
    half = dataclasses.replace(runs[0], cells=runs[0].cells.iloc[:2])
    assert counts_text(summarise(half)) == "2 of 6: 2 ok"
    assert counts_text(summarise(runs[0], lambda cells: cells["S"] == 1024)) == "3 ok"
    empty = dataclasses.replace(runs[0], cells=runs[0].cells.iloc[:0])
    assert counts_text(summarise(empty)) == "0 of 6: none"


def test_what_a_run_does_not_say_is_a_dash(runs: list[Run]) -> None:
    bare = dataclasses.replace(runs[0], info={"run_id": "bare"})
    text = show(runs_table([summarise(bare)], 100), 100)
    assert "bare  -" in text
    assert summarise(bare).to_dict()["created"] is None


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_list_fits_and_says_the_same(runs: list[Run], width: int) -> None:
    names = ["20250102T030405Z-decode-1a2b3c4", "20250102T030406Z-prefill-bbbbbbb"]
    summaries = [dataclasses.replace(summarise(r), run_id=n) for r, n in zip(runs, names, strict=True)]
    text = show(runs_table(summaries, width), width)
    assert max(map(len, text.splitlines())) <= width
    for word in (*names, "2025-01-02 03:04", "cpu night", "AMD EPYC 7B13", "6 ok", "1 ok, 1 oom"):
        assert word in text, word
    below = [line for line in text.splitlines() if line.startswith("  2025-01-02 03:04, ")]
    assert len(below) == (2 if width < 100 else 0)


def test_cells_of_many_runs_are_compared_within_each(runs: list[Run]) -> None:
    collected = collect(runs)
    assert [c.row["run_id"] for c in collected.cells] == ["first"] * 6 + ["second"] * 2
    for name, run in zip(("first", "second"), runs, strict=True):
        alone = cells_json(run.cells, run.samples, order=["sdpa", "gather"])
        ours = json.loads(export_cells(collected, "json"))
        mine = [{k: one[k] for k in alone[0]} for one in ours if one["run_id"] == name]
        assert mine == alone


def test_a_merged_run_and_its_sources_bring_each_cell_once(runs: list[Run]) -> None:
    collected = collect([merged(runs), *runs])
    assert len(collected.cells) == 8
    machine_and_commit = {
        (one["run_id"], one["commit"], one["machine"], tuple(one["tags"]))
        for one in json.loads(export_cells(collected, "json"))
    }
    assert machine_and_commit == {
        ("first", "1a2b3c4", "AMD EPYC 7B13", ("cpu", "night")),
        ("second", "bbbbbbb", "AMD EPYC 7B13", ()),
    }


def test_what_is_not_asked_for_is_still_compared_with(runs: list[Run]) -> None:
    collected = collect(runs, lambda cells: cells["route"] == "gather")
    assert [c.row["route"] for c in collected.cells] == ["gather"] * 3
    first = collected.cells[0]
    assert first.speed is not None
    assert first.x_dense is not None
    assert collect([]).cells == []


def test_csv_has_every_column_and_every_digit(runs: list[Run]) -> None:
    text = export_cells(collect(runs), "csv").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == [c.name for c in FLAT_COLUMNS]
    assert [c.name for c in FLAT_COLUMNS[: len(CELL_COLUMNS)]] == [c.name for c in CELL_COLUMNS]
    for row, cell in zip(rows, collect(runs).cells, strict=True):
        assert row["ms_total"] == ("" if cell.row["ms_total"] is None else repr(cell.row["ms_total"]))
        assert row["x_dense"] == (repr(cell.x_dense.point) if cell.x_dense else "")
        assert row["speed_lo"] == (repr(cell.speed.lo) if cell.speed else "")
    assert (rows[0]["tags"], rows[0]["commit"]) == ("cpu night", "1a2b3c4")
    assert rows[-1]["reason"] == 'too | "little"'


def test_markdown_is_a_table_with_its_title_and_notes(runs: list[Run]) -> None:
    lines = export_cells(collect(runs[:1]), "markdown").decode().splitlines()
    assert lines[0].startswith("decode fwd batched module B=1")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 6
    assert len({line.count("|") for line in table}) == 1
    head = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert head[:3] == ["S", "route", "ms/step"]
    assert "x dense" in head
    assert table[4].startswith("| 1k | dense |")
    assert "x dense: time of dense attention" in lines[-1]
    many = export_cells(collect(runs), "markdown").decode()
    assert "| second | 1k | prefill |" in many
    assert 'oom | too \\| "little" |' in many


def test_lists_of_runs_in_every_text_format(runs: list[Run]) -> None:
    summaries = [summarise(run) for run in runs]
    assert json.loads(export_runs(summaries, "json")) == [run.to_dict() for run in summaries]
    rows = list(csv.DictReader(io.StringIO(export_runs(summaries, "csv").decode())))
    assert [row["run_id"] for row in rows] == ["first", "second"]
    assert [(row["cells_ok"], row["cells_oom"]) for row in rows] == [("6", "0"), ("1", "1")]
    assert rows[0]["tags"] == "cpu night"
    markdown = export_runs(summaries, "markdown").decode().splitlines()
    assert markdown[2].startswith("| first | 2025-01-02 03:04 | cpu night | AMD EPYC 7B13 | 6 ok |")
    assert json.loads(export_runs([], "json")) == []
    assert json.loads(export_cells(collect([]), "json")) == []


def test_parquet_is_typed_and_says_its_units(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    write(tmp_path / "x.parquet", export_cells(collect(runs), "parquet"))
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.schema.names == [c.name for c in FLAT_COLUMNS]
    for column, cells in (
        ("S", [1024] * 3 + [2048] * 3 + [1024] * 2),
        ("reason", [None] * 7 + ['too | "little"']),
    ):
        assert table.column(column).to_pylist() == cells
    assert table.column("ms_total").to_pylist() == [c.row["ms_total"] for c in collect(runs).cells]
    kinds = {c.name: {"str": "string", "int": "int64", "float": "double"}[c.kind] for c in FLAT_COLUMNS}
    assert {field.name: str(field.type) for field in table.schema} == kinds
    assert table.schema.field("ms_total").metadata[b"unit"] == b"ms"
    assert parquet.read_table(io.BytesIO(export_runs([summarise(r) for r in runs], "parquet"))).num_rows == 2


def test_parquet_without_its_library_is_one_line(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    true = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return true(name, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(PresentError, match=r"^parquet needs pyarrow: pip install pyarrow$"):
        export_cells(collect(runs), "parquet")


@pytest.mark.parametrize(
    ("name", "to", "kind"),
    [
        (None, None, "table"),
        ("csv", None, "csv"),
        (None, "x.md", "markdown"),
        (None, "a/b.json", "json"),
        (None, "x.csv", "csv"),
        (None, "x.parquet", "parquet"),
        (None, "x.txt", "table"),
        ("json", "x.csv", "json"),
        ("markdown", "README", "markdown"),
    ],
)
def test_the_format_is_asked_for_or_named_by_the_file(name: str | None, to: str | None, kind: str) -> None:
    assert kind_of(name, None if to is None else Path(to)) == kind


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(PresentError, match=r"--format: 'jsn' is unknown; did you mean json\?"):
        kind_of("jsn", None)
    with pytest.raises(PresentError, match=r"the ending of x.doc names no format; allowed: .md, .json"):
        kind_of(None, Path("x.doc"))


def test_a_file_is_written_whole_with_its_folder_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "x.csv"
    write(path, b"one")
    write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["x.csv"]
    with pytest.raises(StoreError, match=f"cannot write {path.parent}: Is a directory"):
        write(path.parent, b"three")
    assert [p.name for p in path.parent.parent.iterdir()] == ["deep"]
    with pytest.raises(StoreError, match=r"cannot write .*: (Not a directory|File exists)"):
        write(path / "below", b"x")
