"""Where blocks come from, on the command line: as an axis, between sides, captured into a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.run.selection_file import read_header
from nsabench.store import Run

Call = Callable[..., Any]
TheRun = Callable[[], Run]


def test_selections_are_an_axis(call: Call, tiny: list[str], the_run: TheRun) -> None:
    done = call("prefill", *tiny, "--selection", "natural,random,overlap=0.9", "--baseline", "dense")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert "; selection natural, random, overlap=0.9; " in lines[1]
    cells = [line for line in lines if line.startswith("[")]
    assert len(cells) == 6
    assert " S=64 B=1 auto: ok, " in cells[0]
    assert " S=64 B=1 selection=random auto: ok, " in cells[2]
    assert " S=64 B=1 selection=overlap=0.9 dense: ok, " in cells[5]
    rows = {(row["selection"], row["impl"]): row for row in the_run().rows}
    assert len({row["cell_id"] for row in rows.values()}) == 6
    for (_, impl), row in rows.items():
        assert (row["neighbour_overlap"] is None) == (row["union_blocks"] is None) == (impl == "dense")
    shared = {kind: row["neighbour_overlap"] for (kind, impl), row in rows.items() if impl == "nsa"}
    assert 0 <= shared["random"] < shared["overlap=0.9"] <= 1
    assert 4 <= rows["overlap=0.9", "nsa"]["union_blocks"] <= 8


def test_decode_attends_given_blocks_too(call: Call, tiny: list[str], the_run: TheRun) -> None:
    done = call("decode", *tiny, "--selection", "random", "--scope", "module,core")
    assert done.code == 0
    assert [(row["scope"], row["status"]) for row in the_run().rows] == [("module", "ok"), ("core", "ok")]
    assert [row["neighbour_overlap"] for row in the_run().rows] == [None, None]


def test_captured_once_and_measured_with(call: Call, tiny: list[str], the_run: TheRun, folder: Path) -> None:
    done = call("prefill", *tiny, "--save-selection", "layer.npz")
    size = (folder / "layer.npz").stat().st_size
    assert (done.code, done.out, done.err) == (0, f"selection: layer.npz ({size} bytes)\n", "")
    assert sorted(path.name for path in folder.iterdir()) == ["layer.npz"]
    header = read_header(folder / "layer.npz")
    assert {name: header[name] for name in ("S", "groups", "l_sel", "n_sel")} == {
        "S": 64,
        "groups": 1,
        "l_sel": 8,
        "n_sel": 4,
    }
    assert header["source"].startswith("nsabench prefill --device cpu --S 64 ")
    done = call("prefill", *tiny, "--S", "48,64", "--selection", "natural,file=layer.npz")
    assert done.code == 0
    rows = the_run().rows
    assert [row["status"] for row in rows] == ["ok"] * 4
    by_length = {(row["S"], row["selection"]): row["neighbour_overlap"] for row in rows}
    for length in (48, 64):
        assert by_length[length, "natural"] == by_length[length, "file=layer.npz"]


def test_a_file_is_not_captured_twice(call_apart: Call, tiny: list[str], folder: Path) -> None:
    done = call_apart("prefill", *tiny, "--routes", "score=chunked", "--save-selection", "x.npz")
    assert (done.code, "selection: x.npz" in done.out) == (0, True)
    again = call_apart("prefill", *tiny, "--save-selection", "x.npz")
    assert (again.code, again.err) == (2, "nsabench: --save-selection: x.npz exists; name another file\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--S 32,64", "takes one cell of NSA, got 2; give one of each axis"),
        ("--passes fwd,bwd", "takes one cell of NSA, got 2; give one of each axis"),
        ("--selection random", "the selection of the cell is random, not natural"),
        ("--B 2", "a file holds one sequence, B is 2"),
        ("--routes sel=off", "'sel=off' selects nothing"),
        ("--dry-run", "times nothing, and goes without --dry-run"),
        ("--find-max-S", "times nothing, and goes without --find-max-S"),
    ],
)
def test_what_cannot_be_captured_is_one_line(
    call: Call, tiny: list[str], folder: Path, arguments: str, said: str
) -> None:
    done = call("prefill", *tiny, "--save-selection", "x.npz", *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert done.err == f"nsabench: --save-selection: {said}\n"
    assert list(folder.iterdir()) == []


def test_a_file_that_cannot_be_written_or_does_not_fit(call: Call, tiny: list[str], folder: Path) -> None:
    done = call("prefill", *tiny, "--save-selection", "no/x.npz")
    assert (done.code, done.err) == (2, "nsabench: --save-selection: no is no folder\n")
    assert call("prefill", *tiny, "--save-selection", "x.npz").code == 0
    for options, said in (
        ("--S 32,128", "x.npz holds 64 queries; the cell has 128"),
        ("--n-sel 5", "x.npz was captured with n_sel 4; the cell has 5"),
    ):
        done = call("decode", *tiny, "--selection", "file=x.npz", *options.split())
        assert (done.code, done.err) == (2, f"nsabench: --selection: {said}\n")
    done = call("compare", "auto", "selection=file=y.npz", "--device", "cpu", "--S", "64")
    said = "side 'selection=file=y.npz': cannot read y.npz: No such file or directory"
    assert (done.code, done.err) == (2, f"nsabench: {said}\n")
    shown = call("prefill", *tiny, "--selection", "random,file=y.npz", "--dry-run")
    assert shown.code == 0
    assert "cannot run here, in parentheses: auto (1 cell): cannot read y.npz" in shown.out
