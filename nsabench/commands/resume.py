"""`nsabench resume`: finish an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as results/2026...")]


def resume(
    run: RunPath,
    plots: o.Plots = Path("plots"),
    no_plots: o.NoPlots = False,
    json: o.Json = False,
) -> None:
    """Finish an interrupted run with its own plan and settings: repeats no finished cell, loses none.

    Refused on another machine, commit or torch version, where new rows could not stand beside the old ones.
    """
    with one_line_errors():
        from nsabench.commands._sweep import carry_on, refuse_other_machine
        from nsabench.plan import Cell
        from nsabench.run import Policy
        from nsabench.store import RunDir

        with RunDir.open(run) as opened:
            cells = [Cell.from_dict(fields) for fields in opened.info["plan"]]
            policy = Policy.from_dict(opened.info["policy"])
            left = sum(cell.cell_id not in opened.finished for cell in cells)
            if left:
                refuse_other_machine(opened)
            heading = [f"resuming {opened.run_id}: {len(cells) - left} of {len(cells)} cells are finished"]
            code = carry_on(
                opened, cells, policy, plots=None if no_plots else plots, json_lines=json, heading=heading
            )
    raise typer.Exit(code)
