"""Verdicts as a table for people and as plain objects for programs."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from nsabench.present.cell_text import scaled, time_range
from nsabench.present.frame import SHAPE, Row
from nsabench.present.verdicts import Comparison, Finding, percent_text, ratio_digits
from nsabench.present.wording import folded, range_text
from nsabench.stats import Interval

_STYLES = {
    "FASTER": "green",
    "SLOWER": "red",
    "SAME": "cyan",
    "INCONCLUSIVE": "yellow",
    "INVALID": "bold red",
}
_SIDE_WIDTH = 18
_LEAST_WHY = 24
_EASY_WHY = 36
_WIDEST_WHY = 60


def verdict_table(comparison: Comparison, width: int = 100) -> Table:
    """For each shape the first side, the others with ratio and verdict, and the first side timed again.

    Ratios are times over the first side's: below 1 is faster. Where `width` columns do not hold a line,
    intervals stand under what they belong to.
    """
    for stacked in (False, True):
        table = _table(comparison, stacked, "")
        room = width - _width(table)
        if room >= _EASY_WHY:
            break
    return _table(comparison, stacked, "why", min(max(room, _LEAST_WHY), _WIDEST_WHY))


def verdict_objects(comparison: Comparison) -> list[dict[str, Any]]:
    """One object for each verdict, for `json.dumps`: missing values are None, ratios are times over times."""
    return [_object(finding) for finding in comparison.findings]


def _object(finding: Finding) -> dict[str, Any]:
    judged, row, base = finding.judgement, finding.row, finding.base
    shape = base or row or {}
    return {
        "shape": {name: shape.get(name) for name in SHAPE},
        "first": finding.first,
        "side": finding.side,
        "verdict": finding.verdict,
        "why": finding.why,
        "said": finding.said,
        "paired": finding.paired,
        "ratio": _interval(finding.ratio),
        "mean_ratio": None if judged is None else _interval(judged.mean),
        "aa": None if judged is None else _interval(judged.aa),
        "delta": None if judged is None else judged.delta,
        "p_value": None if judged is None else judged.p_value,
        "ms_first": _ms(base),
        "ms_side": _ms(row),
        "cells": [None if one is None else [one["run_id"], one["cell_id"]] for one in (base, row)],
    }


def _interval(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else {"point": found.point, "lo": found.lo, "hi": found.hi, "n": found.n}


def _ms(row: Row | None) -> dict[str, Any] | None:
    if row is None or row["status"] != "ok":
        return None
    return {"point": row["ms_total"], "lo": row["ms_lo"], "hi": row["ms_hi"]}


def _table(comparison: Comparison, stacked: bool, why: str, why_width: int | None = None) -> Table:
    """`why` heads the last column; without it there is none."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=Text(comparison.title) if why else None,
        title_justify="left",
        title_style="bold",
        caption=Text("\n".join(_legend(comparison))) if why else None,
        caption_justify="left",
        caption_style="dim",
    )
    table.add_column("shape", no_wrap=True)
    table.add_column("side", no_wrap=True)
    us = _all_below_1_ms(comparison)
    for header in ("us" if us else "ms", "ratio"):
        table.add_column(f"{header}\n95 %" if stacked else f"{header} (95 %)", justify="right", no_wrap=True)
    for header in [*([] if stacked else ["difference"]), "verdict"]:
        table.add_column(header, no_wrap=True)
    if why:
        table.add_column(why, overflow="fold", max_width=why_width)
    for shape in dict.fromkeys(finding.shape for finding in comparison.findings):
        mine = [finding for finding in comparison.findings if finding.shape == shape]
        for number, cells in enumerate(_lines(mine, stacked, 1000.0 if us else 1.0)):
            table.add_row(
                textwrap.fill(shape, _SIDE_WIDTH) if not number else "", *(cells if why else cells[:-1])
            )
        table.add_section()
    return table


def _lines(mine: Sequence[Finding], stacked: bool, scale: float) -> list[list[Text]]:
    """The first side, the others, and the first side again."""
    one = mine[0]

    def line(side: str, row: Row | None, ratio: Text, difference: str, verdict: Text, why: str) -> list[Text]:
        more = (
            [verdict.append(f"\n{difference}", style="default")] if stacked else [Text(difference), verdict]
        )
        return [_folded(side), _ms_text(row, stacked, scale), ratio, *more, Text(why)]

    lines = [line(one.first, one.base, Text("1"), "", Text(), "what the others are held against")]
    for finding in mine:
        verdict = Text(finding.verdict, style=_STYLES[finding.verdict])
        ratio, difference = _ratio_text(finding.ratio, stacked), _difference(finding)
        lines.append(line(finding.side, finding.row, ratio, difference, verdict, finding.why))
    judged = [finding.judgement for finding in mine if finding.judgement is not None]
    if judged and judged[0].aa is not None:
        about = f"the first side timed twice; a difference must pass {100 * judged[0].delta:.2g} %"
        ratio = _ratio_text(judged[0].aa, stacked)
        lines.append(line(f"{one.first} again", one.control, ratio, "", Text("A/A"), about))
    return lines


def _legend(comparison: Comparison) -> list[str]:
    legend = ["ratio: time over that of the first side; below 1 is faster"]
    return legend + comparison.notes


def _difference(finding: Finding) -> str:
    """How much faster or slower a side is; empty where nothing valid says so."""
    if finding.ratio is None or finding.verdict == "INVALID":
        return ""
    return f"{percent_text(finding.ratio.point)} {'slower' if finding.ratio.point > 1 else 'faster'}"


def _ratio_text(ratio: Interval | None, stacked: bool) -> Text:
    if ratio is None:
        return Text("-")
    ends = range_text(ratio.lo, ratio.hi, ratio_digits)
    return _with_ends(ratio_digits(ratio.point), ends, stacked)


def _ms_text(row: Row | None, stacked: bool, scale: float) -> Text:
    if row is None or row["status"] != "ok":
        return Text("-" if row is None else row["status"])
    return _with_ends(scaled(row["ms_total"], scale), time_range(row, scale), stacked)


def _with_ends(value: str, ends: str, stacked: bool) -> Text:
    between = ("\n", "") if stacked else (" (", ")")
    return Text(value).append(between[0] + ends + between[1], style="dim")


def _folded(text: str) -> Text:
    parts = folded(text, _SIDE_WIDTH)
    return Text("\n".join(line for part in parts for line in textwrap.wrap(part, _SIDE_WIDTH)))


def _all_below_1_ms(comparison: Comparison) -> bool:
    times = [
        row["ms_total"]
        for f in comparison.findings
        for row in (f.base, f.row)
        if row and row["status"] == "ok"
    ]
    return bool(times) and all(ms < 1 for ms in times)


def _width(table: Table) -> int:
    console = Console(width=10_000, file=io.StringIO())
    return Measurement.get(console, console.options, table).maximum
