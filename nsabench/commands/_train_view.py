"""A training as it goes: a bar on a terminal, plain lines elsewhere; and its tables when it has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from nsabench.store.training import Training, summary_of
from nsabench.training.observe import Observer, StepStats

LINE_EVERY_S = 10.0
REFRESHES_PER_S = 4.0


class TrainView(Observer):
    """Shows steps: loss, tokens/s and the time that is left.

    On a terminal in one line that stays; elsewhere a line for the first step, the last, and at most one every
    LINE_EVERY_S in between.
    """

    def __init__(self, talk: Console, steps: int) -> None:
        self._talk, self._steps = talk, steps
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = self._line = 0.0
        self._first = 1

    def begin(self, model: Any, first_step: int) -> None:
        self._began, self._first = time.monotonic(), first_step
        if not self._talk.is_terminal:
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._talk, refresh_per_second=REFRESHES_PER_S)
        self._task = self._bar.add_task("", total=self._steps, completed=first_step - 1)
        self._bar.start()

    def after_step(self, step: int, loss: float, stats: StepStats) -> None:
        text = f"loss {loss:.4f}, {stats.tokens_per_s:,.0f} tokens/s, {self._left(step)} left"
        if stats.overflows:
            text += f", {stats.overflows} overflows"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if step in (self._first, self._steps) or now - self._line >= LINE_EVERY_S:
            self._line = now
            self._talk.print(f"step {step}/{self._steps}: {text}", soft_wrap=True, markup=False)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, step: int) -> str:
        """By the mean of the steps of this process so far, evaluations and checkpoints included."""
        spent = time.monotonic() - self._began
        return duration(spent / (step - self._first + 1) * (self._steps - step))


def duration(seconds: float) -> str:
    """`2h05m`, `3m20s` or `12s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 60}m{whole % 60:02}s" if whole >= 60 else f"{whole}s"


def tables_of(training: Training) -> list[Table]:
    """What a training came to: its figures, and where there are any its evaluation, gates and routes."""
    summary = summary_of(training)
    tables = [_figures(training.info, summary)]
    if summary["evaluation"]:
        tables.append(_evaluation(summary["evaluation"]))
    if summary["gates"]:
        tables.append(_gates(summary["gates"]))
    if summary["routes"]:
        tables.append(_routes(summary["routes"]))
    return tables


def _table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _figures(info: Mapping[str, Any], summary: Mapping[str, Any]) -> Table:
    status = info["status"] + (f": {info['reason']}" if info.get("reason") else "")
    lines = {
        "status": status,
        "steps": f"{summary['step']} of {info['settings']['steps']}",
        "loss, last step": _number(summary["loss"], ".4f", " nats"),
        "loss, mean of the last": _number(summary["loss_mean"], ".4f", " nats"),
        "loss, first step": _number(summary["loss_first"], ".4f", " nats"),
        "gradient norm": _number(summary["grad_norm"], ".3g"),
        "fp16 overflows": _number(summary["overflows"], "d"),
        "speed, median": _number(summary["tokens_per_s"], ",.0f", " tokens/s"),
        "a step, median": _number(summary["step_seconds"], ".3g", " s"),
        "steps took": duration(summary["seconds"]),
        "peak memory, GPU": _mib(summary["peak_alloc_bytes"]),
        "peak memory, process": _mib(summary["peak_rss_bytes"]),
    }
    table = _table("training", ("", ""))
    for name, text in lines.items():
        if text:
            table.add_row(name, text)
    return table


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        f"evaluation after step {rows[0]['step']}",
        ("task", "route"),
        ("distance", "right", "chance", "answers"),
    )
    for row in rows:
        table.add_row(
            row["what"],
            row["route"],
            _number(row["distance"], "d"),
            _percent(row["accuracy"]),
            _percent(row["chance"]),
            _number(row["count"], "d"),
        )
    return table


def _gates(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(
        f"gates after step {rows[0]['step']}", ("layer",), ("cmp", "sel", "win", "entropy", "health")
    )
    for row in rows:
        shares = (_percent(row[f"share_{branch}"]) for branch in ("cmp", "sel", "win"))
        health = "collapsed" if row["collapsed"] else "ok"
        table.add_row(str(row["layer"]), *shares, _number(row["entropy"], ".3f"), health)
    return table


def _routes(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What ran, and what was passed over for it; layers that did the same are one line."""
    ran: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        if row["calls"]:
            over = (other["backend"] for other in rows if other["refused"] and _beside(row, other))
            same = (row["branch"], row["backend"], row["calls"], ", ".join(over))
            ran.setdefault(same, []).append(row["layer"])
    table = _table("routes", ("branch", "backend", "layers"), ("calls",))
    table.add_column("passed over (why: routes.csv)")
    for (branch, backend, calls, over), layers in ran.items():
        table.add_row(branch, backend, ",".join(map(str, layers)), _number(calls, "d"), over)
    return table


def _beside(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (row["layer"], row["branch"]) == (other["layer"], other["branch"])


def _number(value: float | None, how: str, unit: str = "") -> str:
    return "" if value is None else format(value, how) + unit


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f} MiB"
