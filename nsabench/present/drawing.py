"""Lines with intervals over S, or rows of dots for a single S, under the header every figure has."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
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
_LEGEND_CHARACTERS = 100
_LEGEND_ROW_INCHES = 0.195


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
    """Marks by ascending S, drawn as one line that breaks where there is no value.

    `name` is what was measured and `run` in which run, empty where that is not the question.
    """

    name: str
    color: str
    marker: str
    dash: Any
    marks: tuple[Mark, ...]
    run: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} @ {self.run}" if self.run else self.name

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
    return headed_figure(f"{panel.title}: {what}", panel.subtitle, body_inches)


def headed_figure(title: str, subtitle: Sequence[str], body_inches: float) -> Figure:
    """A figure with a title and the lines of a subtitle on top; what is drawn goes below them."""
    header = [line for part in subtitle for line in textwrap.wrap(part, _HEADER_CHARACTERS)]
    header_inches = 0.42 + 0.18 * len(header)
    height = body_inches + header_inches
    layout = ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.99 - header_inches / height))
    figure = Figure(figsize=(WIDTH_INCHES, height), layout=layout)
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
    known = [line for line in lines if line.known]
    failing = [line for line in lines if any(m.status != "ok" for m in line.marks)]
    widths = [min(len(known) - 1 - i, 4) if scale.nested else 0 for i in range(len(known))]
    handles = [*_handles(known, widths), *(cross for line in failing for cross in _crosses(line))]
    columns = legend_columns([str(handle.get_label()) for handle in handles])
    legend_rows = math.ceil(len(handles) / columns)
    body_inches = 4.1 + _LEGEND_ROW_INCHES * max(0, legend_rows - 2)
    figure = new_figure(panel, what, body_inches)
    axes = figure.subplots()
    for line, wider in zip(known, widths, strict=True):
        _draw_line(axes, line, wider)
    if scale.reference is not None:
        axes.axhline(scale.reference, color=GREY, linewidth=1, zorder=1)
    size_axis(axes, panel.sizes)
    value_axis(axes, values, "y", scale.text, binary=scale.binary, zero=scale.reference is None)
    axes.set_ylabel(scale.label)
    _draw_failures(axes, failing)
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0), ncols=columns)
    ticks = axes.yaxis.get_major_formatter().format_ticks(list(axes.yaxis.get_majorticklocs()))
    _place(axes, max(map(len, ticks), default=0), legend_rows, body_inches)
    return figure


def _place(axes: Axes, tick_characters: int, legend_rows: int, body_inches: float) -> None:
    """Put the only axes of a figure between its header and its legend.

    By arithmetic, for a layout engine draws everything once more to find this out.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_layout_engine("none")
    height = figure.get_figheight()
    left = (0.45 + 0.08 * tick_characters) / WIDTH_INCHES
    bottom = (0.7 + _LEGEND_ROW_INCHES * legend_rows) / height
    axes.set_position((left, bottom, 0.985 - left, (body_inches - 0.08) / height - bottom))


def place_grid(figure: Figure, rows: int, columns: int, more_lines: int, body_inches: float) -> None:
    """Put a grid of axes that share their y axis between header and a legend of one row, with room for their
    x labels and titles of one line and `more_lines`. By arithmetic, as one pair of axes is put.
    """
    figure.set_layout_engine(None)
    height = figure.get_figheight()
    titles, labels, legend = 0.28 + 0.17 * more_lines, 0.48, 0.36
    each = (body_inches - legend) / rows - titles - labels
    wide = (0.985 * WIDTH_INCHES - 0.72 - 0.16 * (columns - 1)) / columns
    figure.subplots_adjust(
        left=0.72 / WIDTH_INCHES,
        right=0.985,
        bottom=(legend + labels) / height,
        top=(body_inches - titles) / height,
        wspace=0.16 / wide,
        hspace=(titles + labels) / each,
    )


def legend_columns(labels: Sequence[str]) -> int:
    """The most columns, up to four, in which the labels have room side by side."""
    for columns in (4, 3, 2):
        parts = np.array_split(list(map(len, labels)), min(columns, len(labels)))
        if sum(max(part) + 7 for part in parts) <= _LEGEND_CHARACTERS:
            return columns
    return 1


def _handles(lines: Sequence[Line], widths: Sequence[int]) -> list[Line2D]:
    """The legend: every line, but of several runs once what was measured and once the runs."""
    runs = {line.run: line.dash for line in lines if line.run}
    if len(runs) < 2:
        return [Line2D([], [], **_look(line, wider)) for line, wider in zip(lines, widths, strict=True)]
    names = {line.name: line for line in lines}
    own = [_look(line, 0) | {"label": name} for name, line in names.items()]
    solid = [look | ({"linestyle": "-"} if names[look["label"]].run else {}) for look in own]
    dashed = [{"color": GREY, "linestyle": dash, "label": run} for run, dash in runs.items()]
    return [Line2D([], [], **look) for look in (*solid, *dashed)]


def _look(line: Line, wider: int) -> dict[str, Any]:
    """`wider`: how many lines are drawn over this one, which is to show under them."""
    return {
        "color": line.color,
        "marker": line.marker,
        "linestyle": line.dash,
        "label": line.label,
        "linewidth": 1.6 + 0.6 * wider,
        "markersize": 5.5 + 1.3 * wider,
    }


def _draw_line(axes: Axes, line: Line, wider: int) -> None:
    """What `Axes.errorbar` draws, put together by hand in a fifth of its time."""
    sizes, values, lo, hi = np.array([(m.size, m.value, m.lo, m.hi) for m in line.marks], dtype=float).T
    look = _look(line, wider)
    points = axes.add_line(Line2D(sizes, values, zorder=2.1, **look))
    if np.isnan(lo).all():
        parts: Any = (points, (), ())
    else:
        ends = np.stack([np.column_stack([sizes, lo]), np.column_stack([sizes, hi])], axis=1)
        bars = LineCollection(list(ends), colors=line.color, linewidths=1.3, zorder=2)
        axes.add_collection(bars, autolim=False)
        style: Any = {"color": line.color, "marker": "_", "markersize": 7, "linestyle": "", "zorder": 2}
        caps = axes.add_line(Line2D(np.tile(sizes, 2), np.append(lo, hi), **style))
        parts = (points, (caps,), (bars,))
    axes.add_container(ErrorbarContainer(parts, has_yerr=bool(parts[1]), label=line.label))


def _crosses(line: Line) -> list[Line2D]:
    """A cross for each way in which cells of the line failed; its data are their sizes."""
    crosses = []
    for status in dict.fromkeys(m.status for m in line.marks if m.status != "ok"):
        sizes = [m.size for m in line.marks if m.status == status]
        label = f"{line.label}: {status} at {_sizes_text(sizes)}"
        look: Any = {"color": line.color, "marker": "x", "markeredgewidth": 1.8, "linestyle": ""}
        crosses.append(Line2D(sizes, [0] * len(sizes), label=label, **look))
    return crosses


def _draw_failures(axes: Axes, failing: Sequence[Line]) -> None:
    """Crosses above all values where a cell failed, one row for each line."""
    if not failing:
        return
    band = _FAILED_ROW * (len(failing) + 0.5)
    room_above(axes, band)
    axes.add_patch(Rectangle((0, 1 - band), 1, band, transform=axes.transAxes, color="#f2f2f2", zorder=0.8))
    for row, line in enumerate(failing):
        for cross in _crosses(line):
            cross.set_ydata([1 - _FAILED_ROW * (row + 0.75)] * len(np.asarray(cross.get_xdata())))
            cross.set_transform(axes.get_xaxis_transform())
            axes.add_line(cross)


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
