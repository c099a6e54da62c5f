"""Cells and runs for other programs: Markdown, JSON, CSV and Parquet."""

import csv
import importlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsabench.plan import nearest
from nsabench.present.catalog import Collected, Summary, counts_text, outcome_head, when_text
from nsabench.present.frame import PresentError
from nsabench.present.naming import commit_of, machine_of
from nsabench.present.pairing import Compared
from nsabench.present.tables import cell_object, compared_grid
from nsabench.stats import Interval
from nsabench.store.files import disk_error, replace
from nsabench.store.schema import CELL_COLUMNS, Column

FORMATS = ("table", "markdown", "json", "csv", "parquet")
SUFFIXES = {".md": "markdown", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "table"}

_WORDS = {
    "run",
    "when (UTC)",
    "tags",
    "machine",
    "cells",
    "outcome",
    "route",
    "status",
    *(c.name for c in CELL_COLUMNS if c.kind == "str"),
}
"""Headers of Markdown columns that stand left."""

_ADDED = (
    *(
        Column(f"{name}{end}", "float", "1", f"{what}{doc}")
        for name, what in (
            ("speed", "time of the first route of the shape over this one's"),
            ("x_dense", "time of dense attention of the shape over this one's"),
        )
        for end, doc in (
            ("", ", from paired rounds"),
            ("_lo", ": lower end of the 95 % interval"),
            ("_hi", ": upper end of the 95 % interval"),
        )
    ),
    Column("x_dense_baseline", "str", "text", "the dense attention that x_dense is relative to: the fastest"),
    Column("created", "str", "text", "when the run was made, UTC"),
    Column("commit", "str", "text", "commit of the code measured"),
    Column("machine", "str", "text", "model of the CPU or GPU"),
    Column("tags", "str", "text", "tags of the run, joined by blanks"),
)
FLAT_COLUMNS = (*CELL_COLUMNS, *_ADDED)
"""The columns of CSV and Parquet: those stored, then what they are compared with and where they come from."""


def kind_of(name: str | None, to: Path | None) -> str:
    """The format asked for, else the one that the file's ending names, else "table"."""
    if name is not None:
        if name not in FORMATS:
            raise PresentError(f"--format: {name!r} is unknown; {nearest(name, FORMATS)}")
        return name
    if to is None:
        return "table"
    if to.suffix not in SUFFIXES:
        raise PresentError(
            f"--to: the ending of {to.name} names no format; allowed: {', '.join(SUFFIXES)}, or --format"
        )
    return SUFFIXES[to.suffix]


def write(path: Path, data: bytes) -> None:
    """Put the data in the file, whole or not at all, with its folder. StoreError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, data)
    except OSError as error:
        raise disk_error(f"write {path}", error) from error


def export_cells(collected: Collected, kind: str) -> bytes:
    """The cells in one of the formats but "table"; PresentError where its library is missing."""
    if kind == "markdown":
        title, headers, lines, notes = compared_grid(collected.cells)
        return _markdown(title, headers, lines, notes).encode()
    if kind == "json":
        objects = [
            cell_object(cell) | _origin(collected, cell) | {"tags": _tags(collected, cell)}
            for cell in collected.cells
        ]
        return _json(objects)
    rows = [_flat(collected, cell) for cell in collected.cells]
    return _parquet(FLAT_COLUMNS, rows) if kind == "parquet" else _csv([c.name for c in FLAT_COLUMNS], rows)


def export_runs(runs: Sequence[Summary], kind: str) -> bytes:
    """The list of runs in one of the formats but "table"."""
    if kind == "markdown":
        lines = [
            [
                run.run_id,
                when_text(run.created),
                " ".join(run.tags),
                ", ".join(run.machines),
                counts_text(run),
            ]
            for run in runs
        ]
        return _markdown("", ["run", "when (UTC)", "tags", "machine", outcome_head(runs)], lines, []).encode()
    if kind == "json":
        return _json([run.to_dict() for run in runs])
    columns = [Column(name, "str", "text", doc) for name, doc in _RUN_COLUMNS.items()]
    columns += [Column("planned", "int", "cells", "cells planned")]
    statuses = dict.fromkeys(status for run in runs if run.kind == "cells" for status in run.counts)
    columns += [Column(f"cells_{status}", "int", "cells", f"cells that are {status}") for status in statuses]
    rows = [_flat_run(run, statuses) for run in runs]
    return _parquet(columns, rows) if kind == "parquet" else _csv([c.name for c in columns], rows)


def export_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], kind: str) -> bytes:
    """Rows of a table of those columns in one of the formats but "table"."""
    if kind == "json":
        return _json([{c.name: _finite(row.get(c.name)) for c in columns} for row in rows])
    names = [c.name for c in columns]
    if kind == "markdown":
        lines = [["" if row.get(name) is None else str(row[name]) for name in names] for row in rows]
        return _markdown("", names, lines, []).encode()
    return _parquet(columns, rows) if kind == "parquet" else _csv(names, rows)


_RUN_COLUMNS = {
    "run_id": "the run",
    "path": "its folder",
    "kind": "cells, verify or train",
    "status": "what became of it",
    "outcome": "what it came to, in a line",
    "created": "when the run was made, UTC",
    "name": "command or suite",
    "tags": "tags, joined by blanks",
    "suite": "the suite it came from",
    "machines": "models of the CPUs or GPUs, joined by commas",
    "commits": "commits of the code measured, joined by commas",
}


def _flat_run(run: Summary, statuses: Mapping[str, None]) -> dict[str, Any]:
    said = run.to_dict()
    joined = {
        "tags": " ".join(run.tags),
        "machines": ", ".join(run.machines),
        "commits": ", ".join(run.commits),
    }
    counts = {f"cells_{status}": run.counts.get(status, 0) for status in statuses}
    planned = {"planned": said["planned"]}
    return {name: said[name] for name in _RUN_COLUMNS} | joined | planned | (counts if said["cells"] else {})


def _flat(collected: Collected, cell: Compared) -> dict[str, Any]:
    origin = _origin(collected, cell) | {"tags": " ".join(_tags(collected, cell))}
    named = {"x_dense_baseline": cell.dense_name if cell.x_dense is not None else None}
    return cell.row | _ends("speed", cell.speed) | _ends("x_dense", cell.x_dense) | named | origin


def _ends(name: str, speed: Interval | None) -> dict[str, float | None]:
    point, lo, hi = (speed.point, speed.lo, speed.hi) if speed else (None, None, None)
    return {name: point, f"{name}_lo": lo, f"{name}_hi": hi}


def _origin(collected: Collected, cell: Compared) -> dict[str, Any]:
    info = collected.info[cell.row["run_id"]]
    return {
        "created": info.get("created"),
        "commit": commit_of(info),
        "machine": machine_of(info, cell.row["device"]),
    }


def _tags(collected: Collected, cell: Compared) -> list[str]:
    return list(collected.info[cell.row["run_id"]].get("tags") or ())


def _json(objects: Sequence[Mapping[str, Any]]) -> bytes:
    lines = ",\n".join(json.dumps(one, allow_nan=False) for one in objects)
    return f"[\n{lines}\n]\n".encode() if objects else b"[]\n"


def _csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([row.get(name) for name in names] for row in rows)
    return text.getvalue().encode()


def _markdown(
    title: str, headers: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
    """A table for a README; numbers stand right."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    rules = ["---" if head in _WORDS or head.startswith("%") else "---:" for head in headers]
    body = [line(headers), f"|{'|'.join(rules)}|", *map(line, lines)]
    return "\n\n".join(filter(None, [title, "\n".join(body), "\n\n".join(notes)])) + "\n"


def _parquet(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Typed columns, null for what is missing; each says its unit and meaning."""
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise PresentError("parquet needs pyarrow: pip install pyarrow") from None
    kinds = {"str": arrow.string(), "int": arrow.int64(), "float": arrow.float64()}
    fields = [arrow.field(c.name, kinds[c.kind], metadata={"unit": c.unit, "doc": c.doc}) for c in columns]
    arrays = [arrow.array([_value(row.get(f.name)) for row in rows], type=f.type) for f in fields]
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_arrays(arrays, schema=arrow.schema(fields)), sink)
    return bytes(sink.getvalue())


def _finite(value: Any) -> Any:
    """What JSON can hold: no text that is empty, no number without end."""
    return None if isinstance(value, float) and not math.isfinite(value) else _value(value)


def _value(value: Any) -> Any:
    return None if value == "" else value
