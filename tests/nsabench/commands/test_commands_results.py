"""`results`, `merge` and `plot` on folders of runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.store import load_run

Call = Callable[..., Any]

NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, NoTorch())
"""


def copy_as(source: Path, name: str, **info: Any) -> Path:
    """A copy of a run under another id, as if measured anew, with other words in run.json."""
    target = Path("results") / name
    shutil.copytree(source, target)
    for file in ("run.json", "journal.jsonl", "cells.csv", "samples.csv", "telemetry.csv", "kernels.csv"):
        (target / file).write_text((target / file).read_text().replace(source.name, name))
    # The ids in the CSV files have another length now: the journal's sizes with them.
    if len(name) != len(source.name):
        raise ValueError("give it a name as long as its source's")
    stored = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps({**stored, **info}))
    return target


@pytest.fixture
def two(folder: Path, finished: Path) -> list[Path]:
    """The finished run twice, under two names, the second with a tag and made ten years before."""
    first = Path("results") / finished.name
    shutil.copytree(finished, first)
    second = copy_as(finished, finished.name[:-4] + "wxyz", tags=["old"], created="2016-01-02T03:04:05Z")
    return [first, second]


def test_the_list_of_runs(call: Call, two: list[Path]) -> None:
    done = call("results")
    assert (done.code, done.err) == (0, "")
    for run in two:
        assert run.name in done.out
    assert "2016-01-02 03:04" in done.out
    assert "4 ok" in done.out


def test_runs_by_tag_and_time(call: Call, two: list[Path]) -> None:
    for arguments, left in (
        (["--tag", "old"], two[1:]),
        (["--tag", "old", "--tag", "new"], []),
        (["--since", "2020-01-01"], two[:1]),
        (["--since", "2010-01-01"], two),
        (["--where", "S=64"], two),
        (["--where", "S=65"], []),
    ):
        done = call("results", *arguments, "--format", "json")
        assert done.code == 0
        assert [Path(run["path"]) for run in json.loads(done.out)] == left
        assert done.err == ("" if left else "nsabench: no run is as asked for\n")


def test_one_run_is_shown_with_its_cells(call: Call, two: list[Path]) -> None:
    done = call("results", str(two[1]))
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == f"{two[1].name}, 2016-01-02 03:04 UTC"
    assert "tags old" in lines[1]
    assert lines[2].startswith("repro: nsabench decode")
    assert sum("sel=reference" in line for line in lines) >= 2
    some = call("results", str(two[1]), "--where", "S=32,route=auto")
    assert "sel=reference" not in "\n".join(some.out.splitlines()[3:])
    none = call("results", str(two[1]), "--where", "S=33")
    assert (none.code, none.err) == (0, "nsabench: no cell is as asked for\n")


def test_a_table_of_many_cells_says_what_it_leaves_out(call: Call, two: list[Path]) -> None:
    done = call("results", "--cells", "--most", "3")
    assert "the last 3 of 8 cells; --where, --most and --format show others" in done.out
    assert "of 8 cells" not in call("results", "--cells", "--most", "8").out


def test_cells_of_all_runs_as_csv(call: Call, two: list[Path], folder: Path) -> None:
    done = call("results", "--cells", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["run_id"] for row in rows] == [run.name for run in two for _ in range(4)]
    assert [float(row["ms_total"]) for row in rows[:4]] == list(load_run(two[0]).cells["ms_total"])
    written = call("results", "--cells", "--to", "new/cells.csv")
    assert (written.code, written.out, written.err) == (0, "", "written: new/cells.csv\n")
    assert (folder / "new" / "cells.csv").read_text() == done.out


@pytest.mark.parametrize("kind", ["markdown", "json", "csv", "table"])
@pytest.mark.parametrize("what", [[], ["--cells"]])
def test_every_format_on_the_console_and_in_a_file(
    call: Call, two: list[Path], folder: Path, kind: str, what: list[str]
) -> None:
    done = call("results", *what, "--format", kind)
    assert (done.code, done.err) == (0, "")
    assert two[0].name in done.out
    if kind == "json":
        assert len(json.loads(done.out)) == (8 if what else 2)
    call("results", *what, "--format", kind, "--to", "file")
    assert "\x1b" not in (folder / "file").read_text()
    if kind != "table":
        assert (folder / "file").read_text() == done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is neither a run nor a folder of runs"),
        (["--format", "jsn"], "--format: 'jsn' is unknown; did you mean json?"),
        (["--to", "x.doc"], "the ending of x.doc names no format"),
        (["--format", "parquet"], "parquet"),
        (["--where", "rout=auto"], "unknown column 'rout'; did you mean route?"),
        (["--since", "soon"], "'soon' is no day or moment"),
        (["--most", "0"], "--most"),
        (["--to", "/dev/null/x.csv"], "cannot write /dev/null/x.csv"),
    ],
)
def test_bad_usage_is_one_line(call_apart: Call, two: list[Path], arguments: list[str], said: str) -> None:
    done = call_apart("results", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_run_that_cannot_be_read_is_left_out_of_a_list_and_refused_by_name(
    call: Call, two: list[Path]
) -> None:
    info = json.loads((two[1] / "run.json").read_text())
    (two[1] / "run.json").write_text(json.dumps({**info, "schema_version": 99}))
    done = call("results", "--format", "json")
    assert done.code == 0
    assert [run["run_id"] for run in json.loads(done.out)] == [two[0].name]
    assert done.err.startswith(f"nsabench: left out: {two[1]} has schema 99; this nsabench reads")
    named = call("results", str(two[1]))
    assert (named.code, named.out) == (2, "")
    assert named.err.startswith(f"nsabench: {two[1]} has schema 99")


def test_results_need_no_torch(call_apart: Call, two: list[Path]) -> None:
    for arguments in (["results"], ["results", str(two[0])], ["results", "--cells", "--format", "csv"]):
        done = call_apart(*arguments, before=NO_TORCH)
        assert (done.code, done.err) == (0, "")
    assert call_apart("merge", *map(str, two), "--prefer", two[0].name, before=NO_TORCH).code == 0


def test_merge_keeps_one_row_of_each_cell(call: Call, two: list[Path]) -> None:
    refused = call("merge", *map(str, two))
    assert (refused.code, refused.out) == (2, "")
    assert "4 cells were measured twice" in refused.err
    assert refused.err.count("\n") == 1
    done = call("merge", *map(str, two), "--prefer", str(two[1]), "--out", "merged")
    assert done.code == 0
    (path,) = Path("merged").iterdir()
    assert done.out.splitlines() == [
        f"0 cells of {two[0].name}",
        f"4 cells of {two[1].name}",
        f"results: {path}",
    ]
    assert load_run(path).info["argv"] == [
        "merge",
        *map(str, two),
        "--prefer",
        str(two[1]),
        "--out",
        "merged",
    ]
    assert "merged from 2 runs" in call("results", "merged", str(two[0])).out
    drawn = call("plot", str(path), "--formats", "png")
    assert drawn.code == 0
    assert call("resume", str(path)).code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["results/nowhere", "results/nothing"], "is not a run: it has no run.json"),
        ([], "Missing argument"),
        (["--prefer", "x"], "Missing argument"),
    ],
)
def test_a_merge_of_nothing_is_one_line(call_apart: Call, arguments: list[str], said: str) -> None:
    done = call_apart("merge", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_plot_takes_a_folder_and_says_what_it_leaves_out(call: Call, two: list[Path], folder: Path) -> None:
    done = call("plot", "results", "--formats", "svg", "--where", "route=auto,S=64")
    assert done.code == 0
    (drawn,) = (folder / "plots").iterdir()
    assert drawn.name == f"{two[0].name}+{two[1].name}"
    assert done.out.splitlines()[0] == f"plots/{drawn.name}/decode-time.svg"
    assert call("plot", "results", "--tag", "nobody").err == "nsabench: there is no run to plot\n"
    assert "no cell is as asked for" in call("plot", "results", "--where", "S=1").err
