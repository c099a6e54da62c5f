"""The figures of a panel. Each returns None when the panel has nothing that it could show."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nsabench.present.drawing import Line, Mark, Scale, new_figure, place_grid, value_figure
from nsabench.present.frame import Compared, Row, is_dense, shares_of
from nsabench.present.panels import Panel, Series
from nsabench.present.style import GREY, RUN_DASHES, STAGE_COLOURS, RouteStyle
from nsabench.present.wording import arm_text, bytes_text, digits, folded, ratio_text, tokens_text
from nsabench.stats import Interval
from nsabench.store.schema import STAGES

Styles = Mapping[str, RouteStyle]

_MOST_SHARES = 6
_ITEM_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}


def time_figure(panel: Panel, styles: Styles) -> Figure | None:
    """Median time of a step over S with its 95 % interval, a line for each route."""
    slowest = max(c.row["ms_total"] for s in panel.series for c in s.cells if c.row["status"] == "ok")
    factor, unit = (1000.0, "µs") if slowest < 1 else (1.0, "ms")

    def mark(cell: Compared) -> Mark:
        time, lo, hi = (_number(cell.row[name], factor) for name in ("ms_total", "ms_lo", "ms_hi"))
        return Mark(cell.row["S"], time, lo, hi, cell.row["status"])

    scale = Scale(f"time of one step, {unit}", digits)
    return value_figure(
        panel, _route_lines(panel, styles, mark), "time of one step, median and 95 % interval", scale
    )


def speed_figure(panel: Panel, styles: Styles) -> Figure | None:
    """Speed relative to the first route over S with its 95 % interval.

    None without a second route to compare.
    """
    bases = {arm_text(c.base) for s in panel.series for c in s.cells if c.base and c.speed}
    base = bases.pop() if len(bases) == 1 else "the first route"
    return _ratio_figure(panel, styles, base, lambda cell: cell.speed)


def dense_figure(panel: Panel, styles: Styles) -> Figure | None:
    """Speed relative to the fastest dense attention over S, which is named, with its 95 % interval.

    None where none was measured.
    """
    at: dict[str, dict[int, None]] = {}
    for cell in (cell for series in panel.series for cell in series.cells if cell.x_dense is not None):
        at.setdefault(cell.dense_name, {})[cell.row["S"]] = None
    if len(at) == 1 and sum(is_dense(s.cells[0].row) for s in panel.series) == 1:
        return _ratio_figure(panel, styles, next(iter(at)), lambda cell: cell.x_dense)
    where = (f"{name} at {', '.join(map(tokens_text, sorted(sizes)))}" for name, sizes in at.items())
    panel = replace(panel, subtitle=(*panel.subtitle, f"fastest dense attention: {'; '.join(where)}"))
    if len(at) == 1:
        return _ratio_figure(panel, styles, next(iter(at)), lambda cell: cell.x_dense)
    # What is the fastest at some S only is 1 there: its line would have gaps.
    one = Interval(1.0, None, None, 0)
    return _ratio_figure(
        panel,
        styles,
        "the fastest dense",
        lambda cell: one if cell.dense_name and cell.dense is cell.row else cell.x_dense,
    )


def _ratio_figure(
    panel: Panel, styles: Styles, base: str, speed_of: Callable[[Compared], Interval | None]
) -> Figure | None:
    def mark(cell: Compared) -> Mark:
        speed = speed_of(cell)
        if speed is None:
            return Mark(cell.row["S"], status=cell.row["status"])
        return Mark(cell.row["S"], speed.point, _number(speed.lo), _number(speed.hi))

    lines = [line for line in _route_lines(panel, styles, mark) if line.known]
    if not lines:
        return None
    scale = Scale(f"speed, {base} = 1", ratio_text, reference=1.0)
    return value_figure(panel, lines, f"speed relative to {base}, with 95 % interval", scale)


def memory_figure(panel: Panel, styles: Styles) -> Figure | None:
    """Peak of live tensors for each route over S, the KV cache, and what the cache of dense attention takes.

    None when neither a peak nor a cache is known.
    """

    def mark(cell: Compared) -> Mark:
        return Mark(cell.row["S"], _number(cell.row["peak_alloc_bytes"]), status=cell.row["status"])

    rows = [c.row for s in panel.series for c in s.cells]
    lines = [line for line in _route_lines(panel, styles, mark) if line.known]
    cache = {row["S"]: row["kv_cache_bytes"] for row in rows if row["kv_cache_bytes"] and not is_dense(row)}
    if cache:
        lines.append(_cache_line("KV cache", "h", "-", cache))
    if not lines:
        return None
    dense = {row["S"]: dense_cache_bytes(row) for row in rows}
    lines.append(_cache_line("KV cache of dense attention, computed", "", "--", dense))
    return value_figure(
        panel,
        lines,
        "peak memory of one step, and KV cache",
        Scale("memory", bytes_text, binary=True, nested=True),
    )


def dense_cache_bytes(row: Row) -> int:
    """Bytes of one K and one V for every token: the KV cache of dense attention of the row's shape."""
    return int(row["B"] * row["S"] * row["groups"] * (row["dk"] + row["dv"]) * _ITEM_BYTES[row["dtype"]])


def shares_figure(panel: Panel, styles: Styles) -> Figure | None:
    """A bar per S for each route, stacked from its stages to 100 %; None when no cell has shares."""
    shown = [s for s in panel.series if any(shares_of(c.row) for c in s.cells)]
    if not shown:
        return None
    what = "share of each stage in the time of one step"
    if len(shown) > _MOST_SHARES:
        last = max(s.run for s in shown)
        what += ", the last run" if len(panel.runs) > 1 else ""
        shown = [s for s in shown if s.run == last]
        if len(shown) > _MOST_SHARES:
            what += f", {_MOST_SHARES} of {len(shown)} routes"
            shown = shown[:_MOST_SHARES]
    columns = min(2 if len(panel.sizes) > 3 else 4, len(shown))
    rows = math.ceil(len(shown) / columns)
    titles = ["\n".join(folded(series.label, 80 // columns)) for series in shown]
    body_inches = 0.5 + 2.6 * rows
    figure = new_figure(panel, what, body_inches)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    place_grid(figure, rows, columns, max(title.count("\n") for title in titles), body_inches)
    used: set[str] = set()
    for axes, series, title in zip(grid.flat, shown, titles, strict=False):
        used |= _stacked_bars(axes, series, panel.sizes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("S, tokens")
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the step")
    handles = [Patch(color=STAGE_COLOURS[stage], label=stage) for stage in STAGES if stage in used]
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0),
        ncols=8,
        handlelength=1.0,
        columnspacing=1.2,
    )
    return figure


def _stacked_bars(axes: Axes, series: Series, sizes: Sequence[int]) -> set[str]:
    by_size = {c.row["S"]: c.row for c in series.cells}
    boxes: dict[str, list[list[tuple[float, float]]]] = {}
    for place, size in enumerate(sizes):
        row = by_size.get(size)
        shares = shares_of(row) if row else None
        if shares is None:
            why = "not measured" if row is None else "no shares" if row["status"] == "ok" else row["status"]
            axes.text(place, 3, why, rotation=90, ha="center", va="bottom", fontsize=9, color=GREY)
            continue
        bottom = 0.0
        for stage, share in shares.items():
            left, right, top = place - 0.41, place + 0.41, bottom + share
            if share > 0:
                boxes.setdefault(stage, []).append(
                    [(left, bottom), (left, top), (right, top), (right, bottom)]
                )
            if share >= 8 and len(sizes) <= 10:
                _write_on(axes, place, bottom + share / 2, f"{share:.0f}", STAGE_COLOURS[stage])
            bottom = top
    for stage, drawn in boxes.items():
        style: Any = {"facecolors": STAGE_COLOURS[stage], "edgecolors": "white", "linewidths": 0.6}
        axes.add_collection(PolyCollection(drawn, label=stage, **style), autolim=False)
    step = math.ceil(len(sizes) / 10)
    axes.set_xticks(range(0, len(sizes), step), [tokens_text(s) for s in sizes[::step]])
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25))
    axes.grid(visible=False)
    return set(boxes)


def _write_on(axes: Axes, x: float, y: float, text: str, background: str) -> None:
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")


def _route_lines(panel: Panel, styles: Styles, mark: Callable[[Compared], Mark]) -> list[Line]:
    return [
        Line(
            series.arm,
            styles[series.arm].color,
            styles[series.arm].marker,
            RUN_DASHES[series.run % len(RUN_DASHES)],
            tuple(map(mark, series.cells)),
            panel.runs[series.run] if len(panel.runs) > 1 else "",
        )
        for series in panel.series
    ]


def _cache_line(label: str, marker: str, dash: str, values: Mapping[int, int]) -> Line:
    return Line(label, GREY, marker, dash, tuple(Mark(size, float(n)) for size, n in sorted(values.items())))


def _number(value: float | None, factor: float = 1.0) -> float:
    return math.nan if value is None else value * factor
