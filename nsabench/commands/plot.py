"""`nsabench plot`: figures from stored files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsabench.commands import _stored as s
from nsabench.commands._console import complain, console, one_line_errors

Paths = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="A run's folder, several in one figure, or a folder of runs."),
]
Formats = Annotated[str, typer.Option("--formats", metavar="FORMATS", help="png, svg, or both: png,svg.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FOLDER", help="Folder for the figures; a folder per run (or set) is made in it."
    ),
]
Most = Annotated[
    int,
    typer.Option("--most", metavar="INT", min=1, help="Shapes to draw; of more, those with the most sizes."),
]


def plot(
    runs: Paths,
    out: Out = Path("plots"),
    formats: Formats = "png,svg",
    where: s.Where = None,
    tag: s.Tag = None,
    since: s.Since = None,
    most: Most = 8,
) -> None:
    """Draw time, stage shares, memory and speed over S from stored runs alone, on any machine.

    Of a training: its loss, speed, gate shares and what it retrieves, in figures of its own. Figures stay
    readable: what there is no room for is said, in the figure and here.
    """
    with one_line_errors():
        from nsabench.present.plots import plot_run, second_process, set_name
        from nsabench.present.selecting import parse_where
        from nsabench.present.training_figures import load_drawable, plot_training
        from nsabench.store import RunCells

        condition, kinds = parse_where(where or ()), [part.strip() for part in formats.split(",")]
        with second_process() as helper:
            found = s.stored_runs(runs, load_drawable, tag or (), since)
            loaded = [run for run in found if isinstance(run, RunCells)]
            files = []
            if loaded or not found:
                files += plot_run(
                    loaded,
                    out / set_name([run.run_id for run in loaded]),
                    kinds,
                    keep=condition or None,
                    most=most,
                    note=complain,
                    helper=helper,
                )
            for run in found:
                if not isinstance(run, RunCells):
                    files += plot_training(run, out / str(run.info["run_id"]), kinds)
        for file in files:
            console().print(str(file), soft_wrap=True, markup=False)
