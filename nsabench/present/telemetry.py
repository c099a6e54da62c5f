"""A run in time order: every sample beside its arm's median, and what the GPU did meanwhile."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nsabench.present.disturbances import is_dropped, row_notes, run_notes
from nsabench.present.drawing import headed_figure, legend_columns
from nsabench.present.frame import Row, cell_rows, varying
from nsabench.present.naming import commit_of, machine_of
from nsabench.present.panels import Keep
from nsabench.present.style import GREY, RUN_DASHES, RouteStyle, route_styles, value_axis
from nsabench.present.wording import arm_text, fields_text, ratio_text, tokens_text
from nsabench.store import Run

MOST_ARMS = 12
"""Arms in one figure that can still be told apart."""

_READINGS = {"sm_clock_mhz": "SM clock\nMHz", "power_w": "power\nW", "temp_c": "temperature\n°C"}
_SLOW_DOWNS = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")
_SHADES = {"slowed down": "#f2c4b0", "power capped": "#ece7cf"}
_DROPPED = "#C00000"
_APART_S = 1.0
_MANY = 3000
_SHAPE = ("phase", "passes", "mode", "scope", "B", "dtype", "device")


class _Span(NamedTuple):
    shade: str
    start: float
    end: float


def telemetry_figure(run: Run, keep: Keep | None = None) -> Figure | None:
    """Samples over time in units of their cell's median, one colour for each arm, those that do not count
    crossed; below them, where a GPU was read, its clock, power and temperature, and where it was slowed down.

    `keep` takes a frame of cells and tells which to draw. None without samples.
    """
    cells = run.cells if keep is None else run.cells[keep(run.cells)]
    rows = [row for row in cell_rows(cells) if row["cell_id"] in set(run.samples["cell_id"])]
    if not rows:
        return None
    arms = list(dict.fromkeys(arm_text(row) for row in rows))
    shown = [row for row in rows if arm_text(row) in arms[:MOST_ARMS]]
    samples = _relative(run.samples, shown)
    readings = [name for name in _READINGS if name in run.telemetry and run.telemetry[name].notna().any()]
    figure = headed_figure(
        _title(shown, bool(readings)), _subtitle(run, rows, arms), 3.7 + 1.2 * len(readings)
    )
    grid = figure.subplots(
        1 + len(readings),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [2.6, *[1.0] * len(readings)]},
    )[:, 0]
    styles = route_styles(arms[:MOST_ARMS])
    _draw_samples(grid[0], samples, styles)
    for axes, name in zip(grid[1:], readings, strict=True):
        _draw_reading(axes, run.telemetry, name)
    spans = _spans(run.telemetry) if readings else []
    for axes in grid:
        for span in spans:
            axes.axvspan(span.start, span.end, color=_SHADES[span.shade], linewidth=0, zorder=0.5)
    grid[-1].set_xlabel("time since the run began, s")
    handles = _legend(samples, styles, spans, run.telemetry)
    columns = legend_columns([str(handle.get_label()) for handle in handles])
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _title(rows: Sequence[Row], with_gpu: bool) -> str:
    phases = "/".join(dict.fromkeys(str(row["phase"]) for row in rows)).capitalize()
    return f"{phases}: samples in time order{', and the GPU meanwhile' if with_gpu else ''}"


def _subtitle(run: Run, rows: Sequence[Row], arms: Sequence[str]) -> list[str]:
    same = [name for name in _SHAPE if name not in varying(rows, _SHAPE)]
    lengths = [row["S"] for row in rows]
    sizes = dict.fromkeys((min(lengths), max(lengths)))
    devices = dict.fromkeys(str(row["device"]) for row in rows)
    machines = ", ".join(f"{device} ({machine_of(run.info, device)})" for device in devices)
    hidden = arms[MOST_ARMS:]
    more = f" and {len(hidden) - 3} more" if len(hidden) > 3 else ""
    left_out = f"left out: {len(hidden)} of {len(arms)} routes ({'; '.join(hidden[:3])}{more})"
    loads = [note for note in row_notes(rows) if "dropped" not in note]
    return [
        f"{fields_text(rows[0], same)}, S={' to '.join(tokens_text(size) for size in sizes)}",
        f"{machines}, commit {commit_of(run.info)}, {len(rows)} cells",
        *run_notes(run),
        *loads,
        *([left_out] if hidden else []),
    ]


def _relative(samples: pd.DataFrame, rows: Sequence[Row]) -> pd.DataFrame:
    """The samples of these cells in time order: arm, process, time, time over the median of those that count
    of its cell and kind, and whether it is dropped.
    """
    arm_of = {row["cell_id"]: arm_text(row) for row in rows}
    mine = samples[samples["cell_id"].isin(arm_of) & (samples["ms"] > 0)]
    dropped = is_dropped(mine)
    kind = [mine["cell_id"], mine["variant"].fillna("")]
    counted = mine["ms"].where(~dropped).groupby(kind).transform("median")
    # Of a cell with no round that counts, the median of what there is.
    middle = counted.fillna(mine["ms"].groupby(kind).transform("median"))
    found = {"arm": mine["cell_id"].map(arm_of), "process": mine["process"], "t_s": mine["t_s"]}
    return pd.DataFrame({**found, "value": mine["ms"] / middle, "dropped": dropped}).sort_values("t_s")


def _draw_samples(axes: Axes, samples: pd.DataFrame, styles: Mapping[str, RouteStyle]) -> None:
    many: dict[str, Any] = {"rasterized": True} if len(samples) > _MANY else {}
    size = 4.5 if len(samples) <= 600 else 2.8
    for arm, mine in samples.groupby("arm", sort=False):
        style = styles[str(arm)]
        look: dict[str, Any] = {
            "color": style.color,
            "marker": style.marker,
            "markersize": size,
            "markeredgewidth": 0,
        }
        axes.plot(mine["t_s"], mine["value"], linestyle="", alpha=0.8, label=str(arm), **look, **many)
    out = samples[samples["dropped"]]
    if len(out):
        axes.plot(out["t_s"], out["value"], **_cross(), **many)
    for start in samples.groupby("process")["t_s"].min().sort_values()[1:]:
        axes.axvline(start, color="#999999", linewidth=0.8, linestyle=":", zorder=0.9)
    axes.axhline(1, color=GREY, linewidth=1, zorder=1)
    value_axis(axes, [*samples["value"], 1.0], "y", ratio_text, binary=False, zero=False)
    axes.set_ylabel("time of a step\nover its arm's median")


def _draw_reading(axes: Axes, telemetry: pd.DataFrame, name: str) -> None:
    for number, (_, mine) in enumerate(telemetry.groupby("gpu_uuid", sort=False)):
        times, values = _broken(mine["t_s"].to_numpy(dtype=float), mine[name].to_numpy(dtype=float))
        dash = RUN_DASHES[number % len(RUN_DASHES)]
        axes.plot(times, values, color="#222222", linewidth=1.2, linestyle=dash, marker=".", markersize=2.5)
    axes.set_ylabel(_READINGS[name])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(y=0.15)


def _broken(
    times: npt.NDArray[np.float64], values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A line that breaks where nothing was read for a while."""
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    gaps = np.flatnonzero(np.diff(times) > _APART_S) + 1
    return np.insert(times, gaps, np.nan), np.insert(values, gaps, np.nan)


def _spans(telemetry: pd.DataFrame) -> list[_Span]:
    """When a GPU was slowed down or capped: from a reading that shows it to the next one."""
    found: list[_Span] = []
    for _, mine in telemetry.sort_values("t_s", kind="stable").groupby("gpu_uuid", sort=False):
        times = mine["t_s"].to_numpy(dtype=float)
        after = np.minimum(np.append(times[1:], times[-1:]), times + _APART_S)
        for start, end, reasons in zip(times, after, mine["throttle_reasons"], strict=True):
            shade = _shade(reasons)
            if not shade:
                continue
            if found and found[-1].shade == shade and found[-1].end >= start:
                found[-1] = found[-1]._replace(end=end)
            else:
                found.append(_Span(shade, start, end))
    return found


def _shade(reasons: object) -> str:
    names = set(str(reasons).split("+"))
    if names & set(_SLOW_DOWNS):
        return "slowed down"
    return "power capped" if "sw_power_cap" in names else ""


def _legend(
    samples: pd.DataFrame,
    styles: Mapping[str, RouteStyle],
    spans: Sequence[_Span],
    telemetry: pd.DataFrame,
) -> list[Line2D | Patch]:
    drawn = set(samples["arm"])
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=style.color, marker=style.marker, linestyle="", markersize=5.5, label=arm)
        for arm, style in styles.items()
        if arm in drawn
    ]
    if samples["dropped"].any():
        handles.append(Line2D([], [], label="round does not count", **_cross()))
    if samples["process"].nunique() > 1:
        handles.append(Line2D([], [], color="#999999", linewidth=0.8, linestyle=":", label="a fresh process"))
    shades = dict.fromkeys(span.shade for span in spans)
    handles += [Patch(facecolor=_SHADES[shade], label=shade) for shade in shades]
    gpus = list(dict.fromkeys(telemetry["gpu_uuid"])) if "gpu_uuid" in telemetry else []
    if len(gpus) > 1:
        handles += [
            Line2D([], [], color="#222222", linestyle=RUN_DASHES[i % len(RUN_DASHES)], label=f"GPU {i + 1}")
            for i in range(len(gpus))
        ]
    return handles


def _cross() -> dict[str, Any]:
    return {"color": _DROPPED, "marker": "x", "markersize": 6.5, "markeredgewidth": 1.6, "linestyle": ""}
