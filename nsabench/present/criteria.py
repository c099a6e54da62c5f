"""GO, NO-GO or CONDITIONAL, computed: every criterion held against stored rows, and what limits the rest.

A criterion that nothing measured is not met. GO takes all criteria met and nothing that limits them;
CONDITIONAL all met, with limits; anything else is NO-GO.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nsabench.plan.criteria import DEFAULTS, Wanted, wanted_of
from nsabench.present.criteria_cells import CELL_RULES
from nsabench.present.criteria_others import judge_training, judge_verify
from nsabench.present.evidence import MET, Found
from nsabench.present.limits import Limit, limits_of
from nsabench.present.material import Material, far_needles, id_of

Word = Literal["GO", "CONDITIONAL", "NO-GO"]


@dataclass(frozen=True)
class Check:
    """A criterion, where it comes from, and what was found."""

    wanted: Wanted
    origin: str
    found: Found

    @property
    def met(self) -> bool:
        return self.found.outcome == MET

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "criterion": self.wanted.name,
            "wanted": self.wanted.words,
            "origin": self.origin,
            "outcome": self.found.outcome,
            "measured": self.found.measured,
            "evidence": list(self.found.evidence),
        }


@dataclass(frozen=True)
class Verdict:
    """The word, every criterion, and what limits the ones that are met."""

    word: Word
    checks: tuple[Check, ...]
    limits: tuple[Limit, ...]

    @property
    def unmet(self) -> list[Check]:
        return [check for check in self.checks if not check.met]


@dataclass(frozen=True)
class Demand:
    """Criteria, where they come from, and the runs that those about every cell are about."""

    origin: str
    criteria: Mapping[str, Any]
    own: Material


def judge_material(
    material: Material, given: Mapping[str, Any] | None = None, origin: str = "--criteria"
) -> Verdict:
    """The verdict on these runs by the criteria given, else by those they declare, else by the defaults.

    Criteria about every cell are held against the runs that declare them; a speedup, a time or a training may
    be met by any run; a scorecard wanted is every scorecard there is.
    """
    checks = []
    demands = demands_of(material, given, origin)
    for demand in demands:
        for wanted in wanted_of(demand.criteria):
            rule, own = _RULES[wanted.key], demand.own
            scope = own if wanted.key in _UNIVERSAL or demand.origin.startswith(_DEFAULT) else material
            checks.append(Check(wanted, demand.origin, rule(wanted.value, scope)))
    each = [id_of(t) for d in demands if d.origin.startswith(_DEFAULT) for t in d.own.trainings]
    limits = limits_of(material, [check.wanted.key for check in checks], each)
    limits += [Limit(f"criterion {c.wanted.name}", text) for c in checks if c.met for text in c.found.limits]
    if not checks:
        return Verdict("NO-GO", (), tuple(limits))
    met = all(check.met for check in checks)
    return Verdict("NO-GO" if not met else "CONDITIONAL" if limits else "GO", tuple(checks), tuple(limits))


_DEFAULT = "default"


def demands_of(material: Material, given: Mapping[str, Any] | None, origin: str) -> list[Demand]:
    """Which criteria hold for which runs."""
    if given is not None:
        return [Demand(origin, given, material)]
    demands: list[Demand] = []
    plain = []
    for run in material.cells:
        suite = run.info.get("suite") or {}
        criteria = suite.get("criteria")
        if not criteria:
            plain.append(run)
            continue
        name = f"suite {suite.get('name') or id_of(run)}"
        for place, old in enumerate(demands):
            if old.origin == name and old.criteria == criteria:
                demands[place] = replace(old, own=Material(cells=(*old.own.cells, run)))
                break
        else:
            demands.append(Demand(name, criteria, Material(cells=(run,))))
    declared = {key for demand in demands for key in demand.criteria}
    return demands + _defaults(material, plain, declared)


def _defaults(material: Material, plain: Sequence[Any], declared: set[str]) -> list[Demand]:
    demands = []
    if plain:
        contests = any("comparison" in run.info for run in plain)
        criteria = {**DEFAULTS["cells"], **(DEFAULTS["comparison"] if contests else {})}
        demands.append(Demand(_DEFAULT, criteria, Material(cells=tuple(plain))))
    if material.scorecards and "verify" not in declared:
        demands.append(Demand(_DEFAULT, DEFAULTS["verify"], Material(scorecards=material.scorecards)))
    for training in material.trainings if "training" not in declared else ():
        (wanted,) = DEFAULTS["train"]["training"]
        looked = {"needle": True, "sel_off_near_chance": False}
        more = {k: v for k, v in DEFAULTS["needle"].items() if far_needles(training, sel=looked[k])}
        own = Material(trainings=(training,))
        demands.append(Demand(f"{_DEFAULT}, {id_of(training)}", {"training": [{**wanted, **more}]}, own))
    return demands


_RULES: dict[str, Callable[[Any, Material], Found]] = {
    **CELL_RULES,
    "verify": judge_verify,
    "training": judge_training,
}
_UNIVERSAL = {"require_ok", "max_failures", "correct", "max_rel_interval", "comparisons"}
