"""From options to a finished sweep: plan, refuse what cannot be, run, draw, say where everything is."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nsa import Routing, UnsupportedRoute
from nsa.routes import Request, resolve
from nsabench.commands._console import BAD_USAGE, CHECK_FAILED, GOOD, INCONCLUSIVE, console, fail
from nsabench.commands._options import ON_CPU, ON_GPU, Model
from nsabench.measure import MeasureError, resolve_device
from nsabench.plan import Cell, PlanError, parse_ints, parse_routes, sweep
from nsabench.present.frame import planned_routes
from nsabench.present.live import SweepView
from nsabench.present.plots import plot_run
from nsabench.run import Policy, run_plan
from nsabench.run.work import config_of
from nsabench.run.workload import DTYPES
from nsabench.store import RunDir, StoreError, capture_environment, load_run


def device_of(name: str) -> str:
    """`auto` settled: the GPU where torch sees one, else the CPU. PlanError for a device that is not
    there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolve_device(name)
    except MeasureError as error:
        raise PlanError(f"--device: {error}") from None
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
    seed: int,
    shape: dict[str, int | None],
    blocks: dict[str, int],
) -> tuple[list[Cell], Model]:
    """The cells of a sweep, all checked: PlanError or ValueError in one line names the value and what is
    allowed.
    """
    device = device_of(device)
    model = ON_CPU if device == "cpu" else ON_GPU
    fixed: dict[str, Any] = {
        name: getattr(model, name) if value is None else value for name, value in shape.items()
    }
    if shape["dv"] is None and shape["dk"] is not None:
        fixed["dv"] = shape["dk"]
    dtype = model.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise PlanError(f"--dtype: {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    try:
        wanted = [str(Routing.parse(route)) if route == "env" else route for route in parse_routes(routes)]
        for route in wanted:
            Routing.parse(route)
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(f"--routes: {error}") from None
    cells = sweep(
        S=parse_ints(lengths, name="--S"),
        B=parse_ints(batches, name="--B"),
        routes=wanted,
        passes=list(passes),
        phase=phase,
        mode=mode,
        device=device,
        dtype=dtype,
        seed=seed,
        **fixed,
        **blocks,
    )
    try:
        config_of(cells[0])
    except ValueError as error:
        raise PlanError(_in_options(str(error))) from None
    if cells[0].dk % 2:
        raise PlanError(f"--dk: {cells[0].dk} is odd; rotary positions need an even key dim")
    _refuse_unless_some_route_runs(cells)
    return cells, model


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


def _in_options(message: str) -> str:
    """The attention's complaint, in the words of the command line."""
    for field, option in _OPTION_OF.items():
        message = message.replace(field, option)
    return message


def _refuse_unless_some_route_runs(cells: list[Cell]) -> None:
    """A sweep in which nothing can run is bad usage; one in which something can keeps its refusals as
    rows.
    """
    reasons: dict[str, str] = {}
    for cell in cells:
        request = Request(
            device=torch.device(cell.device).type,
            dtype=DTYPES[cell.dtype],
            num_queries=1 if cell.phase == "decode" else cell.S,
            kv_len=cell.S,
            needs_grad=cell.passes != "fwd",
            config=config_of(cell),
        )
        try:
            resolve(cell.route, request)
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
) -> int:
    """Measure what is left of ``run``, draw it, and say where everything is; returns the exit code."""
    left = [cell for cell in cells if cell.cell_id not in run.finished]
    view = SweepView(console(), total=len(left), json_lines=json_lines, order=planned_routes(run.info))
    with view:
        for line in heading:
            view.note(line)
        run_plan(cells, policy, run, view)
        stored = load_run(run.path)
        view.close(stored.samples)
    talk = console(stderr=json_lines)
    talk.print(f"results: {run.path}", soft_wrap=True, markup=False)
    rows = list(run.finished.values())
    if plots is not None and any(row["status"] == "ok" for row in rows):
        files = plot_run(stored, plots / run.run_id)
        talk.print(f"plots:   {plots / run.run_id} ({len(files)} files)", soft_wrap=True, markup=False)
    return exit_code(rows)


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
        f"blocks l {cell.l}, d {cell.d}, l' {cell.l_sel}, n {cell.n_sel}, w {cell.w}; selection {cell.selection}; "
        f"timer {policy.timer_for(cell)}, {policy.cache} cache, {policy.rounds} rounds, seed {cell.seed}",
    ]


def refuse_other_machine(run: RunDir) -> None:
    """StoreError where a run was begun elsewhere: its rows and new ones could not be compared."""
    before, here = run.info["environment"], capture_environment()
    for what, path in (("commit", ["commit"]), ("torch", ["torch", "version"]), ("CPU", ["cpu", "model"])):
        old, new = _dig(before, path), _dig(here, path)
        if old != new:
            raise StoreError(
                f"run {run.run_id} was begun with {what} {old!r}, here it is {new!r}; start a new run"
            )
    old_gpus, new_gpus = ([gpu.get("uuid") for gpu in env.get("gpus") or []] for env in (before, here))
    if old_gpus != new_gpus:
        raise StoreError(
            f"run {run.run_id} was begun on GPUs {old_gpus}, here they are {new_gpus}; start a new run"
        )


def _dig(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


__all__ = ["BAD_USAGE", "carry_on", "exit_code", "fail", "plan_cells", "refuse_other_machine", "start_sweep"]
