"""Stored rows as the tables and figures need them: plain values, baselines, ratios, shares."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from nsabench.stats.intervals import Interval, paired_ratio
from nsabench.store.schema import CELL_COLUMNS, STAGES, clean_row

Row = dict[str, Any]
Cells = pd.DataFrame | Iterable[Mapping[str, Any]]

_COLUMNS = [c.name for c in CELL_COLUMNS]
PLANNED = tuple(n for n in _COLUMNS[: _COLUMNS.index("route")] if n not in ("run_id", "cell_id"))
"""The fields that make the shape of a cell: all that was planned but the route."""


class PresentError(ValueError):
    """Nothing, or nothing sensible, to show; one line."""


def cell_rows(cells: Cells) -> list[Row]:
    """Rows with every column of cells.csv as plain values, missing ones "" (text) or None (numbers).

    Columns that this version does not know are left out.
    """
    records = cells.to_dict("records") if isinstance(cells, pd.DataFrame) else cells
    return [
        clean_row({n: None if row.get(n) is pd.NA else row.get(n) for n in _COLUMNS}, CELL_COLUMNS)
        for row in records
    ]


def shape_key(row: Row) -> tuple[Any, ...]:
    """Equal for the cells that were measured interleaved: same run, same shape, any route."""
    return (row["run_id"], *(row[f] for f in PLANNED))


def varying(rows: Sequence[Row], fields: Iterable[str] = PLANNED) -> list[str]:
    """The fields that have more than one value over the rows."""
    return [f for f in fields if len({row[f] for row in rows}) > 1]


def planned_routes(info: Mapping[str, Any]) -> list[str]:
    """The routes of run.json's plan in the order they were asked for."""
    return list(dict.fromkeys(str(cell["route"]) for cell in info.get("plan") or () if "route" in cell))


def baselines(rows: Sequence[Row], order: Sequence[str] = ()) -> list[Row]:
    """For each row, the row of the first route of its shape: by `order`, then by place.

    It is the baseline even if it failed: no other route silently takes its place.
    """
    first: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda r: order.index(r["route"]) if r["route"] in order else len(order)):
        first.setdefault(shape_key(row), row)
    return [first[shape_key(row)] for row in rows]


def speeds(
    rows: Sequence[Row], samples: pd.DataFrame | None = None, order: Sequence[str] = ()
) -> list[Interval | None]:
    """For each row, its baseline's time over its own: above 1 is faster. None for a baseline
    and a failed cell.

    The interval comes from samples paired by (process, round). Without samples, or when the two were not
    measured interleaved, the point is the ratio of the two medians and there is no interval.
    """
    by_cell = {} if samples is None else {str(i): part for i, part in samples.groupby("cell_id")}
    result: list[Interval | None] = []
    for row, base in zip(rows, baselines(rows, order), strict=True):
        measured = row["status"] == base["status"] == "ok" and row["ms_total"] and base["ms_total"]
        result.append(_speed(base, row, by_cell) if measured and row is not base else None)
    return result


def _speed(base: Row, row: Row, by_cell: Mapping[str, pd.DataFrame]) -> Interval:
    a, b = (_round_times(r, by_cell.get(r["cell_id"])) for r in (base, row))
    both = a.merge(b, left_index=True, right_index=True, suffixes=("_a", "_b")).dropna()
    # Two arms at one place of one round were not visited in turn: the pairs of such rounds prove nothing.
    if both.empty or (both["position_a"] == both["position_b"]).any():
        return Interval(base["ms_total"] / row["ms_total"], None, None, 0)
    return paired_ratio(both["ms_a"].to_numpy(), both["ms_b"].to_numpy())


def _round_times(row: Row, samples: pd.DataFrame | None) -> pd.DataFrame:
    """`ms` and `position` by (process, round); decode's two kinds of step weighted as they occur."""
    if samples is None:
        return pd.DataFrame({"ms": [], "position": []}, index=pd.MultiIndex.from_arrays([[], []]))
    if row["run_id"] and "run_id" in samples:
        samples = samples[samples["run_id"] == row["run_id"]]
    samples = samples.assign(variant=samples["variant"].fillna("").astype(str))
    rounds = samples.groupby(["process", "round"])
    ms = samples.groupby(["process", "round", "variant"])["ms"].median().unstack("variant")
    if "emit" in ms or "plain" in ms:
        weights = {"emit": 1 / row["d"], "plain": 1 - 1 / row["d"]}
        parts = [
            ms[v] * weight if v in ms else ms.iloc[:, 0] * math.nan for v, weight in weights.items() if weight
        ]
        total = sum(parts[1:], start=parts[0])
    else:
        total = ms.iloc[:, 0]
    return pd.DataFrame({"ms": total, "position": rounds["position"].first()})


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
