"""`nsabench merge`: several runs as one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nsabench.commands._console import console, one_line_errors

RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="The runs' folders.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the new run's folder goes.")]
Prefer = Annotated[
    list[str] | None,
    typer.Option(
        "--prefer",
        metavar="RUN",
        help="Keep this run's row of a cell that two runs measured. Repeat it for a second choice.",
    ),
]
Across = Annotated[
    bool, typer.Option("--across", help="Merge also what differs in schema, policy or commit; it is noted.")
]


def merge(runs: RunPaths, out: Out = Path("results"), prefer: Prefer = None, across: Across = False) -> None:
    """Make one run of several: rows keep the run that measured them, nothing is averaged.

    The runs given stay as they are. The same measurement in two of them is kept once; a cell that two runs
    measured is refused unless --prefer decides.
    """
    with one_line_errors():
        from nsabench.store import load_cells, merge_runs

        path = merge_runs(runs, out, prefer=prefer or (), across=across, argv=sys.argv[1:])
        merged = load_cells(path)
        talk = console()
        for source in merged.sources:
            kept = int((merged.cells["run_id"] == source["run_id"]).sum())
            talk.print(f"{kept} cells of {source['run_id']}", soft_wrap=True, markup=False)
        if merged.info["across"]:
            talk.print(f"merged across: {', '.join(merged.info['across'])}", soft_wrap=True, markup=False)
        talk.print(f"results: {path}", soft_wrap=True, markup=False)
