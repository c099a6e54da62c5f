"""Stored rows as the tables and figures need them: plain values, what they are compared with, shares."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from nsabench.present.wording import arm_text
from nsabench.stats import Interval
from nsabench.store.reading import frame_rows
from nsabench.store.schema import CELL_COLUMNS, STAGES, clean_row

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
Order = Sequence[str] | Mapping[str, Sequence[str]]
"""The routes as asked for: of all rows, or by run_id."""

Cells: TypeAlias = "pd.DataFrame | Iterable[Mapping[str, Any]]"

_COLUMNS = [c.name for c in CELL_COLUMNS]
PLANNED = tuple(n for n in _COLUMNS[: _COLUMNS.index("route")] if n not in ("run_id", "cell_id"))
"""All that was planned of a cell but the route."""

SHAPE = tuple(n for n in PLANNED if n not in ("impl", "twin"))
"""The fields that make the shape of a cell: what an implementation and its route have in common."""


class PresentError(ValueError):
    """Nothing, or nothing sensible, to show; one line."""


@dataclass(frozen=True)
class Compared:
    """A cell, what it is compared with, and its speed relative to that: above 1 it is the faster one.

    `base` is the first route of its shape and `dense` the fastest dense attention of its shape; each may be
    the cell itself, and is None where there is none. `speed` and `x_dense` are None for the cell itself, and
    unless both cells are ok and were timed in one regime, cache state and way.
    """

    row: Row
    base: Row | None
    speed: Interval | None
    dense: Row | None
    x_dense: Interval | None

    @property
    def dense_name(self) -> str:
        """Which dense attention that is; empty where none is ok."""
        return arm_text(self.dense) if self.dense is not None and self.dense["status"] == "ok" else ""


def cell_rows(cells: Cells) -> list[Row]:
    """Rows with every column of cells.csv as plain values, missing ones "" (text) or None (numbers).

    Columns that this version does not know are left out.
    """
    import pandas as pd

    if isinstance(cells, pd.DataFrame):
        return frame_rows(cells)
    return [
        clean_row({n: None if row.get(n) is pd.NA else row.get(n) for n in _COLUMNS}, CELL_COLUMNS)
        for row in cells
    ]


def shape_key(row: Row) -> tuple[Any, ...]:
    """Equal for the cells that were measured interleaved: same run, same shape, any route of any impl."""
    return (row["run_id"], *(row[f] for f in SHAPE))


def conditions_of(row: Row) -> str:
    """Regime, cache and timer of a measured row: times under two of these are never put in one ratio."""
    return " ".join(filter(None, (row["regime"], row["cache"], row["timer"])))


def is_nsa(row: Mapping[str, Any]) -> bool:
    """Whether the row is of the NSA here, by one of its routes: neither dense nor a peer."""
    return row["impl"] in ("", None, "nsa")


def is_dense(row: Mapping[str, Any]) -> bool:
    """Whether the row is of dense attention, in whatever implementation."""
    return str(row["impl"]).partition(":")[0] == "dense"


def varying(rows: Sequence[Row], fields: Iterable[str] = PLANNED) -> list[str]:
    """The fields that have more than one value over the rows."""
    return [f for f in fields if len({row[f] for row in rows}) > 1]


def planned_routes(info: Mapping[str, Any]) -> list[str]:
    """The routes of NSA in run.json's plan, in the order they were asked for."""
    cells = [cell for cell in info.get("plan") or () if "route" in cell]
    return list(dict.fromkeys(str(c["route"]) for c in cells if is_nsa({"impl": "", **c})))


def baselines(rows: Sequence[Row], order: Order = ()) -> list[Row | None]:
    """For each row, the row of the first route of its shape: by `order`, then by place. None for dense.

    It is the baseline even if it failed: no other route silently takes its place. A peer is one only where
    no route was measured.
    """
    by_run = order if isinstance(order, Mapping) else dict.fromkeys((row["run_id"] for row in rows), order)
    places = {run: {route: place for place, route in enumerate(routes)} for run, routes in by_run.items()}

    def place_of(row: Row) -> tuple[bool, int]:
        known = places.get(row["run_id"], {})
        return not is_nsa(row), known.get(row["route"], len(known))

    first: dict[tuple[Any, ...], Row] = {}
    for row in sorted((row for row in rows if not is_dense(row)), key=place_of):
        first.setdefault(shape_key(row), row)
    return [None if is_dense(row) else first[shape_key(row)] for row in rows]


def dense_rows(rows: Sequence[Row]) -> list[Row | None]:
    """For each row, the fastest dense row of its shape that is ok, be it the row itself; where none is ok,
    the first dense one, and None where there is none.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in sorted(filter(is_dense, rows), key=_dense_ms):
        best.setdefault(shape_key(row), row)
    return [best.get(shape_key(row)) for row in rows] if best else [None] * len(rows)


def _dense_ms(row: Row) -> float:
    return float(row["ms_total"]) if row["status"] == "ok" and row["ms_total"] else math.inf


def shares_of(row: Row) -> dict[str, float] | None:
    """Percent of the step by stage, scaled to a total of 100; None when `why_no_shares` says why."""
    if why_no_shares(row):
        return None
    known = _stored_shares(row)
    total = math.fsum(known.values())
    return {stage: share * 100 / total for stage, share in known.items()}


def why_no_shares(row: Row) -> str:
    """Empty when the row has shares that add up to 100 % within 1 %."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    known = _stored_shares(row)
    if not known:
        return row["shares_note"] or "no shares were measured"
    total = math.fsum(known.values())
    return "" if abs(total - 100) <= 1 else f"the stored shares add up to {total:.1f} %"


def _stored_shares(row: Row) -> dict[str, float]:
    stored = {stage: row[f"share_{stage}_pct"] for stage in STAGES}
    return {stage: share for stage, share in stored.items() if share is not None}
