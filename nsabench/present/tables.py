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
    Compared,
    compare,
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
from nsabench.present.frame import PLANNED, Cells, Row, cell_rows, varying, why_no_shares
from nsabench.present.wording import MISSING, fields_text, folded, name_of, tokens_text, value_text
from nsabench.store.schema import STAGES

_STATUS_STYLES = {"ok": "green", "unsupported": "yellow"}
_ROUTE_WIDTH = 18

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
    order: Sequence[str] = (),
    last: int | None = None,
    width: int = 100,
) -> Table:
    """One line per cell: S, what varies, route, time, speed, reads, memory, power, clock, status and shares.

    `speed` is the time of the shape's first route (by `order`, else by place) over the cell's own; its
    interval needs `samples`. A cell that is not ok has its status and a number; the caption gives the reason
    under that number. `last` shows only so many of the last cells, with the speeds they have among all. Where
    `width` columns do not hold it, a cell has two lines.
    """
    compared = compare(cell_rows(cells), samples, order)
    table = _cells_table(compared, last, stacked=False)
    return table if _width(table) <= width else _cells_table(compared, last, stacked=True)


def _cells_table(cells: Sequence[Compared], last: int | None, stacked: bool) -> Table:
    """`stacked`: intervals and shares stand under what they belong to."""
    rows = [cell.row for cell in cells]
    several = len({row["route"] for row in rows}) > 1
    columns = _columns(rows, several, stacked)
    notes, extra = _Notes(), _extra(rows)
    table = _table(rows, columns)
    main = "/".join(MAIN_STAGES[:2]), "/".join(MAIN_STAGES[2:])
    table.add_column(f" status, %\n {main[0]}\n /{main[1]}", overflow="fold")
    for cell in cells[-last:] if last else cells:
        numbers = _numbers(cell, columns) if cell.row["status"] == "ok" else [Text()] * len(columns)
        status = _status_text(cell.row, notes, "\n " if stacked else " ")
        table.add_row(*_head(cell.row, extra), *numbers, status)
    if several:
        notes.add("speed: time of the shape's first route over this one's; above 1 is faster")
    notes.write(table)
    return table


def _columns(rows: Sequence[Row], several: bool, stacked: bool) -> list[_Column]:
    unit, per_ms = ("us", 1000.0) if _all_below_1_ms(rows) else ("ms", 1.0)
    per_step = "/step" if {row["phase"] for row in rows} == {"decode"} else ""
    columns = _with_range(
        unit + per_step,
        lambda cell: scaled(cell.row["ms_total"], per_ms),
        lambda cell: time_range(cell.row, per_ms),
        stacked,
    )
    if several:
        columns += _with_range("speed", speed_text, speed_range, stacked)
    if _any(rows, "reads_tokens"):
        columns.append(_Column("reads\n/dense", lambda cell: reads_text(cell.row)))
    columns.append(_Column("peak\nMiB", lambda cell: scaled(cell.row["peak_alloc_bytes"], 2**-20)))
    if _any(rows, "power_w") or _any(rows, "sm_clock_mhz"):
        columns.append(_Column("W", lambda cell: whole(cell.row["power_w"])))
        columns.append(_Column("MHz", lambda cell: whole(cell.row["sm_clock_mhz"]), gap=0))
    return columns


def _with_range(header: str, value: _Writer, ends: _Writer, stacked: bool) -> list[_Column]:
    if stacked:
        return [_Column(f"{header}\n95 %", lambda cell: f"{value(cell)}\n{ends(cell)}")]
    return [_Column(header, value), _Column("95 %", ends, "dim", gap=0)]


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
    for cell in compare(rows):
        shares = rounded_shares(cell.row)
        total = f"{sum(shares.values()):.1f}" if shares else notes.number(why_no_shares(cell.row))
        table.add_row(*_head(cell.row, extra), *_numbers(cell, columns), Text(total))
    notes.write(table)
    return table


def cells_json(
    cells: Cells, samples: pd.DataFrame | None = None, *, order: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The cells as objects for `json.dumps`: every stored column, missing ones None, plus `speed`.

    `speed` is None or {"baseline": route, "point", "lo", "hi", "n"}: see `cells_table`.
    """
    compared = compare(cell_rows(cells), samples, order)
    return [plain_row(cell.row) | {"speed": speed_object(cell)} for cell in compared]


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
    about = fields_text(rows[0], [f for f in PLANNED if f not in ("S", *extra)]) if rows else "no cell"
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title=Text(about + (f": {what}" if what else "")),
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
    )
    for header in ("S", *(f" {name_of(f)}" for f in extra)):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column(" route", overflow="fold", min_width=9)
    for column in columns:
        table.add_column(_spaced(column, column.header), justify="right", no_wrap=True, style=column.style)
    return table


def _head(row: Row, extra: Sequence[str]) -> list[Text]:
    """S, the fields that vary, and the route."""
    fields = [f" {value_text(row, f) or MISSING}" for f in extra]
    route = "\n".join(f" {part}" for part in folded(row["route"], _ROUTE_WIDTH))
    return [Text(text) for text in (tokens_text(row["S"]), *fields, route)]


def _numbers(cell: Compared, columns: Sequence[_Column]) -> list[Text]:
    return [Text(_spaced(column, column.text(cell))) for column in columns]


def _spaced(column: _Column, text: str) -> str:
    return "\n".join(" " * column.gap + part for part in text.split("\n"))


def _extra(rows: Sequence[Row]) -> list[str]:
    return [f for f in varying(rows) if f != "S"]


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
    return text.append(between + (short_shares(row) if status == "ok" else notes.number(row["reason"])))
