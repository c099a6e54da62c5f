"""One cell, from its options to what it says: gated, timed, looked into, shown."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from nsabench.commands._console import CHECK_FAILED, INTERRUPTED, MACHINE_FAILED, complain, console, fail
from nsabench.commands._execute import ctrl_c, exit_code, heading_of
from nsabench.commands._options import MeasureOptions, option_of
from nsabench.commands._sweep import Plan, plan_of
from nsabench.plan import Cell, PlanError, Suite, tags_of
from nsabench.plan.declaration import AXES, PREFILL_ONLY
from nsabench.present.live import SweepView
from nsabench.present.profile_tables import (
    declared_table,
    kernel_objects,
    kernel_table,
    stage_objects,
    stage_table,
)
from nsabench.present.roofline import sources_of
from nsabench.run import run_plan
from nsabench.run.executor import Executor, LocalExecutor, WorkerError, local_slots
from nsabench.run.profile import MEASURE, Here, ProfilePolicy
from nsabench.store import Run, RunDir, capture_environment, load_run
from nsabench.store.profile import load_profile

if TYPE_CHECKING:
    from nsabench.commands.profile import BriefOptions, LookOptions

NCU_KERNELS = 3
NCU_LAUNCHES = 20


def look_into(phase: str, axes: Mapping[str, str], brief: BriefOptions, look: LookOptions) -> int:
    """Measure, look into and show the one cell that the options mean; returns the exit code."""
    plan = _plan(phase, axes, brief)
    with RunDir.create(
        look.out,
        name="profile",
        argv=sys.argv[1:],
        repro=shlex.join(["nsabench", *sys.argv[1:]]),
        plan=[cell.to_dict() for cell in plan.cells],
        environment=capture_environment(),
        policy=plan.policy.to_dict(),
        seed=plan.cells[0].seed,
        tags=tags_of(look.tag or [], "--tag"),
    ) as run:
        _measure(plan, run, look.json, brief.in_process)
        talk = console(stderr=look.json)
        stored = load_run(run.path)
        failed = _show(stored, plan, look, talk)
        talk.print(f"results: {run.path}", soft_wrap=True, markup=False)
        code = exit_code(list(run.finished.values())) or failed
    if look.no_plots or all(row["status"] != "ok" for row in stored.rows):
        return code
    return _drawn(stored, look.plots, talk) or code


def _plan(phase: str, axes: Mapping[str, str], brief: BriefOptions) -> Plan:
    """The plan of one cell; PlanError where the options mean several."""
    from nsabench.commands.profile import ROUNDS

    how = MeasureOptions(
        rounds=brief.rounds or ROUNDS,
        sample_ms=brief.sample_ms,
        timer=brief.timer,
        cache=brief.cache,
        timeout=brief.timeout,
        alone=False,
    )
    plan = plan_of(Suite.of_options(phase, axes, option_of), how)
    if len(plan.cells) > 1:
        several = [
            name for name in AXES if name not in ("routes", "baselines") and _values(name, plan.cells) > 1
        ]
        names = [option_of("baselines" if n == "impl" and "baselines" in axes else n) for n in several]
        names += ["--routes"] if _values("route", plan.cells) > 1 else []
        count = len(plan.cells)
        raise PlanError(f"profile looks into one cell, not {count}: give one value of {', '.join(names)}")
    return plan


def _values(axis: str, cells: Sequence[Cell]) -> int:
    return len({getattr(cell, axis) for cell in cells})


def _measure(plan: Plan, run: RunDir, json_lines: bool, in_process: bool) -> None:
    """Measure the cell into its run, and leave what else there is in the run's folder."""
    cells = plan.cells
    policy = ProfilePolicy(**plan.policy.to_dict(), folder=str(run.path.absolute()))
    executor: Executor = Here(cells) if in_process else LocalExecutor(local_slots(cells), measure=MEASURE)
    with SweepView(console(stderr=json_lines), total=1) as view, ctrl_c() as stop:
        for line in heading_of(cells, plan.model, plan.policy, None):
            view.note(line)
        try:
            run_plan(cells, policy, run, view, executor=executor, stop=stop)
            if not run.finished:
                raise KeyboardInterrupt
        except WorkerError as error:
            raise fail(str(error), MACHINE_FAILED) from None
        except KeyboardInterrupt:
            raise fail(f"interrupted; {run.path} holds no finished cell", INTERRUPTED) from None
        view.close()


def _show(run: Run, plan: Plan, look: LookOptions, talk: Console) -> int:
    """Print what was found; returns an exit code where the cell could not be looked into."""
    (row,), cell = run.rows, plan.cells[0]
    profile = load_profile(run.path)
    if row["status"] != "ok" or profile is None:
        if look.json:
            typer.echo(json.dumps(row))
        return 0
    if profile["failed"]:
        complain(f"the cell is measured, but could not be looked into: {profile['failed']}")
        if look.json:
            typer.echo(json.dumps(row))
        return CHECK_FAILED
    kernels: list[dict[str, Any]] = [
        {str(name): value for name, value in one.items()} for one in run.kernels.to_dict("records")
    ]
    roofs = sources_of([run])[run.run_id].roofs(row)
    files = {what: str(run.path / name) for what, name in profile["files"].items()}
    ncu = ncu_command(cell, plan, kernel_objects(kernels, profile))
    if look.json:
        found = {
            **row,
            "profile": {name: profile[name] for name in ("step_ms", "idle_ms", "note")},
            "kernels": kernel_objects(kernels, profile, roofs),
            "stages": stage_objects(row, profile, roofs),
            "files": files,
            "ncu": ncu or None,
        }
        typer.echo(json.dumps(found, allow_nan=False))
        return 0
    tables = (
        kernel_table(kernels, profile, top=look.top),
        declared_table(kernels, profile, roofs),
        stage_table(row, profile, roofs),
    )
    for part in chain.from_iterable(tables):
        talk.print(part, soft_wrap=isinstance(part, Text))
    talk.print(f"trace:   {files['trace']} (for ui.perfetto.dev)", soft_wrap=True, markup=False)
    talk.print(f"memory:  {files['memory']} ({_memory_is(files['memory'])})", soft_wrap=True, markup=False)
    deeper = ncu or "ncu looks into kernels of a GPU; this cell ran on the CPU"
    talk.print(f"deeper:  {deeper}", soft_wrap=True, markup=False)
    return 0


def _memory_is(path: str) -> str:
    if path.endswith(".pickle"):
        return "the allocator's snapshot, for pytorch.org/memory_viz"
    return "every allocation with its stage; torch has no snapshot for a CPU"


def _drawn(run: Run, plots: Path, talk: Console) -> int:
    # Imported late: matplotlib need not delay what comes first.
    from nsabench.present.frame import PresentError
    from nsabench.present.plots import plot_run

    try:
        files = plot_run(run, plots / run.run_id)
    except PresentError as error:
        raise fail(f"{error}; the results are safe: nsabench plot {shlex.quote(str(run.path))}") from None
    talk.print(f"plots:   {plots / run.run_id} ({len(files)} files)", soft_wrap=True, markup=False)
    return 0


def ncu_command(cell: Cell, plan: Plan, kernels: Iterable[Mapping[str, Any]]) -> str:
    """The line for a shell that has NVIDIA Nsight Compute look into the cell's heaviest kernels; empty for a
    cell that runs none of its own.
    """
    names = (
        [name for one in kernels if (name := ncu_name(str(one["kernel"])))] if cell.device != "cpu" else []
    )
    heaviest = list(dict.fromkeys(names))[:NCU_KERNELS]
    if not heaviest:
        return ""
    wanted = f"regex:^({'|'.join(heaviest)})$"
    ncu = ["ncu", "--set", "full", "--target-processes", "all", "-k", wanted, "-c", str(NCU_LAUNCHES)]
    ncu += ["-o", f"{cell.phase}-{cell.cell_id}"]
    return shlex.join([*ncu, *cell_command(cell, plan)])


def cell_command(cell: Cell, plan: Plan) -> list[str]:
    """The words of the command that measures this cell alone, briefly, in one process, with every size named:
    under a profiler its times mean nothing, and a tag says so.
    """
    words = ["nsabench", cell.phase]
    for axis in AXES:
        if axis in ("routes", "baselines") or (axis in PREFILL_ONLY and cell.phase == "decode"):
            continue
        words += [option_of(axis), str(getattr(cell, axis))]
    words += ["--route", cell.route, "--rounds", "1", "--cache", plan.policy.cache_for(cell)]
    words += ["--timer", "event" if cell.device != "cpu" else "cpu"]
    return [*words, "--no-shares", "--no-alone", "--no-plots", "--in-process", "--tag", "under-ncu"]


def ncu_name(kernel: str) -> str:
    """What ncu calls a kernel: its function's own name, without type, namespaces and arguments; empty for
    what is no kernel.
    """
    from nsabench.measure.attribution import short_name

    if kernel.startswith(("Memcpy", "Memset", "nsa::")):
        return ""
    return short_name(kernel).rpartition("::")[2].split(" ")[-1]
