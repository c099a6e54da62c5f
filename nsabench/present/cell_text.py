"""A cell in words: its numbers as they stand in tables and plain lines."""

from collections.abc import Sequence
from typing import Any

from nsabench.present.frame import Row, is_dense, shares_of
from nsabench.present.pairing import Compared
from nsabench.present.wording import (
    MISSING,
    arm_text,
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


def plain_row(row: Row) -> dict[str, Any]:
    """The row with None for everything that is missing."""
    return {name: None if value == "" else value for name, value in row.items()}


def cell_line(cell: Compared) -> str:
    """The cell in one plain line, for a pipe or a log."""
    row = cell.row
    told = [name for name, usual in (("scope", "module"), ("selection", "natural")) if row[name] != usual]
    head = f"{fields_text(row, ('phase', 'passes', 'S', 'B', *told))} {arm_text(row)}: {row['status']}"
    if row["status"] != "ok":
        return f"{head}: {row['reason']}"
    parts = [f"{scaled(row['ms_total'])} ms{_in_brackets(time_range(row))}"]
    for other, speed in ((cell.base, cell.speed), (cell.dense, cell.x_dense)):
        if other is not None and speed is not None:
            interval = range_text(speed.lo, speed.hi, ratio_text)
            parts.append(f"{ratio_text(speed.point)}x{_in_brackets(interval)} the speed of {arm_text(other)}")
    if row["reads_tokens"] is not None:
        parts.append(f"reads {reads_text(row)}")
    if row["peak_alloc_bytes"] is not None:
        parts.append(f"peak {bytes_text(row['peak_alloc_bytes'])}")
    if row["power_w"] is not None:
        parts.append(f"{whole(row['power_w'])} W")
    if row["sm_clock_mhz"] is not None:
        parts.append(f"{whole(row['sm_clock_mhz'])} MHz")
    if shares_of(row) and not is_dense(row):
        parts.append(f"{'/'.join(MAIN_STAGES)} {short_shares(row)} %")
    return f"{head}, {', '.join(parts)}"


def last_line(shape: Sequence[Compared], complete: bool = True) -> str:
    """The last of the cells of one shape in one plain line; of a `complete` shape with dense attention also
    how the others compare to the fastest of it, by name where that is another cell.
    """
    last = shape[-1]
    line = cell_line(last)
    dense = [cell for cell in shape if is_dense(cell.row)]
    if not complete or not is_dense(last.row) or not dense[0].dense_name:
        return line
    faster = [
        f"{arm_text(c.row)} {ratio_text(c.x_dense.point)}x"
        for c in shape
        if c.x_dense is not None and not is_dense(c.row)
    ]
    it = "relative to it" if len(dense) == 1 else f"relative to {last.dense_name}, the fastest dense"
    return f"{line}; {it}: {', '.join(faster)}" if faster else line


def scaled(value: float | None, factor: float = 1.0) -> str:
    """Three digits of `value * factor`."""
    return digits(None if value is None else value * factor)


def time_range(row: Row, per_ms: float = 1.0) -> str:
    """The interval of the cell's time, in units of which a millisecond has `per_ms`."""
    lo, hi = (None if row[name] is None else row[name] * per_ms for name in ("ms_lo", "ms_hi"))
    return range_text(lo, hi, digits)


def speed_text(row: Row, other: Row | None, speed: Interval | None) -> str:
    """1 for the cell that is compared with, "-" where there is no speed, empty where nothing is compared."""
    if speed is None:
        return "" if other is None else "1" if row is other else MISSING
    return ratio_text(speed.point)


def speed_range(row: Row, other: Row | None, speed: Interval | None) -> str:
    """The interval of the speed; empty for the cell that is compared with."""
    if speed is None:
        return "" if other is None or row is other else MISSING
    return range_text(speed.lo, speed.hi, ratio_text)


def speed_object(other: Row | None, speed: Interval | None) -> dict[str, Any] | None:
    """The speed for JSON."""
    if speed is None or other is None:
        return None
    return {
        "baseline": arm_text(other),
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
