"""How numbers and shapes are written: the same in tables, plain lines and figures. What is missing is "-"."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

MISSING = "-"

_NAMES = {"l_sel": "l'", "n_sel": "n"}
_BARE = ("phase", "passes", "mode", "impl", "scope", "dtype", "device")


def tokens_text(n: int) -> str:
    """512 -> "512", 2048 -> "2k", 1536 -> "1.5k", 2**20 -> "1m"; 1000 stays "1000", so the text is exact."""
    for unit, suffix in ((1024**2, "m"), (1024, "k")):
        if n >= unit and n % (unit // 2) == 0:
            return f"{n // unit}{'.5' if n % unit else ''}{suffix}"
    return str(n)


def bytes_text(n: float | None) -> str:
    """Three digits and a binary unit: "512 B", "1.50 KiB", "12.3 MiB"."""
    if n is None:
        return MISSING
    size, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while float(f"{size:.3g}") >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{digits(size)} {units[0]}"


def digits(value: float | None, n: int = 3) -> str:
    """`n` significant digits without an exponent; digits before the point are never dropped."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{n - 1}e}"))))
    return f"{value:.{max(0, n - 1 - exponent)}f}"


def ratio_text(value: float | None) -> str:
    """Three digits, but no more than three after the point: "0.048", "0.525", "1.46", "12.3"."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if abs(value) < 1 else digits(value)


def range_text(lo: float | None, hi: float | None, text: Callable[[float], str]) -> str:
    """An interval "1.23-1.26", each end through `text`; "-" when either is missing."""
    return MISSING if lo is None or hi is None else f"{text(lo)}-{text(hi)}"


def duration_text(seconds: float) -> str:
    """45 -> "45s", 200 -> "3m20s", 7300 -> "2h01m"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def round_to_100(values: Sequence[float], decimals: int) -> list[float]:
    """The values scaled to a total of 100 and rounded so that the rounded values still total 100.

    Largest remainders are rounded up; ties go to the earlier value. The values' total must be above 0.
    """
    unit = 10**decimals
    exact = [v * 100 * unit / math.fsum(values) for v in values]
    floors = [math.floor(v) for v in exact]
    by_remainder = sorted(range(len(values)), key=lambda i: floors[i] - exact[i])
    for i in by_remainder[: round(100 * unit - sum(floors))]:
        floors[i] += 1
    return [v / unit for v in floors]


def name_of(field: str) -> str:
    """The paper's name of a field: l_sel -> l', n_sel -> n; every other field keeps its own."""
    return _NAMES.get(field, field)


def value_text(row: Mapping[str, Any], field: str) -> str:
    """The value as text, empty when missing and for the twin that every cell is; of a file its name alone."""
    value = "" if row[field] is None or (field == "twin" and not row[field]) else str(row[field])
    return f"file={PurePath(value.removeprefix('file=')).name}" if value.startswith("file=") else value


def field_text(row: Mapping[str, Any], field: str) -> str:
    """One field as `name=value`, or its value alone where that says it all: "fp32", "dk=64", "l'=64"."""
    value = value_text(row, field)
    return value if field in _BARE else f"{name_of(field)}={value}"


def fields_text(row: Mapping[str, Any], fields: Iterable[str]) -> str:
    """The fields that have a value, in one phrase."""
    return " ".join(field_text(row, f) for f in fields if value_text(row, f))


def arm_text(row: Mapping[str, Any]) -> str:
    """What was measured at a shape: NSA by its route, anything else by its name: "auto", "dense",
    "peer:sfnsa win=off".
    """
    if row["impl"] in ("", None, "nsa"):
        return str(row["route"])
    return str(row["impl"]) if row["route"] == "auto" else f"{row['impl']} {row['route']}"


def folded(route: str, width: int) -> list[str]:
    """The route in lines of at most `width`, broken after commas; a longer part keeps its own line."""
    lines: list[str] = []
    for part in re.findall("[^,]+,?|,", route):
        if lines and len(lines[-1] + part) <= width:
            lines[-1] += part
        else:
            lines.append(part)
    return lines


def count_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """How many rows have which status, the most frequent first: "5 ok, 2 oom"."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items(), key=lambda item: -item[1]))
