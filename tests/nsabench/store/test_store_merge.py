"""Merging: every row keeps its run, nothing is lost, doubled or averaged, and what differs is not hidden."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nsabench.store import DiskError, RunDir, StoreError, load_run, merge_runs
from nsabench.store.schema import SCHEMA_VERSION, TABLES, columns_of

Create = Callable[..., RunDir]
Make = Callable[[int], Any]

FRAMES = ("cells", "samples", "telemetry", "kernels")


@pytest.fixture
def make(create_run: Create, make_cell: Make) -> Callable[..., Path]:
    """A closed run of these cells; `factor` on their times."""

    def run_of(*cells: int, factor: float = 1.0, **settings: Any) -> Path:
        settings.setdefault("plan", [{"S": 2**i, "scope": "module", "twin": 0} for i in cells])
        run = create_run(**settings)
        for i in cells:
            row, *rest = make_cell(i)
            run.append({**row, "ms_total": row["ms_total"] * factor}, *rest)
        run.close()
        return run.path

    return run_of


def folders(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_rows_and_samples_are_the_sources_own(make: Callable[..., Path], tmp_path: Path) -> None:
    first, second = make(0, 1, tags=["cpu", "a"]), make(2, 3, tags=["cpu", "b"])
    before = folders(first.parent)
    merged = load_run(merge_runs([first, second], tmp_path / "out", argv=["merge", "A", "B C"]))
    assert folders(first.parent) == before
    one, two = load_run(first), load_run(second)
    assert merged.rows == [*one.rows, *two.rows]
    parts = merged.parts()
    for part, source in zip(parts, (one, two), strict=True):
        for name in FRAMES:
            pd.testing.assert_frame_equal(getattr(part, name), getattr(source, name), check_dtype=False)
        assert part.run_id == source.run_id
        assert part.info["environment"] == source.info["environment"]
    info = merged.info
    assert info["schema_version"] == SCHEMA_VERSION
    assert (info["name"], info["tags"], info["across"]) == ("merge", ["cpu", "a", "b"], [])
    assert (info["argv"], info["repro"]) == (["merge", "A", "B C"], "nsabench merge A 'B C'")
    assert [cell["S"] for cell in info["plan"]] == [1, 2, 4, 8]
    assert [source["run_id"] for source in info["sources"]] == [one.run_id, two.run_id]
    for source, run in zip(info["sources"], (one, two), strict=True):
        kept = {name: run.info[name] for name in ("environment", "policy", "argv", "tags", "seed", "created")}
        assert {name: source[name] for name in kept} == kept
        assert "plan" not in source
    assert merged.run_id.endswith("-merge-0123456")
    assert merged.path.name == merged.run_id


def test_its_files_fit_its_journal(make: Callable[..., Path], tmp_path: Path) -> None:
    path = merge_runs([make(0, 1), make(2)], tmp_path / "out")
    whole = load_run(path)
    (path / "journal.jsonl").unlink()
    again = load_run(path)
    for name in FRAMES:
        assert getattr(again, name).equals(getattr(whole, name))


def test_the_same_measurement_is_kept_once(make: Callable[..., Path], tmp_path: Path) -> None:
    """A copy, a copy made before the run was finished, and a run merged before: each brings what is new."""
    run, other = make(0, 1, 2), make(3)
    early = tmp_path / "early"
    shutil.copytree(run, early)
    lines = (early / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (early / "journal.jsonl").write_bytes(b"".join(lines[:1]))
    once = merge_runs([early, run, other], tmp_path / "out")
    assert list(load_run(once).cells["S"]) == [1, 2, 4, 8]
    assert len(load_run(once).samples) == 12
    twice = merge_runs([once, run, make(4)], tmp_path / "out")
    merged = load_run(twice)
    assert list(merged.cells["S"]) == [1, 2, 4, 8, 16]
    assert [source["run_id"] for source in merged.sources[:2]] == [run.name, other.name]
    assert len(merged.sources) == 3


def test_a_measurement_that_was_edited_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make(0, 1)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    journal = copy / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"S":2', '"S":3'))
    with pytest.raises(
        StoreError, match=f"hold cell {1:012x} of run .* with different values: one was edited"
    ):
        merge_runs([run, copy], tmp_path / "out")


def test_a_cell_measured_twice_is_refused_or_decided_never_averaged(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    first, second, third = make(0, 1), make(1, 2, factor=3.0), make(1, factor=5.0)
    with pytest.raises(StoreError) as caught:
        merge_runs([first, second], tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(f"1 cell was measured twice: S=2 in {first.name} and {second.name}; --prefer RUN")
    assert not (tmp_path / "out").exists()
    times = {path: load_run(path).cells.set_index("S")["ms_total"][2] for path in (first, second, third)}
    for prefer, winner in (
        ([first.name], first),
        ([str(second)], second),
        ([third.name, first.name], third),
        ([second.name, third.name], second),
    ):
        merged = load_run(merge_runs([first, second, third], tmp_path / "out", prefer=prefer))
        assert sorted(merged.cells["S"]) == [1, 2, 4]
        row = merged.cells.set_index("S").loc[2]
        assert (row["ms_total"], row["run_id"]) == (times[winner], winner.name)
        mine = merged.samples[merged.samples["cell_id"] == f"{1:012x}"]
        assert (len(mine), set(mine["run_id"])) == (3, {winner.name})


def test_a_preference_for_a_run_without_the_cell_decides_nothing(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make(0, 1), make(1, factor=2.0), make(2)]
    with pytest.raises(StoreError, match="1 cell was measured twice"):
        merge_runs(runs, tmp_path / "out", prefer=[runs[2].name])


def test_many_conflicts_are_counted(make: Callable[..., Path], tmp_path: Path) -> None:
    cells = range(12)
    with pytest.raises(StoreError) as caught:
        merge_runs([make(*cells), make(*cells, factor=2.0)], tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("12 cells were measured twice: S=1 in ")
    assert "; 4 more; --prefer" in said
    assert "\n" not in said


def test_an_unknown_preference_names_the_nearest(make: Callable[..., Path], tmp_path: Path) -> None:
    first, second = make(0, name="prefill"), make(1, name="decode")
    with pytest.raises(StoreError, match=f"'.*' is none of the merged runs; did you mean {second.name}"):
        merge_runs([first, second], tmp_path / "out", prefer=[second.name[:-2]])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": {"rounds": 9}}, r"policy rounds \(15 and 9\)"),
        ({"policy": {"rounds": 15, "cache": "cold"}}, r"policy cache \(None and cold\)"),
        ({"environment": {"commit": "fedcba9876"}}, r"commit \(0123456 and fedcba9\)"),
        (
            {"environment": {"commit": "0123456789abcdef", "dirty": True}},
            r"commit \(0123456 and 0123456-dirty\)",
        ),
    ],
)
def test_what_differs_is_refused_unless_asked_for(
    make: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    runs = [make(0), make(1, **settings)]
    with pytest.raises(StoreError, match=f"the runs differ in {said}; --across merges them nonetheless"):
        merge_runs(runs, tmp_path / "out")
    merged = load_run(merge_runs(runs, tmp_path / "out", across=True))
    (noted,) = merged.info["across"]
    assert noted in said
    assert len(merged.cells) == 2
    if "policy" in settings:
        assert merged.info["policy"] is None
    else:
        assert merged.info["environment"] is None
        assert merged.run_id.split("-")[-1] == "mixed"


def test_different_machines_merge_and_stay_told_apart(make: Callable[..., Path], tmp_path: Path) -> None:
    cpus = [{"commit": "0123456789abcdef", "cpu": {"model": model}} for model in ("A", "B")]
    runs = [make(i, environment=cpu) for i, cpu in enumerate(cpus)]
    merged = load_run(merge_runs(runs, tmp_path / "out"))
    assert merged.info["environment"] is None
    assert [part.info["environment"]["cpu"]["model"] for part in merged.parts()] == ["A", "B"]


def test_an_older_schema_is_merged_only_across(make: Callable[..., Path], tmp_path: Path) -> None:
    old, new = make(0, plan=[{"S": 1}]), make(1)
    info = json.loads((old / "run.json").read_text())
    (old / "run.json").write_text(json.dumps({**info, "schema_version": 1}))
    for file in ("cells.csv", "samples.csv"):
        keep = [column in columns_of(file, 1) for column in TABLES[file]]
        lines = [compress(line.split(","), keep) for line in (old / file).read_text().splitlines()]
        (old / file).write_text("".join(",".join(line) + "\n" for line in lines))
    with pytest.raises(StoreError, match=rf"differ in schema \(1 and {SCHEMA_VERSION}\)"):
        merge_runs([old, new], tmp_path / "out")
    merged = load_run(merge_runs([old, new], tmp_path / "out", across=True))
    assert list(merged.cells["scope"]) == ["module", ""]
    assert merged.info["plan"] == [{"S": s, "scope": "module", "twin": 0} for s in (1, 2)]
    assert merged.info["schema_version"] == SCHEMA_VERSION


def test_a_merged_run_is_not_continued(make: Callable[..., Path], tmp_path: Path) -> None:
    path = merge_runs([make(0), make(1)], tmp_path / "out")
    with pytest.raises(StoreError, match="is merged from 2 runs; continue those, then merge"):
        RunDir.open(path)


def test_damaged_sources_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    path = merge_runs([make(0), make(1)], tmp_path / "out")
    for broken in ({}, [1], [{"name": "x"}], "no"):
        info = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps({**info, "sources": broken}))
        with pytest.raises(StoreError, match=r"is damaged: sources in run.json is no list of runs"):
            load_run(path)


def test_one_run_is_nothing_to_merge(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="merge takes at least two runs; given: 1"):
        merge_runs([make(0)], tmp_path / "out")
    with pytest.raises(StoreError, match=r"is not a run: it has no run.json"):
        merge_runs([make(0), tmp_path], tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_disk_that_refuses_leaves_nothing(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    runs = [make(0), make(1)]
    calls, write = iter(range(100)), os.write

    def refusing(descriptor: int, data: bytes) -> int:
        if next(calls) >= after:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refusing)
        with pytest.raises(StoreError, match="cannot create a run in") as caught:
            merge_runs(runs, tmp_path / "out")
    assert isinstance(caught.value, DiskError) == (number == errno.ENOSPC)
    assert not (tmp_path / "out").exists()
