"""Selections in files: the blocks that one sequence's queries selected in a layer, to measure with again.

An npz file (a zip archive of numpy arrays, deflated) of two arrays: ``blocks (S,H,n)``, int16 or int32,
ascending in each list, -1 in empty slots at its tail; and ``header``, JSON text that says what they are.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nsabench.plan import Cell, PlanError
from nsabench.store.files import disk_error, replace

Array = np.ndarray[Any, Any]

FORMAT, VERSION = "nsabench selection", 1
FIT = ("groups", "l_sel", "n_sel")
"""Fields of a header and of a cell that have to be the same. The others tell where the blocks are from."""
HEADER = ("S", *FIT, "l", "d", "seed", "source")


def save_selection(path: str | Path, blocks: Array, cell: Cell, source: str) -> None:
    """Write ``blocks (S,H,n)``, as :func:`nsa.select_blocks` gives them, to a new file, whole or not at all.

    ``cell`` says their geometry; ``source`` in a line where they are from. PlanError where the file exists,
    or the blocks are no selection of such a layer; StoreError where it cannot be written.
    """
    path = Path(path)
    header = {"format": FORMAT, "version": VERSION, "B": 1, "source": source}
    header |= {name: getattr(cell, name) for name in HEADER if name != "source"}
    if fault := _fault(blocks, header):
        raise PlanError(f"cannot save a selection: {fault}")
    small = np.int16 if blocks.max(initial=0) <= np.iinfo(np.int16).max else np.int32
    if path.exists():
        raise PlanError(f"{path} exists; name another file")
    data = io.BytesIO()
    np.savez_compressed(data, blocks=blocks.astype(small), header=np.array(json.dumps(header)))
    try:
        replace(path, data.getvalue())
    except OSError as error:
        raise disk_error(f"write {path}", error) from None


def read_header(path: str | Path) -> dict[str, Any]:
    """What a file's blocks are, read without them; PlanError for what is no selection, in a line."""
    header, _ = _read(Path(path), blocks=False)
    return header


def unusable(cell: Cell) -> str | None:
    """Why the file that a cell's selection names cannot be what it attends, by the file's header, or None."""
    kind, _, path = cell.selection.partition("=")
    if kind != "file" or not cell.computes_nsa:
        return None
    try:
        return _other(read_header(path), cell, path)
    except PlanError as error:
        return str(error)


def load_selection(path: str | Path, cell: Cell) -> Array:
    """The blocks in a file, ``(S,H,n)`` int32; PlanError in a line for a broken file or another geometry."""
    header, blocks = _read(Path(path), blocks=True)
    if why := _other(header, cell, str(path)):
        raise PlanError(why)
    return blocks


def _other(header: Mapping[str, Any], cell: Cell, path: str) -> str | None:
    for name in FIT:
        if header[name] != getattr(cell, name):
            return f"{path} was captured with {name} {header[name]}; the cell has {getattr(cell, name)}"
    if header["S"] < cell.S:
        return f"{path} holds {header['S']} queries; the cell has {cell.S}"
    return None


def _read(path: Path, *, blocks: bool) -> tuple[dict[str, Any], Array]:
    nothing = np.empty((0, 0, 0), np.int32)
    try:
        with zipfile.ZipFile(path) as archive:
            missing = {"header.npy", "blocks.npy"} - set(archive.namelist())
            if missing:
                raise PlanError(f"{path} is no file of selected blocks: it has no {missing.pop()[:-4]}")
        with np.load(path, allow_pickle=False) as stored:
            header = _header(str(stored["header"]), path)
            found = stored["blocks"] if blocks else nothing
    except PlanError:
        raise
    except OSError as error:
        # numpy says some faults of a file's content as an OSError without a number.
        raise PlanError(f"cannot read {path}: {error.strerror or 'not a selection'}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, KeyError):
        raise PlanError(f"{path} is no file of selected blocks, or a truncated one") from None
    if blocks and (fault := _fault(found, header)):
        raise PlanError(f"{path}: {fault}")
    return header, found.astype(np.int32)


def _header(text: str, path: Path) -> dict[str, Any]:
    header = json.loads(text)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise PlanError(f"{path} is no file of selected blocks: its header says nothing of them")
    if header.get("version") != VERSION:
        raise PlanError(f"{path} has version {header.get('version')!r}; this nsabench reads {VERSION}")
    for name in ("S", *FIT):
        if type(header.get(name)) is not int or header[name] < 1:
            raise PlanError(f"{path}: its header says {name} is {header.get(name)!r}")
    return header


def _fault(blocks: Array, header: Mapping[str, Any]) -> str:
    """Why ``blocks`` is not what the header says, or cannot be attended; empty where it can."""
    shape = (header["S"], header["groups"], header["n_sel"])
    if blocks.shape != shape or blocks.dtype.kind != "i":
        return f"blocks are {blocks.dtype} {blocks.shape}, not integers {shape}"
    if int(blocks.min(initial=0)) < -1:
        return "a block is below -1"
    own = np.arange(header["S"]) // header["l_sel"]
    late = (blocks > own[:, None, None]).any((1, 2))
    if late.any():
        return f"query {int(late.argmax())} selects a block that begins after it"
    ascending = (blocks[..., :-1] < blocks[..., 1:]) | (blocks[..., 1:] < 0)
    if not (ascending & ~((blocks[..., :-1] < 0) & (blocks[..., 1:] >= 0))).all():
        return "the blocks of a query are not ascending, with -1 only after the last"
    return ""
