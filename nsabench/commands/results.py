"""`nsabench results`: the stored runs, and their cells."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nsabench.commands import _stored as s
from nsabench.commands._console import complain, console, one_line_errors

if TYPE_CHECKING:
    from rich.table import Table

    from nsabench.present.page import Grid
    from nsabench.present.selecting import Where
    from nsabench.store import Run
    from nsabench.store.scorecard import Scorecard
    from nsabench.store.training import Training

Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[ROOT|RUN]...", help="Folders of runs, or runs.", show_default="results"),
]
Cells = Annotated[bool, typer.Option("--cells", help="Show the cells of all runs, not a line for each run.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="FORMAT", help="table, markdown, json, csv or parquet.", show_default="table"
    ),
]
To = Annotated[
    Path | None,
    typer.Option(
        "--to", metavar="FILE", help="Write there; without --format its ending says in which format."
    ),
]
Most = Annotated[
    int, typer.Option("--most", metavar="INT", min=1, help="Cells in a table; of more, the last are shown.")
]


def results(
    paths: Paths = None,
    where: s.Where = None,
    tag: s.Tag = None,
    since: s.Since = None,
    cells: Cells = False,
    format: Format = None,
    to: To = None,
    most: Most = 400,
) -> None:
    """List the stored runs, or show one: as a table, or as a file for another program.

    One RUN is shown with its cells (a scorecard with its checks, a training with its steps), anything else as
    a list of runs. Reading changes nothing.
    """
    with one_line_errors():
        from nsabench.present.catalog import load_brief, runs_table, summarise
        from nsabench.present.export import kind_of
        from nsabench.present.selecting import parse_where
        from nsabench.store import RunCells, find_runs, load_run

        kind, condition = kind_of(format, to), parse_where(where or ())
        places = paths or [Path("results")]
        alone = len(places) == 1 and find_runs(places[0]) == places
        if alone and not cells and not condition:
            for other in s.stored_runs(places, load_brief, tag or (), since):
                if not isinstance(other, RunCells):
                    _show_other(other, kind, to)
                    return
        if cells or alone:
            _show_cells(s.stored_runs(places, load_run, tag or (), since), condition, kind, to, most)
            return

        from nsabench.present.export import export_runs

        runs = [
            summarise(run, condition or None) for run in s.stored_runs(places, load_brief, tag or (), since)
        ]
        runs = [run for run in runs if run.counts] if condition else runs
        if not runs:
            complain("no run is as asked for")
        if kind == "table":
            _print([runs_table(runs, _width(to))] if runs else [], to)
        else:
            _give(export_runs(runs, kind), kind, to)


def _show_cells(runs: Sequence[Run], condition: Where, kind: str, to: Path | None, most: int) -> None:
    from nsabench.present.catalog import about_run, collect, summarise
    from nsabench.present.export import export_cells
    from nsabench.present.tables import compared_table

    collected = collect(runs, condition or None)
    if not collected.cells:
        complain("no cell is as asked for")
    if kind != "table":
        _give(export_cells(collected, kind), kind, to)
        return
    lines: list[object] = about_run(summarise(runs[0]), runs[0].info) if len(runs) == 1 else []
    if collected.cells:
        lines.append(compared_table(collected.cells, last=most, width=_width(to)))
    if len(collected.cells) > most:
        lines.append(
            f"the last {most} of {len(collected.cells)} cells; --where, --most and --format show others"
        )
    _print(lines, to)


def _show_other(run: Scorecard | Training, kind: str, to: Path | None) -> None:
    """A scorecard with its checks, a training with its steps."""
    from nsabench.present.catalog import about_run, summarise
    from nsabench.present.export import export_rows
    from nsabench.present.report_tables import training_grids
    from nsabench.present.scorecard import scorecard_view
    from nsabench.store.scorecard import SCORECARD_COLUMNS, Scorecard
    from nsabench.store.training import TRAINING_COLUMNS

    if kind != "table":
        if isinstance(run, Scorecard):
            _give(export_rows(run.rows, SCORECARD_COLUMNS, kind), kind, to)
        else:
            _give(export_rows(run.steps, TRAINING_COLUMNS, kind), kind, to)
        return
    lines: list[object] = about_run(summarise(run), run.info)
    if isinstance(run, Scorecard):
        lines += scorecard_view(run.rows, peers=run.info.get("peers") or (), width=_width(to))
    else:
        lines += [_table(grid) for grid in training_grids(run)]
    _print(lines, to)


def _table(grid: Grid) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = Text(grid.title, style="bold")
    for place, head in enumerate(grid.headers):
        table.add_column(head, justify="right" if place in grid.right else "left", overflow="fold")
    for line in grid.lines:
        table.add_row(*map(Text, line))
    table.caption = Text("\n".join(grid.notes)) if grid.notes else None
    table.caption_justify = "left"
    return table


def _width(to: Path | None) -> int:
    return console().width if to is None else 100


def _print(parts: Sequence[object], to: Path | None) -> None:
    """Tables and lines, on the console or as plain text in a file."""
    text = io.StringIO()
    talk = console() if to is None else Console(file=text, width=_width(to), color_system=None)
    for part in parts:
        talk.print(part, markup=False, soft_wrap=isinstance(part, str))
    if to is not None:
        _give(text.getvalue().encode(), "table", to)


def _give(data: bytes, kind: str, to: Path | None) -> None:
    from nsabench.present.export import write
    from nsabench.present.frame import PresentError

    if to is not None:
        write(to, data)
        console(stderr=True).print(f"written: {to}", soft_wrap=True, markup=False)
    elif kind == "parquet":
        raise PresentError("parquet is not for a console; name a file with --to")
    else:
        typer.echo(data.decode(), nl=False)
