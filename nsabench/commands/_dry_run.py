"""A plan shown instead of carried out: what would run, in which order, what it takes, what cannot run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from nsabench.commands._console import console
from nsabench.commands._sweep import Plan, cannot_run, missing
from nsabench.plan import Cell, groups
from nsabench.present.wording import arm_text, bytes_text, duration_text, fields_text
from nsabench.run.estimate import Estimate, estimate, estimate_group, machine, memory_free

ALWAYS = ("phase", "passes", "S", "B")
REST = (
    *("mode", "scope", "dim", "heads", "groups", "dk", "dv", "l", "d", "l_sel", "n_sel", "w"),
    *("dtype", "device", "selection", "seed"),
)


@dataclass(frozen=True)
class Planned:
    """A group in its turn. ``refusals`` are reasons by cell, where its device is here; ``expected`` is what
    the other cells take, None without any; ``fits`` whether the budget, if there is one, has room for it.
    """

    cells: list[Cell]
    refusals: dict[Cell, str]
    expected: Estimate | None
    fits: bool

    @property
    def seconds(self) -> float:
        return self.expected.seconds if self.expected else 0.0


def show_plan(plan: Plan, *, json_lines: bool) -> None:
    """Print the plan: a table for people, or one JSON object a cell."""
    planned = look_ahead(plan)
    if json_lines:
        for number, group in enumerate(planned, 1):
            for cell in group.cells:
                print(json.dumps(_described(number, group, cell, plan)))
        return
    talk = console()
    talk.print(_table(planned, plan))
    for line in _notes(planned, plan):
        talk.print(line, soft_wrap=True, markup=False)


def look_ahead(plan: Plan) -> list[Planned]:
    """The groups of a plan in their order, with what each is expected to take. As in a run, a group that does
    not fit into the budget is passed over, and a smaller one after it may fit.
    """
    found: list[Planned] = []
    left = math.inf if plan.budget_s is None else plan.budget_s
    for cells in groups(plan.cells):
        here = missing(cells[0].device) is None
        refusals = {cell: why for cell in cells if here and (why := cannot_run(cell))}
        able = [cell for cell in cells if cell not in refusals]
        expected = estimate_group(able, plan.policy) if able else None
        fits = expected is None or expected.seconds <= left
        left -= expected.seconds if expected and fits else 0.0
        found.append(Planned(cells, refusals, expected, fits))
    return found


def _described(number: int, group: Planned, cell: Cell, plan: Plan) -> dict[str, Any]:
    why = group.refusals.get(cell) or missing(cell.device)
    own = None if cell in group.refusals else estimate(cell, plan.policy)
    return {
        "group": number,
        "cell_id": cell.cell_id,
        **cell.to_dict(),
        "cannot_run": why,
        "estimated_s": own and round(own.seconds, 3),
        "estimated_step_ms": own and round(own.step_s * 1e3, 4),
        "estimated_bytes": own and own.bytes,
        "within_budget": None if plan.budget_s is None else group.fits,
    }


def _table(planned: Sequence[Planned], plan: Plan) -> Table:
    cells = plan.cells
    varied = [name for name in REST if len({getattr(cell, name) for cell in cells}) > 1]
    size = f"{counted(len(cells), 'cell')} in {counted(len(planned), 'group')}"
    table = Table(
        title=f"{plan.suite.name}: {size}",
        title_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        box=box.SIMPLE_HEAD,
    )
    for header in ("#", *ALWAYS, *(["with"] if varied else []), "arms", "time", "memory"):
        right = header in ("#", "S", "B", "time", "memory")
        wide = header in ("with", "arms")
        side: Literal["left", "right"] = "right" if right else "left"
        table.add_column(header, justify=side, overflow="fold", no_wrap=not wide, min_width=8 * wide)
    for place, group in enumerate(planned, 1):
        first, expected = group.cells[0], group.expected
        apart = fields_text(first.to_dict(), varied)
        arms = (f"({name})" if cell in group.refusals else name for cell, name in _arms(group.cells))
        table.add_row(
            str(place),
            *(str(getattr(first, name)) for name in ALWAYS),
            *([apart] if varied else []),
            Text(", ".join(arms)),
            _time(expected.seconds) if expected else "-",
            bytes_text(expected.bytes) if expected else "-",
            style="" if group.fits else "dim",
        )
    return table


def _arms(cells: Sequence[Cell]) -> list[tuple[Cell, str]]:
    return [(cell, arm_text(cell.to_dict())) for cell in cells]


def _notes(planned: Sequence[Planned], plan: Plan) -> list[str]:
    devices = list(dict.fromkeys(cell.device for cell in plan.cells))
    rates = "; ".join(machine(device).what for device in devices)
    total = duration_text(sum(group.seconds for group in planned))
    lines = [f"about {total} in all, a guess good to a factor of two or three, from shapes and {rates}"]
    if plan.budget_s is not None:
        out = ", ".join(f"#{place}" for place, group in enumerate(planned, 1) if not group.fits)
        fit = f"by these guesses there is no room for {out}" if out else "by these guesses all of it fits"
        lines.append(f"budget {duration_text(plan.budget_s)}: {fit}")
    for device in devices:
        if why := missing(device):
            count = sum(cell.device == device for cell in plan.cells)
            lines.append(f"cannot run here: {counted(count, 'cell')} on {why}")
        free = memory_free(device)
        numbered = [(n, g.expected) for n, g in enumerate(planned, 1) if g.cells[0].device == device]
        big = [f"#{n}" for n, expected in numbered if free and expected and expected.bytes > free]
        if free and big:
            where = ", ".join(big[:8]) + (", ..." if len(big) > 8 else "")
            lines.append(f"may not fit into the {bytes_text(free)} that are free on {device}: {where}")
    reasons = Counter((arm_text(c.to_dict()), why) for group in planned for c, why in group.refusals.items())
    for (arm, why), count in reasons.items():
        lines.append(f"cannot run here, in parentheses: {arm} ({counted(count, 'cell')}): {why}")
    return lines


def _time(seconds: float) -> str:
    return "<1s" if seconds < 1 else duration_text(seconds)


def counted(number: int, what: str) -> str:
    """1 cell, 2 cells."""
    return f"{number} {what}" + ("s" if number != 1 else "")
