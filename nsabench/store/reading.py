"""Reading a stored run, on any machine, finished or not, even while it is being written."""

import csv
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsabench.store.files import StoreError, disk_error
from nsabench.store.journal import RUN_FILE, read_info, read_journal, refuse_other_kind
from nsabench.store.schema import (
    CELL_COLUMNS,
    TABLES,
    Column,
    clean_value,
    clean_values,
    columns_of,
    rows_of,
    upgraded,
)

if TYPE_CHECKING:
    import pandas as pd

_CELL_COLUMNS = {c.name: c for c in CELL_COLUMNS}
_CONVERT: dict[str, Callable[[str], int | float]] = {"int": int, "float": float}


@dataclass(frozen=True, eq=False, kw_only=True)
class RunCells:
    """What a stored run says of its cells. `info` is run.json; the frame has exactly the schema's columns.

    `str` columns hold text, empty where missing; `float` columns are float64, NaN where missing; `int`
    columns are int64, or float64 with NaN once a value is missing. Rows are in the order of measurement.
    """

    info: dict[str, Any]
    cells: "pd.DataFrame"
    path: Path

    @property
    def run_id(self) -> str:
        """The name the run was created with, wherever its folder lies now."""
        return str(self.info["run_id"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The cells as plain dicts; missing text is empty, a missing number None."""
        return rows_of({name: self.column(name) for name in _CELL_COLUMNS})

    def column(self, name: str) -> Sequence[Any]:
        """A column of the cells as plain values, as `rows` has them."""
        held = vars(self)["cells"]
        return held[name] if isinstance(held, dict) else _plain(_CELL_COLUMNS[name], held)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """run.json of each run that measured: of a merged run several, without plans; else its own."""
        return list(self.info.get("sources") or [self.info])

    def whole(self) -> "Run":
        """The same run with all its files, read now; this very one if it has them."""
        return load_run(self.path)


@dataclass(frozen=True, eq=False, kw_only=True)
class Run(RunCells):
    """A stored run with all its files, each frame as `cells` is: the schema's columns, typed."""

    samples: "pd.DataFrame"
    telemetry: "pd.DataFrame"
    kernels: "pd.DataFrame"

    def whole(self) -> "Run":
        return self

    def parts(self) -> list["Run"]:
        """The runs that a merged run was made from, each with its own rows; else this run alone."""
        if "sources" not in self.info:
            return [self]
        return [self._part(source) for source in self.sources]

    def _part(self, source: dict[str, Any]) -> "Run":
        frames = {
            name: frame[frame["run_id"] == source["run_id"]].reset_index(drop=True)
            for name in ("cells", "samples", "telemetry", "kernels")
            if "run_id" in (frame := getattr(self, name))
        }
        return dataclasses.replace(self, info={**source, "plan": self.info["plan"]}, **frames)


class _Frame:
    """A frame of a run. Of columns it is made when it is first asked for: of most of many runs few are."""

    def __init__(self, name: str) -> None:
        self._name, self._columns = name, TABLES[f"{name}.csv"]

    def __set__(self, run: object, value: "pd.DataFrame | dict[str, list[Any]]") -> None:
        vars(run)[self._name] = value

    def __get__(self, run: object, owner: type) -> "pd.DataFrame":
        found: pd.DataFrame | dict[str, list[Any]] = vars(run)[self._name]
        if isinstance(found, dict):
            found = vars(run)[self._name] = _frame(self._columns, found)
        return found


for _owner, _name in ((RunCells, "cells"), (Run, "samples"), (Run, "telemetry"), (Run, "kernels")):
    setattr(_owner, _name, _Frame(_name))


def frame_rows(frame: "pd.DataFrame", columns: Sequence[Column] = CELL_COLUMNS) -> list[dict[str, Any]]:
    """The rows of a frame as plain dicts with every one of the columns and no other."""
    return rows_of({c.name: _plain(c, frame) for c in columns})


def _plain(column: Column, frame: "pd.DataFrame") -> list[Any]:
    """The values as `clean_row` has them; whole columns at once where their type allows."""
    if column.name not in frame:
        return [clean_value(column, None)] * len(frame)
    series = frame[column.name]
    values = series.tolist()
    if column.kind == "int" and series.dtype == "int64":
        return values
    if column.kind == "float" and series.dtype == "float64":
        return [value if value == value else None for value in values]
    return [clean_value(column, value) for value in values]


def find_runs(path: Path | str) -> list[Path]:
    """The run folder itself, else the run folders in it, by name. StoreError where there is none."""
    path = Path(path)
    try:
        if (path / RUN_FILE).exists():
            return [path]
        found = sorted(p for p in path.iterdir() if not p.name.startswith(".") and (p / RUN_FILE).exists())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} is neither a run nor a folder of runs") from None
    except OSError as error:
        raise disk_error(f"read {path}", error) from error
    if not found:
        raise StoreError(f"{path} holds no run: no folder in it has a {RUN_FILE}")
    return found


def load_cells(path: Path | str) -> RunCells:
    """The run stored in the folder `path` without its samples, telemetry and kernels; as `load_run`."""
    info, columns, _ = _load(Path(path))
    return RunCells(info=info, path=Path(path), **columns)


def load_run(path: Path | str) -> Run:
    """The run stored in the folder `path`: its finished cells and their samples. Changes nothing.

    Where the journal is missing (a copy of the CSV files alone), the CSV files are taken as they are; a last
    line cut short is left out. A run of an older schema gets the columns that came later. StoreError for a
    folder that is no run, or one of a newer schema.
    """
    path = Path(path)
    info, columns, sizes = _load(path)
    for name in ("samples", "telemetry", "kernels"):
        file = f"{name}.csv"
        columns[name] = _read_csv(path / file, info["schema_version"], sizes.get(file))
    return Run(info=info, path=path, **columns)


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """run.json, the columns of the cells under that name, and the size in bytes up to which a CSV file
    counts, where a journal says so.
    """
    info = read_info(path)
    refuse_other_kind(path, info)
    version = info["schema_version"]
    # The journal before the CSV files: a run being written only ever has more than its journal says.
    try:
        journal = read_journal(path, version)
    except FileNotFoundError:
        return info, {"cells": _read_csv(path / "cells.csv", version, None)}, {}
    return info, {"cells": journal.columns}, journal.sizes


def _frame(columns: Iterable[Column], values: Mapping[str, Sequence[Any]]) -> "pd.DataFrame":
    """Typed columns of clean values."""
    import numpy as np
    import pandas as pd

    typed: dict[str, Any] = {}
    for column in columns:
        found = values[column.name]
        if column.kind == "str":
            typed[column.name] = pd.Series(found, dtype=str)
        else:
            whole = column.kind == "int" and None not in found
            typed[column.name] = np.array(found, dtype="int64" if whole else "float64")
    return pd.DataFrame(typed)


def _read_csv(path: Path, version: int, size: int | None) -> dict[str, list[Any]]:
    """The columns of the whole lines in the first `size` bytes; Python reads numbers to the last digit."""
    columns = columns_of(path.name, version)
    try:
        data = path.read_bytes()[:size]
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise disk_error(f"read {path}", error) from error
    try:
        start, _, text = data[: data.rfind(b"\n") + 1].decode().partition("\n")
        if start and start != ",".join(c.name for c in columns):
            raise ValueError("row 1: it does not have the columns of its schema")
        texts = _texts(text, len(columns))
        values = {c.name: clean_values(c, _parsed(c, part)) for c, part in zip(columns, texts, strict=True)}
    except (ValueError, csv.Error) as error:
        raise StoreError(f"{path.parent} is damaged: {path.name}, {error}") from error
    later = upgraded({}, version) if path.name == "cells.csv" else {}
    length = len(values["run_id"])
    return {
        c.name: values.get(c.name) or [clean_value(c, later.get(c.name))] * length for c in TABLES[path.name]
    }


def _texts(text: str, n: int) -> list[Sequence[str]]:
    """The `n` columns of the lines; ValueError for a line with more or fewer values."""
    rows: Sequence[Sequence[str]] | None = None
    if '"' in text:
        rows = list(csv.reader(io.StringIO(text, newline="")))
        found = [len(row) for row in rows]
    else:
        # Without quotes a comma is a comma: one flat list is far sooner made than a list for every line.
        found = [line.count(",") + 1 for line in text.split("\n")[:-1]]
    for number, count in enumerate(found, start=1):
        if count != n:
            raise ValueError(f"row {number}: it has {count} values, not {n}")
    if rows is not None:
        return list(zip(*rows, strict=True))
    flat = text[:-1].replace("\n", ",").split(",") if found else []
    return [flat[place::n] for place in range(n)]


def _parsed(column: Column, texts: Sequence[str]) -> list[Any]:
    if column.kind == "str":
        return list(texts)
    convert = _CONVERT[column.kind]
    try:
        return [convert(text) if text else None for text in texts]
    except ValueError:
        for number, text in enumerate(texts, start=1):
            try:
                convert(text or "0")
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None
        raise
