"""The four figures of a panel. Each returns None when the panel has nothing that it could show."""

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nsabench.present.drawing import Line, Mark, Scale, new_figure, value_figure
from nsabench.present.frame import Row, shares_of
from nsabench.present.panels import Panel, Point, Series
from nsabench.present.style import GREY, RUN_DASHES, STAGE_COLOURS, RouteStyle
from nsabench.present.wording import bytes_text, digits, folded, ratio_text, tokens_text
from nsabench.store.schema import STAGES

Styles = Mapping[str, RouteStyle]

_ITEM_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}


def time_figure(panel: Panel, styles: Styles) -> Figure | None:
    """Median time of a step over S with its 95 % interval, a line for each route."""
    slowest = max(p.row["ms_total"] for s in panel.series for p in s.points if p.ok)
    factor, unit = (1000.0, "µs") if slowest < 1 else (1.0, "ms")

    def mark(point: Point) -> Mark:
        time, lo, hi = (_number(point.row[name], factor) for name in ("ms_total", "ms_lo", "ms_hi"))
        return Mark(point.row["S"], time, lo, hi, point.row["status"])

    scale = Scale(f"time of one step, {unit}", digits)
    return value_figure(
        panel, _route_lines(panel, styles, mark), "time of one step, median and 95 % interval", scale
    )


def speed_figure(panel: Panel, styles: Styles) -> Figure | None:
    """Speed relative to the first route over S with its 95 % interval.

    None without a second route to compare.
    """

    def mark(point: Point) -> Mark:
        speed = point.speed
        if speed is None:
            return Mark(point.row["S"], status=point.row["status"])
        return Mark(point.row["S"], speed.point, _number(speed.lo), _number(speed.hi))

    lines = [line for line in _route_lines(panel, styles, mark) if line.known]
    if not lines:
        return None
    bases = {p.baseline for s in panel.series for p in s.points if p.speed}
    base = bases.pop() if len(bases) == 1 else "the first route"
    scale = Scale(f"speed, {base} = 1", ratio_text, reference=1.0)
    return value_figure(panel, lines, f"speed relative to {base}, with 95 % interval", scale)


def memory_figure(panel: Panel, styles: Styles) -> Figure | None:
    """Peak of live tensors for each route over S, the KV cache, and what the cache of dense attention takes.

    None when neither a peak nor a cache is known.
    """

    def mark(point: Point) -> Mark:
        return Mark(point.row["S"], _number(point.row["peak_alloc_bytes"]), status=point.row["status"])

    points = [p for s in panel.series for p in s.points]
    lines = [line for line in _route_lines(panel, styles, mark) if line.known]
    cache = {p.row["S"]: p.row["kv_cache_bytes"] for p in points if p.row["kv_cache_bytes"]}
    if cache:
        lines.append(_cache_line("KV cache", "h", "-", cache))
    if not lines:
        return None
    dense = {p.row["S"]: dense_cache_bytes(p.row) for p in points}
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
    shown = [s for s in panel.series if any(shares_of(p.row) for p in s.points)]
    if not shown:
        return None
    columns = min(2 if len(panel.sizes) > 3 else 4, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(panel, "share of each stage in the time of one step", 0.5 + 2.6 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    used: set[str] = set()
    for axes, series in zip(grid.flat, shown, strict=False):
        used |= _stacked_bars(axes, series, panel.sizes)
        axes.set_title("\n".join(folded(series.label, 80 // columns)), fontsize=10)
        axes.set_xlabel("S, tokens")
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the step")
    handles = [Patch(color=STAGE_COLOURS[stage], label=stage) for stage in STAGES if stage in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, handlelength=1.0, columnspacing=1.2)
    return figure


def _stacked_bars(axes: Axes, series: Series, sizes: Sequence[int]) -> set[str]:
    by_size = {p.row["S"]: p for p in series.points}
    used: set[str] = set()
    for place, size in enumerate(sizes):
        point = by_size.get(size)
        shares = shares_of(point.row) if point else None
        if shares is None:
            why = "not measured" if point is None else "no shares" if point.ok else point.row["status"]
            axes.text(place, 3, why, rotation=90, ha="center", va="bottom", fontsize=9, color=GREY)
            continue
        bottom = 0.0
        for stage, share in shares.items():
            color = STAGE_COLOURS[stage]
            axes.bar(place, share, 0.82, bottom, color=color, edgecolor="white", linewidth=0.6, label=stage)
            if share >= 8 and len(sizes) <= 10:
                _write_on(axes, place, bottom + share / 2, f"{share:.0f}", color)
            bottom += share
        used |= {stage for stage, share in shares.items() if share > 0}
    step = math.ceil(len(sizes) / 10)
    axes.set_xticks(range(0, len(sizes), step), [tokens_text(s) for s in sizes[::step]])
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 25))
    axes.grid(visible=False)
    return used


def _write_on(axes: Axes, x: float, y: float, text: str, background: str) -> None:
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "black")


def _route_lines(panel: Panel, styles: Styles, mark: Callable[[Point], Mark]) -> list[Line]:
    return [
        Line(
            series.label,
            styles[series.route].color,
            styles[series.route].marker,
            RUN_DASHES[series.run % len(RUN_DASHES)],
            tuple(map(mark, series.points)),
        )
        for series in panel.series
    ]


def _cache_line(label: str, marker: str, dash: str, values: Mapping[int, int]) -> Line:
    return Line(label, GREY, marker, dash, tuple(Mark(size, float(n)) for size, n in sorted(values.items())))


def _number(value: float | None, factor: float = 1.0) -> float:
    return math.nan if value is None else value * factor
