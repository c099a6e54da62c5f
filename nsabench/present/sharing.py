"""Drawing the figures of panels into files, by this process and another that helps.

What a process imports before it can draw is what its help costs: no tables and no statistics in here.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nsabench.present.figures import dense_figure, memory_figure, shares_figure, speed_figure, time_figure
from nsabench.present.frame import PresentError
from nsabench.present.panels import Panel
from nsabench.present.style import RouteStyle, figure_style, lay_out
from nsabench.store import DiskError
from nsabench.store.files import disk_error

FIGURES: dict[str, Callable[[Panel, Mapping[str, RouteStyle]], Figure | None]] = {
    "time": time_figure,
    "shares": shares_figure,
    "memory": memory_figure,
    "speed": speed_figure,
    "dense": dense_figure,
}
"""The figures of a panel, by what their files are called."""

_WRITERS: dict[str, Callable[[Figure, Path], None]] = {
    "png": lambda figure, path: FigureCanvasAgg(figure).print_png(
        path, metadata={"Software": "nsabench"}, pil_kwargs={"compress_level": 2}
    ),
    "svg": lambda figure, path: FigureCanvasSVG(figure).print_svg(
        path, metadata={"Creator": "nsabench", "Date": None}
    ),
}
FORMATS = tuple(_WRITERS)

Task = tuple[Panel, str, Mapping[str, RouteStyle], Path, tuple[str, ...]]
"""A panel, which of its figures, everything's style, the folder and the formats."""


@contextmanager
def second_process() -> Iterator[ProcessPoolExecutor]:
    """A process to share the drawing with. It gets ready at once: begin it before the runs are loaded.

    The program's main module must bear to be imported once more (`if __name__ == "__main__"`).
    """
    helper = ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C is this process's to answer
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        helper.submit(_draw, [])
        yield helper
    finally:
        helper.shutdown(cancel_futures=True)


def draw(tasks: Sequence[Task], helper: ProcessPoolExecutor | None) -> list[Path]:
    """The files of all tasks, in order. A helper takes tasks from the end until it meets this process.

    PresentError for a file that cannot be written; DiskError where the disk is full.
    """
    given = (
        {} if helper is None else {i: helper.submit(_draw, [tasks[i]]) for i in reversed(range(len(tasks)))}
    )
    written: list[Path] = []
    for number, task in enumerate(tasks):
        taken = given.get(number)
        written += _draw([task]) if taken is None or taken.cancel() else taken.result()
    return written


def _draw(tasks: Sequence[Task]) -> list[Path]:
    written = []
    with figure_style():
        for panel, what, styles, out, formats in tasks:
            figure = FIGURES[what](panel, styles)
            if figure is not None:
                written += save(figure, [out / f"{panel.name}-{what}.{f}" for f in formats])
    return written


def save(figure: Figure, paths: Sequence[Path]) -> list[Path]:
    """Write the figure into these files, in the format that each name ends in. Raises as `draw`."""
    lay_out(figure)
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not savefig: it draws every figure twice.
            _WRITERS[path.suffix[1:]](figure, path)
        except OSError as error:
            failed = disk_error(f"write {path}", error)
            raise failed if isinstance(failed, DiskError) else PresentError(str(failed)) from error
    return list(paths)
