"""Figures of a stored training: loss, speed, the gates of every layer, and what it can retrieve."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nsabench.present.drawing import headed_figure
from nsabench.present.frame import PresentError
from nsabench.present.material import (
    ALL_FAR_NEEDLES,
    id_of,
    is_finite,
    last_step,
    load_kind,
    setting_of,
    trained_route,
    training_status,
)
from nsabench.present.naming import commit_of, machine_of
from nsabench.present.plots import save_figures
from nsabench.present.style import GREY, STAGE_COLOURS, figure_style
from nsabench.store import RunCells, StoreError, load_cells
from nsabench.store.scorecard import Scorecard
from nsabench.store.training import Training

Points = tuple[list[float], list[float]]

_BRANCHES = {"cmp": "compressed", "sel": "selected", "win": "sliding"}
_SHOWN = ("dim", "layers", "heads", "groups", "dk", "dv", "l", "d", "l_sel", "n_sel", "w")
_OTHERS = ("precision", "mode", "data", "S", "batch")
_MOST_LAYERS = 12
_SMOOTHED = 200
"""Steps from which a running mean is drawn over the losses."""

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")


def plot_training(training: Training, out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw a training into the folder `out`: `loss`, `speed`, `gates` and `needle`, those it has numbers for.

    PresentError where it has none; else as `save_figures`.
    """
    with figure_style():
        figures = {name: made for name, make in _FIGURES.items() if (made := make(training)) is not None}
        if not figures:
            raise PresentError(f"{id_of(training)} has nothing to draw: no step was logged")
        return save_figures(figures, out, formats)


def load_drawable(folder: Path) -> RunCells | Training:
    """The run in the folder, of cells without their samples. StoreError for a scorecard: it has no figure."""
    run = load_kind(folder, load_cells)
    if isinstance(run, Scorecard):
        raise StoreError(f"{folder} is a scorecard, which has no figure; nsabench report shows it")
    return run


def _loss(training: Training) -> Figure | None:
    steps, losses = _series(training.steps, "loss")
    if not steps:
        return None
    figure, axes = _over_steps(training, "loss", "loss, nats per byte")
    thin = len(losses) >= _SMOOTHED
    axes.plot(steps, losses, color=_LINES[0], linewidth=0.7 if thin else 1.6, alpha=0.45 if thin else 1)
    if thin:
        width = len(losses) // 50
        axes.plot(steps, _running(losses, width), color=_LINES[0], label=f"mean of {width} logged steps")
        axes.legend(loc="upper right")
    broken = [row["step"] for row in training.steps if not is_finite(row["loss"])]
    if broken:
        axes.axvline(broken[0], color="#D55E00", linewidth=1.2)
        axes.set_title(f"not finite at step {broken[0]}", fontsize=9.5, color="#D55E00", loc="right")
    axes.set_ylim(min(0.0, *losses), 1.08 * max(losses))
    return figure


def _speed(training: Training) -> Figure | None:
    steps, speeds = _series(training.steps, "tokens_per_s")
    if not steps:
        return None
    figure, axes = _over_steps(training, "speed", "tokens/s")
    axes.plot(steps, speeds, color=_LINES[2], linewidth=1.2)
    axes.set_ylim(0, 1.08 * max(speeds))
    return figure


def _gates(training: Training) -> Figure | None:
    """The mean part of the gates that each branch has, a panel for each layer."""
    layers = sorted({row["layer"] for row in training.gates})
    if not layers:
        return None
    shown = layers[:_MOST_LAYERS]
    columns = min(len(shown), 3)
    rows = math.ceil(len(shown) / columns)
    figure = headed_figure(_title(training, "gate shares"), _subtitle(training), 0.5 + 2.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        mine = [row for row in training.gates if row["layer"] == shown[place]]
        for branch, name in _BRANCHES.items():
            steps, parts = _series(mine, f"share_{branch}")
            look: Any = {
                "color": STAGE_COLOURS[branch],
                "label": name,
                "marker": "o" if len(steps) == 1 else "",
            }
            axes.plot(steps, [100 * part for part in parts], **look)
        for row in mine:
            if row["collapsed"]:
                axes.axvline(row["step"], color="#D55E00", linewidth=1)
        shut = any(row["collapsed"] for row in mine)
        axes.set_title(f"layer {shown[place]}{': collapsed where marked' if shut else ''}", fontsize=9.5)
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if place % columns == 0:
            axes.set_ylabel("share of gates, %")
        if place + columns >= len(shown):
            axes.set_xlabel("step")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _needle(training: Training) -> Figure | None:
    """Accuracy of retrieval, by the route as trained and with branches off: over steps where it was evaluated
    more than once, else needles over their distance.
    """
    rows = [row for row in training.evaluation if row["accuracy"] is not None]
    if not rows:
        return None
    by_step = len({row["step"] for row in rows}) > 1
    lines = _over_time(training, rows) if by_step else _over_distance(rows)
    if not lines:
        return None
    figure = headed_figure(_title(training, "accuracy where it was asked"), _subtitle(training), 4.0)
    axes = figure.subplots()
    for place, (name, points) in enumerate(lines.items()):
        steps, parts = _series(points, "accuracy", "step" if by_step else "distance")
        axes.plot(
            steps,
            [100 * part for part in parts],
            color=_LINES[place % len(_LINES)],
            marker="os^Dv*"[place % 6],
            linestyle="--" if "off" in name else "-",
            label=name,
        )
    shown = [row for points in lines.values() for row in points]
    for chance in sorted({row["chance"] for row in shown if row["chance"] is not None})[:3]:
        axes.axhline(
            100 * chance, color=GREY, linewidth=1, linestyle=":", label=f"chance {100 * chance:.3g} %"
        )
    window = setting_of(training, "w")
    if not by_step and isinstance(window, int):
        axes.axvline(window, color=GREY, linewidth=1, label=f"window, {window} tokens")
    axes.set_ylim(-2, 103)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel("step" if by_step else "distance of the nearest, tokens")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _over_time(training: Training, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was asked, as trained and without the selected branch; of needles those of all distances."""
    routes = (trained_route(training), "sel=off")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["route"] in routes and not row["what"].endswith(" back"):
            lines.setdefault(f"{row['what']}, {row['route']}", []).append(row)
    return lines


def _over_distance(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Needles by route, a point for each distance."""
    needles = [row for row in rows if row["what"].startswith("needle") and row["distance"] is not None]
    parts = any(row["what"].endswith(" back") for row in needles)
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in needles:
        if not (parts and row["what"] == ALL_FAR_NEEDLES):
            lines.setdefault(f"needle, {row['route']}", []).append(row)
    return lines


_FIGURES: Mapping[str, Callable[[Training], Figure | None]] = {
    "loss": _loss,
    "speed": _speed,
    "gates": _gates,
    "needle": _needle,
}


def _series(rows: Sequence[Mapping[str, Any]], name: str, over: str = "step") -> Points:
    """The finite values of a column over another."""
    known = sorted(
        (float(row[over]), float(row[name])) for row in rows if row[over] is not None and is_finite(row[name])
    )
    return [x for x, _ in known], [y for _, y in known]


def _running(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value with up to `width` - 1 before it."""
    found = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - width) : end]
        found.append(math.fsum(part) / len(part))
    return found


def _over_steps(training: Training, what: str, label: str) -> tuple[Figure, Axes]:
    figure = headed_figure(_title(training, what), _subtitle(training), 3.6)
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure, axes


def _title(training: Training, what: str) -> str:
    status = training_status(training)
    return f"Training: {what}{'' if status == 'ok' else f' ({status})'}, {last_step(training)} steps"


def _subtitle(training: Training) -> tuple[str, str]:
    """The model; then how and where it was trained."""
    model = [f"{name} {value}" for name in _SHOWN if (value := setting_of(training, name)) is not None]
    device = str(setting_of(training, "device") or "cpu")
    machine = machine_of(training.info, device if device != "auto" else "cpu")
    how = [
        value if name in ("precision", "mode") else f"{name} {value}"
        for name in _OTHERS
        if (value := PurePath(str(setting_of(training, name) or "")).name)
    ]
    return ", ".join(model), ", ".join([*how, f"{device} ({machine})", f"commit {commit_of(training.info)}"])
