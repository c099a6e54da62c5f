"""Reading a stored run, on any machine, finished or not, even while it is being written."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsabench.store.files import StoreError, disk_error
from nsabench.store.journal import read_info, read_journal
from nsabench.store.schema import CELL_COLUMNS, TABLES, Column, clean_row

if TYPE_CHECKING:
    import pandas as pd

_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": lambda text: int(text) if text else None,
    "float": lambda text: float(text) if text else None,
}


@dataclass(frozen=True, eq=False)
class Run:
    """A stored run. `info` is run.json; each frame has exactly the schema's columns, in order.

    `str` columns hold text, empty where missing; `float` columns are float64, NaN where missing; `int`
    columns are int64, or float64 with NaN once a value is missing. Rows are in the order of measurement.
    """

    info: dict[str, Any]
    cells: "pd.DataFrame"
    samples: "pd.DataFrame"
    telemetry: "pd.DataFrame"
    kernels: "pd.DataFrame"
    path: Path

    @property
    def run_id(self) -> str:
        """The name the run was created with, wherever its folder lies now."""
        return str(self.info["run_id"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The cells as plain dicts; missing text is empty, a missing number None."""
        return [
            clean_row({str(k): v for k, v in row.items()}, CELL_COLUMNS)
            for row in self.cells.to_dict("records")
        ]


def load_run(path: Path | str) -> Run:
    """The run stored in the folder `path`: its finished cells and their samples. Changes nothing.

    Where the journal is missing (a copy of the CSV files alone), the CSV files are taken as they are; a last
    line cut short is left out. StoreError for a folder that is no run, or one of another schema.
    """
    path = Path(path)
    info = read_info(path)
    sizes: dict[str, int] | None = None
    # The journal before the CSV files: a run being written only ever has more than its journal says.
    try:
        journal = read_journal(path)
        cells = _frame(list(journal.rows.values()), CELL_COLUMNS)
        sizes = journal.sizes
    except FileNotFoundError:
        cells = _read_csv(path / "cells.csv", CELL_COLUMNS, None)
    frames = {
        file: _read_csv(path / file, TABLES[file], sizes[file] if sizes else None)
        for file in ("samples.csv", "telemetry.csv", "kernels.csv")
    }
    return Run(info, cells, frames["samples.csv"], frames["telemetry.csv"], frames["kernels.csv"], path)


def _frame(rows: list[dict[str, Any]], columns: tuple[Column, ...]) -> "pd.DataFrame":
    import pandas as pd

    frame = pd.DataFrame(rows, columns=[c.name for c in columns])
    kinds: dict[str, Any] = {}
    for column in columns:
        whole = column.kind == "int" and not frame[column.name].isna().any()
        kinds[column.name] = str if column.kind == "str" else "int64" if whole else "float64"
    return frame.astype(kinds)


def _read_csv(path: Path, columns: tuple[Column, ...], size: int | None) -> "pd.DataFrame":
    """The whole lines in the first `size` bytes. Python reads the numbers, to the last digit."""
    try:
        data = path.read_bytes()[:size]
    except FileNotFoundError:
        return _frame([], columns)
    except OSError as error:
        raise disk_error(f"read {path}", error) from error
    names = [c.name for c in columns]
    rows: list[dict[str, Any]] = []
    try:
        lines = csv.reader(io.StringIO(data[: data.rfind(b"\n") + 1].decode(), newline=""))
        if next(lines, names) != names:
            raise ValueError("it does not have the columns of its schema")
        for line in lines:
            values = zip(columns, line, strict=True)
            rows.append({column.name: _READ[column.kind](text) for column, text in values})
    except (ValueError, csv.Error) as error:
        where = f"{path.name}, row {len(rows) + 1}"
        raise StoreError(f"{path.parent} is damaged: {where}: {error}") from error
    return _frame(rows, columns)
