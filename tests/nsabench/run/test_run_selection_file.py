"""Selections in files: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsa import select_blocks
from nsabench.plan import Cell, PlanError
from nsabench.run import Policy
from nsabench.run.capture import Capturing, capture, captured
from nsabench.run.selection import blocks_of, synthetic
from nsabench.run.selection_file import load_selection, read_header, save_selection, unusable
from nsabench.run.session import measure_group
from nsabench.run.work import config_of
from nsabench.run.workload import workload_for
from nsabench.store import StoreError

MakeCell = Callable[..., Cell]

ONCE = Policy(rounds=1, sample_ms=0.01, shares=False, alone=False)


class Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: Any, *more: Any) -> None:
        self.rows.append(dict(row))


def made(cell: Cell, seed: int = 1) -> np.ndarray[Any, Any]:
    return synthetic(config_of(cell), cell.groups, (0, cell.S), seed, 0.5)


@pytest.mark.parametrize("S", [1, 40, 300])
def test_what_is_written_is_read_back(make_cell: MakeCell, tmp_path: Path, S: int) -> None:
    cell, path = make_cell(S=S), tmp_path / "layer 3.npz"
    save_selection(path, made(cell), cell, "by hand")
    loaded = load_selection(path, cell)
    assert loaded.dtype == np.int32
    assert np.array_equal(loaded, made(cell))
    assert read_header(path) == {
        "format": "nsabench selection",
        "version": 1,
        "B": 1,
        "source": "by hand",
        "S": S,
        "groups": 2,
        "l_sel": 8,
        "n_sel": 4,
        "l": 8,
        "d": 4,
        "seed": 3,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["layer 3.npz"]
    with np.load(path) as stored:
        assert stored["blocks"].dtype == np.int16


def test_blocks_beyond_16_bits_are_kept(make_cell: MakeCell, tmp_path: Path) -> None:
    cell = make_cell(S=40_000, l=1, d=1, l_sel=1)
    save_selection(tmp_path / "x.npz", made(cell), cell, "by hand")
    assert np.array_equal(load_selection(tmp_path / "x.npz", cell), made(cell))


def test_a_shorter_cell_of_any_batch_takes_the_first_rows(make_cell: MakeCell, tmp_path: Path) -> None:
    long, path = make_cell(S=100), tmp_path / "x.npz"
    save_selection(path, made(long), long, "by hand")
    cell = make_cell(S=60, B=3, selection=f"file={path}")
    blocks = blocks_of(cell, [(0, 20), (20, 60)])
    for sequence in range(3):
        assert np.array_equal(blocks[0][sequence].numpy(), made(long)[:20])
        assert np.array_equal(blocks[20][sequence].numpy(), made(long)[20:60])
    decode = make_cell(phase="decode", S=60, selection=f"file={path}")
    assert np.array_equal(blocks_of(decode, [(57, 58), (59, 60)])[59][0].numpy(), made(long)[59:60])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"S": 101}, "holds 100 queries; the cell has 101"),
        ({"groups": 1}, "was captured with groups 2; the cell has 1"),
        ({"l_sel": 16}, "was captured with l_sel 8; the cell has 16"),
        ({"n_sel": 5}, "was captured with n_sel 4; the cell has 5"),
    ],
)
def test_another_geometry_is_refused(
    make_cell: MakeCell, tmp_path: Path, change: dict[str, int], said: str
) -> None:
    long, path = make_cell(S=100), tmp_path / "x.npz"
    save_selection(path, made(long), long, "by hand")
    cell = make_cell(**{"S": 60, **change}, selection=f"file={path}")
    assert unusable(cell) == f"{path} {said}"
    with pytest.raises(PlanError) as caught:
        load_selection(path, cell)
    assert str(caught.value) == f"{path} {said}"
    assert unusable(replace(cell, impl="dense")) is None
    assert unusable(make_cell(S=60, l=4, d=2, w=7, heads=8, dk=16, selection=f"file={path}")) is None


def test_a_file_is_never_written_over(make_cell: MakeCell, tmp_path: Path) -> None:
    cell, path = make_cell(), tmp_path / "x.npz"
    path.write_text("mine")
    with pytest.raises(PlanError, match=r"x.npz exists; name another file$"):
        save_selection(path, made(cell), cell, "by hand")
    assert path.read_text() == "mine"
    with pytest.raises(StoreError, match=r"^cannot write .*: No such file or directory$"):
        save_selection(tmp_path / "no" / "x.npz", made(cell), cell, "by hand")


def written(**members: Any) -> bytes:
    data = io.BytesIO()
    np.savez(data, **members)
    return data.getvalue()


def header(**changes: Any) -> np.ndarray[Any, Any]:
    good = {"format": "nsabench selection", "version": 1, "S": 40, "groups": 2, "l_sel": 8, "n_sel": 4}
    return np.array(json.dumps(good | changes))


def blocks(change: Callable[[np.ndarray[Any, Any]], object]) -> np.ndarray[Any, Any]:
    """Every block up to the query's own, but for what `change` does in place."""
    own = np.arange(40) // 8
    lists = np.arange(4) + np.maximum(own - 3, 0)[:, None, None]
    found = np.where(lists <= own[:, None, None], lists, -1).repeat(2, 1).astype(np.int16)
    change(found)
    return found


def put(row: int, *values: int) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(found: np.ndarray[Any, Any]) -> None:
        found[row, 1] = values

    return change


def nothing(found: object) -> None: ...


FORM = "the blocks of a query are not ascending, with -1 only after the last"
FOREIGN = {
    "text": (b"query,block\n0,0\n", "is no file of selected blocks, or a truncated one"),
    "empty": (b"", "is no file of selected blocks, or a truncated one"),
    "other arrays": (written(a=np.arange(3)), "is no file of selected blocks: it has no "),
    "no header": (written(blocks=blocks(nothing)), "is no file of selected blocks: it has no header"),
    "no blocks": (written(header=header()), "is no file of selected blocks: it has no blocks"),
    "header of another": (
        written(header=np.array('{"S": 40}'), blocks=blocks(nothing)),
        "is no file of selected blocks: its header says nothing of them",
    ),
    "a list for a header": (
        written(header=np.array("[1]"), blocks=blocks(nothing)),
        "is no file of selected blocks: its header says nothing of them",
    ),
    "no JSON": (
        written(header=np.array("{"), blocks=blocks(nothing)),
        "is no file of selected blocks, or a truncated one",
    ),
    "pickled": (
        written(header=np.array({"a": 1}, dtype=object), blocks=blocks(nothing)),
        "is no file of selected blocks, or a truncated one",
    ),
    "later version": (
        written(header=header(version=2), blocks=blocks(nothing)),
        "has version 2; this nsabench reads 1",
    ),
    "S in words": (
        written(header=header(S="many"), blocks=blocks(nothing)),
        "its header says S is 'many'",
    ),
}
FAULTY = {
    "another shape": (blocks(nothing)[:39], "blocks are int16 (39, 2, 4), not integers (40, 2, 4)"),
    "floats": (blocks(nothing).astype(float), "blocks are float64 (40, 2, 4), not integers (40, 2, 4)"),
    "the future": (blocks(put(3, 0, 1, -1, -1)), "query 3 selects a block that begins after it"),
    "below -1": (blocks(put(39, -2, 1, 2, 3)), "a block is below -1"),
    "descending": (blocks(put(39, 3, 2, 1, 0)), FORM),
    "twice": (blocks(put(39, 1, 1, 2, 3)), FORM),
    "a hole": (blocks(put(39, 0, -1, 2, 3)), FORM),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused_by_their_header(make_cell: MakeCell, tmp_path: Path, kind: str) -> None:
    data, said = FOREIGN[kind]
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    why = unusable(make_cell(S=40, selection=f"file={path}"))
    assert why is not None
    assert why.startswith(str(path))
    assert said in why
    assert "\n" not in why


@pytest.mark.parametrize("kind", FAULTY)
def test_blocks_that_cannot_be_attended_are_refused_as_a_row(
    make_cell: MakeCell, tmp_path: Path, kind: str
) -> None:
    found, said = FAULTY[kind]
    path = tmp_path / "x.npz"
    path.write_bytes(written(header=header(), blocks=found))
    cell, sink = make_cell(S=40, selection=f"file={path}"), Rows()
    assert unusable(cell) is None, "the header is right"
    with pytest.raises(PlanError) as caught:
        load_selection(path, cell)
    assert str(caught.value) == f"{path}: {said}"
    measure_group([cell], ONCE, sink)
    assert [(row["status"], row["reason"]) for row in sink.rows] == [("error", f"{path}: {said}")]
    with pytest.raises(PlanError, match=r"^cannot save a selection: "):
        save_selection(tmp_path / "y.npz", found, cell, "by hand")


def test_a_file_cut_anywhere_is_refused(make_cell: MakeCell, tmp_path: Path) -> None:
    cell, path = make_cell(S=100), tmp_path / "x.npz"
    save_selection(path, made(cell), cell, "by hand")
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        assert "is no file of selected blocks" in str(unusable(replace(cell, selection=f"file={path}")))


def test_a_byte_changed_in_the_blocks_is_found(make_cell: MakeCell, tmp_path: Path) -> None:
    cell, path = make_cell(S=100), tmp_path / "x.npz"
    save_selection(path, made(cell), cell, "by hand")
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("blocks.npy").header_offset + 200
    data = bytearray(path.read_bytes())
    data[start] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(PlanError, match="is no file of selected blocks, or a truncated one"):
        load_selection(path, cell)


def test_a_file_that_is_not_there_is_said_in_a_row_of_a_resumed_run(
    make_cell: MakeCell, tmp_path: Path
) -> None:
    sink = Rows()
    measure_group([make_cell(S=40, selection=f"file={tmp_path / 'x.npz'}")], ONCE, sink)
    (row,) = sink.rows
    said = f"cannot read {tmp_path / 'x.npz'}: No such file or directory"
    assert (row["status"], row["reason"]) == ("error", said)


@pytest.mark.parametrize("mode", ["batched", "chunked=16", "stepwise"])
@pytest.mark.parametrize("scope", ["module", "core"])
def test_what_is_captured_is_what_the_layer_selects(
    make_cell: MakeCell, tmp_path: Path, mode: str, scope: str
) -> None:
    cell, path, sink = make_cell(S=60, mode=mode, scope=scope, passes="bwd"), tmp_path / "x.npz", Rows()
    capture([cell], Capturing(path=str(path), source="a test"), sink)
    assert sink.rows == [{"cell_id": cell.cell_id, "status": "ok", "reason": ""}]
    whole = workload_for(make_cell(S=60)).inputs_without_cache()
    chosen = select_blocks(whole["q"], whole["k_cmp"], config_of(cell), kv_len=60)
    assert np.array_equal(load_selection(path, cell), chosen[0].numpy())
    again, sink = replace(cell, passes="fwd", selection=f"file={path}"), Rows()
    measure_group([again], ONCE, sink)
    assert [row["status"] for row in sink.rows] == ["ok"]


def test_a_capture_that_fails_is_a_row(make_cell: MakeCell, tmp_path: Path, plant: Any) -> None:
    policy = Capturing(path=str(tmp_path / "x.npz"), source="a test")
    sink = Rows()
    with plant("backends.chunked:select_blocks", lambda true, *given, **more: true(*given, **more) * 0):
        capture([make_cell(S=60, route="score=chunked")], policy, sink)
    assert sink.rows[0]["status"] == "wrong"
    capture([make_cell(S=60, route="win=fa2")], policy, sink)
    assert sink.rows[1]["status"] == "unsupported"
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.npz").touch()
    capture([make_cell(S=60)], policy, sink)
    assert (sink.rows[2]["status"], sink.rows[2]["reason"][-5:]) == ("error", " file")


def test_captured_blocks_are_on_the_cpu(make_cell: MakeCell) -> None:
    found = captured(make_cell(S=60), Rows())
    assert (tuple(found.shape), found.dtype, found.device.type) == ((60, 2, 4), torch.int32, "cpu")
