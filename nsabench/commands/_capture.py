"""`--save-selection`: the blocks that one cell selects, in a file for `--selection file=FILE`."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from pathlib import Path

from nsa import Routing
from nsabench.commands._console import CHECK_FAILED, GOOD, INCONCLUSIVE, MACHINE_FAILED, console, fail
from nsabench.commands._options import MeasureOptions, OutputOptions, SweepOptions
from nsabench.commands._sweep import plan_of
from nsabench.plan import Cell, PlanError, Suite
from nsabench.run.capture import CAPTURE, Capturing
from nsabench.run.executor import Done, Job, LocalExecutor, WorkerError, local_slots


def save_selection_of(
    suite: Suite, measure: MeasureOptions, output: OutputOptions, sweep: SweepOptions, path: Path
) -> int:
    """Capture the selection of the one cell that `suite` means; returns the exit code.

    PlanError for more than one cell, a cell that selects nothing of its own, or a file that exists.
    """
    for option, given in (("--dry-run", output.dry_run), ("--find-max-S", sweep.find_max_S)):
        if given:
            raise PlanError(f"--save-selection: times nothing, and goes without {option}")
    plan = plan_of(suite, measure)
    cell = _only(plan.cells)
    if path.exists():
        raise PlanError(f"--save-selection: {path} exists; name another file")
    if not path.parent.is_dir():
        raise PlanError(f"--save-selection: {path.parent} is no folder")
    source = shlex.join(["nsabench", *sys.argv[1:]])
    policy = Capturing(path=str(path), source=source, timeout_s=plan.policy.timeout_s)
    talk = console(stderr=output.json)
    with talk.status("starting") as status:
        executor = LocalExecutor(local_slots([cell]), measure=CAPTURE)
        try:
            with closing(executor.run(iter([Job((cell,), policy, 0)]))) as events:
                row = None
                for event in events:
                    if isinstance(event, Done):
                        row = event.row
                    elif hasattr(event, "text"):
                        status.update(event.text)
        except WorkerError as error:
            raise fail(str(error), MACHINE_FAILED) from None
    assert row is not None
    if row["status"] != "ok":
        failed = row["status"] in ("wrong", "nan", "error", "hang")
        raise fail(f"{row['status']}: {row['reason']}", CHECK_FAILED if failed else INCONCLUSIVE)
    talk.print(f"selection: {path} ({path.stat().st_size} bytes)", soft_wrap=True, markup=False)
    return GOOD


def _only(cells: list[Cell]) -> Cell:
    """The one cell, if its selection is one that can be captured."""
    found = [cell for cell in cells if cell.impl == "nsa"]
    if len(found) != 1:
        raise PlanError(f"--save-selection: takes one cell of NSA, got {len(found)}; give one of each axis")
    (cell,) = found
    if cell.selection != "natural":
        raise PlanError(f"--save-selection: the selection of the cell is {cell.selection}, not natural")
    if cell.B != 1:
        raise PlanError(f"--save-selection: a file holds one sequence, B is {cell.B}")
    if Routing.parse(cell.route).sel == "off":
        raise PlanError(f"--save-selection: {cell.route!r} selects nothing")
    return cell
