"""`nsabench plot`: figures from stored files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsabench.commands._console import console, one_line_errors

RunPaths = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="One run's folder, or several in one figure.")
]
Formats = Annotated[str, typer.Option("--formats", metavar="FORMATS", help="png, svg, or both: png,svg.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FOLDER", help="Folder for the figures; a folder per run (or set) is made in it."
    ),
]


def plot(runs: RunPaths, out: Out = Path("plots"), formats: Formats = "png,svg") -> None:
    """Draw time, stage shares, memory and speed over S from stored runs alone, on any machine."""
    with one_line_errors():
        from nsabench.present.plots import plot_run
        from nsabench.store import load_run

        loaded = [load_run(path) for path in runs]
        folder = out / "+".join(run.run_id for run in loaded)
        for file in plot_run(loaded, folder, [part.strip() for part in formats.split(",")]):
            console().print(str(file), soft_wrap=True, markup=False)
