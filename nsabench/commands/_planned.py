"""A plan, carried out or only shown: what decode, prefill and suite run have in common."""

from __future__ import annotations

from dataclasses import replace

from nsabench.commands._console import GOOD
from nsabench.commands._dry_run import show_plan
from nsabench.commands._options import MeasureOptions, OutputOptions, SweepOptions
from nsabench.commands._sweep import Plan, plan_of
from nsabench.plan import PlanError, Suite, save_suite, tags_of


def carry_out(
    suite: Suite, measure: MeasureOptions, output: OutputOptions, sweep: SweepOptions | None = None
) -> int:
    """Measure a suite, or show what that would be; returns the exit code.

    ``sweep``: the suite is a command's one sweep; without, it is a file's, and its run goes by its name.
    """
    if sweep is not None:
        _refuse_contradictions(output, sweep)
    suite = replace(suite, tags=tuple(dict.fromkeys((*suite.tags, *tags_of(output.tag or [], "--tag")))))
    plan = plan_of(suite, measure, anywhere=output.dry_run)
    if sweep is not None and sweep.save_suite is not None:
        save_suite(plan.suite, sweep.save_suite)
    if output.dry_run:
        show_plan(plan, json_lines=output.json)
        return GOOD
    if sweep is not None and sweep.find_max_S:
        return _capacity(plan, output, sweep)
    # Imported late, as below: what is only shown needs none of what measures and stores.
    from nsabench.commands._execute import start_sweep

    return start_sweep(
        plan.cells,
        plan.model,
        plan.policy,
        out=output.out,
        plots=None if output.no_plots else output.plots,
        json_lines=output.json,
        tags=plan.suite.tags,
        suite=None if sweep is not None else {"name": plan.suite.name, **plan.suite.to_dict()},
        budget_s=plan.budget_s,
        in_process=measure.in_process,
    )


def _capacity(plan: Plan, output: OutputOptions, sweep: SweepOptions) -> int:
    from nsabench.commands._capacity import find_max_S

    return find_max_S(
        plan.cells,
        memory_limit=sweep.memory_limit,
        timeout_s=plan.policy.timeout_s,
        out=output.out,
        json_lines=output.json,
    )


def _refuse_contradictions(output: OutputOptions, sweep: SweepOptions) -> None:
    if sweep.find_max_S and output.dry_run:
        raise PlanError("--dry-run: shows what would be timed; --find-max-S times nothing")
    if sweep.memory_limit is not None and not sweep.find_max_S:
        raise PlanError("--memory-limit: only with --find-max-S")
