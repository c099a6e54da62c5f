"""`nsabench resume`: finish an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors

if TYPE_CHECKING:
    from nsabench.plan import Cell
    from nsabench.run import Policy
    from nsabench.store import Run

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as results/2026...")]


def resume(
    run: RunPath,
    plots: o.Plots = Path("plots"),
    no_plots: o.NoPlots = False,
    json: o.Json = False,
    in_process: o.InProcess = False,
) -> None:
    """Finish an interrupted run with its own plan and settings: repeats no finished cell, loses none.

    Refused on another machine, commit or torch, where new rows could not stand beside the old ones.
    """
    with one_line_errors():
        from nsabench.commands._execute import carry_on
        from nsabench.commands._same_machine import refuse_other_machine
        from nsabench.store import RunDir, capture_environment, load_run
        from nsabench.store.runs import refuse_unless_continuable

        # All that may refuse comes before the run is opened: opening repairs what a crash left half-written.
        refuse_unless_continuable(run)
        stored = load_run(run)
        cells, policy = _plan_of(stored)
        finished = set(stored.cells["cell_id"])
        left = sum(cell.cell_id not in finished for cell in cells)
        if left:
            refuse_other_machine(stored.info, capture_environment())
        heading = [f"resuming {stored.run_id}: {len(cells) - left} of {len(cells)} cells are finished"]
        with RunDir.open(run) as opened:
            code = carry_on(
                opened,
                cells,
                policy,
                plots=None if no_plots else plots,
                json_lines=json,
                heading=heading,
                process=int(stored.samples["process"].max()) + 1 if len(stored.samples) else 0,
                in_process=in_process,
            )
    raise typer.Exit(code)


def _plan_of(stored: Run) -> tuple[list[Cell], Policy]:
    """What a stored run was to measure, and how; StoreError where run.json does not say."""
    from nsabench.plan import Cell
    from nsabench.run import Policy
    from nsabench.store import StoreError

    if "comparison" in stored.info:
        raise StoreError(f"{stored.path} is a comparison, which is never resumed: measure it anew")
    if stored.info.get("name") == "profile" and stored.info.get("suite") is None:
        raise StoreError(f"{stored.path} is a profile of one cell, which is never resumed: profile it anew")
    try:
        cells = [Cell.from_dict(fields) for fields in stored.info["plan"]]
        return cells, Policy.from_dict(stored.info["policy"])
    except (LookupError, TypeError, AttributeError):
        raise StoreError(f"{stored.path} is damaged: run.json holds no plan to go on with") from None
