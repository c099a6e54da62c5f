"""Runs of older schemas still load, newer ones are refused; tags and suite; folders of runs."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nsabench.store import RunDir, StoreError, find_runs, load_cells, load_run
from nsabench.store.schema import CELL_COLUMNS, SCHEMA_VERSION, TABLES, columns_of
from nsabench.store.scorecard import load_scorecard
from nsabench.store.training import load_training

Create = Callable[..., RunDir]
Make = Callable[[int], Any]

OLDER = range(1, SCHEMA_VERSION)
ROOT = Path(__file__).resolve().parents[3]


def make_old(run: RunDir, version: int) -> Path:
    """The run as an older schema had it: without the columns that came later."""
    path = run.path
    info = json.loads((path / "run.json").read_text())
    if version == 1:
        del info["tags"], info["suite"]
    (path / "run.json").write_text(json.dumps({**info, "schema_version": version}))
    for file in ("cells.csv", "samples.csv"):
        keep = [column in columns_of(file, version) for column in TABLES[file]]
        lines = [line.split(",") for line in (path / file).read_text().splitlines()]
        assert not any('"' in part for line in lines for part in line)
        (path / file).write_text("".join(",".join(compress(line, keep)) + "\n" for line in lines))
    known = {column.name for column in columns_of("cells.csv", version)}
    journal = []
    for line in (path / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        record["row"] = {name: value for name, value in record["row"].items() if name in known}
        journal.append(json.dumps(record) + "\n")
    (path / "journal.jsonl").write_text("".join(journal))
    return path


@pytest.fixture(params=OLDER)
def version(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture
def old(create_run: Create, make_cell: Make, version: int) -> Path:
    run = create_run()
    for i in range(3):
        row, *rest = make_cell(i)
        run.append({**row, "route": "auto", "impl": "nsa", "scope": "module", "twin": 0}, *rest)
    run.close()
    return make_old(run, version)


@pytest.mark.parametrize("kept", [["journal.jsonl"], []], ids=["journal", "CSV alone"])
def test_a_run_of_an_older_schema_loads_with_its_scope_filled_in(old: Path, kept: list[str]) -> None:
    if not kept:
        (old / "journal.jsonl").unlink()
    run = load_run(old)
    assert list(run.cells["scope"]) == ["module"] * 3
    assert list(run.cells["twin"]) == [0] * 3
    assert list(run.cells.columns) == [c.name for c in CELL_COLUMNS]
    assert list(run.cells["S"]) == [1, 2, 4]
    assert len(run.samples) == 9
    assert {row["scope"] for row in run.rows} == {"module"}
    assert {row["twin"] for row in run.rows} == {0}


def test_an_empty_run_of_an_older_schema_loads(create_run: Create, version: int) -> None:
    run = create_run()
    run.close()
    path = make_old(run, version)
    assert load_run(path).cells.empty
    (path / "journal.jsonl").unlink()
    assert load_run(path).cells.empty


def test_a_run_of_an_older_schema_is_not_continued(old: Path, version: int) -> None:
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    with pytest.raises(
        StoreError, match=rf"has schema {version}, which can be read but not continued; .* measure anew"
    ):
        RunDir.open(old)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before


def test_runs_that_are_kept_in_the_repository_load() -> None:
    for path in find_runs(ROOT / "results"):
        kind = json.loads((path / "run.json").read_text()).get("kind")
        if kind is not None:
            assert (load_scorecard if kind == "verify" else load_training)(path).info["kind"] == kind
            continue
        run = load_run(path)
        assert len(run.cells)
        assert set(run.cells["scope"]) <= {"module", "core"}


LATER = {
    1: {
        "cells.csv": "scope twin canary_spread_pct cross_timer ms_cross timers_note copies neighbour_overlap "
        "union_blocks queue_gated_pct cold_probe dropped_rounds neighbour_load_pct",
        "samples.csv": "dropped",
    },
    2: {
        "cells.csv": "cross_timer ms_cross timers_note copies neighbour_overlap union_blocks "
        "queue_gated_pct cold_probe dropped_rounds neighbour_load_pct",
        "samples.csv": "dropped",
    },
}


def test_only_later_columns_are_missing_from_older_schemas(version: int) -> None:
    for file in TABLES:
        missing = set(TABLES[file]) - set(columns_of(file, version))
        assert {c.name for c in missing} == set(LATER[version].get(file, "").split())
        assert columns_of(file, SCHEMA_VERSION) == TABLES[file]


@pytest.mark.parametrize("file", ["cells.csv", "samples.csv", "kernels.csv"])
def test_a_csv_of_a_newer_schema_is_refused(create_run: Create, make_cell: Make, file: str) -> None:
    run = create_run()
    run.append(*make_cell(0))
    run.close()
    (run.path / "journal.jsonl").unlink()
    data = (run.path / file).read_text().splitlines()
    (run.path / file).write_text(
        "".join(f"{line},{'later' if not i else 1}\n" for i, line in enumerate(data))
    )
    with pytest.raises(StoreError, match=f"is damaged: {file}, row 1: it does not have the columns of its"):
        load_run(run.path)


def test_a_journal_of_a_newer_schema_is_refused(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(0))
    run.close()
    journal = run.path / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"S":', '"later":1,"S":'))
    for read in (load_run, RunDir.open):
        with pytest.raises(StoreError, match=r"line 1 of journal.jsonl: unknown column 'later'"):
            read(run.path)


def test_tags_and_suite_are_kept(create_run: Create) -> None:
    run = create_run(tags=["cpu", "a/b:c=1", "cpu"], suite={"name": "quick", "sweeps": [{"S": [1]}]})
    info = load_run(run.path).info
    assert info["tags"] == ["cpu", "a/b:c=1"]
    assert info["suite"] == {"name": "quick", "sweeps": [{"S": [1]}]}
    assert (create_run().info["tags"], create_run().info["suite"]) == ([], None)


@pytest.mark.parametrize("tag", ["", "two words", "a,b", "-x", "a\n", "x" * 65])
def test_a_tag_that_is_no_word_is_refused(create_run: Create, root: Path, tag: str) -> None:
    with pytest.raises(StoreError, match=f"tag {re.escape(repr(tag))} is not usable; allowed: letters"):
        create_run(tags=["good", tag])
    assert not root.exists()


def test_cells_can_be_read_without_the_rest(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(1))
    run.close()
    whole = load_run(run.path)
    (run.path / "samples.csv").write_text("no CSV of ours")
    cells = load_cells(run.path)
    assert cells.cells.equals(whole.cells)
    assert (cells.info, cells.run_id, cells.path, cells.rows) == (
        whole.info,
        run.run_id,
        run.path,
        whole.rows,
    )
    assert cells.sources == [whole.info]
    assert whole.parts() == [whole]
    assert whole.whole() is whole


def test_columns_are_to_be_had_without_frames(
    create_run: Create, make_cell: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run()
    for i in range(2):
        run.append(*make_cell(i))
    run.append({"cell_id": "e" * 12, "S": 8, "status": "unsupported", "reason": "no GPU"}, [])
    framed = load_run(run.path)
    assert len(framed.cells) == 3
    assert framed.cells is framed.cells
    monkeypatch.setattr(pd, "DataFrame", None)
    for stored in (load_run(run.path), load_cells(run.path)):
        assert stored.rows == framed.rows == list(run.finished.values())
        for column in CELL_COLUMNS:
            assert list(stored.column(column.name)) == list(framed.column(column.name))
    assert framed.column("ms_total")[2] is None


def test_the_rest_of_a_run_is_read_when_it_is_wanted(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(1))
    cells = load_cells(run.path)
    run.append(*make_cell(2))
    whole = cells.whole()
    assert list(whole.cells["S"]) == [2, 4]
    assert len(whole.samples) == 6


def test_runs_are_found_by_name_order_and_nothing_else(create_run: Create, root: Path) -> None:
    made = sorted(create_run(name=name).path for name in ("zebra", "decode", "prefill"))
    (root / "notes").mkdir()
    (root / "file.txt").write_text("x")
    shutil.copytree(made[0], root / ".hidden")
    assert find_runs(root) == made
    assert find_runs(str(made[1])) == [made[1]]


def test_no_run_to_be_found_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is neither a run nor a folder of runs"):
        find_runs(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is neither a run nor a folder of runs"):
        find_runs(tmp_path / "file")
    with pytest.raises(StoreError, match=r"holds no run: no folder in it has a run.json"):
        find_runs(tmp_path)
