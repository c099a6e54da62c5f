"""A comparison as a forest: each ratio with its interval, the margin, and the noise of an arm timed twice."""

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nsabench.present.drawing import headed_figure
from nsabench.present.naming import commit_of, machine_of
from nsabench.present.style import GREY
from nsabench.present.verdicts import Comparison, Finding, ratio_digits
from nsabench.present.wording import folded, range_text

MOST_ROWS = 40
"""Ratios in one figure that can still be told apart."""

_COLOURS = {
    "FASTER": "#009E73",
    "SLOWER": "#D55E00",
    "SAME": "#0072B2",
    "INCONCLUSIVE": GREY,
    "INVALID": "#BBBBBB",
}
_MARGIN, _NOISE = "#e4edf5", "#bdbdbd"
_BELOW = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
_ABOVE = (1.01, 1.02, 1.03, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
_LABEL_WIDTH = 30
_MOST_TICKS = 9


def forest_figure(comparison: Comparison) -> Figure | None:
    """Ratios of time to the first side on a logarithmic axis, 1 marked; None where there is none.

    The margin is shaded, and behind each ratio a grey bar is the interval of the first side beside itself.
    """
    every = [finding for finding in comparison.findings if finding.ratio is not None]
    if not every:
        return None
    shown = every[:MOST_ROWS]
    figure = headed_figure(
        f"{'' if comparison.paired else 'UNPAIRED: '}time relative to {_first(comparison)}",
        _subtitle(comparison, len(every) - len(shown)),
        1.0 + 0.36 * max(3, len(shown)),
    )
    axes = figure.subplots()
    _axis(axes, shown)
    for place, finding in enumerate(shown):
        _draw(axes, place, finding)
    axes.set_yticks(range(len(shown)), [_label(finding) for finding in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    figure.legend(handles=_legend(shown), loc="outside lower center", ncols=4)
    return figure


def _first(comparison: Comparison) -> str:
    firsts = dict.fromkeys(finding.first for finding in comparison.findings)
    return next(iter(firsts)) if len(firsts) == 1 else "the first side"


def _subtitle(comparison: Comparison, hidden: int) -> list[str]:
    where = []
    for run in comparison.runs:
        devices = dict.fromkeys(str(device) for device in run.cells["device"])
        machines = ", ".join(f"{device} ({machine_of(run.info, device)})" for device in devices)
        where.append(f"{machines}, commit {commit_of(run.info)}")
    left_out = [f"left out: {hidden} more ratios"] if hidden else []
    return [comparison.title.removeprefix("UNPAIRED: "), *dict.fromkeys(where), *comparison.notes, *left_out]


def _draw(axes: Axes, place: int, finding: Finding) -> None:
    judged = finding.judgement
    assert judged is not None
    margin = 1 + judged.delta
    _band(axes, place, 1 / margin, margin, 0.46, _MARGIN, 0.6)
    if judged.aa is not None and judged.aa.lo is not None and judged.aa.hi is not None:
        _band(axes, place, judged.aa.lo, judged.aa.hi, 0.16, _NOISE, 0.8)
    ratio, colour = judged.ratio, _COLOURS[finding.verdict]
    known = ratio.lo is not None and ratio.hi is not None
    ends = [[ratio.point - (ratio.lo or 0)], [(ratio.hi or 0) - ratio.point]] if known else None
    axes.errorbar(ratio.point, place, xerr=ends, color=colour, marker="o", markersize=5.5, capsize=3.5)
    text = f"{ratio_digits(ratio.point)} ({range_text(ratio.lo, ratio.hi, ratio_digits)})"
    said = f"{text if known else ratio_digits(ratio.point)}  {finding.verdict}"
    axes.text(1.01, place, said, transform=axes.get_yaxis_transform(), va="center", fontsize=9, color=colour)


def _band(axes: Axes, place: int, lo: float, hi: float, half: float, colour: str, order: float) -> None:
    axes.add_patch(
        Rectangle((lo, place - half), hi - lo, 2 * half, facecolor=colour, edgecolor="none", zorder=order)
    )


def _axis(axes: Axes, shown: Sequence[Finding]) -> None:
    """A logarithmic axis about 1 that holds every interval, with ticks at round ratios."""
    reach = max(max(_reaches(finding)) for finding in shown)
    axes.set_xscale("log")
    below, above = (max(_sided(finding, sign) for finding in shown) for sign in (-1, 1))
    axes.set_xlim(math.exp(-1.12 * max(below, 0.12 * reach)), math.exp(1.12 * max(above, 0.12 * reach)))
    lo, hi = axes.get_xlim()
    ticks = [1.0]
    apart = math.log(hi / lo) / _MOST_TICKS
    for ratio in sorted((*_BELOW, *_ABOVE), key=lambda ratio: -abs(math.log(ratio))):
        if lo <= ratio <= hi and all(abs(math.log(ratio / tick)) >= apart for tick in ticks):
            ticks.append(ratio)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.axvline(1, color=GREY, linewidth=1, zorder=1)
    axes.set_xlabel("time over that of the first side; left of 1 is faster")


def _values(finding: Finding) -> list[float]:
    judged = finding.judgement
    assert judged is not None
    own = [] if judged.aa is None else [judged.aa.lo, judged.aa.hi]
    known = [
        judged.ratio.point,
        judged.ratio.lo,
        judged.ratio.hi,
        *own,
        1 + judged.delta,
        1 / (1 + judged.delta),
    ]
    return [value for value in known if value is not None]


def _reaches(finding: Finding) -> list[float]:
    return [abs(math.log(value)) for value in _values(finding)]


def _sided(finding: Finding, sign: int) -> float:
    """How far, in logs, something of a finding reaches below (-1) or above (1) a ratio of 1."""
    return max(sign * math.log(value) for value in _values(finding))


def _label(finding: Finding) -> str:
    shape = textwrap.fill(finding.shape, _LABEL_WIDTH)
    return "\n".join(folded(f"{shape}  {finding.side}", _LABEL_WIDTH))


def _legend(shown: Sequence[Finding]) -> list[Line2D | Patch]:
    found: list[Line2D | Patch] = [
        Line2D([], [], color=_COLOURS[verdict], marker="o", markersize=5.5, label=verdict)
        for verdict in dict.fromkeys(finding.verdict for finding in shown)
    ]
    found.append(Patch(facecolor=_MARGIN, label="what a difference must pass"))
    if any(finding.judgement is not None and finding.judgement.aa is not None for finding in shown):
        found.append(Patch(facecolor=_NOISE, label="first side timed twice (A/A)"))
    return found
