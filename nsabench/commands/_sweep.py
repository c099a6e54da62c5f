"""From a suite, declared in a file or by options, to cells and a policy; what cannot be is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsa import Routing, UnsupportedRoute
from nsabench.commands._options import ON_CPU, ON_GPU, MeasureOptions, Model, size
from nsabench.measure import MeasureError, resolve_device
from nsabench.plan import Cell, PlanError, Suite, Sweep, cells_of, parse_duration, unmeasured
from nsabench.run import Policy
from nsabench.run.impl import Refused, impl_for
from nsabench.run.selection_file import unusable
from nsabench.run.steps import steps_of
from nsabench.run.work import config_of


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and how. ``suite`` is what it comes from, with every override in it."""

    suite: Suite
    cells: list[Cell]
    policy: Policy
    budget_s: float | None

    @property
    def model(self) -> Model:
        """The layer that the first cell's device has by default."""
        return _model(self.cells[0].device)


def device_of(name: str) -> str:
    """`auto` settled: the GPU where torch sees one, else the CPU. PlanError for a device that is not
    there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    why = missing(name)
    if why:
        raise PlanError(f"--device: {why.replace('allowed: cpu', 'allowed: auto, cpu')}")
    return name


def missing(device: str) -> str | None:
    """Why a device is not here, or None."""
    try:
        resolve_device(device)
    except MeasureError as error:
        return str(error).removeprefix("device is ")
    return None


def plan_of(suite: Suite, measure: MeasureOptions, *, anywhere: bool = False) -> Plan:
    """The plan of a suite: PlanError in one line names the option or key, the value and what is allowed.

    ``anywhere``: plan also for devices that are not here, and where nothing can run: for looking, not for
    measuring.
    """
    suite = replace(suite, policy=suite.policy | _policy_given(measure))
    sweeps = (_settled(own, f"sweep[{number}].routes", suite) for number, own in enumerate(suite.sweeps, 1))
    suite = replace(suite, sweeps=tuple(sweeps))
    for part in suite.resolved():
        _check(part, anywhere)
    settings = {name: value for name, value in suite.policy.items() if name != "budget"}
    policy, budget = Policy(**{"cache": "auto", **settings}), suite.policy.get("budget")
    cells = cells_of(suite, _defaults, coarse_first=budget is not None)
    if not suite.options:
        for line in unmeasured(suite, cells):
            raise PlanError(line)
    if not anywhere:
        for cell in cells:
            policy.timer_for(cell)
        _refuse_unless_some_run(cells, next(suite.resolved()).names)
    return Plan(suite, cells, policy, budget)


def cannot_run(cell: Cell) -> str | None:
    """Why this machine cannot run a cell, or None."""
    why = missing(cell.device)
    if why:
        return why
    spans = [span for step in steps_of(cell) for span in (step.spans[0], step.spans[-1])]
    try:
        impl_for(cell).settle(cell.route, spans)
    except (Refused, UnsupportedRoute) as error:
        return str(error)
    return None


def _model(device: str) -> Model:
    return ON_CPU if device == "cpu" else ON_GPU


def _defaults(device: str) -> Mapping[str, Any]:
    """What a sweep on ``device`` takes where it does not say."""
    device = device_of(device) if device == "auto" else device
    model = _model(device)
    sizes = {name: getattr(model, name) for name in ("dim", "heads", "groups", "dk", "dtype")}
    return {"device": device, **sizes}


def _policy_given(measure: MeasureOptions) -> dict[str, Any]:
    given = {
        "rounds": None if measure.rounds is None else size(measure.rounds, "--rounds"),
        "sample_ms": measure.sample_ms,
        "timer": measure.timer,
        "cache": measure.cache,
        "regime": measure.regime,
        "shares": measure.shares,
        "alone": measure.alone,
        "share_runs": None if measure.share_runs is None else size(measure.share_runs, "--share-runs"),
        "timeout_s": None if measure.timeout is None else parse_duration(measure.timeout, name="--timeout"),
        "budget": None if measure.budget is None else parse_duration(measure.budget, name="--budget"),
    }
    return {name: value for name, value in given.items() if value is not None}


def _settled(own: dict[str, Any], where: str, suite: Suite) -> dict[str, Any]:
    """A sweep whose routes are in words the route table knows; `env` spelled out, for other shells."""
    if "routes" not in own:
        return own
    where = suite.options.get("routes", where)
    return own | {"routes": tuple(dict.fromkeys(_route(route, where) for route in own["routes"]))}


def _route(route: str, where: str) -> str:
    try:
        routing = Routing.parse(route)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from None
    return str(routing) if route == "env" else route


_AXIS_OF = {
    "num_kv_heads": "groups",
    "num_heads": "heads",
    "compression_block_size": "l",
    "compression_stride": "d",
    "selection_block_size": "l_sel",
    "num_selected_blocks": "n_sel",
    "window_size": "w",
    "head_dim": "dk",
    "value_dim": "dv",
}


def _check(sweep: Sweep, anywhere: bool) -> None:
    """Refuse a sweep with a device, sizes or a file of blocks that cannot be measured, by the names it was
    given under.
    """
    names = sweep.names
    for device in sweep.axes.get("device", ()):
        why = None if anywhere or device == "auto" else missing(device)
        if why:
            raise PlanError(f"{names['device']}: {why}")
    shapes = {
        (c.heads, c.groups, c.dk, c.dv, c.l, c.d, c.l_sel, c.n_sel, c.w): c for c in sweep.cells(_defaults)
    }
    for cell in shapes.values():
        try:
            config_of(cell)
        except ValueError as error:
            raise PlanError(_renamed(str(error), names)) from None
        if cell.dk % 2:
            raise PlanError(f"{names['dk']}: {cell.dk} is odd; rotary positions need an even key dim")
    if not anywhere and any("file=" in selection for selection in sweep.axes.get("selection", ())):
        for cell in sweep.cells(_defaults):
            if why := unusable(cell):
                raise PlanError(f"{names['selection']}: {why}")


def _renamed(message: str, names: Mapping[str, str]) -> str:
    """A complaint of the attention, in the words in which the sizes were given."""
    known = "|".join(sorted(_AXIS_OF, key=len, reverse=True))
    return re.sub(rf"\b({known})\b", lambda found: names[_AXIS_OF[found[1]]], message)


def _refuse_unless_some_run(cells: list[Cell], names: Mapping[str, str]) -> None:
    """A sweep in which nothing that is asked for can run is bad usage; one in which something can keeps its
    refusals as rows. Where NSA is measured, what stands beside it is not asked.
    """
    of_nsa = [cell for cell in cells if cell.impl == "nsa"]
    reasons: dict[str, str] = {}
    for cell in of_nsa or cells:
        why = cannot_run(cell)
        if why is None:
            return
        reasons.setdefault(cell.arm, why)
    said = "; ".join(f"{name!r} cannot run here: {why}" for name, why in reasons.items())
    raise PlanError(f"{names['routes' if of_nsa else 'impl']}: {said}")
