"""A cell in words: its numbers as they stand in tables and plain lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nsabench.present.frame import Row, baselines, shares_of, speeds
from nsabench.present.wording import (
    MISSING,
    bytes_text,
    digits,
    fields_text,
    range_text,
    ratio_text,
    round_to_100,
    tokens_text,
)
from nsabench.stats import Interval

MAIN_STAGES = ("cmp", "score", "sel", "win")


@dataclass(frozen=True)
class Compared:
    """A cell, its baseline (which may be itself) and its speed relative to that, where there is one."""

    row: Row
    base: Row
    speed: Interval | None


def compare(
    rows: Sequence[Row], samples: pd.DataFrame | None = None, order: Sequence[str] = ()
) -> list[Compared]:
    """Each row with its baseline and speed; see `frame.speeds`."""
    return [
        Compared(*parts)
        for parts in zip(rows, baselines(rows, order), speeds(rows, samples, order), strict=True)
    ]


def plain_row(row: Row) -> dict[str, Any]:
    """The row with None for everything that is missing."""
    return {name: None if value == "" else value for name, value in row.items()}


def cell_line(cell: Compared) -> str:
    """The cell in one plain line, for a pipe or a log."""
    row = cell.row
    head = f"{fields_text(row, ('phase', 'passes', 'S', 'B'))} {row['route']}: {row['status']}"
    if row["status"] != "ok":
        return f"{head}: {row['reason']}"
    parts = [f"{scaled(row['ms_total'])} ms{_in_brackets(time_range(row))}"]
    if cell.speed is not None:
        base = cell.base["route"]
        parts.append(f"{speed_text(cell)}x{_in_brackets(speed_range(cell))} the speed of {base}")
    if row["reads_tokens"] is not None:
        parts.append(f"reads {reads_text(row)}")
    if row["peak_alloc_bytes"] is not None:
        parts.append(f"peak {bytes_text(row['peak_alloc_bytes'])}")
    if row["power_w"] is not None:
        parts.append(f"{whole(row['power_w'])} W")
    if row["sm_clock_mhz"] is not None:
        parts.append(f"{whole(row['sm_clock_mhz'])} MHz")
    if shares_of(row):
        parts.append(f"{'/'.join(MAIN_STAGES)} {short_shares(row)} %")
    return f"{head}, {', '.join(parts)}"


def scaled(value: float | None, factor: float = 1.0) -> str:
    """Three digits of `value * factor`."""
    return digits(None if value is None else value * factor)


def time_range(row: Row, per_ms: float = 1.0) -> str:
    """The interval of the cell's time, in units of which a millisecond has `per_ms`."""
    lo, hi = (None if row[name] is None else row[name] * per_ms for name in ("ms_lo", "ms_hi"))
    return range_text(lo, hi, digits)


def speed_text(cell: Compared) -> str:
    """1 for a baseline, "-" where there is no speed."""
    if cell.speed is None:
        return "1" if cell.row is cell.base else MISSING
    return ratio_text(cell.speed.point)


def speed_range(cell: Compared) -> str:
    """The interval of the speed; empty for a baseline."""
    if cell.speed is None:
        return "" if cell.row is cell.base else MISSING
    return range_text(cell.speed.lo, cell.speed.hi, ratio_text)


def speed_object(cell: Compared) -> dict[str, Any] | None:
    """The speed for JSON."""
    speed = cell.speed
    if speed is None:
        return None
    return {
        "baseline": cell.base["route"],
        "point": speed.point,
        "lo": speed.lo,
        "hi": speed.hi,
        "n": speed.n,
    }


def reads_text(row: Row) -> str:
    """Tokens read by a query, sparse/dense; large ones in k where that is exact."""
    reads = (row["reads_tokens"], row["reads_tokens_dense"])
    return "/".join(MISSING if n is None else str(n) if n < 10_000 else tokens_text(n) for n in reads)


def whole(value: float | None) -> str:
    """To the nearest whole number."""
    return MISSING if value is None else f"{value:.0f}"


def _in_brackets(text: str) -> str:
    return "" if text == MISSING else f" ({text})"


def rounded_shares(row: Row) -> dict[str, float]:
    """Tenths of a percent that add up to 100 exactly; empty without shares."""
    shares = shares_of(row)
    return dict(zip(shares, round_to_100(list(shares.values()), 1), strict=True)) if shares else {}


def short_shares(row: Row) -> str:
    """The branches' shares in whole percents, rounded together with the rest so that nothing goes missing."""
    shares = shares_of(row)
    if shares is None:
        return MISSING
    known = [s for s in MAIN_STAGES if s in shares]
    rest = max(0.0, 100 - sum(shares[s] for s in known))
    rounded = dict(zip(known, round_to_100([*(shares[s] for s in known), rest], 0), strict=False))
    return "/".join(f"{rounded[s]:.0f}" if s in rounded else MISSING for s in MAIN_STAGES)
