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
from nsabench.store.schema import CELL_COLUMNS, TABLES, Column, clean_value, columns_of, upgraded

if TYPE_CHECKING:
    import pandas as pd

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
        return frame_rows(self.cells)

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


def frame_rows(frame: "pd.DataFrame", columns: Sequence[Column] = CELL_COLUMNS) -> list[dict[str, Any]]:
    """The rows of a frame as plain dicts with every one of the columns and no other."""
    names = [c.name for c in columns]
    missing = {c.name: [clean_value(c, None)] * len(frame) for c in columns if c.name not in frame}
    values = [missing.get(c.name) or _plain(c, frame[c.name]) for c in columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _plain(column: Column, series: "pd.Series[Any]") -> list[Any]:
    """The values as `clean_row` has them; whole columns at once where their type allows."""
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
    info, cells, _ = _load(Path(path))
    return RunCells(info=info, cells=cells, path=Path(path))


def load_run(path: Path | str) -> Run:
    """The run stored in the folder `path`: its finished cells and their samples. Changes nothing.

    Where the journal is missing (a copy of the CSV files alone), the CSV files are taken as they are; a last
    line cut short is left out. A run of an older schema gets the columns that came later. StoreError for a
    folder that is no run, or one of a newer schema.
    """
    path = Path(path)
    info, cells, sizes = _load(path)
    samples, telemetry, kernels = (
        _read_csv(path / file, info["schema_version"], sizes[file] if sizes else None)
        for file in ("samples.csv", "telemetry.csv", "kernels.csv")
    )
    return Run(info=info, cells=cells, path=path, samples=samples, telemetry=telemetry, kernels=kernels)


def _load(path: Path) -> tuple[dict[str, Any], "pd.DataFrame", dict[str, int] | None]:
    """run.json, the cells, and the size in bytes up to which each CSV file counts, where a journal says."""
    info = read_info(path)
    refuse_other_kind(path, info)
    version = info["schema_version"]
    # The journal before the CSV files: a run being written only ever has more than its journal says.
    try:
        journal = read_journal(path, version)
    except FileNotFoundError:
        return info, _read_csv(path / "cells.csv", version, None), None
    names = [c.name for c in CELL_COLUMNS]
    values = list(zip(*(row.values() for row in journal.rows.values()), strict=True))
    return info, _frame(CELL_COLUMNS, dict(zip(names, values, strict=False))), journal.sizes


def _frame(columns: Iterable[Column], values: Mapping[str, Sequence[Any]]) -> "pd.DataFrame":
    """Typed columns, None for what is missing; a column without values is missing in every row."""
    import numpy as np
    import pandas as pd

    length = max(map(len, values.values()), default=0)
    typed: dict[str, Any] = {}
    for column in columns:
        found = values.get(column.name) or [None] * length
        if column.kind == "str":
            typed[column.name] = pd.Series([v or "" for v in found], dtype=str)
        else:
            whole = column.kind == "int" and None not in found
            typed[column.name] = np.array(found, dtype="int64" if whole else "float64")
    return pd.DataFrame(typed)


def _read_csv(path: Path, version: int, size: int | None) -> "pd.DataFrame":
    """The whole lines in the first `size` bytes. Python reads the numbers, to the last digit."""
    columns = columns_of(path.name, version)
    try:
        data = path.read_bytes()[:size]
    except FileNotFoundError:
        return _frame(TABLES[path.name], {})
    except OSError as error:
        raise disk_error(f"read {path}", error) from error
    try:
        start, _, text = data[: data.rfind(b"\n") + 1].decode().partition("\n")
        if start and start != ",".join(c.name for c in columns):
            raise ValueError("row 1: it does not have the columns of its schema")
        texts = _texts(text, len(columns))
        values = {column.name: _parsed(column, part) for column, part in zip(columns, texts, strict=True)}
    except (ValueError, csv.Error) as error:
        raise StoreError(f"{path.parent} is damaged: {path.name}, {error}") from error
    if path.name == "cells.csv" and (later := upgraded({}, version)):
        length = len(values["run_id"])
        values |= {name: [value] * length for name, value in later.items()}
    return _frame(TABLES[path.name], values)


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


def _parsed(column: Column, texts: Sequence[str]) -> Sequence[Any]:
    if column.kind == "str":
        return texts
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
