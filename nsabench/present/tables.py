"""Cells as tables for people, in 100 columns, and as plain objects for programs."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from nsabench.present.cell_text import (
    MAIN_STAGES,
    plain_row,
    reads_text,
    rounded_shares,
    scaled,
    short_shares,
    speed_object,
    speed_range,
    speed_text,
    time_range,
    whole,
)
from nsabench.present.disturbances import row_notes
from nsabench.present.frame import PLANNED, Cells, Order, Row, cell_rows, is_dense, varying, why_no_shares
from nsabench.present.pairing import Compared, compare
from nsabench.present.wording import (
    MISSING,
    arm_text,
    fields_text,
    folded,
    name_of,
    tokens_text,
    value_text,
)
from nsabench.store.schema import STAGES

_STATUS_STYLES = {"ok": "green", "unsupported": "yellow"}
_ROUTE_WIDTH = 18
_READS = "reads\n/dense"

_Writer = Callable[[Compared], str]


@dataclass(frozen=True)
class _Column:
    header: str
    text: _Writer
    style: str = ""
    gap: int = 1  # blanks before the column, besides the one between any two


def cells_table(
    cells: Cells,
    samples: pd.DataFrame | None = None,
    *,
    order: Order = (),
    last: int | None = None,
    width: int = 100,
) -> Table:
    """One line per cell: S, what varies, route, time, speed, reads, memory, power, clock, status and shares.

    `speed` is the time of the shape's first route (by `order`, else by place) over the cell's own, `x dense`
    that of dense attention; their intervals need `samples`. A cell that is not ok has its status and a
    number; the caption gives the reason under that number, and the run where there are several. `last` shows
    only so many of the last cells, with the speeds they have among all. Where `width` columns do not hold
    it, a cell has two lines, and where that does not suffice, the tokens read are left out.
    """
    return compared_table(compare(cell_rows(cells), samples, order), last=last, width=width)


def compared_table(cells: Sequence[Compared], *, last: int | None = None, width: int = 100) -> Table:
    """`cells_table` of cells already compared."""
    for stacked, reads in ((False, True), (True, True), (True, False)):
        table = _cells_table(cells, last, stacked, reads)
        if _width(table) <= width:
            break
    return table


def compared_grid(cells: Sequence[Compared]) -> tuple[str, list[str], list[list[str]], list[str]]:
    """What `cells_table` says, as plain text: title, headers, a line of texts per cell, and notes below."""
    rows = [cell.row for cell in cells]
    beside = _Beside.of(cells)
    columns, extra, runs = _columns(rows, beside, stacked=False), _extra(rows), _runs(rows)
    headers = [*(["run"] if len(runs) > 1 else []), "S", *map(name_of, extra), "route"]
    headers += [column.header.replace("\n", " ") for column in columns]
    lines = []
    for cell in cells:
        ok = cell.row["status"] == "ok"
        head = [cell.row["run_id"]] if len(runs) > 1 else []
        head += [tokens_text(cell.row["S"]), *(value_text(cell.row, f) or MISSING for f in extra)]
        numbers = [column.text(cell) if ok else "" for column in columns]
        shares = short_shares(cell.row) if ok and not is_dense(cell.row) else ""
        lines.append([*head, arm_text(cell.row), *numbers, cell.row["status"], shares or cell.row["reason"]])
    return _about(rows), [*headers, "status", f"% {'/'.join(MAIN_STAGES)}"], lines, beside.legend()


def _cells_table(cells: Sequence[Compared], last: int | None, stacked: bool, reads: bool) -> Table:
    """`stacked`: intervals and shares stand under what they belong to."""
    rows = [cell.row for cell in cells]
    beside = _Beside.of(cells)
    columns = _columns(rows, beside, stacked)
    if not reads:
        columns = [column for column in columns if column.header != _READS]
    notes, extra = _Notes(), _extra(rows)
    table = _table(rows, columns)
    main = "/".join(MAIN_STAGES[:2]), "/".join(MAIN_STAGES[2:])
    table.add_column(f" status, %\n {main[0]}\n /{main[1]}", overflow="fold")
    runs = _runs(rows)
    shown = cells[-last:] if last else cells
    for cell in shown:
        numbers = _numbers(cell, columns) if cell.row["status"] == "ok" else [Text()] * len(columns)
        status = _status_text(cell.row, notes, "\n " if stacked else " ")
        table.add_row(*_head(cell.row, extra, runs), *numbers, status)
    if len(runs) > 1:
        for run_id in dict.fromkeys(cell.row["run_id"] for cell in shown):
            notes.add(f"run {runs.index(run_id) + 1}: {run_id}")
    for line in (*beside.legend(), *row_notes([cell.row for cell in shown])):
        notes.add(line)
    notes.write(table)
    return table


@dataclass(frozen=True)
class _Beside:
    """What cells are compared with: other routes or not; by name, the dense attention that was measured, ok
    somewhere, and what of it was the fastest of a shape.
    """

    routes: bool
    dense: tuple[str, ...]
    fastest: tuple[str, ...]

    @classmethod
    def of(cls, cells: Sequence[Compared]) -> "_Beside":
        routes = {arm_text(cell.row) for cell in cells if not is_dense(cell.row)}
        beside = [cell for cell in cells if cell.dense is not None and cell.dense is not cell.row]
        rows = [cell.row for cell in cells if is_dense(cell.row)] if beside else []
        # Where none is ok, there is nothing to name but what was asked for.
        dense = dict.fromkeys(map(arm_text, [row for row in rows if row["status"] == "ok"] or rows[:1]))
        fastest = dict.fromkeys(cell.dense_name for cell in beside if cell.dense_name)
        return cls(len(routes) > 1, tuple(dense), tuple(fastest or dense))

    @property
    def over(self) -> str:
        """What the dense speed is relative to, in a header."""
        return self.fastest[0] if len(self.fastest) == 1 else "dense"

    def legend(self) -> list[str]:
        speed = "speed: time of the shape's first route over this one's; above 1 is faster"
        if len(self.fastest) > 1:
            what = f"the fastest of {len(self.dense)} dense attentions of that shape, named beside,"
        elif len(self.dense) > 1:
            what = f"{self.over}, the fastest of {len(self.dense)} dense attentions of that shape,"
        else:
            what = f"{'dense attention' if self.over == 'dense' else self.over} of that shape"
        x_dense = f"x {self.over}: time of {what} over this one's; above 1 is faster"
        return [speed] * self.routes + [x_dense] * bool(self.fastest)


def _columns(rows: Sequence[Row], beside: _Beside, stacked: bool) -> list[_Column]:
    unit, per_ms = ("us", 1000.0) if _all_below_1_ms(rows) else ("ms", 1.0)
    per_step = "/step" if {row["phase"] for row in rows} == {"decode"} else ""
    columns = _with_range(
        unit + per_step,
        lambda cell: scaled(cell.row["ms_total"], per_ms),
        lambda cell: time_range(cell.row, per_ms),
        stacked,
    )
    if beside.routes:
        columns += _with_range(
            "speed",
            lambda cell: speed_text(cell.row, cell.base, cell.speed),
            lambda cell: speed_range(cell.row, cell.base, cell.speed),
            stacked,
        )
    if beside.fastest:
        several = len(beside.fastest) > 1
        columns += _with_range(
            f"x {beside.over}",
            lambda cell: speed_text(cell.row, cell.dense, cell.x_dense),
            lambda cell: speed_range(cell.row, cell.dense, cell.x_dense),
            stacked,
            below=("fastest", _other_dense) if several else None,
        )
    if _any(rows, "reads_tokens"):
        columns.append(_Column(_READS, lambda cell: reads_text(cell.row)))
    columns.append(_Column("peak\nMiB", lambda cell: scaled(cell.row["peak_alloc_bytes"], 2**-20)))
    if _any(rows, "power_w") or _any(rows, "sm_clock_mhz"):
        columns.append(_Column("W", lambda cell: whole(cell.row["power_w"])))
        columns.append(_Column("MHz", lambda cell: whole(cell.row["sm_clock_mhz"]), gap=0))
    return columns


def _other_dense(cell: Compared) -> str:
    """What the cell's dense speed is relative to; empty for that cell itself."""
    return "" if cell.dense is cell.row else cell.dense_name


def _with_range(
    header: str, value: _Writer, ends: _Writer, stacked: bool, below: tuple[str, _Writer] | None = None
) -> list[_Column]:
    """A value, its interval and what else belongs to it: beside each other, or `stacked` in one column."""
    if stacked:
        more = [below] if below else []
        heads = "\n".join([header, "95 %", *(head for head, _ in more)])
        writers = [value, ends, *(text for _, text in more)]
        return [_Column(heads, lambda cell: "\n".join(write(cell) for write in writers))]
    columns = [_Column(header, value), _Column("95 %", ends, "dim", gap=0)]
    return columns + ([_Column(f"{below[0]}\ndense", below[1], "dim")] if below else [])


def _width(table: Table) -> int:
    console = Console(width=10_000, file=io.StringIO())
    return Measurement.get(console, console.options, table).maximum


def shares_table(cells: Cells) -> Table:
    """One line per ok cell: percent of the step by stage, rounded so that what is printed adds up to 100.0.

    A cell without shares has a number instead; the caption says under that number why.
    """
    rows = [row for row in cell_rows(cells) if row["status"] == "ok"]
    columns = [_Column(stage, partial(_share_text, stage)) for stage in STAGES]
    notes, extra = _Notes(), _extra(rows)
    table = _table(rows, columns, "share of each stage in %")
    table.add_column(" total", justify="right", no_wrap=True)
    runs = _runs(rows)
    for cell in compare(rows):
        shares = rounded_shares(cell.row)
        total = f"{sum(shares.values()):.1f}" if shares else notes.number(why_no_shares(cell.row))
        table.add_row(*_head(cell.row, extra, runs), *_numbers(cell, columns), Text(total))
    notes.write(table)
    return table


def cells_json(
    cells: Cells, samples: pd.DataFrame | None = None, *, order: Order = ()
) -> list[dict[str, Any]]:
    """The cells as objects for `json.dumps`: every stored column, missing ones None, `speed` and `x_dense`.

    These are None or {"baseline": what it is compared with, "point", "lo", "hi", "n"}: see `cells_table`.
    """
    return [cell_object(cell) for cell in compare(cell_rows(cells), samples, order)]


def cell_object(cell: Compared) -> dict[str, Any]:
    """One of the objects of `cells_json`."""
    speed = speed_object(cell.base, cell.speed)
    return plain_row(cell.row) | {"speed": speed, "x_dense": speed_object(cell.dense, cell.x_dense)}


class _Notes:
    """Numbered notes under a table; equal texts share a number."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._closing: list[str] = []

    def number(self, text: str) -> str:
        if text not in self._texts:
            self._texts.append(text)
        return f"({self._texts.index(text) + 1})"

    def add(self, text: str) -> None:
        self._closing.append(text)

    def write(self, table: Table) -> None:
        lines = [f"({n}) {text}" for n, text in enumerate(self._texts, 1)] + self._closing
        table.caption = Text("\n".join(lines)) if lines else None


def _table(rows: Sequence[Row], columns: Sequence[_Column], what: str = "") -> Table:
    """A table with its title, S, the fields that vary, route and then `columns`."""
    extra = _extra(rows)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title=Text(_about(rows) + (f": {what}" if what else "")),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
    )
    several = ["run "] if len(_runs(rows)) > 1 else []
    for header in (*several, "S", *(f" {name_of(f)}" for f in extra)):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column(" route", overflow="fold", min_width=9)
    for column in columns:
        table.add_column(_spaced(column, column.header), justify="right", no_wrap=True, style=column.style)
    return table


def _about(rows: Sequence[Row]) -> str:
    """What the rows have in common."""
    varied = varying(rows)
    same = [f for f in PLANNED if f != "S" and f not in varied]
    return fields_text(rows[0], same) if rows else "no cell"


def _runs(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["run_id"] for row in rows))


def _head(row: Row, extra: Sequence[str], runs: Sequence[str]) -> list[Text]:
    """The run where there are several, S, the fields that vary, and the route."""
    run = [f"{runs.index(row['run_id']) + 1} "] if len(runs) > 1 else []
    fields = [f" {value_text(row, f) or MISSING}" for f in extra]
    route = "\n".join(f" {part}" for part in folded(arm_text(row), _ROUTE_WIDTH))
    return [Text(text) for text in (*run, tokens_text(row["S"]), *fields, route)]


def _numbers(cell: Compared, columns: Sequence[_Column]) -> list[Text]:
    return [Text(_spaced(column, column.text(cell))) for column in columns]


def _spaced(column: _Column, text: str) -> str:
    return "\n".join(" " * column.gap + part for part in text.split("\n"))


def _extra(rows: Sequence[Row]) -> list[str]:
    return [f for f in varying(rows) if f not in ("S", "impl")]


def _any(rows: Sequence[Row], name: str) -> bool:
    return any(row[name] is not None for row in rows)


def _all_below_1_ms(rows: Sequence[Row]) -> bool:
    return _any(rows, "ms_total") and all((row["ms_total"] or 0) < 1 for row in rows)


def _share_text(stage: str, cell: Compared) -> str:
    share = rounded_shares(cell.row).get(stage)
    return MISSING if share is None else f"{share:.1f}"


def _status_text(row: Row, notes: _Notes, between: str) -> Text:
    status = row["status"]
    text = Text(" ").append(status, style=_STATUS_STYLES.get(status, "red"))
    if status != "ok":
        return text.append(between + notes.number(row["reason"]))
    return text if is_dense(row) else text.append(between + short_shares(row))
