"""Figures of stored runs: made from their files alone, without a display, the same bytes every time."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nsabench.present.figures import dense_figure, memory_figure, shares_figure, speed_figure, time_figure
from nsabench.present.forest import forest_figure
from nsabench.present.frame import PresentError
from nsabench.present.panels import MOST_PANELS, Keep, Panel, make_panels
from nsabench.present.style import RouteStyle, figure_style, lay_out, route_styles
from nsabench.present.verdicts import Comparison, findings_of
from nsabench.store import DiskError, RunCells
from nsabench.store.files import disk_error

_FIGURES: dict[str, Callable[[Panel, Mapping[str, RouteStyle]], Figure | None]] = {
    "time": time_figure,
    "shares": shares_figure,
    "memory": memory_figure,
    "speed": speed_figure,
    "dense": dense_figure,
}
_WRITERS: dict[str, Callable[[Figure, Path], None]] = {
    "png": lambda figure, path: FigureCanvasAgg(figure).print_png(
        path, metadata={"Software": "nsabench"}, pil_kwargs={"compress_level": 2}
    ),
    "svg": lambda figure, path: FigureCanvasSVG(figure).print_svg(
        path, metadata={"Creator": "nsabench", "Date": None}
    ),
}


_LONGEST_NAME = 120


def plot_run(
    run: RunCells | Sequence[RunCells],
    out: Path,
    formats: Sequence[str] = ("png", "svg"),
    *,
    keep: Keep | None = None,
    most: int = MOST_PANELS,
    note: Callable[[str], object] = lambda text: None,
) -> list[Path]:
    """Draw the run, or several in the same figures, into the folder `out`; returns the files written.

    Of a run given without its samples (`load_cells`) they are read if it is drawn.

    They are `<name>-time`, `-shares` (where stages were measured), `-memory`, `-speed` (with several routes)
    and `-dense` (where dense attention was measured). `<name>` is the phase, followed by passes, mode, scope
    and B where they are not fwd, batched, module and 1, and by whatever else tells two shapes of these runs
    apart. A comparison has `compare` too. Runs that share a figure differ by their dashes. `keep` and `most`:
    see `make_panels`; what is left out for the sake of reading goes line by line to `note`.

    PresentError, with nothing drawn, for a format other than png and svg, for no run, and when no cell is ok;
    also when a file cannot be written; DiskError where the disk is full.
    """
    unknown = [f for f in formats if f not in _WRITERS]
    if unknown or not formats:
        raise PresentError(f"format is {unknown[0] if unknown else ''!r}; allowed: {', '.join(_WRITERS)}")
    panels, left_out = make_panels([run] if isinstance(run, RunCells) else list(run), keep, most)
    styles = route_styles(series.arm for panel in panels for series in panel.series)
    written: list[Path] = []
    with figure_style():
        for panel in panels:
            for what, draw in _FIGURES.items():
                figure = draw(panel, styles)
                if figure is not None:
                    lay_out(figure)
                    written += [_save(figure, Path(out) / f"{panel.name}-{what}.{f}") for f in formats]
    for text in left_out:
        note(text)
    for one in [run] if isinstance(run, RunCells) else run:
        if "comparison" in one.info:
            written += plot_comparison(findings_of(one.whole()), Path(out), formats)
    return written


def plot_comparison(comparison: Comparison, out: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Draw every ratio of a comparison with its interval into the folder `out`; returns the files written.

    None where there is no ratio to draw. The files are `compare.<format>`, or, of a comparison that is not
    the only one in its folder, `compare-<run>.<format>`. Raises as `plot_run`.
    """
    with figure_style():
        figure = forest_figure(comparison)
        if figure is None:
            return []
        lay_out(figure)
        alone = out.name == set_name([run.run_id for run in comparison.runs])
        name = "compare" if alone else f"compare-{comparison.runs[0].run_id}"
        return [_save(figure, Path(out) / f"{name}.{f}") for f in formats]


def set_name(run_ids: Sequence[str]) -> str:
    """What the folder of these runs' figures is called: their ids, or the first, how many and a digest."""
    joined = "+".join(run_ids)
    if len(joined) <= _LONGEST_NAME:
        return joined
    return f"{run_ids[0]}+{len(run_ids) - 1}-{zlib.crc32(joined.encode()):08x}"


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not savefig: it draws every figure twice.
        _WRITERS[path.suffix[1:]](figure, path)
    except OSError as error:
        failed = disk_error(f"write {path}", error)
        raise failed if isinstance(failed, DiskError) else PresentError(str(failed)) from error
    return path
