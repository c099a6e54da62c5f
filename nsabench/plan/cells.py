"""A cell is one thing to measure: a shape, a pass, a device and a route. A plan is a list of cells."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nsabench.plan.axes import MAX_INT, PlanError

_ALLOWED = {
    "phase": r"decode|prefill|train",
    "passes": r"fwd|bwd|fwd_bwd",
    "mode": r"batched|stepwise|chunked=[1-9][0-9]*",
    "dtype": r"fp64|fp32|fp16|bf16",
    "device": r"cpu|cuda|cuda:[0-9]+",
    "selection": r"natural|random|overlap=0(\.[0-9]+)?|file=.+",
    "impl": r"\S+",
    "route": r"\S+",
}
_SAY = {
    "mode": "batched, stepwise or chunked=N with N at least 1",
    "device": "cpu, cuda or cuda:N",
    "selection": "natural, random, overlap=X with X from 0 to 0.95, or file=PATH",
    "impl": "a name without spaces",
    "route": "a route without spaces",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to measure. Checks itself: PlanError names the field, the value and what is allowed.

    Sizes are in tokens (`S, l, d, l_sel, w`), sequences (`B`), blocks (`n_sel`), heads (`heads, groups`) and
    channels (`dim, dk, dv`), each at least 1. Whether the sizes fit each other is for the attention's own
    configuration to say.
    """

    phase: str
    passes: str
    mode: str
    impl: str = "nsa"
    S: int
    B: int
    dim: int
    heads: int
    groups: int
    dk: int
    dv: int
    l: int
    d: int
    l_sel: int
    n_sel: int
    w: int
    dtype: str
    device: str
    selection: str = "natural"
    seed: int
    route: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                _check_int(field.name, value, minimum=0 if field.name == "seed" else 1)
            else:
                _check_text(field.name, value)

    @property
    def cell_id(self) -> str:
        """12 hex digits that depend on every field: the same cell has the same id in every run."""
        return _digest(self.to_dict())

    @property
    def group_key(self) -> str:
        """12 hex digits that depend on every field but the route: cells that share it run interleaved."""
        return _digest({k: v for k, v in self.to_dict().items() if k != "route"})

    def to_dict(self) -> dict[str, Any]:
        """The fields in order; JSON holds it, `from_dict` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Cell":
        """The cell with exactly these fields; PlanError when one is unknown or missing."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [repr(name) for name in fields if name not in known]
        if unknown:
            raise PlanError(f"cell: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        missing = [name for name in known if name not in fields]
        if missing:
            raise PlanError(f"cell: {', '.join(missing)} missing; needed: {', '.join(known)}")
        return cls(**fields)


def sweep(*, S: list[int], B: list[int], routes: list[str], passes: list[str], **fixed: Any) -> list[Cell]:
    """Every combination, ordered by B, then passes, then S, with the routes of one shape adjacent.

    `fixed` holds the other fields of Cell; those with a default may be left out. Duplicates on an axis are
    dropped. PlanError for an empty axis, and as `Cell.from_dict`.
    """
    axes = {"B": B, "passes": passes, "S": S, "routes": routes}
    for name, values in axes.items():
        if not values:
            raise PlanError(f"sweep: {name} is empty; give at least one value")
    defaults = {"impl": "nsa", "selection": "natural"}
    return [
        Cell.from_dict({**defaults, **fixed, "B": b, "passes": p, "S": s, "route": route})
        for b in dict.fromkeys(B)
        for p in dict.fromkeys(passes)
        for s in dict.fromkeys(S)
        for route in dict.fromkeys(routes)
    ]


def groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells by `group_key`, groups and cells in the order of first appearance."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.group_key, []).append(cell)
    return list(found.values())


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_int(name: str, value: object, minimum: int) -> None:
    if type(value) is not int:
        raise PlanError(f"cell: {name} is {value!r}; it must be a whole number")
    if not minimum <= value <= MAX_INT:
        raise PlanError(f"cell: {name} is {value}; it must be at least {minimum} and below 2**63")


def _check_text(name: str, value: object) -> None:
    allowed = _ALLOWED[name]
    fits = isinstance(value, str) and re.fullmatch(allowed, value) is not None
    if fits and name == "selection":
        kind, _, number = str(value).partition("=")
        fits = kind != "overlap" or float(number) <= 0.95
    if not fits:
        raise PlanError(f"cell: {name} is {value!r}; allowed: {_SAY.get(name, allowed.replace('|', ', '))}")
