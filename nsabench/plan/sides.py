"""The sides of a comparison: what each changes of the cell that they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from nsabench.plan.axes import PlanError, nearest, parse_ints
from nsabench.plan.cells import BASELINES, IMPLS, PEERS, Cell, names_backend, no_backends, switched_off

BRANCHES = ("cmp", "score", "sel", "win")
WORK = ("phase", "S", "B", "dim", "heads", "groups", "dk", "dv", "scope", "passes")
"""Fields that say how much there is to do: sides that differ in them do different work."""

_SIZES = tuple(field.name for field in fields(Cell) if field.type is int)
_NOT_FREE = ("phase", "device", "seed", "route", "twin")
_FREE = tuple(field.name for field in fields(Cell) if field.name not in _NOT_FREE)


@dataclass(frozen=True)
class Side:
    """One side: its name as given, and the fields of the cell it changes."""

    name: str
    changes: tuple[tuple[str, int | str], ...]

    def of(self, cell: Cell) -> Cell:
        """The shared cell with this side's changes; PlanError where they do not fit."""
        changes: dict[str, Any] = dict(self.changes)
        if "dk" in changes and cell.dk == cell.dv:  # the value dim follows where it did
            changes.setdefault("dv", changes["dk"])
        return replace(cell, **changes)


def parse_side(text: str) -> Side:
    """The side that `text` names, parts separated by commas.

    A part is a route or the part of one (`sdpa`, `cmp=fa2`), a baseline (`dense:flash`), a peer, of which a
    branch may be off (`peer:sfnsa,win=off`), or a field of the cell and its value (`dtype=bf16`, `S=4k`,
    `passes=bwd`). PlanError names what is none of these, given twice, or at odds with another part.
    """
    name = ",".join(part.strip() for part in text.split(","))
    route: list[str] = []
    changes: dict[str, int | str] = {}
    for part in name.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not part or (equals and not value):
            raise PlanError(f"side {text!r} has an empty part; write it as sdpa, dense or cmp=fa2,dtype=bf16")
        if not equals and part.partition(":")[0] in (*BASELINES, "peer"):
            key, equals, value = "impl", "=", part
        if not equals or key in BRANCHES:
            route.append(part)
            continue
        if key not in _FREE:
            hint = nearest(key, (*_FREE, *BRANCHES))
            raise PlanError(f"side {text!r}: {key!r} cannot differ between sides; {hint}")
        if key in changes:
            raise PlanError(f"side {text!r}: {key} is given twice")
        changes[key] = _value(key, value, text)
        if key == "impl" and value not in IMPLS:
            raise PlanError(f"side {text!r}: no implementation {value!r}; {nearest(value, IMPLS)}")
    if len(route) > 1 and not all("=" in part for part in route):
        raise PlanError(f"side {text!r}: {' and '.join(route)} are two routes; name one")
    impl = changes.get("impl", "nsa")
    if impl in PEERS:
        changes["route"] = switched_off(",".join(route))
        if any(map(names_backend, route)):
            raise PlanError(f"side {text!r}: {no_backends(str(impl))}")
    elif route and impl != "nsa":
        raise PlanError(f"side {text!r}: {impl} has no routes")
    elif route:
        changes["route"] = ",".join(route)
    elif impl != "nsa":
        changes["route"] = "auto"
    return Side(name, tuple(sorted(changes.items())))


def compared(shared: Cell, sides: Sequence[Side], *, different_work: bool = False) -> list[Cell]:
    """The cells of a comparison: each side's, in order, and the first side's again under another name.

    The second of two equal sides is a twin too. PlanError for fewer than two sides, and for sides that differ
    in work unless `different_work`.
    """
    if len(sides) < 2:
        raise PlanError(f"compare needs at least two sides, got {len(sides)}")
    cells = [side.of(shared) for side in sides]
    for name in WORK:
        values = dict.fromkeys(getattr(cell, name) for cell in cells)
        if len(values) > 1 and not different_work:
            said = " and ".join(str(value) for value in values)
            raise PlanError(f"the sides do different work: {name} is {said}; --allow-different-work")
    found: list[Cell] = []
    for cell in (*cells, cells[0]):
        twins = sum(replace(other, twin=0) == cell for other in found)
        found.append(replace(cell, twin=twins))
    return found


def _value(key: str, value: str, text: str) -> int | str:
    if key not in _SIZES:
        return value
    if re.fullmatch(r"[0-9]+[kKmM]?", value) is None:
        raise PlanError(f"side {text!r}: {key} is {value!r}, not a whole number")
    return parse_ints(value, name=f"side {text!r}: {key}")[0]
