"""From options to a finished sweep: plan, refuse what cannot be, run, draw, say where everything is."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nsa import Routing, UnsupportedRoute
from nsabench.commands._console import (
    BAD_USAGE,
    CHECK_FAILED,
    GOOD,
    INCONCLUSIVE,
    INTERRUPTED,
    complain,
    console,
    fail,
)
from nsabench.commands._options import ON_CPU, ON_GPU, Model, size
from nsabench.measure import MeasureError, resolve_device
from nsabench.plan import Cell, PlanError, parse_ints, parse_routes, sweep
from nsabench.present.frame import PresentError, planned_routes
from nsabench.present.live import SweepView
from nsabench.run import Policy, run_plan
from nsabench.run.steps import DTYPES, route_at, steps_of
from nsabench.run.work import config_of
from nsabench.store import RunDir, capture_environment, load_run


def device_of(name: str) -> str:
    """`auto` settled: the GPU where torch sees one, else the CPU. PlanError for a device that is not
    there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolve_device(name)
    except MeasureError as error:
        said = str(error).removeprefix("device is ").replace("allowed: cpu", "allowed: auto, cpu")
        raise PlanError(f"--device: {said}") from None
    return name


def plan_cells(
    *,
    phase: str,
    lengths: str,
    batches: str,
    routes: str,
    passes: Sequence[str],
    mode: str,
    device: str,
    dtype: str | None,
    seed: str,
    shape: dict[str, str | None],
    blocks: dict[str, str],
) -> tuple[list[Cell], Model]:
    """The cells of a sweep, all checked: PlanError in one line names the option, the value and what is
    allowed.
    """
    device = device_of(device)
    model = ON_CPU if device == "cpu" else ON_GPU
    fixed: dict[str, Any] = {
        name: getattr(model, name) if text is None else size(text, _option(name))
        for name, text in shape.items()
    }
    if shape["dv"] is None:
        fixed["dv"] = fixed["dk"]
    dtype = model.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise PlanError(f"--dtype: {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    try:
        cells = sweep(
            S=parse_ints(lengths, name="--S"),
            B=parse_ints(batches, name="--B"),
            routes=_routes(routes),
            passes=list(passes),
            phase=phase,
            mode=mode,
            device=device,
            dtype=dtype,
            seed=size(seed, "--seed", minimum=0),
            **fixed,
            **{name: size(text, _option(name)) for name, text in blocks.items()},
        )
        config_of(cells[0])
    except ValueError as error:
        raise PlanError(_in_options(str(error))) from None
    if cells[0].dk % 2:
        raise PlanError(f"--dk: {cells[0].dk} is odd; rotary positions need an even key dim")
    _refuse_unless_some_route_runs(cells)
    return cells, model


def _routes(text: str) -> list[str]:
    """The routes asked for, each in words the route table knows; `env` spelled out, for other shells."""
    found = []
    for route in parse_routes(text):
        try:
            routing = Routing.parse(route)
        except ValueError as error:
            raise PlanError(f"--routes: {error}") from None
        found.append(str(routing) if route == "env" else route)
    return found


_OPTION_OF = {
    "num_kv_heads": "--groups",
    "num_heads": "--heads",
    "compression_block_size": "--l",
    "compression_stride": "--d",
    "selection_block_size": "--l-sel",
    "num_selected_blocks": "--n-sel",
    "window_size": "--w",
    "head_dim": "--dk",
    "value_dim": "--dv",
}


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _in_options(message: str) -> str:
    """A complaint of the plan or the attention, in the words of the command line."""
    for field, option in _OPTION_OF.items():
        message = message.replace(field, option)
    return re.sub(r"^cell: (\w+) is ", lambda found: f"{_option(found[1])}: ", message)


def _refuse_unless_some_route_runs(cells: list[Cell]) -> None:
    """A sweep in which nothing can run is bad usage; one in which something can keeps its refusals as
    rows.
    """
    reasons: dict[str, str] = {}
    for cell in cells:
        try:
            route_at(cell, steps_of(cell)[-1].spans[-1])
            return
        except UnsupportedRoute as error:
            reasons.setdefault(cell.route, str(error))
    raise PlanError(
        "--routes: " + "; ".join(f"{route!r} cannot run here: {why}" for route, why in reasons.items())
    )


def start_sweep(
    cells: list[Cell], model: Model, policy: Policy, *, out: Path, plots: Path | None, json_lines: bool
) -> int:
    """Run a new sweep to its end; returns the exit code."""
    for cell in cells[:1]:
        policy.timer_for(cell)
    argv = sys.argv[1:]
    with RunDir.create(
        out,
        name=cells[0].phase,
        argv=argv,
        repro=shlex.join(["nsabench", *argv]),
        plan=[cell.to_dict() for cell in cells],
        environment=capture_environment(),
        policy=policy.to_dict(),
        seed=cells[0].seed,
    ) as run:
        return carry_on(
            run, cells, policy, plots=plots, json_lines=json_lines, heading=_heading(cells[0], model, policy)
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
) -> int:
    """Measure what is left of ``run``, draw it, and say where everything is; returns the exit code."""
    talk = console(stderr=json_lines)
    if any(cell.cell_id not in run.finished for cell in cells):
        _measure(run, cells, policy, json_lines, heading, process)
    else:
        talk.print(*heading, sep="\n", soft_wrap=True, markup=False)
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
    run: RunDir, cells: list[Cell], policy: Policy, json_lines: bool, heading: Sequence[str], process: int
) -> None:
    left = sum(cell.cell_id not in run.finished for cell in cells)
    order = planned_routes(run.info)
    with SweepView(console(), total=left, json_lines=json_lines, order=order) as view:
        for line in heading:
            view.note(line)
        try:
            run_plan(cells, policy, run, view, process=process)
        except KeyboardInterrupt:
            view.close()
            kept = f"interrupted; {len(run.finished)} of {len(cells)} cells are finished and kept"
            resume = f"nsabench resume {shlex.quote(str(run.path))}"
            raise fail(f"{kept}, {resume} goes on", INTERRUPTED) from None
        view.close(load_run(run.path).samples)


def exit_code(rows: Sequence[dict[str, Any]]) -> int:
    """1 where a result was wrong or a cell broke, 3 where nothing valid came out, else 0."""
    statuses = {row["status"] for row in rows}
    if statuses & {"wrong", "nan", "error", "hang"}:
        return CHECK_FAILED
    return GOOD if "ok" in statuses and "invalid" not in statuses else INCONCLUSIVE


def _heading(cell: Cell, model: Model, policy: Policy) -> list[str]:
    mine = all(getattr(cell, name) == getattr(model, name) for name in ("dim", "heads", "groups", "dk", "dv"))
    return [
        f"{cell.phase} on {cell.device}: dim {cell.dim}, {cell.heads} heads, {cell.groups} KV heads, "
        f"dk {cell.dk}, dv {cell.dv}, {cell.dtype}" + (f" ({model.what})" if mine else ""),
        f"blocks l {cell.l}, d {cell.d}, l' {cell.l_sel}, n {cell.n_sel}, w {cell.w}; "
        f"selection {cell.selection}; timer {policy.timer_for(cell)}, {policy.cache} cache, "
        f"{policy.rounds} rounds, seed {cell.seed}",
    ]
