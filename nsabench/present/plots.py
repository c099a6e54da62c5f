"""Figures of stored runs: made from their files alone, without a display, the same bytes every time."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

from nsabench.present.forest import forest_figure
from nsabench.present.frame import PresentError
from nsabench.present.panels import MOST_PANELS, Keep, Panel, make_panels
from nsabench.present.roofline import Source, roofline_figure, sources_of
from nsabench.present.sharing import FIGURES, FORMATS, draw, save, second_process
from nsabench.present.style import RouteStyle, figure_style, route_styles
from nsabench.present.telemetry import telemetry_figure
from nsabench.present.verdicts import Comparison, findings_of
from nsabench.store import Run, RunCells

__all__ = ["plot_comparison", "plot_run", "save_figures", "second_process", "set_name"]

_LONGEST_NAME = 120


def plot_run(
    run: RunCells | Sequence[RunCells],
    out: Path,
    formats: Sequence[str] = ("png", "svg"),
    *,
    keep: Keep | None = None,
    most: int = MOST_PANELS,
    note: Callable[[str], object] = lambda text: None,
    helper: ProcessPoolExecutor | None = None,
) -> list[Path]:
    """Draw the run, or several in the same figures, into the folder `out`; returns the files written.

    Of a run given without its samples (`load_cells`) they are read if it is drawn.

    They are `<name>-time`, `-shares` (where stages were measured), `-memory`, `-speed` (with several routes),
    `-dense` (where dense attention was measured) and `-roofline` (where peaks were, and of a profile).
    `<name>` is the phase, followed by passes, mode, scope and B where they are not fwd, batched, module and
    1, and by whatever else tells two shapes of these runs apart. A comparison has `compare` too, and a run
    that is drawn alone `telemetry`. Runs that share a figure differ by their dashes. `keep` and `most`: see
    `make_panels`; what is left out for the sake of reading goes line by line to `note`.
    `helper`: see `second_process`.

    PresentError, with nothing drawn, for a format other than png and svg, for no run, and when no cell is ok;
    also when a file cannot be written; DiskError where the disk is full.
    """
    _check_formats(formats)
    runs = [run] if isinstance(run, RunCells) else list(run)
    if len(runs) == 1:
        runs = [runs[0].whole()]
    panels, left_out = make_panels(runs, keep, most)
    styles = route_styles(series.arm for panel in panels for series in panel.series)
    tasks = [(panel, what, styles, Path(out), tuple(formats)) for panel in panels for what in FIGURES]
    written = draw(tasks, helper)
    written += _plot_rooflines(panels, styles, sources_of(runs), Path(out), formats)
    for text in left_out:
        note(text)
    for one in runs:
        if "comparison" in one.info:
            written += plot_comparison(findings_of(one.whole()), Path(out), formats)
    # The clocks of several runs have nothing to do with each other.
    if len(runs) == 1 and "sources" not in runs[0].info:
        written += _plot_telemetry(runs[0].whole(), Path(out), formats, keep)
    return written


def _check_formats(formats: Sequence[str]) -> None:
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise PresentError(f"format is {unknown[0] if unknown else ''!r}; allowed: {', '.join(FORMATS)}")


def _plot_rooflines(
    panels: Sequence[Panel],
    styles: Mapping[str, RouteStyle],
    sources: Mapping[str, Source],
    out: Path,
    formats: Sequence[str],
) -> list[Path]:
    written = []
    with figure_style():
        for panel in panels:
            figure = roofline_figure(panel, styles, sources)
            if figure is not None:
                written += save(figure, [out / f"{panel.name}-roofline.{f}" for f in formats])
    return written


def _plot_telemetry(run: Run, out: Path, formats: Sequence[str], keep: Keep | None) -> list[Path]:
    with figure_style():
        figure = telemetry_figure(run, keep)
        if figure is None:
            return []
        return save(figure, [out / f"telemetry.{f}" for f in formats])


def plot_comparison(comparison: Comparison, out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw every ratio of a comparison with its interval into the folder `out`; returns the files written.

    None where there is no ratio to draw. The files are `compare.<format>`, or, of a comparison that is not
    the only one in its folder, `compare-<run>.<format>`. Raises as `plot_run`.
    """
    with figure_style():
        figure = forest_figure(comparison)
        if figure is None:
            return []
        alone = out.name == set_name([run.run_id for run in comparison.runs])
        name = "compare" if alone else f"compare-{comparison.runs[0].run_id}"
        return save(figure, [Path(out) / f"{name}.{f}" for f in formats])


def save_figures(figures: Mapping[str, Figure], out: Path, formats: Sequence[str]) -> list[Path]:
    """Write figures, each by the beginning of its files' names, into the folder `out`; the files written.

    PresentError for a format other than png and svg, and for a file that cannot be written; DiskError where
    the disk is full.
    """
    _check_formats(formats)
    return [
        path
        for name, figure in figures.items()
        for path in save(figure, [Path(out) / f"{name}.{f}" for f in formats])
    ]


def set_name(run_ids: Sequence[str]) -> str:
    """What the folder of these runs' figures is called: their ids, or the first, how many and a digest."""
    joined = "+".join(run_ids)
    if len(joined) <= _LONGEST_NAME:
        return joined
    return f"{run_ids[0]}+{len(run_ids) - 1}-{zlib.crc32(joined.encode()):08x}"
