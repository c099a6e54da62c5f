"""A cell is one thing to measure: a shape, a pass, a device and a route. A plan is a list of cells."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsabench.plan.axes import MAX_INT, PlanError

_PATTERN = {
    "phase": r"decode|prefill|train",
    "passes": r"fwd|bwd|fwd_bwd",
    "scope": r"module|core",
    "mode": r"batched|stepwise|chunked=[1-9][0-9]*",
    "dtype": r"fp64|fp32|fp16|bf16",
    "device": r"cpu|cuda|cuda:[0-9]+",
    "selection": r"natural|random|overlap=0(\.([0-8][0-9]*|9([0-4][0-9]*|50*)?))?|file=.+",
    "impl": r"\S+",
    "route": r"\S+",
}
BASELINES = (
    "dense",
    *(f"dense:{kernel}" for kernel in ("flash", "cudnn", "efficient", "math", "flex", "fa2", "fa3", "fa4")),
)
"""Dense causal attention of the same shape, by the kernel that torch picks or by one of a name. A baseline
has no route: its cells say ``auto``.
"""

PEERS = ("peer:fla-core", "peer:fla-core:naive", "peer:xunhaolai", "peer:sfnsa")
"""Other implementations of NSA. The route of a peer's cell says no more than which branches are off."""

IMPLS = ("nsa", *BASELINES, *PEERS)
"""What can be measured: the NSA here by its routes, dense attention, and the NSA of others."""

ALL = "all"
"""Stands for every baseline."""

_LATER: dict[str, Any] = {"scope": "module", "twin": 0}
"""Fields that the first stored plans lack, and what those plans meant."""

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
    configuration to say. `scope` is what is timed: `module`, the layer from its projections to its output,
    or `core`, the attention alone on given inputs. `twin` tells apart cells that are equal but for it: a
    comparison times one arm twice, as its own control.
    """

    phase: str
    passes: str
    mode: str
    impl: str = "nsa"
    scope: str = "module"
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
    twin: int = 0
    route: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                _check_int(field.name, value, minimum=0 if field.name in ("seed", "twin") else 1)
            else:
                _check_text(field.name, value)
        if self.impl in PEERS and self.route != switched_off(self.route):
            raise PlanError(f"cell: route is {self.route!r}; {no_backends(self.impl)}")
        if self.impl in PEERS and self.route.count("=off") == 3:
            raise PlanError(f"cell: route is {self.route!r}; at least one of cmp, sel, win must run")
        if self.impl not in ("nsa", *PEERS) and self.route != "auto":
            raise PlanError(f"cell: route is {self.route!r}; {self.impl} has no routes, only auto")

    @property
    def computes_nsa(self) -> bool:
        """Whether it is NSA that is measured, the one here or another's."""
        return self.impl == "nsa" or self.impl in PEERS

    @property
    def arm(self) -> str:
        """What is measured at its shape: the NSA here by its route, anything else by its name."""
        if self.impl == "nsa":
            return self.route
        return self.impl if self.route == "auto" else f"{self.impl} {self.route}"

    @property
    def cell_id(self) -> str:
        """12 hex digits that depend on every field: the same cell has the same id in every run."""
        return _digest(self._told_apart())

    @property
    def group_key(self) -> str:
        """12 hex digits of all but impl, route and twin: cells that share it are measured together."""
        return _digest({k: v for k, v in self._told_apart().items() if k not in ("impl", "route", "twin")})

    def _told_apart(self) -> dict[str, Any]:
        """The fields; those that came later only where they say something: ids outlive versions."""
        return {k: v for k, v in self.to_dict().items() if _LATER.get(k) != v}

    def to_dict(self) -> dict[str, Any]:
        """The fields in order; JSON holds it, `from_dict` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Cell":
        """The cell with exactly these fields; PlanError when one is unknown or missing.

        `scope` and `twin` may be missing: plans stored before them meant the module and no twin.
        """
        fields = {**_LATER, **fields}
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [repr(name) for name in fields if name not in known]
        if unknown:
            raise PlanError(f"cell: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        missing = [name for name in known if name not in fields]
        if missing:
            raise PlanError(f"cell: {', '.join(missing)} missing; needed: {', '.join(known)}")
        return cls(**fields)


def sweep(
    *,
    S: list[int],
    B: list[int],
    routes: list[str],
    passes: list[str],
    baselines: Sequence[str] = (),
    impls: Sequence[str] = ("nsa",),
    **fixed: Any,
) -> list[Cell]:
    """Every combination, ordered by B, then passes, then S, with the arms of one shape adjacent: the routes
    as given if `impls` has `nsa`, then its other names, then the `baselines`; `all` stands for each baseline.
    A peer has an arm for each choice of branches that the routes switch off.

    `fixed` holds the other fields of Cell; those with a default may be left out. Duplicates on an axis are
    dropped. PlanError for an empty axis, and as `Cell.from_dict`.
    """
    axes = {"B": B, "passes": passes, "S": S, "routes": routes}
    for name, values in axes.items():
        if not values:
            raise PlanError(f"sweep: {name} is empty; give at least one value")
    fixed = {"impl": "nsa", "selection": "natural", **fixed}
    arms = [{"route": route} for route in routes if "nsa" in impls]
    less = list(dict.fromkeys(map(switched_off, routes)))
    arms += [
        {"impl": name, "route": route}
        for name in spelled_out((*impls, *baselines))
        if name != "nsa"
        for route in (less if name in PEERS else ["auto"])
    ]
    cells = [
        Cell.from_dict({**fixed, "B": b, "passes": p, "S": s, **arm})
        for b in dict.fromkeys(B)
        for p in dict.fromkeys(passes)
        for s in dict.fromkeys(S)
        for arm in arms
    ]
    return list(dict.fromkeys(cells))


def spelled_out(names: Iterable[str]) -> list[str]:
    """The names of impls, each once, with `all` as every baseline that it stands for."""
    return list(dict.fromkeys(one for name in names for one in (BASELINES if name == ALL else (name,))))


def switched_off(route: str) -> str:
    """What of a route a peer can follow, its branches that are off: `auto`, or such as `sel=off,win=off`."""
    parts = {part.replace(" ", "").replace("score=", "sel=") for part in route.split(",")}
    return ",".join(off for off in ("cmp=off", "sel=off", "win=off") if off in parts) or "auto"


def names_backend(route: str) -> bool:
    """Whether a route says more than which branches are off."""
    return any(part.strip().partition("=")[2] != "off" for part in route.split(",") if part.strip() != "auto")


def no_backends(impl: str) -> str:
    """What is said of a peer's route that names a backend."""
    return f"{impl} has no backends, only branches that are off, such as win=off"


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


def fits(name: str, value: object) -> bool:
    """Whether the text field `name` of a cell may hold `value`."""
    return isinstance(value, str) and re.fullmatch(_PATTERN[name], value) is not None


def pattern(name: str) -> str:
    """The regular expression that the text field `name` matches as a whole."""
    return _PATTERN[name]


def allowed(name: str) -> str:
    """What the text field `name` may hold, in words."""
    return _SAY.get(name, _PATTERN[name].replace("|", ", "))


def _check_text(name: str, value: object) -> None:
    if not fits(name, value):
        raise PlanError(f"cell: {name} is {value!r}; allowed: {allowed(name)}")
