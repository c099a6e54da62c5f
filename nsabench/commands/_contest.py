"""Sides to measure: from their names to a stored comparison."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.text import Text

from nsa import Routing
from nsabench.commands._compare_options import EffortOptions, ResultOptions, SharedOptions, part_of_one
from nsabench.commands._console import GOOD, INTERRUPTED, MACHINE_FAILED, complain, console
from nsabench.commands._execute import ctrl_c
from nsabench.commands._options import MeasureOptions, axes_given, option_of, size
from nsabench.commands._sweep import cannot_run, plan_of
from nsabench.plan import Cell, PlanError, Suite, parse_duration, tags_of
from nsabench.plan.sides import Side, compared, parse_side
from nsabench.present.verdicts import Comparison, findings_of
from nsabench.present.wording import count_text, tokens_text
from nsabench.run import Policy
from nsabench.run.comparison import MOST_PROCESSES, Effort, run_comparison
from nsabench.run.executor import LocalExecutor, WorkerError, local_slots
from nsabench.run.selection_file import unusable
from nsabench.run.work import config_of
from nsabench.store import RunDir, capture_environment, load_run

QUIET_S, WAITED = 5.0, 0.05
"""Longest that each process waits for other processes to end: so many seconds, or that part of the budget."""


@dataclass(frozen=True)
class Terms:
    """What is compared with what, and how it is judged."""

    sides: Sequence[str]
    phase: str
    different_work: bool
    delta: float
    correct: str


def measure(
    terms: Terms, shared: SharedOptions, options: EffortOptions, output: ResultOptions
) -> tuple[Comparison, int]:
    """Measure and store a comparison. Returns what came of it, and an exit code where that is not all.

    PlanError for sides that cannot be compared or do not run here, before anything is measured.
    """
    effort = _effort(options)
    cells, policy = _shapes(terms.phase, shared, options)
    sides = [_settled(parse_side(text)) for text in terms.sides]
    groups = _groups(cells, sides, terms.different_work)
    _refuse_unless_each_runs(groups, sides)
    argv = sys.argv[1:]
    told = {
        "sides": _names(sides),
        "delta": terms.delta,
        "correct": terms.correct,
        "width": effort.width,
        "processes": effort.processes,
        "budget_s": effort.budget_s,
        "groups": [[cell.cell_id for cell in group] for group in groups],
    }
    with RunDir.create(
        output.out,
        name="compare",
        argv=argv,
        repro=shlex.join(["nsabench", *argv]),
        plan=[cell.to_dict() for group in groups for cell in group],
        environment=capture_environment(),
        policy=policy.to_dict(),
        seed=cells[0].seed,
        tags=tags_of(output.tag or [], "--tag"),
        comparison=told,
    ) as run:
        code = _run(groups, policy, effort, run, output.json)
        console(stderr=output.json).print(f"results: {run.path}", soft_wrap=True, markup=False)
        return findings_of(load_run(run.path)), code


def _run(groups: list[list[Cell]], policy: Policy, effort: Effort, run: RunDir, json_lines: bool) -> int:
    """Measure all groups, or as many as can be; returns the exit code of what went wrong."""
    with _View(json_lines, run.info["comparison"]["sides"], len(groups)) as view, ctrl_c() as stop:
        view.note(_heading(groups, policy, effort))
        try:
            run_comparison(groups, policy, effort, run, view, hire=_hire, stop=stop)
            if not stop():
                return GOOD
        except WorkerError as error:
            view.close()
            complain(f"{error}; what was measured is kept in {run.path}")
            return MACHINE_FAILED
        except KeyboardInterrupt:
            pass
    complain(f"interrupted; what was measured is kept in {run.path}")
    return INTERRUPTED


def _hire(cells: Sequence[Cell], process: int) -> LocalExecutor:
    return LocalExecutor(local_slots(cells), process=process)


def _effort(options: EffortOptions) -> Effort:
    given: dict[str, Any] = {}
    if options.processes is not None:
        given["processes"] = size(options.processes, "--processes")
        if given["processes"] > MOST_PROCESSES:
            raise PlanError(
                f"--processes: {options.processes!r} is not allowed; allowed: 1 to {MOST_PROCESSES}"
            )
    if options.width is not None:
        given["width"] = part_of_one(options.width, "--width")
    if options.budget is not None:
        given["budget_s"] = parse_duration(options.budget, name="--budget")
    return Effort(**given)


def _shapes(phase: str, shared: SharedOptions, options: EffortOptions) -> tuple[list[Cell], Policy]:
    """A cell for each shape, as sweeps make them, and how to measure it."""
    suite = Suite.of_options(phase, axes_given(shared), option_of)
    how = MeasureOptions(
        rounds=options.rounds,
        sample_ms=options.sample_ms,
        timer=options.timer,
        cache=options.cache,
        regime=options.regime,
        timeout=options.timeout,
        shares=options.shares,
        alone=options.alone,
    )
    plan = plan_of(suite, how)
    budget_s = _effort(options).budget_s
    waited = min(QUIET_S, WAITED * budget_s)
    return plan.cells, replace(plan.policy, settle=True, quiet_s=waited, kernels=False, memory=False)


def _settled(side: Side) -> Side:
    """The side with its route in words the route table knows; `env` spelled out."""
    changes = dict(side.changes)
    if "route" not in changes:
        return side
    try:
        routing = Routing.parse(str(changes["route"]))
    except ValueError as error:
        raise PlanError(f"side {side.name!r}: {error}") from None
    if changes["route"] == "env":
        changes["route"] = str(routing)
    return replace(side, changes=tuple(sorted(changes.items())))


def _groups(cells: Sequence[Cell], sides: Sequence[Side], different_work: bool) -> list[list[Cell]]:
    """The cells of each comparison; one that stands in several is told apart as a twin."""
    found: list[list[Cell]] = []
    taken: set[Cell] = set()
    for shared in cells:
        group = []
        for cell in compared(shared, sides, different_work=different_work):
            while cell in taken:
                cell = replace(cell, twin=cell.twin + 1)
            taken.add(cell)
            group.append(cell)
        for side, cell in zip(sides, group, strict=False):
            _check(side, cell)
        found.append(group)
    return found


def _check(side: Side, cell: Cell) -> None:
    """PlanError for a side whose cell cannot be measured anywhere."""
    why = ""
    try:
        config_of(cell)
    except ValueError as error:
        why = str(error)
    if cell.dk % 2:
        why = f"dk is {cell.dk}, odd; rotary positions need an even key dim"
    elif fault := unusable(cell):
        why = fault
    elif cell.phase == "decode" and (cell.passes, cell.mode) != ("fwd", "batched"):
        why = "decode has only fwd, batched"
    if why:
        raise PlanError(f"side {side.name!r}: {why}")


def _refuse_unless_each_runs(groups: Sequence[Sequence[Cell]], sides: Sequence[Side]) -> None:
    """A side that runs at no shape is bad usage; one that runs at some keeps its refusals as rows."""
    for place, side in enumerate(sides):
        reasons = [cannot_run(group[place]) for group in groups]
        if all(reasons):
            raise PlanError(f"side {side.name!r} cannot run here: {reasons[0]}")


def _names(sides: Sequence[Side]) -> list[str]:
    """The sides as given; of equal ones the later have a number."""
    names: list[str] = []
    for side in sides:
        before = [one.name for one in sides[: len(names)]].count(side.name)
        names.append(f"{side.name} #{before + 1}" if before else side.name)
    return names


def _heading(groups: Sequence[Sequence[Cell]], policy: Policy, effort: Effort) -> str:
    cell = groups[0][0]
    shapes = "1 shape" if len(groups) == 1 else f"{len(groups)} shapes"
    processes = "1 process" if effort.processes == 1 else f"{effort.processes} processes"
    return (
        f"{cell.phase} on {cell.device}, {shapes}: {policy.how_for(cell)}; "
        f"at least {processes} of {policy.rounds} rounds, "
        f"until each interval is within "
        f"{100 * effort.width:g} % or {effort.budget_s:g} s are spent"
    )


class _View(AbstractContextManager["_View"]):
    """What the person at the console sees: on a terminal what is being done, everywhere what is finished.

    Nothing is redrawn by a clock: that would take its share of the processor from what is being measured.
    """

    def __init__(self, json_lines: bool, sides: Sequence[str], total: int) -> None:
        self._console = console(stderr=json_lines)
        self._sides, self._total, self._done = sides, total, 0
        self._live: Live | None = None
        if self._console.is_interactive and self._console.file.isatty():
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave only what is finished."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def activity(self, text: str) -> None:
        if self._live is not None:
            line = Text(f"[{self._done + 1}/{self._total}] {text}", no_wrap=True, overflow="ellipsis")
            self._live.update(line, refresh=True)

    def finished(self, group: Sequence[Cell], rows: Sequence[Mapping[str, Any]], processes: int) -> None:
        self._done += 1
        said = (
            f"{processes} process{'' if processes == 1 else 'es'}, {count_text(rows) or 'nothing measured'}"
        )
        self.note(
            f"[{self._done}/{self._total}] S={tokens_text(group[0].S)} {', '.join(self._sides)}: {said}"
        )
