"""A stored scorecard: rules as rows, what was checked as columns, one line of scorecard.csv for each pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsabench.store.files import StoreError
from nsabench.store.journal import read_info, said_kind
from nsabench.store.schema import Column, SchemaError, clean_row
from nsabench.store.tables import TableRun, read_table

KIND = "verify"
SCORECARD_FILE = "scorecard.csv"
CHECK_STATUSES = ("pass", "fail", "unsupported", "differs")
"""What became of a check. Only `pass` may go without a reason."""

SCORECARD_COLUMNS = (
    Column("run_id", "str", "text", "the run: UTC time, name and commit"),
    Column("rule", "str", "text", "what was checked, in one word"),
    Column("title", "str", "text", "what was checked, in words"),
    Column("source", "str", "text", "where it is asked for: the rule's number, the paper's equation"),
    Column("subject", "str", "text", "what was put to it: branch:backend, layer:route, or a peer"),
    Column("branch", "str", "text", "cmp, score, sel, win, layer or all"),
    Column("backend", "str", "text", "the backend, or the library of a peer"),
    Column("dtype", "str", "text", "fp32, fp16, bf16 or fp64"),
    Column("passes", "str", "text", "fwd or fwd_bwd: values, or values and gradients"),
    Column("status", "str", "text", "one of " + ", ".join(CHECK_STATUSES)),
    Column("reason", "str", "text", "why status is not pass; for pass, what was refused of it, or empty"),
    Column("max_abs_err", "float", "1", "largest absolute error of the worst case"),
    Column("budget", "float", "1", "error allowed to the worst case"),
    Column("cases", "int", "cases", "how many cases were checked"),
    Column("failed", "int", "cases", "how many of them failed"),
    Column("worst", "str", "text", "the case whose error is the largest part of its budget"),
    Column("reported", "float", "1", "what a field report saw of this check"),
    Column("reported_note", "str", "text", "what that figure is, and what it was taken for"),
    Column("seconds", "float", "s", "time of the check"),
)
"""scorecard.csv: one row per rule, subject and dtype."""

SCORECARD_TABLES = {SCORECARD_FILE: SCORECARD_COLUMNS}


@dataclass(frozen=True)
class Scorecard:
    """A scorecard as stored: the content of run.json, the rows in the order they were checked, its folder."""

    info: dict[str, Any]
    rows: list[dict[str, Any]]
    path: Path


def check_score(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` as it is stored, every column in order; SchemaError unless it may stand in scorecard.csv."""
    clean = clean_row(row, SCORECARD_COLUMNS)
    for name in ("rule", "subject"):
        if not clean[name].strip():
            raise SchemaError(f"{name} is empty; a row of a scorecard needs one")
    status, reason = clean["status"], clean["reason"].strip()
    if status not in CHECK_STATUSES:
        raise SchemaError(f"status is {status!r}; allowed: {', '.join(CHECK_STATUSES)}")
    if status != "pass" and not reason:
        raise SchemaError(f"status is {status}, so reason must say why; it is empty")
    return clean


def store_scores(run: TableRun, *rows: Mapping[str, Any]) -> None:
    """Add rows to a run's scorecard; they are durable when this returns. SchemaError for rows that do not
    fit, DiskError where the disk refuses.
    """
    run.append(SCORECARD_FILE, *(check_score(row) for row in rows))


def load_scorecard(path: Path | str) -> Scorecard:
    """The scorecard in the run folder `path`, up to its last whole line.

    StoreError for a folder that is no run, a run of another kind, and a damaged one.
    """
    path = Path(path)
    info = read_info(path)
    if info.get("kind") != KIND:
        raise StoreError(f"{path} is {said_kind(info)}; wanted here: {said_kind({'kind': KIND})}")
    rows = read_table(path, SCORECARD_FILE, SCORECARD_COLUMNS)
    for number, row in enumerate(rows, 1):
        try:
            check_score(row)
        except SchemaError as error:
            raise StoreError(f"{path} is damaged: {SCORECARD_FILE}: row {number}: {error}") from error
    return Scorecard(info, rows, path)


def failed_rows(rows: Sequence[Mapping[str, Any]], peers: Sequence[str] = ()) -> list[Mapping[str, Any]]:
    """The rows that failed, less those of the subjects in `peers`."""
    return [row for row in rows if row["status"] == "fail" and row["subject"] not in peers]
