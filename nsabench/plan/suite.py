"""A suite: sweeps, how to measure them and what must come out, as data; and the cells it means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nsabench.plan.axes import PlanError, sizes_text
from nsabench.plan.cells import PEERS, Cell, groups, names_backend, no_backends, sweep, switched_off
from nsabench.plan.declaration import AXES, PREFILL_ONLY, SHAPE, SUITE, SWEEP
from nsabench.plan.kinds import Sizes, Table
from nsabench.plan.order import informative

MAX_CELLS = 100_000
"""Most cells a sweep may name; more is a slip of the pen."""

Defaults = Callable[[str], Mapping[str, Any]]
"""What a sweep on a device, `auto` too, takes where it does not say: the device itself, sizes, dtype."""


@dataclass(frozen=True)
class Sweep:
    """One sweep with all that is given for it; an axis is a tuple of its values, left out if not given.

    `number` is its place in the suite's file, from 1.
    """

    number: int
    phase: str
    headline: bool
    axes: Mapping[str, tuple[Any, ...]]
    names: Mapping[str, str]
    """What each axis is called where it was given: `sweep[2].S`, `shape.dim` or `--S`."""

    def text(self, axis: str) -> str:
        """The values of an axis as an option of a command takes them; empty where none is given."""
        values = self.axes.get(axis, ())
        if values and isinstance(AXES[axis], Sizes) and axis != "seed":
            return sizes_text(values)
        return (";" if axis == "routes" else ",").join(map(str, values))

    def cells(self, defaults: Defaults) -> list[Cell]:
        """Every combination; the lengths of one shape and their arms are adjacent."""
        axes = {name: getattr(kind, "default", None) for name, kind in AXES.items()} | dict(self.axes)
        outer = {name: axes[name] or (None,) for name in ("mode", *SHAPE)}
        count = math.prod(len(axes[name] or (None,)) for name in AXES)
        if count > MAX_CELLS:
            raise PlanError(f"{self.names['S']}: with the other axes, names {count} cells, over {MAX_CELLS}")
        found: list[Cell] = []
        for values in itertools.product(*outer.values()):
            given = {name: value for name, value in zip(outer, values, strict=True) if value is not None}
            fixed = {**defaults(given.pop("device")), **given}
            found += sweep(
                S=axes["S"],
                B=axes["B"],
                routes=axes["routes"],
                passes=axes["passes"],
                baselines=[name for name in axes["baselines"] if name != "none"],
                impls=axes["impl"],
                phase=self.phase,
                **{**fixed, "dv": given.get("dv", fixed["dk"])},
            )
        return found


@dataclass(frozen=True)
class Suite:
    """Sweeps as declared. `shape`, `policy` and `criteria` hold what is given; `sweeps`, each sweep's own."""

    name: str
    about: str
    sweeps: tuple[dict[str, Any], ...]
    shape: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    criteria: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Axes that came from the command line, and the option of each."""

    @classmethod
    def read(cls, name: str, declared: Mapping[str, Any]) -> Suite:
        """The suite that a file declares; PlanError names the key, the value and what is allowed."""
        found = SUITE.read(dict(declared), "")
        for number, own in enumerate(found["sweep"], 1):
            _refuse_contradictions(own, f"sweep[{number}].{{}}".format)
        return cls(
            name=name,
            about=found["about"],
            sweeps=tuple(found["sweep"]),
            **{key: found[key] for key in ("shape", "policy", "criteria", "tags") if key in found},
        )

    @classmethod
    def of_options(cls, phase: str, given: Mapping[str, str], option: Callable[[str], str]) -> Suite:
        """The suite of one sweep that a command's options say; `option` names the option of an axis."""
        own = SWEEP.read_as({"phase": phase, **given}, "", option)
        _refuse_contradictions(own, option)
        return cls(phase, f"{phase} from the command line", (own,), options={a: option(a) for a in AXES})

    def overridden(self, given: Mapping[str, str], option: Callable[[str], str]) -> Suite:
        """The suite with axes replaced in every sweep; those of a prefill alone in the prefills."""
        axes = Table("", AXES).read_as(given, "", option)
        phases = {own["phase"] for own in self.sweeps}
        for name in axes.keys() & PREFILL_ONLY.keys():
            if "prefill" not in phases:
                raise PlanError(f"{option(name)}: no sweep of the suite is a prefill")
        impls = axes.get("impl", ("nsa",))
        changed = [
            (own if "nsa" in impls else _without_backends(own, impls))
            | {a: v for a, v in axes.items() if own["phase"] == "prefill" or a not in PREFILL_ONLY}
            for own in self.sweeps
        ]
        for own in changed:
            _refuse_contradictions(own, option)
        return replace(self, sweeps=tuple(changed), options={**self.options, **{a: option(a) for a in axes}})

    def resolved(self) -> Iterator[Sweep]:
        """The sweeps, each with what [shape] says for it, headlines first."""
        numbered = sorted(enumerate(self.sweeps, 1), key=lambda item: not item[1].get("headline", False))
        for number, own in numbered:
            names = {a: f"sweep[{number}].{a}" for a in AXES}
            names |= {a: f"shape.{a}" for a in self.shape if a not in own}
            given = {a: v for a, v in (self.shape | own).items() if a in AXES}
            yield Sweep(number, own["phase"], own.get("headline", False), given, {**names, **self.options})

    def to_dict(self) -> dict[str, Any]:
        """As a suite's file says it, lists of one as their one value: `read` takes it back."""
        found = {
            "about": self.about,
            "tags": list(self.tags),
            "policy": dict(self.policy),
            "shape": _plain(self.shape),
            "sweep": [_plain(own) for own in self.sweeps],
            "criteria": dict(self.criteria),
        }
        return {key: value for key, value in found.items() if value}


def cells_of(suite: Suite, defaults: Defaults, *, coarse_first: bool = False) -> list[Cell]:
    """The cells of a suite, each once, headline sweeps first; those to be compared adjacent, baselines last.

    `coarse_first` puts the headlines, and then the rest, in the order of `informative`.
    """
    parts: dict[bool, list[Cell]] = {True: [], False: []}
    for part in suite.resolved():
        parts[part.headline] += part.cells(defaults)
    found: dict[Cell, None] = {}
    for cells in parts.values():
        together = informative(groups(cells)) if coarse_first else groups(cells)
        found.update(dict.fromkeys(cell for group in together for cell in group))
    return [cell for group in groups(found) for cell in sorted(group, key=lambda c: c.impl != "nsa")]


def tags_of(words: Iterable[str], where: str) -> tuple[str, ...]:
    """The words as tags; PlanError where one is none."""
    given = list(words)
    return SUITE.keys["tags"].read(given, where) if given else ()


def unmeasured(suite: Suite, cells: Iterable[Cell]) -> list[str]:
    """The criteria that no cells can meet, because none of that kind is measured; a line for each."""
    measured = {(c.S, c.phase, c.passes, c.scope, c.arm, c.group_key) for c in cells}
    lines = []
    for key in ("speedup", "max_ms"):
        for number, wanted in enumerate(suite.criteria.get(key, ()), 1):
            kind = (wanted["S"], wanted["phase"], wanted.get("passes", "fwd"), wanted.get("scope", "module"))
            arms = [wanted.get("route", "auto"), *([wanted["against"]] if "against" in wanted else [])]
            where = [{m[5] for m in measured if m[:5] == (*kind, arm)} for arm in arms]
            if not set.intersection(*where):
                what = f"{kind[1]} {kind[2]} of the {kind[3]} at S={kind[0]}"
                lines.append(f"criteria.{key}[{number}]: no sweep measures {' beside '.join(arms)}, {what}")
    return lines


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    def one(value: object) -> object:
        if not isinstance(value, tuple):
            return value
        return value[0] if len(value) == 1 else list(value)

    return {key: one(value) for key, value in table.items()}


def _without_backends(own: Mapping[str, Any], impls: Collection[str]) -> dict[str, Any]:
    """The axes of a sweep, of whose routes others than the NSA here have nothing, and peers what is off."""
    kept = {axis: value for axis, value in own.items() if axis != "routes"}
    if "routes" in own and not set(PEERS).isdisjoint(impls):
        kept["routes"] = tuple(dict.fromkeys(map(switched_off, own["routes"])))
    return kept


def _refuse_contradictions(own: Mapping[str, Any], name: Callable[[str], str]) -> None:
    for axis, only in PREFILL_ONLY.items():
        if own["phase"] == "decode" and own.get(axis, (only,)) != (only,):
            raise PlanError(f"{name(axis)}: decode has only {only}")
    impls = own.get("impl", ("nsa",))
    peers = [name for name in impls if name in PEERS]
    if "nsa" not in impls and peers and any(map(names_backend, own.get("routes", ()))):
        raise PlanError(f"{name('routes')}: {no_backends(peers[0])}; leave it out, or add nsa")
    if "routes" in own and "nsa" not in impls and not peers:
        raise PlanError(f"{name('routes')}: {','.join(impls)} has no routes; leave it out, or add nsa")
    baselines = own.get("baselines", ())
    if "none" in baselines and len(baselines) > 1:
        raise PlanError(f"{name('baselines')}: {','.join(baselines)!r}; none goes alone")
