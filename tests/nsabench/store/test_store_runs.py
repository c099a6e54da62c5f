"""A run folder: how it is named and made, what an append does, and that what is read is what was written."""

import csv
import json
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsabench.store import RunDir, SchemaError, StoreError, load_run, runs
from nsabench.store.schema import CELL_COLUMNS, SCHEMA_VERSION, TABLES

FILES = {"run.json", "journal.jsonl", *TABLES}
Create = Callable[..., RunDir]
Make = Callable[[int], Any]


def visible(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if not p.name.startswith(".")}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_new_run_is_whole(create_run: Create, root: Path) -> None:
    run = create_run()
    assert run.path == root / run.run_id
    assert visible(run.path) == FILES
    assert run.finished == {}
    for file, columns in TABLES.items():
        assert (run.path / file).read_text() == ",".join(c.name for c in columns) + "\n"
    assert json.loads((run.path / "run.json").read_text()) == run.info
    assert run.info["schema_version"] == SCHEMA_VERSION
    assert run.info["run_id"] == run.run_id
    given = {k: run.info[k] for k in ("name", "argv", "repro", "plan", "policy", "seed", "environment")}
    assert given == {
        "name": "decode",
        "argv": ["nsabench", "decode", "--S", "512"],
        "repro": "nsabench decode --S 512",
        "plan": [{"S": 512}],
        "policy": {"rounds": 15},
        "seed": 7,
        "environment": {"commit": "0123456789abcdef", "dirty": False},
    }
    assert [p.name for p in root.iterdir()] == [run.run_id]


@pytest.mark.parametrize(
    ("environment", "ending"),
    [
        ({"commit": "0123456789abcdef", "dirty": False}, "0123456"),
        ({"commit": "0123456789abcdef", "dirty": True}, "0123456-dirty"),
        ({"commit": None, "dirty": False}, "nogit"),
        ({}, "nogit"),
    ],
)
def test_a_run_is_named_after_time_command_and_commit(
    create_run: Create, environment: dict[str, Any], ending: str
) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    run = create_run(name="prefill_long", environment=environment)
    match = re.fullmatch(r"(\d{8}T\d{6}Z)-prefill_long-(.*)", run.run_id)
    assert match is not None
    assert match[2] == ending
    stamp = datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    assert before <= stamp <= datetime.now(UTC)
    assert run.info["created"] == f"{stamp:%Y-%m-%dT%H:%M:%SZ}"


def test_a_taken_name_gets_a_number(create_run: Create, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "utc_now", lambda: datetime(2024, 6, 7, 8, 9, 10, tzinfo=UTC))
    stem = "20240607T080910Z-decode-0123456"
    assert [create_run().run_id for _ in range(3)] == [stem, f"{stem}-2", f"{stem}-3"]
    assert {p.name for p in root.iterdir()} == {stem, f"{stem}-2", f"{stem}-3"}


def test_a_name_taken_at_the_last_moment_gets_a_number(
    create_run: Create, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "utc_now", lambda: datetime(2024, 6, 7, 8, 9, 10, tzinfo=UTC))
    stem = "20240607T080910Z-decode-0123456"
    rename = runs._rename_new

    def race(source: Path, target: Path) -> None:
        if target.name == stem:
            target.mkdir()
            (target / "other").touch()
        rename(source, target)

    monkeypatch.setattr(runs, "_rename_new", race)
    run = create_run()
    assert run.run_id == f"{stem}-2"
    assert run.info["run_id"] == run.run_id
    assert {p.name for p in (root / stem).iterdir()} == {"other"}


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "a\n", "x" * 65])
def test_a_name_that_is_no_folder_is_refused(create_run: Create, root: Path, name: str) -> None:
    with pytest.raises(StoreError, match="is not usable; allowed: letters"):
        create_run(name=name)
    assert not root.exists()


def test_what_json_cannot_hold_is_refused(create_run: Create, root: Path) -> None:
    with pytest.raises(StoreError, match=r"run.json cannot hold what it was given"):
        create_run(policy={"rounds": object()})
    assert not root.exists()


def test_an_append_is_on_disk_when_it_returns(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    for i in range(3):
        run.append(*make_cell(i))
        # Read by someone else, with the run still open.
        assert len(read_csv(run.path / "cells.csv")) == i + 1
        lines = (run.path / "journal.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert (len(lines), last["event"], last["cell_id"]) == (i + 1, "cell", f"{i:012x}")
        assert last["sizes"] == {file: (run.path / file).stat().st_size for file in TABLES}
    assert [len(read_csv(run.path / file)) for file in TABLES] == [3, 9, 1, 3]
    assert {r["run_id"] for file in TABLES for r in read_csv(run.path / file)} == {run.run_id}
    assert [r["cell_id"] for r in read_csv(run.path / "samples.csv")][::3] == [f"{i:012x}" for i in range(3)]


def test_finished_rows_are_whole_before_and_after_reopening(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(1))
    run.append({"cell_id": "b" * 12, "status": "oom", "reason": "out of\nmemory"}, [])
    before = run.finished
    run.close()
    with RunDir.open(run.path) as again:
        assert again.finished == before
        assert again.run_id == run.run_id
        assert again.info == run.info
    row = before["b" * 12]
    assert list(row) == [c.name for c in CELL_COLUMNS]
    assert (row["run_id"], row["reason"], row["ms_total"], row["provider"]) == (
        run.run_id,
        "out of memory",
        None,
        "",
    )


def test_a_finished_cell_is_refused_a_second_time(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(1))
    before = {file: (run.path / file).read_bytes() for file in FILES}
    with pytest.raises(StoreError, match=f"cell {1:012x} is already finished"):
        run.append(*make_cell(1))
    assert {file: (run.path / file).read_bytes() for file in FILES} == before


@pytest.mark.parametrize(
    ("row", "samples", "message"),
    [
        ({"cell_id": None}, [], "cell_id is None"),
        ({"status": "slow"}, [], "status is 'slow'"),
        ({"status": "oom"}, [], "reason must say why"),
        ({"run_id": "other"}, [], "cells.csv: run_id is 'other'"),
        ({}, [{"ms": 1.0}, {"ms": "fast"}], "ms takes float, not 'fast'"),
        ({}, [{"milliseconds": 1.0}], "unknown column 'milliseconds'"),
        ({}, [{"cell_id": "other", "ms": 1.0}], "samples.csv: cell_id is 'other'"),
    ],
)
def test_rows_that_do_not_fit_change_nothing(
    create_run: Create, row: dict[str, Any], samples: list[dict[str, Any]], message: str
) -> None:
    run = create_run()
    before = {file: (run.path / file).read_bytes() for file in FILES}
    with pytest.raises(SchemaError, match=message):
        run.append({"cell_id": "a" * 12, "status": "ok", **row}, samples)
    assert {file: (run.path / file).read_bytes() for file in FILES} == before
    run.append({"cell_id": "a" * 12, "status": "ok"}, [])
    assert list(run.finished) == ["a" * 12]


def test_a_closed_run_takes_nothing(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    with run:
        run.append(*make_cell(0))
    run.close()
    with pytest.raises(StoreError, match="is closed"):
        run.append(*make_cell(1))
    assert visible(run.path) == FILES
    assert {p.name for p in run.path.iterdir()} - FILES <= {".lock"}


FLOATS = st.floats(allow_nan=False)
WHOLE = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=20)


@given(
    ms=FLOATS,
    error=FLOATS | st.none() | st.just(math.nan),
    flops=WHOLE | st.none(),
    seed=WHOLE,
    text=TEXT,
    kernel=st.sampled_from(["NA", "nan", "null", "None", 'f<"a", b>', " x ", "1e5", "=1+1"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_come_back_exactly_from_csv_journal_and_frames(
    create_run: Create, ms: float, error: float | None, flops: int | None, seed: int, text: str, kernel: str
) -> None:
    run = create_run()
    row = {
        "cell_id": "c" * 12,
        "status": "ok",
        "ms_total": ms,
        "max_abs_err": error,
        "flops": flops,
        "seed": seed,
    }
    run.append({**row, "provider": text}, [{"ms": ms, "variant": text}], [], [{"kernel": kernel, "ms": ms}])
    run.close()
    error = None if error != error else error

    (line,) = read_csv(run.path / "cells.csv")
    assert line["ms_total"] == repr(ms)
    assert line["max_abs_err"] == ("" if error is None else repr(error))
    assert line["flops"] == ("" if flops is None else str(flops))
    assert (line["seed"], line["provider"], line["gbps"]) == (str(seed), text, "")

    with RunDir.open(run.path) as again:
        finished = again.finished["c" * 12]
    assert finished == run.finished["c" * 12]
    assert same(finished["ms_total"], ms)
    assert finished["max_abs_err"] == error
    assert (finished["flops"], finished["seed"], finished["provider"]) == (flops, seed, text)

    stored = load_run(run.path)
    assert same(stored.cells["ms_total"][0], ms)
    assert stored.cells["seed"][0] == seed
    assert same(stored.samples["ms"][0], ms)
    assert same(stored.kernels["ms"][0], ms)
    assert stored.samples["variant"][0] == text
    assert stored.kernels["kernel"][0] == kernel
    assert stored.rows == [finished]


def same(a: float, b: float) -> bool:
    """Equal, with the sign of zero."""
    return a == b and math.copysign(1, a) == math.copysign(1, b)


def test_numpy_scalars_are_stored_as_their_values(create_run: Create) -> None:
    run = create_run()
    row = {
        "cell_id": np.str_("d" * 12),
        "status": "ok",
        "S": np.int32(512),
        "ms_total": np.float64(0.1),
        "ms_lo": np.float32(0.1),
        "ms_hi": np.float32("nan"),
    }
    run.append(row, [{"ms": np.float64(1 / 3), "iters": np.uint8(4)}])
    run.close()
    (line,) = read_csv(run.path / "cells.csv")
    assert (line["S"], line["ms_total"], line["ms_hi"]) == ("512", "0.1", "")
    assert float(line["ms_lo"]) == float(np.float32(0.1))
    (sample,) = read_csv(run.path / "samples.csv")
    assert (sample["ms"], sample["iters"]) == (repr(1 / 3), "4")


def test_a_loaded_run_has_typed_frames_in_schema_order(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(0))
    run.append({"cell_id": "e" * 12, "S": 8, "status": "unsupported", "reason": "no GPU"}, [])
    stored = load_run(str(run.path))
    assert stored.info == run.info
    assert stored.run_id == run.run_id
    assert stored.path == run.path
    frames = (stored.cells, stored.samples, stored.telemetry, stored.kernels)
    for frame, columns in zip(frames, TABLES.values(), strict=True):
        assert list(frame.columns) == [c.name for c in columns]
    assert [len(f) for f in frames] == [2, 3, 0, 1]
    assert stored.cells["S"].dtype == np.int64
    assert stored.cells["ms_total"].dtype == np.float64
    assert math.isnan(stored.cells["ms_total"][1])
    assert stored.cells["peak_alloc_bytes"].isna().all()
    assert list(stored.cells["reason"]) == ["", "no GPU"]
    assert list(stored.samples["variant"]) == ["", "", ""]
    assert stored.samples["t_s"].dtype == np.float64
    assert stored.telemetry["power_w"].dtype == np.float64
    assert stored.rows == list(run.finished.values())


def test_an_empty_run_loads(create_run: Create) -> None:
    stored = load_run(create_run().path)
    assert stored.cells.empty
    assert stored.samples.empty
    assert stored.rows == []
    assert list(stored.cells["status"] == "ok") == []


def test_the_csv_files_and_run_json_alone_can_be_read(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    for i in range(3):
        run.append(*make_cell(i))
    whole = load_run(run.path)
    run.close()
    (run.path / "journal.jsonl").unlink()
    copied = load_run(run.path)
    assert copied.rows == whole.rows
    assert copied.samples.equals(whole.samples)
    # A copy cut off in the middle of a line.
    cells = run.path / "cells.csv"
    cells.write_bytes(cells.read_bytes()[:-5])
    (run.path / "kernels.csv").unlink()
    cut = load_run(run.path)
    assert cut.rows == whole.rows[:2]
    assert cut.kernels.empty


def test_reading_takes_no_lock_and_changes_nothing(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(0))
    run.close()
    with (run.path / "journal.jsonl").open("a") as stream:
        stream.write('{"event":"cell","cell')
    with (run.path / "samples.csv").open("a") as stream:
        stream.write("orphan,")
    (run.path / ".lock").unlink(missing_ok=True)
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    stored = load_run(run.path)
    assert list(stored.cells["cell_id"]) == [f"{0:012x}"]
    assert len(stored.samples) == 3
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before
