"""What must come out: criteria as declared, in words, those of a file, and those that hold where none are."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsabench.plan.axes import PlanError, nearest
from nsabench.plan.declaration import CRITERIA, SUITE
from nsabench.plan.kinds import Table

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cells": {"max_failures": 0, "correct": True, "max_rel_interval": 0.5},
    "comparison": {"comparisons": "valid"},
    "verify": {"verify": "pass"},
    "train": {"training": [{"loss_falls": True, "open_gates": True}]},
    "needle": {"needle": 0.9, "sel_off_near_chance": True},
}
"""Criteria of a run that declares none, by what it is. `comparison` is added for one, and `needle` to a
training in which needles were looked for.
"""


@dataclass(frozen=True)
class Wanted:
    """One criterion: where it stands, as `speedup[1]`, its key, what it says, and that in words."""

    name: str
    key: str
    value: Any
    words: str


def wanted_of(criteria: Mapping[str, Any]) -> list[Wanted]:
    """The criteria one by one, in the order of a suite's schema; a flag that is off is none."""
    found = []
    for key, say in _WORDS.items():
        value = criteria.get(key)
        if isinstance(value, list):
            found += [Wanted(f"{key}[{n}]", key, one, say(one)) for n, one in enumerate(value, 1)]
        elif value is not None and value is not False:
            found.append(Wanted(key, key, value, say(value)))
    return found


def read_criteria(declared: object, where: str = "criteria") -> dict[str, Any]:
    """The criteria in their settled form. PlanError for what no suite may say, and for none at all."""
    found = Table("Criteria.", CRITERIA).read(declared, where)
    if not wanted_of(found):
        raise PlanError(f"{where}: nothing is wanted; allowed: {', '.join(CRITERIA)}")
    return found


def load_criteria(path: Path) -> dict[str, Any]:
    """The `[criteria]` of a TOML file, a suite's or one of its own; PlanError in one line with the file."""
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: not TOML: {error}") from None
    try:
        for key in declared:
            if key not in SUITE.keys:
                raise PlanError(f"{key}: unknown key; {nearest(key, SUITE.keys)}")
        if "criteria" not in declared:
            raise PlanError("no [criteria] in it")
        return read_criteria(declared["criteria"])
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def percent(part: float) -> str:
    """0.05 -> "5 %"."""
    return f"{100 * part:.4g} %"


def _step(wanted: Mapping[str, Any]) -> str:
    passes, scope = wanted.get("passes", "fwd"), wanted.get("scope", "module")
    return f"{wanted['phase']} {passes} of the {scope} at S={wanted['S']}"


def _training(wanted: Mapping[str, Any]) -> str:
    said = {
        "steps": lambda n: f"at least {n} steps",
        "loss": lambda most: f"final loss at most {most:g} nats",
        "loss_falls": lambda on: "loss falls" if on else "",
        "open_gates": lambda on: "no gate collapsed" if on else "",
        "needle": lambda least: f"needle accuracy past the window at least {percent(least)}",
        "sel_off_near_chance": lambda on: "near chance with sel off" if on else "",
    }
    parts = [say(wanted[key]) for key, say in said.items() if key in wanted]
    what = f"a training in {wanted['precision']}" if "precision" in wanted else "a training"
    return ", ".join([f"{what}: status ok, every loss finite", *filter(None, parts)])


_WORDS: dict[str, Callable[[Any], str]] = {
    "require_ok": lambda value: "every cell ok",
    "max_failures": lambda most: f"at most {most} failed cells" if most else "no failed cell",
    "correct": lambda value: "every ok cell within its error budget",
    "max_rel_interval": lambda most: f"no 95 % interval wider than {percent(most)} of its time",
    "comparisons": lambda value: (
        "no verdict INVALID" if value == "valid" else "no verdict INVALID or INCONCLUSIVE"
    ),
    "verify": lambda value: "a scorecard in which nothing of ours fails",
    "speedup": lambda wanted: (
        f"{wanted.get('route', 'auto')} at least {wanted['ratio']:g} x the speed of {wanted['against']}, "
        + _step(wanted)
    ),
    "max_ms": lambda wanted: f"{wanted.get('route', 'auto')} at most {wanted['ms']:g} ms, {_step(wanted)}",
    "training": _training,
}
