"""Lines with intervals over S, or rows of dots for a single S, under the header every figure has."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from nsabench.present.panels import Panel
from nsabench.present.style import GREY, WIDTH_INCHES, room_above, size_axis, value_axis
from nsabench.present.wording import folded, range_text, tokens_text

_HEADER_CHARACTERS = 114
_FAILED_ROW = 0.055


@dataclass(frozen=True)
class Mark:
    """A value with its interval, at one S; NaN where there is none. `status` is the cell's."""

    size: int
    value: float = math.nan
    lo: float = math.nan
    hi: float = math.nan
    status: str = "ok"

    @property
    def known(self) -> bool:
        return not math.isnan(self.value)


@dataclass(frozen=True)
class Line:
    """Marks by ascending S, drawn as one line that breaks where there is no value."""

    label: str
    color: str
    marker: str
    dash: Any
    marks: tuple[Mark, ...]

    @property
    def known(self) -> bool:
        return any(mark.known for mark in self.marks)


@dataclass(frozen=True)
class Scale:
    """The axis of values: its label, how a value is written, a line to compare with, steps of powers of two.

    `nested` lines stay visible where they have equal values.
    """

    label: str
    text: Callable[[float], str]
    reference: float | None = None
    binary: bool = False
    nested: bool = False


def new_figure(panel: Panel, what: str, body_inches: float) -> Figure:
    """A figure with title, shape, machine and commit on top; what is drawn goes below them."""
    header = [line for part in panel.subtitle for line in textwrap.wrap(part, _HEADER_CHARACTERS)]
    header_inches = 0.42 + 0.18 * len(header)
    height = body_inches + header_inches
    layout = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.99 - header_inches / height))
    figure = Figure(figsize=(WIDTH_INCHES, height), layout=layout)
    title = f"{panel.title}: {what}"
    figure.text(0.012, 1 - 0.08 / height, title, fontsize=12, fontweight="bold", va="top")
    for number, line in enumerate(header):
        figure.text(0.012, 1 - (0.34 + 0.18 * number) / height, line, fontsize=9, color=GREY, va="top")
    return figure


def value_figure(panel: Panel, lines: Sequence[Line], what: str, scale: Scale) -> Figure:
    """The lines over S; for a single S a row of dots for each line."""
    values = [v for line in lines for m in line.marks for v in (m.value, m.lo, m.hi) if not math.isnan(v)]
    values += [] if scale.reference is None else [scale.reference]
    if len(panel.sizes) == 1:
        return _dots(panel, lines, f"{what}, S={panel.sizes[0]}", scale, values)
    figure = new_figure(panel, what, 4.1)
    axes = figure.subplots()
    handles = _draw_lines(axes, lines, scale)
    size_axis(axes, panel.sizes)
    value_axis(axes, values, "y", scale.text, binary=scale.binary, zero=scale.reference is None)
    axes.set_ylabel(scale.label)
    handles += _draw_failures(axes, lines)
    columns = min(4, max(1, 100 // (max(len(h.get_label()) for h in handles) + 7)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _draw_lines(axes: Axes, lines: Sequence[Line], scale: Scale) -> list[Any]:
    known = [line for line in lines if line.known]
    if scale.reference is not None:
        axes.axhline(scale.reference, color=GREY, linewidth=1, zorder=1)
    return [_draw_line(axes, line, len(known) - 1 - i if scale.nested else 0) for i, line in enumerate(known)]


def _draw_line(axes: Axes, line: Line, above: int) -> ErrorbarContainer:
    """`above`: how many lines will be drawn over this one, which is wider so that it shows under them."""
    marks = line.marks
    intervals = [[m.value - m.lo for m in marks], [m.hi - m.value for m in marks]]
    wider = min(above, 4)
    return axes.errorbar(
        [m.size for m in marks],
        [m.value for m in marks],
        yerr=None if all(map(math.isnan, intervals[0])) else intervals,
        color=line.color,
        marker=line.marker,
        linestyle=line.dash,
        label=line.label,
        linewidth=1.6 + 0.6 * wider,
        markersize=5.5 + 1.3 * wider,
        capsize=3.5,
        elinewidth=1.3,
    )


def _draw_failures(axes: Axes, lines: Sequence[Line]) -> list[Line2D]:
    """Crosses above all values where a cell failed, one row for each line; their labels say why."""
    failing = [line for line in lines if any(m.status != "ok" for m in line.marks)]
    if not failing:
        return []
    band = _FAILED_ROW * (len(failing) + 0.5)
    room_above(axes, band)
    axes.add_patch(Rectangle((0, 1 - band), 1, band, transform=axes.transAxes, color="#f2f2f2", zorder=0.8))
    crosses: list[Line2D] = []
    for row, line in enumerate(failing):
        for status in dict.fromkeys(m.status for m in line.marks if m.status != "ok"):
            sizes = [m.size for m in line.marks if m.status == status]
            crosses += axes.plot(
                sizes,
                [1 - _FAILED_ROW * (row + 0.75)] * len(sizes),
                transform=axes.get_xaxis_transform(),
                color=line.color,
                marker="x",
                markeredgewidth=1.8,
                linestyle="",
                label=f"{line.label}: {status} at {_sizes_text(sizes)}",
            )
    return crosses


def _sizes_text(sizes: Sequence[int]) -> str:
    texts = [tokens_text(size) for size in sizes]
    return ", ".join(texts) if len(texts) <= 3 else f"{len(texts)} sizes, {texts[0]} to {texts[-1]}"


def _dots(panel: Panel, lines: Sequence[Line], what: str, scale: Scale, values: Sequence[float]) -> Figure:
    figure = new_figure(panel, what, 0.8 + 0.42 * max(2, len(lines)))
    axes = figure.subplots()
    value_axis(axes, values, "x", scale.text, binary=scale.binary, zero=True)
    if scale.reference is not None:
        axes.axvline(scale.reference, color=GREY, linewidth=1, zorder=1)
    for row, line in enumerate(lines):
        mark = line.marks[0]
        if mark.known:
            error = [[mark.value - mark.lo], [mark.hi - mark.value]]
            axes.errorbar(
                mark.value,
                row,
                xerr=error,
                color=line.color,
                marker=line.marker or "|",
                capsize=3.5,
                label=line.label,
            )
        axes.text(
            1.01, row, _dot_text(mark, scale), transform=axes.get_yaxis_transform(), va="center", fontsize=9
        )
    axes.set_yticks(range(len(lines)), ["\n".join(folded(line.label, 24)) for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel(scale.label)
    return figure


def _dot_text(mark: Mark, scale: Scale) -> str:
    if not mark.known:
        return mark.status if mark.status != "ok" else "-"
    ends = "" if math.isnan(mark.lo + mark.hi) else f" ({range_text(mark.lo, mark.hi, scale.text)})"
    return scale.text(mark.value) + ends
