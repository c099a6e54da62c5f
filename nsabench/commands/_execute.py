"""From cells to a finished sweep: run, draw, say where everything is."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nsabench.commands._console import (
    BAD_USAGE,
    CHECK_FAILED,
    GOOD,
    INCONCLUSIVE,
    INTERRUPTED,
    MACHINE_FAILED,
    complain,
    console,
    fail,
)
from nsabench.commands._options import Model
from nsabench.plan import Cell, groups
from nsabench.present.frame import PresentError, planned_routes
from nsabench.present.live import SweepView
from nsabench.run import Policy, run_plan
from nsabench.run.executor import LocalExecutor, WorkerError, local_slots
from nsabench.store import RunDir, capture_environment, load_run


def start_sweep(
    cells: list[Cell],
    model: Model,
    policy: Policy,
    *,
    out: Path,
    plots: Path | None,
    json_lines: bool,
    tags: Sequence[str] = (),
    suite: dict[str, Any] | None = None,
    budget_s: float | None = None,
    in_process: bool = False,
) -> int:
    """Run a new sweep to its end; returns the exit code.

    ``budget_s``: measure what fits into so many seconds, in the order of ``cells``. ``in_process``: without
    workers.
    """
    for cell in cells:
        policy.timer_for(cell)
    argv = sys.argv[1:]
    with RunDir.create(
        out,
        name=cells[0].phase if suite is None else suite["name"],
        argv=argv,
        repro=shlex.join(["nsabench", *argv]),
        plan=[cell.to_dict() for cell in cells],
        environment=capture_environment(),
        policy=policy.to_dict(),
        seed=cells[0].seed,
        tags=tags,
        suite=suite,
    ) as run:
        return carry_on(
            run,
            cells,
            policy,
            plots=plots,
            json_lines=json_lines,
            heading=heading_of(cells, model, policy, suite),
            budget_s=budget_s,
            in_process=in_process,
        )


def carry_on(
    run: RunDir,
    cells: list[Cell],
    policy: Policy,
    *,
    plots: Path | None,
    json_lines: bool,
    heading: Sequence[str],
    process: int = 0,
    budget_s: float | None = None,
    in_process: bool = False,
) -> int:
    """Measure what is left of ``run``, draw it, and say where everything is; returns the exit code.

    ``process``: number of the first process to measure, among those of the run.
    """
    talk = console(stderr=json_lines)
    if _left(run, cells):
        _measure(run, cells, policy, json_lines, heading, process, budget_s, in_process)
    else:
        talk.print(*heading, sep="\n", soft_wrap=True, markup=False)
    if left := _left(run, cells):
        talk.print(f"left out: {_goes_on(run, left)}", soft_wrap=True, markup=False)
    talk.print(f"results: {run.path}", soft_wrap=True, markup=False)
    code = exit_code(list(run.finished.values()))
    if plots is None or all(row["status"] != "ok" for row in run.finished.values()):
        return code
    # Imported late: matplotlib need not delay the start.
    from nsabench.present.plots import plot_run

    try:
        files = plot_run(load_run(run.path), plots / run.run_id)
    except PresentError as error:
        complain(f"{error}; the results are safe: nsabench plot {shlex.quote(str(run.path))}")
        return code or BAD_USAGE
    talk.print(f"plots:   {plots / run.run_id} ({len(files)} files)", soft_wrap=True, markup=False)
    return code


def _measure(
    run: RunDir,
    cells: list[Cell],
    policy: Policy,
    json_lines: bool,
    heading: Sequence[str],
    process: int,
    budget_s: float | None,
    in_process: bool,
) -> None:
    left = _left(run, cells)
    executor = None if in_process else LocalExecutor(local_slots(left), process=process)
    order = planned_routes(run.info)
    with SweepView(console(), total=len(left), json_lines=json_lines, order=order) as view, ctrl_c() as stop:
        for line in heading:
            view.note(line)
        try:
            run_plan(
                cells,
                policy,
                run,
                view,
                executor=executor,
                process=process,
                budget_s=budget_s,
                stop=stop,
            )
            if stop() and _left(run, cells):
                raise KeyboardInterrupt
        except (KeyboardInterrupt, WorkerError) as error:
            view.close()
            kept = f"{len(run.finished)} of {len(cells)} cells are finished and kept"
            kept += f", nsabench resume {shlex.quote(str(run.path))} goes on"
            if isinstance(error, WorkerError):
                raise fail(f"{error}; {kept}", MACHINE_FAILED) from None
            raise fail(f"interrupted; {kept}", INTERRUPTED) from None
        view.close(load_run(run.path).samples)


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is a wish, which the function that this gives tells of; the second ends what runs."""
    asked = 0

    def heard(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            # Past any buffer: whatever was printing when the signal came is in the middle of it.
            os.write(2, b"nsabench: finishing the cells in progress; Ctrl-C again stops now\n")
        elif asked == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, heard)
    try:
        yield lambda: asked > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _left(run: RunDir, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.cell_id not in run.finished]


def _goes_on(run: RunDir, left: Sequence[Cell]) -> str:
    """What the budget left out, in a line."""
    lengths = ", ".join(str(S) for S in sorted({cell.S for cell in left}))
    resume = f"nsabench resume {shlex.quote(str(run.path))}"
    return f"{len(left)} cells (S {lengths}) do not fit into the budget; {resume} measures them"


def exit_code(rows: Sequence[dict[str, Any]]) -> int:
    """1 where a result was wrong or a cell broke, 3 where nothing valid came out, else 0."""
    statuses = {row["status"] for row in rows}
    if statuses & {"wrong", "nan", "error", "hang"}:
        return CHECK_FAILED
    return GOOD if "ok" in statuses and "invalid" not in statuses else INCONCLUSIVE


def heading_of(
    cells: Sequence[Cell], model: Model, policy: Policy, suite: dict[str, Any] | None
) -> list[str]:
    """What is about to be measured: of several layers, one suite's, only how many."""
    cell = cells[0]
    how = f"{policy.rounds} rounds, seed {cell.seed}"
    if suite is not None:
        about = f": {suite['about']}" if suite.get("about") else ""
        shapes = f"{len(cells)} cells in {len(groups(cells))} groups, {how}"
        return [f"suite {suite['name']}{about}", shapes]
    mine = all(getattr(cell, name) == getattr(model, name) for name in ("dim", "heads", "groups", "dk", "dv"))
    return [
        f"{cell.phase} on {cell.device}: dim {cell.dim}, {cell.heads} heads, {cell.groups} KV heads, "
        f"dk {cell.dk}, dv {cell.dv}, {cell.dtype}" + (f" ({model.what})" if mine else ""),
        f"blocks l {cell.l}, d {cell.d}, l' {cell.l_sel}, n {cell.n_sel}, w {cell.w}; "
        f"selection {', '.join(dict.fromkeys(c.selection for c in cells))}; {policy.how_for(cell)}, {how}",
    ]
