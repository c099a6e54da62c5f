"""What an interruption leaves behind, and how it is put right."""

from pathlib import Path

from nsabench.store.files import StoreError, csv_rows, header, replace, truncate
from nsabench.store.journal import JOURNAL_FILE, Journal, read_journal
from nsabench.store.schema import TABLES


def inspect(path: Path) -> Journal:
    """What the run at `path` truly holds; StoreError where it was damaged by more than an interruption."""
    # cells.csv before the journal, the rest after it: so a run being written is never taken for damaged.
    try:
        listed = (path / "cells.csv").read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        listed = 0
    try:
        journal = read_journal(path)
    except FileNotFoundError:
        raise StoreError(f"{path} is damaged: it has no {JOURNAL_FILE}") from None
    if listed > len(journal.rows) + 1:
        known = len(journal.rows)
        raise StoreError(f"{path} is damaged: cells.csv has {listed} cells, {JOURNAL_FILE} only {known}")
    for file, size in journal.sizes.items():
        columns = header(TABLES[file])
        if file == "cells.csv" or size == len(columns):
            continue
        try:
            with (path / file).open("rb") as stream:
                start = stream.read(len(columns))
                found = stream.seek(0, 2)
        except FileNotFoundError:
            start, found = b"", 0
        if start != columns or found < size:
            raise StoreError(f"{path} is damaged: {file} has {found} of {size} bytes or other columns")
    return journal


def repair(path: Path, journal: Journal) -> None:
    """Bring every file to what the journal says."""
    for leftover in path.glob(".*.csv.new"):
        leftover.unlink()
    truncate(path / JOURNAL_FILE, journal.length)
    for file, size in journal.sizes.items():
        columns = header(TABLES[file])
        if file == "cells.csv" or size == len(columns):
            whole = columns + (csv_rows(journal.rows.values()) if file == "cells.csv" else b"")
            if not (path / file).is_file() or (path / file).read_bytes() != whole:
                replace(path / file, whole)
        else:
            truncate(path / file, size)
