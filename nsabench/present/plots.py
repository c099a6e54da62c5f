"""Figures of stored runs: made from their files alone, without a display, the same bytes every time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nsabench.present.figures import memory_figure, shares_figure, speed_figure, time_figure
from nsabench.present.frame import PresentError
from nsabench.present.panels import Panel, make_panels
from nsabench.present.style import RouteStyle, figure_style, route_styles
from nsabench.store import Run

_FIGURES: dict[str, Callable[[Panel, Mapping[str, RouteStyle]], Figure | None]] = {
    "time": time_figure,
    "shares": shares_figure,
    "memory": memory_figure,
    "speed": speed_figure,
}
_METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": "nsabench"},
    "svg": {"Creator": "nsabench", "Date": None},
}


def plot_run(run: Run | Sequence[Run], out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw the run, or several in the same figures, into the folder `out`; returns the files written.

    They are `<name>-time`, `-shares` (where stages were measured), `-memory` and `-speed` (with several
    routes). `<name>` is the phase, followed by passes, mode and B where they are not fwd, batched and 1, and
    by whatever else tells two shapes of these runs apart. Runs that share a figure differ by their dashes.

    PresentError, with nothing drawn, for a format other than png and svg, for no run, and when no cell is ok;
    also when a file cannot be written.
    """
    unknown = [f for f in formats if f not in _METADATA]
    if unknown or not formats:
        raise PresentError(f"format is {unknown[0] if unknown else ''!r}; allowed: {', '.join(_METADATA)}")
    panels = make_panels([run] if isinstance(run, Run) else list(run))
    styles = route_styles(series.route for panel in panels for series in panel.series)
    written: list[Path] = []
    with figure_style():
        for panel in panels:
            for what, draw in _FIGURES.items():
                figure = draw(panel, styles)
                if figure is not None:
                    written += [_save(figure, Path(out) / f"{panel.name}-{what}.{f}") for f in formats]
    return written


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=_METADATA[path.suffix[1:]])
    except OSError as error:
        raise PresentError(f"cannot write {path}: {error.strerror or error}") from error
    return path
