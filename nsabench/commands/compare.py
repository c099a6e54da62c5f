"""`nsabench compare`: which is faster, by how much, and whether that is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from nsabench.commands import _compare_options as c
from nsabench.commands._console import (
    BAD_USAGE,
    CHECK_FAILED,
    GOOD,
    INCONCLUSIVE,
    complain,
    console,
    one_line_errors,
)
from nsabench.plan import PlanError

if TYPE_CHECKING:
    from nsabench.present.verdicts import Comparison

FAILS = {"slower": ("SLOWER",), "faster": ("FASTER",), "different": ("SLOWER", "FASTER")}
PHASES = ("prefill", "decode")

Sides = Annotated[
    list[str],
    typer.Argument(
        metavar="SIDE SIDE...",
        help="Routes, dense, or what else differs: sdpa, dense, cmp=fa2, dtype=bf16; or two runs' folders. "
        "All are held against the first.",
    ),
]
Phase = Annotated[
    str, typer.Option("--phase", metavar="PHASE", help="prefill or decode.", rich_help_panel=None)
]
DifferentWork = Annotated[
    bool,
    typer.Option(
        "--allow-different-work", help="Compare sides that differ in size, pass or phase of the work, too."
    ),
]
AcrossMachines = Annotated[
    bool, typer.Option("--across-machines", help="Compare runs of different machines or torch versions, too.")
]


def compare(
    sides: Sides,
    shared: c.SharedOptions,
    effort: c.EffortOptions,
    verdicts: c.VerdictOptions,
    output: c.ResultOptions,
    phase: Phase = "prefill",
    allow_different_work: DifferentWork = False,
    across_machines: AcrossMachines = False,
) -> None:
    """Hold sides against the first: FASTER, SLOWER, SAME, INCONCLUSIVE or INVALID, with intervals.

    All sides, and the first one again as its own control, are timed in the same rounds of several fresh
    processes, until the ratios are known well enough or the budget is spent. One comparison for each shape.

    Two folders of finished runs are compared cell by cell: UNPAIRED, for they were never measured in turn.
    """
    with one_line_errors():
        delta = c.part_of_one(verdicts.delta, "--delta")
        method = cast(Literal["holm", "bh"], c.one_of(verdicts.correct, "--correct", ("bh", "holm")))
        if verdicts.fail_if is not None:
            c.one_of(verdicts.fail_if, "--fail-if", tuple(FAILS))
        c.one_of(phase, "--phase", PHASES)
        failed = GOOD
        if _are_runs(sides):
            _refuse_options(c.given(shared, effort), output, phase, allow_different_work)
            comparison = _of_runs(sides, delta, method, across_machines)
        else:
            if across_machines:
                raise PlanError("--across-machines: only with the folders of two runs")
            from nsabench.commands._contest import Terms, measure

            terms = Terms(sides, phase, allow_different_work, delta, method)
            comparison, failed = measure(terms, shared, effort, output)
        code = _shown(comparison, output) or failed or _exit_code(comparison, verdicts.fail_if)
    raise typer.Exit(failed or code)


def _are_runs(sides: Sequence[str]) -> bool:
    """Whether the sides are folders of runs; PlanError where only some are."""
    runs = [side for side in sides if (Path(side) / "run.json").is_file()]
    if not runs:
        for side in sides:
            if "/" in side or Path(side).is_dir():
                raise PlanError(f"side {side!r} is neither a route nor the folder of a run")
        return False
    if len(runs) < len(sides):
        other = next(side for side in sides if side not in runs)
        raise PlanError(f"{runs[0]} is a run and {other!r} is none; compare two runs, or sides to measure")
    if len(runs) != 2:
        raise PlanError(f"compare takes two runs, got {len(runs)}")
    return True


def _refuse_options(names: Sequence[str], output: c.ResultOptions, phase: str, different_work: bool) -> None:
    """PlanError for what only says how to measure."""
    more = {
        "--tag": bool(output.tag),
        "--phase": phase != PHASES[0],
        "--allow-different-work": different_work,
    }
    for name in (*names, *(name for name, is_given in more.items() if is_given)):
        raise PlanError(f"{name}: not with the folders of runs, which are compared as they are")


def _of_runs(
    paths: Sequence[str], delta: float, method: Literal["holm", "bh"], across_machines: bool
) -> Comparison:
    from nsabench.commands._same_machine import refuse_unlike
    from nsabench.present.verdicts import findings_between
    from nsabench.store import load_run

    a, b = (load_run(path) for path in paths)
    if not across_machines:
        refuse_unlike(a.info, b.info)
    return findings_between(a, b, delta=delta, method=method)


def _shown(comparison: Comparison, output: c.ResultOptions) -> int:
    """Print the table and draw the forest; returns the exit code where a figure cannot be written."""
    from nsabench.present.verdict_table import verdict_objects, verdict_table
    from nsabench.present.verdicts import closing

    talk = console(stderr=output.json)
    if comparison.findings:
        talk.print(verdict_table(comparison, talk.width), soft_wrap=False)
    for line in closing(comparison):
        talk.print(line, soft_wrap=True, markup=False)
    if output.json:
        for one in verdict_objects(comparison):
            typer.echo(json.dumps(one, allow_nan=False))
    return GOOD if output.no_plots else _drawn(comparison, output.plots, talk)


def _drawn(comparison: Comparison, plots: Path, talk: Any) -> int:
    # Imported late: matplotlib need not delay what comes first.
    from nsabench.present.frame import PresentError
    from nsabench.present.plots import plot_comparison, set_name

    folder = plots / set_name([run.run_id for run in comparison.runs])
    try:
        files = plot_comparison(comparison, folder)
    except PresentError as error:
        complain(str(error))
        return BAD_USAGE
    if files:
        talk.print(f"plots:   {folder} ({len(files)} files)", soft_wrap=True, markup=False)
    return GOOD


def _exit_code(comparison: Comparison, fail_if: str | None) -> int:
    verdicts = {finding.verdict for finding in comparison.findings}
    if fail_if is not None and verdicts & set(FAILS[fail_if]):
        return CHECK_FAILED
    return GOOD if verdicts - {"INCONCLUSIVE", "INVALID"} else INCONCLUSIVE
