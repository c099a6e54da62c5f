"""A stored training: its tables, its heartbeat, and reading them back."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsabench.store.files import StoreError, disk_error
from nsabench.store.journal import read_info, said_kind
from nsabench.store.schema import Column
from nsabench.store.tables import TableRun, read_table

KIND = "train"
RUN_STATUSES = ("running", "ok", "nan", "hang", "oom", "error", "interrupted")
"""What became of a training, in run.json as `status`; each but `running` and `ok` has a `reason`."""

TRAINING_FILE = "training.csv"
GATES_FILE = "gates.csv"
ROUTES_FILE = "routes.csv"
OVERLAP_FILE = "overlap.csv"
EVAL_FILE = "evaluation.csv"
HEARTBEAT_FILE = "heartbeat.jsonl"

_RUN_ID = Column("run_id", "str", "text", "the run: UTC time, name and commit")
_STEP = Column("step", "int", "1", "the optimizer step, counted from 1")
_LAYER = Column("layer", "int", "1", "the layer, counted from 0")

TRAINING_COLUMNS = (
    _RUN_ID,
    _STEP,
    Column("loss", "float", "nats", "mean cross-entropy of the step's target positions, over all ranks"),
    Column("tokens_per_s", "float", "1/s", "tokens of the step, of all ranks, over its seconds"),
    Column("grad_norm", "float", "1", "2-norm of all gradients, before clipping"),
    Column("lr", "float", "1", "learning rate of the step"),
    Column("scale", "float", "1", "the GradScaler's scale after the step; empty without one"),
    Column("overflows", "int", "1", "steps that the GradScaler has skipped so far; empty without one"),
    Column("peak_alloc_bytes", "int", "bytes", "most held by the GPU's allocator so far; empty on a CPU"),
    Column("rss_bytes", "int", "bytes", "resident memory of the process after the step"),
    Column("seconds", "float", "s", "wall time of the step, from its data to its optimizer"),
)
"""training.csv: one row per step that was logged."""

GATES_COLUMNS = (
    _RUN_ID,
    _STEP,
    _LAYER,
    Column("entropy", "float", "nats", "of the gates normalised to sum 1, mean over tokens and heads"),
    Column("largest_share", "float", "1", "largest of the three mean shares"),
    Column("collapsed", "int", "1", "1 where the gates have all but closed branches, else 0"),
    Column("share_cmp", "float", "1", "mean part of the gates that the compressed branch has"),
    Column("share_sel", "float", "1", "mean part of the gates that the selected branch has"),
    Column("share_win", "float", "1", "mean part of the gates that the sliding branch has"),
)
"""gates.csv: one row per step looked at and layer."""

ROUTES_COLUMNS = (
    _RUN_ID,
    _LAYER,
    Column("branch", "str", "text", "cmp, score, sel or win"),
    Column("backend", "str", "text", "the backend that ran, or refused"),
    Column("calls", "int", "1", "calls that it computed"),
    Column("refused", "int", "1", "calls that it refused"),
    Column("reason", "str", "text", "why it refused; empty where it did not"),
)
"""routes.csv: one row per layer, branch and backend asked, written when the training ends."""

OVERLAP_COLUMNS = (
    _RUN_ID,
    _STEP,
    _LAYER,
    Column("neighbour_overlap", "float", "1", "part of a query's blocks that the one before it selects"),
    Column("union_blocks", "float", "1", "different blocks that neighbouring queries select together"),
)
"""overlap.csv: one row per step looked at and layer."""

EVAL_COLUMNS = (
    _RUN_ID,
    _STEP,
    Column("what", "str", "text", "the task that was put"),
    Column("accuracy", "float", "1", "part of the answers that were right"),
    Column("chance", "float", "1", "accuracy of guessing"),
    Column("distance", "int", "tokens", "how far back the answer lies; empty where it is no one place"),
    Column("count", "int", "1", "answers that were judged"),
    Column("route", "str", "text", "the route it was put to, such as auto or sel=off"),
)
"""evaluation.csv: one row per evaluation, task, distance and route."""

TRAINING_TABLES: Mapping[str, Sequence[Column]] = {
    TRAINING_FILE: TRAINING_COLUMNS,
    GATES_FILE: GATES_COLUMNS,
    ROUTES_FILE: ROUTES_COLUMNS,
    OVERLAP_FILE: OVERLAP_COLUMNS,
    EVAL_FILE: EVAL_COLUMNS,
}

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """A training as stored: the content of run.json, its tables as rows in the order written, its heartbeats
    (`t`, `step`, `stage`), its folder.
    """

    info: dict[str, Any]
    steps: Rows
    gates: Rows
    routes: Rows
    overlap: Rows
    evaluation: Rows
    heartbeat: Rows
    path: Path


def load_training(path: Path | str) -> Training:
    """The training in the run folder `path`, up to the last whole line of each file.

    StoreError for a folder that is no run, a run of another kind, and a damaged one.
    """
    path = Path(path)
    info = read_info(path)
    if info.get("kind") != KIND:
        raise StoreError(f"{path} is {said_kind(info)}; wanted here: {said_kind({'kind': KIND})}")
    steps, gates, routes, overlap, evaluation = (
        read_table(path, file, columns) for file, columns in TRAINING_TABLES.items()
    )
    return Training(info, steps, gates, routes, overlap, evaluation, read_heartbeat(path), path)


def read_heartbeat(path: Path) -> Rows:
    """The heartbeats in the run folder `path`, up to the last whole line. StoreError for a damaged file."""
    file = path / HEARTBEAT_FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_error(f"read {file}", error) from error
    try:
        beats = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        if not all(isinstance(beat, dict) for beat in beats):
            raise ValueError("a line is no object")
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {HEARTBEAT_FILE}: {error}") from error
    return beats


def rewind(run: TableRun, step: int, *, ended: bool = False) -> None:
    """Cut the run's tables to what was written up to a step, for a training that goes on from there.

    A table of the whole training (routes.csv) becomes empty: it is written anew. So are evaluations of that
    very step when `ended`, because a training's last one comes after its last checkpoint.
    """
    for file, columns in TRAINING_TABLES.items():
        rows = read_table(run.path, file, columns)
        limit = step - 1 if ended and file == EVAL_FILE else step
        has_steps = any(column.name == "step" for column in columns)
        run.keep(file, sum(row["step"] <= limit for row in rows) if has_steps else 0)


LAST = 20
"""Rows of training.csv whose mean is `loss_mean` of a summary: one step's loss is of one batch."""


def summary_of(training: Training) -> dict[str, Any]:
    """What a training came to, from its rows: for run.json's `summary` and for tables.

    Keys: `step`, `loss` and `grad_norm` of the last row, `loss_first`, `loss_mean` of the last LAST rows,
    `tokens_per_s` (median), `step_seconds` (median), `seconds` in rows, `overflows`, `peak_alloc_bytes`,
    `peak_rss_bytes`; `evaluation`, `gates`: the rows of the last step evaluated and looked at; `routes`, all
    rows. None for what is not there.
    """
    rows = training.steps
    last = rows[-1] if rows else {}
    losses = [row["loss"] for row in rows[-LAST:] if row["loss"] is not None]
    return {
        "step": last.get("step", 0),
        "loss": last.get("loss"),
        "loss_first": rows[0]["loss"] if rows else None,
        "loss_mean": statistics.fmean(losses) if losses else None,
        "grad_norm": last.get("grad_norm"),
        "tokens_per_s": _median(rows, "tokens_per_s"),
        "step_seconds": _median(rows, "seconds"),
        "seconds": sum(row["seconds"] or 0.0 for row in rows),
        "overflows": last.get("overflows"),
        "peak_alloc_bytes": _largest(rows, "peak_alloc_bytes"),
        "peak_rss_bytes": _largest(rows, "rss_bytes"),
        "evaluation": _of_last_step(training.evaluation),
        "gates": _of_last_step(training.gates),
        "routes": [_without_run(row) for row in training.routes],
    }


def _median(rows: Rows, name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return statistics.median(values) if values else None


def _largest(rows: Rows, name: str) -> int | None:
    return max((row[name] for row in rows if row[name] is not None), default=None)


def _of_last_step(rows: Rows) -> Rows:
    return [_without_run(row) for row in rows if row["step"] == rows[-1]["step"]]


def _without_run(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "run_id"}
