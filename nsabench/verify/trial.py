"""One rule put to one subject in one dtype: what was asked, what was wrong, and the row that says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import nsa.reference
from nsa.routes import FUNCTIONS
from nsa.testing import check, error_budget
from nsabench.plan.checks import RULES
from nsabench.verify.ours import run_function, run_layer
from nsabench.verify.subjects import DTYPES, Case, LayerCase, Subject, Tensors, placed


class Oracle:
    """What the specification gives for cases, in fp64 and in their own dtype, kept for the next subject."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[Case, Tensors]] = {}
        self._made: dict[tuple[Any, ...], Any] = {}
        self._budgets: dict[tuple[Any, ...], float] = {}

    def exact(self, case: Case) -> Tensors:
        """In fp64, on the CPU."""
        return self._run(case, torch.float64)

    def eager(self, case: Case) -> Tensors:
        """In the case's dtype, on the CPU."""
        return self._run(case, DTYPES[case.dtype])

    def budget(self, case: Case, key: str) -> float:
        """What a result may differ from the specification's, by :func:`nsa.testing.error_budget`."""
        place = (*self._key(case), key)
        if place not in self._budgets:
            exact, eager = self.exact(case)[key], self.eager(case)[key]
            self._budgets[place] = error_budget(exact, eager, largest(case))
        return self._budgets[place]

    def once(self, make: Callable[..., Any], *args: Any) -> Any:
        """``make(*args)``, made once for all subjects."""
        key = (make, *args)
        if key not in self._made:
            self._made[key] = make(*args)
        return self._made[key]

    def forget(self) -> None:
        """Drop what is kept: the next rule asks other cases."""
        self._kept.clear()
        self._made.clear()
        self._budgets.clear()

    @staticmethod
    def _key(case: Case) -> tuple[Any, ...]:
        if isinstance(case, LayerCase) and case.blocks is not None:
            # The case is made anew for each subject, with the blocks that it attended: mostly the same ones.
            facts = (case.config, case.mode, case.chunks, case.gradients, case.trained, case.only)
            return (id(case.tensors), id(case.options), *facts, case.blocks.numpy().tobytes())
        return (case,)

    def _run(self, case: Case, dtype: torch.dtype) -> Tensors:
        key = (*self._key(case), dtype)
        if key not in self._kept:
            # The case stays with its result: an id belongs to it only as long as it lives.
            self._kept[key] = (case, self._specified(case, dtype))
        return self._kept[key][1]

    def _specified(self, case: Case, dtype: torch.dtype) -> Tensors:
        if case.layout and case.layout != "expanded":
            case = replace(case, layout="")
        if isinstance(case, LayerCase):
            return run_layer(case, "cpu", "reference", dtype)
        return run_function(getattr(nsa.reference, FUNCTIONS[case.branch]), case, "cpu", dtype)


def asking_gradients(case: Case) -> Case:
    """The case with gradients."""
    return replace(case, gradients=True)


def largest(case: Case) -> float:
    """Largest magnitude that goes in."""
    given = [t for t in placed(replace(case, layout=""), "cpu").values() if t.is_floating_point()]
    return max(float(t.detach().abs().max()) for t in given if t.numel())


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. ``what`` names the quantity."""

    case: str
    what: str
    error: float
    budget: float
    places: bool = False
    """The error is a number of places that break the rule."""

    @property
    def ok(self) -> bool:
        """True when the error is a number and within the budget."""
        return math.isfinite(self.error) and self.error <= self.budget

    @property
    def part(self) -> float:
        """The error over its budget: above 1 is wrong, exact 0."""
        if math.isnan(self.error):
            return math.inf
        if not self.budget:
            return math.inf if self.error else 0.0
        return self.error / self.budget


class Trial:
    """One rule, one subject, one dtype. A rule asks cases of it and puts down what it finds."""

    def __init__(
        self, rule: str, subject: Subject, dtype: str, *, full: bool = False, oracle: Oracle | None = None
    ) -> None:
        self.rule, self.subject, self.dtype, self.full = rule, subject, dtype, full
        self.oracle = oracle or Oracle()
        self.findings: list[Finding] = []
        self.asked: dict[str, None] = {}
        self.refused: list[str] = []
        self.crashes: list[str] = []
        self.notes: list[str] = []
        self.backward = False

    @property
    def branch(self) -> str:
        return self.subject.branch

    def ask(self, case: Case) -> Tensors | None:
        """The subject's answer, on the CPU; None where it refuses, or crashes, which is put down."""
        self.backward |= case.gradients
        reason = self.subject.refusal(case)
        if reason:
            self.refused.append(reason)
            return None
        self.asked[case.name] = None
        try:
            found = self.subject.run(case)
            return {name: tensor.detach().cpu() for name, tensor in found.items()}
        except Exception as error:
            self.crashed(case.name, error)
            return None

    def takes(self, case: Case) -> bool:
        """Whether the subject would run the case; a refusal is not put down."""
        return not self.subject.refusal(case)

    def with_gradients(self, case: Case) -> Case:
        """The case, with gradients asked for where the subject computes them."""
        asked: Case = self.oracle.once(asking_gradients, case)
        return asked if self.takes(asked) else case

    def crashed(self, case: str, error: BaseException) -> None:
        """Put down an exception: its type and first line."""
        said = next(iter(str(error).strip().splitlines()), "")
        self.crashes.append(f"{type(error).__name__}: {said}" if said else type(error).__name__)
        self.asked[case] = None
        self.findings.append(Finding(case, "crash", math.inf, 0.0))

    def judge(self, case: str, what: str, error: float, budget: float = 0.0) -> None:
        """Put down an error and what it may be."""
        self.asked[case] = None
        self.findings.append(Finding(case, what, error, budget))

    def holds(self, case: str, what: str, violations: int | torch.Tensor) -> None:
        """Put down how many places break a rule that has no tolerance."""
        self.asked[case] = None
        self.findings.append(Finding(case, what, float(violations), 0.0, places=True))

    def same(self, case: str, what: str, mine: torch.Tensor, other: torch.Tensor) -> None:
        """Put down whether two tensors agree bit for bit."""
        if mine.shape != other.shape:
            raise ValueError(f"{what} is {tuple(mine.shape)}, not {tuple(other.shape)}")
        self.judge(case, what, check(mine, other, 0.0).max_abs_err)

    def close(self, case: Case, what: str, mine: torch.Tensor, exact: torch.Tensor, budget: float) -> None:
        """Put down how far a result is from the exact one."""
        self.judge(case.name, what, check(mine, exact, budget).max_abs_err, budget)

    def meets_spec(self, case: Case, only: tuple[str, ...] = ()) -> None:
        """Ask a case and put down every quantity of the answer against the specification."""
        found = self.ask(case)
        if found is None:
            return
        if isinstance(case, LayerCase) and "blocks" in found and case.blocks is None:
            # Whether the right blocks are chosen is put to the scores; here they are attended.
            case = replace(case, blocks=found["blocks"])
        exact = self.oracle.exact(case)
        for key in found.keys() & exact.keys():
            if key != "blocks" and (not only or key in only):
                self.close(case, key, found[key], exact[key], self.oracle.budget(case, key))

    def note(self, text: str) -> None:
        """Say something beside the report's figure, once."""
        if text not in self.notes:
            self.notes.append(text)

    def row(self, seconds: float) -> dict[str, Any]:
        """The row of the scorecard, without its run_id."""
        rule = RULES[self.rule]
        failed = [finding for finding in self.findings if not finding.ok]
        worst = max(self.findings, key=lambda finding: (not finding.ok, finding.part), default=None)
        status, reason = self._status(failed, worst)
        error = math.nan if worst is None else worst.error
        return {
            "rule": self.rule,
            "title": rule.title,
            "source": rule.source,
            "subject": self.subject.name,
            "branch": self.branch,
            "backend": self.subject.backend,
            "dtype": self.dtype,
            "passes": "fwd_bwd" if self.backward else "fwd",
            "status": status,
            "reason": reason,
            "max_abs_err": error if math.isfinite(error) else None,
            "budget": None if worst is None else worst.budget,
            "cases": len(self.asked),
            "failed": len({finding.case for finding in failed}),
            "worst": "" if worst is None else f"{worst.case}: {worst.what}",
            "reported": rule.reported,
            "reported_note": "; ".join(filter(None, (rule.report, *self.notes))),
            "seconds": seconds,
        }

    def _status(self, failed: list[Finding], worst: Finding | None) -> tuple[str, str]:
        differs = self.subject.differs(self.rule)
        if self.crashes:
            return "fail", self.crashes[0]
        if worst is not None and failed:
            wrong = _said(worst)
            return ("differs", f"{differs} ({wrong})") if differs else ("fail", wrong)
        if worst is None:
            return "unsupported", next(iter(self.refused), "the rule asks nothing of it")
        if self.refused:
            return "pass", f"{len(self.refused)} cases refused: {self.refused[0]}"
        return "pass", ""


def _said(worst: Finding) -> str:
    if not math.isfinite(worst.error):
        return f"{worst.what} is not finite ({worst.case})"
    if worst.places:
        return f"{worst.what}: {worst.error:.0f} places ({worst.case})"
    return f"{worst.what} differs by {worst.error:.3g}, allowed {worst.budget:.3g} ({worst.case})"


CHECKS: dict[str, Callable[[Trial], None]] = {}
"""What each rule does, by its name in :data:`nsabench.plan.checks.RULES`."""


def rule(check: Callable[[Trial], None]) -> Callable[[Trial], None]:
    """Enter a rule under its function's name."""
    CHECKS[check.__name__] = check
    return check


def run_trial(trial: Trial, rule: Callable[[Trial], None]) -> dict[str, Any]:
    """Put the rule and return its row. What a rule cannot make sense of is a failure of the subject."""
    began = time.perf_counter()
    try:
        rule(trial)
    except Exception as error:
        trial.crashed("an answer of another shape or kind", error)
    return trial.row(time.perf_counter() - began)
