"""run.json and journal.jsonl: what a run folder says of itself. Reading only; nothing here changes the disk.

The journal is the truth. It has one line per finished cell, written after the CSV rows of the cell are safe:
`{"event": "cell", "cell_id": ..., "row": {...}, "sizes": {file: bytes}}`. `sizes` says how long each CSV file
is when the cell is finished; what lies beyond belongs to a cell that never was.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nsabench.store.files import StoreError, disk_error, header
from nsabench.store.schema import (
    CELL_COLUMNS,
    SCHEMA_VERSION,
    TABLES,
    SchemaError,
    clean_columns,
    clean_row,
    columns_of,
    is_missing,
    rows_of,
    upgraded,
)

RUN_FILE = "run.json"
JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class Journal:
    """The finished cells by column, and the sizes in bytes of the CSV files and the journal at that point."""

    columns: dict[str, list[Any]]
    sizes: dict[str, int]
    length: int

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The finished cells by cell_id, as `clean_row` has them."""
        return {row["cell_id"]: row for row in rows_of(self.columns)}


def journal_line(row: Mapping[str, Any], sizes: Mapping[str, int]) -> bytes:
    """The line that finishes a cell; missing values are left out."""
    known = {name: value for name, value in row.items() if not is_missing(value)}
    record = {"event": "cell", "cell_id": row["cell_id"], "row": known, "sizes": dict(sizes)}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def read_info(path: Path) -> dict[str, Any]:
    """run.json of the run at `path`; StoreError where there is none, or its schema is not one known here."""
    try:
        info = json.loads((path / RUN_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path} is not a run: it has no {RUN_FILE}") from None
    except OSError as error:
        raise disk_error(f"read {path / RUN_FILE}", error) from error
    except ValueError:
        raise StoreError(f"{path} is damaged: {RUN_FILE} is not JSON") from None
    version = info.get("schema_version") if isinstance(info, dict) else None
    if type(version) is not int or not isinstance(info.get("run_id"), str):
        raise StoreError(f"{path} is not a run: {RUN_FILE} is not nsabench's")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {version}; this nsabench reads {SCHEMA_VERSION}: upgrade nsabench"
        )
    if version < 1:
        raise StoreError(f"{path} is not a run: there never was a schema {version}")
    sources = info.get("sources", [{"run_id": ""}])
    if not isinstance(sources, list) or not all(isinstance(s, dict) and "run_id" in s for s in sources):
        raise StoreError(f"{path} is damaged: sources in {RUN_FILE} is no list of runs")
    return dict(info)


def said_kind(info: Mapping[str, Any]) -> str:
    """What kind of run run.json is of, in words."""
    words = {"verify": "a scorecard (nsabench verify)", "train": "a training (nsabench train)"}
    return words.get(str(info.get("kind", "")), "a run of cells")


def refuse_other_kind(path: Path, info: Mapping[str, Any]) -> None:
    """StoreError for a run that has no cells."""
    if "kind" in info:
        more = ", nsabench train --resume continues it" if info["kind"] == "train" else ""
        raise StoreError(f"{path} is {said_kind(info)}, which has no cells; nsabench report shows it{more}")


def read_journal(path: Path, version: int = SCHEMA_VERSION) -> Journal:
    """The journal of the run at `path`, of that schema. A last line cut short counts as never written.

    FileNotFoundError where there is no journal; StoreError for a damaged one.
    """
    try:
        lines = (path / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise disk_error(f"read {path / JOURNAL_FILE}", error) from error
    records = _records(lines)
    rows: dict[str, dict[str, Any]] = {}
    sizes = {file: len(header(columns_of(file, version))) for file in TABLES}
    length = 0
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            record = records[number - 1] if records else json.loads(line)
            cell_id = str(record["cell_id"])
            row = upgraded(record["row"], version)
            sizes_then = {file: int(record["sizes"][file]) for file in TABLES}
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines):
                break
            raise _damaged(path, number, error) from None
        if cell_id in rows or row.get("cell_id") != cell_id:
            raise StoreError(
                f"{path} is damaged: line {number} of {JOURNAL_FILE} repeats or mixes up cell {cell_id}"
            )
        rows[cell_id] = row
        sizes = sizes_then
        length += len(line)
    return Journal(_by_column(path, list(rows.values())), sizes, length)


def _records(lines: Sequence[bytes]) -> list[Any]:
    """What the lines hold, read at once, which is sooner; nothing unless each of them holds one record."""
    try:
        # A number between the lines, for a comma alone could make two halves of a record whole.
        records = json.loads(b"[" + b",0,".join(lines) + b"]")
    except ValueError:
        return []
    return records[::2] if len(records) == 2 * len(lines) - 1 else []


def _by_column(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    try:
        return clean_columns(rows, CELL_COLUMNS)
    except SchemaError:
        for number, row in enumerate(rows, start=1):
            try:
                clean_row(row, CELL_COLUMNS)
            except SchemaError as error:
                raise _damaged(path, number, error) from None
        raise


def _damaged(path: Path, number: int, error: Exception) -> StoreError:
    return StoreError(f"{path} is damaged: line {number} of {JOURNAL_FILE}: {error}")
