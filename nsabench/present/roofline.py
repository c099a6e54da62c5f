"""Rooflines: what was reached, by how many FLOPs there are to a byte, under what the machine can do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nsabench.present.drawing import headed_figure
from nsabench.present.frame import Row
from nsabench.present.panels import Panel
from nsabench.present.style import GREY, STAGE_COLOURS, RouteStyle
from nsabench.present.wording import digits, tokens_text
from nsabench.store import RunCells
from nsabench.store.profile import load_profile
from nsabench.store.schema import STAGES

STEP = "whole step"
CALIBRATE = "nsabench doctor --calibrate"
_BODY_INCHES = 4.6
_ROOM = 0.35  # of a decade, beyond what is drawn


@dataclass(frozen=True)
class Roofs:
    """What a device was measured to reach: 1e9 bytes/s of a copy, 1e12 FLOP/s of a matrix product in a dtype
    (None where that was not measured).
    """

    copy_gbps: float
    matrix_tflops: float | None
    dtype: str

    def tflops_at(self, intensity: float) -> float:
        """The most that work of so many FLOPs a byte can reach, 1e12 FLOP/s."""
        memory = intensity * self.copy_gbps * 1e-3
        return memory if self.matrix_tflops is None else min(memory, self.matrix_tflops)


@dataclass(frozen=True)
class Spot:
    """Counted FLOPs and bytes of something that took so many ms."""

    name: str
    flops: float
    bytes: float
    ms: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    @property
    def tflops(self) -> float:
        return self.flops / self.ms * 1e-9

    @property
    def gbps(self) -> float:
        return self.bytes / self.ms * 1e-6


@dataclass(frozen=True)
class Source:
    """What a stored run knows beside its rows: measured peaks by device, and its profile, if it is one."""

    peaks: Mapping[str, Mapping[str, Any]]
    profile: Mapping[str, Any] | None = None

    def roofs(self, row: Row) -> Roofs | None:
        """The roofs over a row; None where its device was not calibrated when it was measured."""
        peaks = self.peaks.get(row["device"])
        if not peaks:
            return None
        rates = peaks["matmul_tflops"]
        # Inputs of 16 bits may be computed in fp32 where that is faster.
        usable = (row["dtype"], "fp32") if row["dtype"] in ("fp16", "bf16") else (row["dtype"],)
        best = max((rates[name] for name in usable if name in rates), default=None)
        return Roofs(peaks["copy_gbps"], best, row["dtype"])


def sources_of(runs: Sequence[RunCells]) -> dict[str, Source]:
    """By run_id, what rooflines need of each run, and of each that a merged one was made from."""
    found = {}
    for run in runs:
        profile = load_profile(run.path)
        for info in run.sources:
            found[str(info["run_id"])] = Source(info.get("peaks") or {}, profile)
    return found


def spot_of(row: Row, name: str = STEP) -> Spot | None:
    """The whole step of a row; None where it has no time, or no work was counted."""
    if row["status"] != "ok" or not row["ms_total"] or not row["flops"] or not row["bytes"]:
        return None
    return Spot(name, row["flops"], row["bytes"], row["ms_total"])


def stage_spots(row: Row, profile: Mapping[str, Any]) -> tuple[list[Spot], str]:
    """The stages of a profiled row that have both time and counted work; and in words, which have none."""
    spots, without = [], []
    for stage in STAGES:
        ms, work = row[f"ms_{stage}"], (profile.get("stages") or {}).get(stage)
        if ms and work and work["flops"] and work["bytes"]:
            spots.append(Spot(stage, work["flops"], work["bytes"], ms))
        elif ms:
            without.append(f"{stage} {digits(ms)} ms")
    if row["shares_note"]:
        return spots, f"no stages: {row['shares_note']}"
    return spots, f"no FLOPs are counted for {', '.join(without)}" if without else ""


def roofline_figure(
    panel: Panel, styles: Mapping[str, RouteStyle], sources: Mapping[str, Source]
) -> Figure | None:
    """The steps of a panel under this machine's roofs; of a profiled cell its stages too, even without roofs.

    None where nothing has counted work, and for a sweep on a machine that was not calibrated.
    """
    rows = [cell.row for series in panel.series for cell in series.cells]
    known = [(row, sources[row["run_id"]]) for row in rows if row["run_id"] in sources and spot_of(row)]
    if not known:
        return None
    roofs = next((found for row, source in reversed(known) if (found := source.roofs(row))), None)
    row, source = known[0]
    if len(known) == 1 and source.profile and source.profile["cell_id"] == row["cell_id"]:
        return _stages_figure(panel, row, source.profile, roofs)
    return None if roofs is None else _steps_figure(panel, styles, roofs)


def _stages_figure(panel: Panel, row: Row, profile: Mapping[str, Any], roofs: Roofs | None) -> Figure:
    whole = spot_of(row)
    assert whole is not None
    spots, note = stage_spots(row, profile)
    said = [note, _CACHED if row["cache"] == "warm" and roofs else ""]
    if roofs is None:
        said.append(f"peaks of {row['device']} were not measured, so there are no roofs: {CALIBRATE}")
    spots = [*spots, whole]
    figure, axes = _begin(panel, f"roofline, S={tokens_text(row['S'])}", spots, roofs, said)
    _points(axes, spots, _scale(spots, roofs))
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _steps_figure(panel: Panel, styles: Mapping[str, RouteStyle], roofs: Roofs) -> Figure:
    lines = [
        (s, [x for c in s.cells if (x := spot_of(c.row, tokens_text(c.row["S"])))]) for s in panel.series
    ]
    spots = [spot for _, line in lines for spot in line]
    warm = any(c.row["cache"] == "warm" for series in panel.series for c in series.cells)
    figure, axes = _begin(panel, "roofline of whole steps", spots, roofs, [_CACHED if warm else ""])
    unit = _scale(spots, roofs)
    ends: list[tuple[str, Spot, str]] = []
    for series, line in lines:
        if not line:
            continue
        look = styles[series.arm]
        places = [spot.intensity for spot in line], [spot.tflops * unit for spot in line]
        axes.plot(*places, color=look.color, marker=look.marker, linewidth=1, label=series.label)
        ends += [(f"S={spot.name}", spot, look.color) for spot in dict.fromkeys((line[0], line[-1]))]
    names = [(text, spot) for text, spot, _ in ends]
    for (text, spot, color), (offset, side) in zip(ends, _sides(axes, names, unit), strict=True):
        _write(axes, spot.intensity, spot.tflops * unit, text, color, offset, side)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


_CACHED = "warm cache: what is read from it may pass the memory roof"


def _scale(spots: Sequence[Spot], roofs: Roofs | None) -> float:
    """1 for an axis in TFLOP/s, 1000 for GFLOP/s."""
    tops = [spot.tflops for spot in spots] + ([roofs.matrix_tflops or 0.0] if roofs else [])
    return 1.0 if max(tops) >= 1 else 1000.0


def _begin(
    panel: Panel, what: str, spots: Sequence[Spot], roofs: Roofs | None, said: Sequence[str]
) -> tuple[Figure, Axes]:
    """A figure with its axes and its roofs, wide enough for all spots; `said` goes into its head."""
    title = f"{panel.title}: {what}"
    figure = headed_figure(title, [*panel.subtitle, *(line for line in said if line)], _BODY_INCHES)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    unit = _scale(spots, roofs)
    xs, ys = [s.intensity for s in spots], [s.tflops * unit for s in spots]
    if roofs is not None:
        ridge = None if roofs.matrix_tflops is None else roofs.matrix_tflops * 1e3 / roofs.copy_gbps
        xs += [] if ridge is None else [ridge / 3, ridge * 3]
        ys += [unit * roofs.tflops_at(x) for x in (min(xs), max(xs))]
    for set_limits, values in ((axes.set_xlim, xs), (axes.set_ylim, ys)):
        set_limits(min(values) / 10**_ROOM, max(values) * 10**_ROOM)
    if roofs is not None:
        _draw_roofs(axes, roofs, unit)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(visible=True, axis="both")
    axes.set_xlabel("counted FLOP per byte")
    axes.set_ylabel(_unit_text(unit))
    return figure, axes


def _draw_roofs(axes: Axes, roofs: Roofs, unit: float) -> None:
    (left, right), top = axes.get_xlim(), roofs.matrix_tflops
    slope = unit * roofs.copy_gbps * 1e-3
    end = right if top is None else min(right, top * 1e3 / roofs.copy_gbps)
    if left < end:
        axes.plot([left, end], [left * slope, end * slope], color=GREY, linewidth=1.6, zorder=1)
        at = max(left, axes.get_ylim()[0] / slope) ** 0.4 * end**0.6
        _write(axes, at, at * slope, f"memory, {digits(roofs.copy_gbps)} GB/s copied", GREY, (8, -11), "left")
    if top is not None:
        axes.plot([max(left, end), right], [top * unit] * 2, color=GREY, linewidth=1.6, zorder=1)
        rate = f"{digits(top * unit)} {_unit_text(unit)}"
        _write(axes, right, top * unit, f"matrix product, {roofs.dtype}, {rate}", GREY, (-4, 4), "right")


def _points(axes: Axes, spots: Sequence[Spot], unit: float) -> None:
    """Stages as dots and the step as a diamond, each with its name."""
    for spot in spots:
        whole = spot.name == STEP
        color, marker = ("black", "D") if whole else (STAGE_COLOURS[spot.name], "o")
        label = f"{spot.name}, {digits(spot.ms)} ms"
        axes.plot(
            spot.intensity, spot.tflops * unit, color=color, marker=marker, markersize=8, ls="", label=label
        )
    names = [("step" if spot.name == STEP else spot.name, spot) for spot in spots]
    for (text, spot), (offset, side) in zip(names, _sides(axes, names, unit), strict=True):
        color = "black" if spot.name == STEP else STAGE_COLOURS[spot.name]
        _write(axes, spot.intensity, spot.tflops * unit, text, color, offset, side)


_Side = tuple[tuple[int, int], str]
_SIDES: tuple[_Side, ...] = (((7, 5), "left"), ((-7, 5), "right"), ((7, -12), "left"), ((-7, -12), "right"))


def _sides(axes: Axes, names: Sequence[tuple[str, Spot]], unit: float) -> list[_Side]:
    """Where the name of each point goes: the first place in which it meets no other name and no point."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [tuple(to_axes.transform((spot.intensity, spot.tflops * unit))) for _, spot in names]
    taken = [(x - 0.01, x + 0.01, y - 0.015, y + 0.015) for x, y in places]
    found = []
    for (text, _), (x, y) in zip(names, places, strict=True):
        boxes = []
        for (_, up), side in _SIDES:
            width, bottom = 0.016 * len(text), y + (0.01 if up > 0 else -0.05)
            left = x + 0.012 if side == "left" else x - 0.012 - width
            boxes.append((left, left + width, bottom, bottom + 0.04))
        clashes = [sum(_meet(box, other) for other in taken) for box in boxes]
        best = clashes.index(min(clashes))
        taken.append(boxes[best])
        found.append(_SIDES[best])
    return found


_Box = tuple[float, float, float, float]


def _meet(a: _Box, b: _Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _write(axes: Axes, x: float, y: float, text: str, color: str, offset: tuple[int, int], side: str) -> None:
    """Text beside a point, `side` being the end of the text that is nearer to it."""
    axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=9, color=color)


def _unit_text(unit: float) -> str:
    return "TFLOP/s" if unit == 1 else "GFLOP/s"
