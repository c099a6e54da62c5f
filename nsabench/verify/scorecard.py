"""The scorecard: each rule put to each subject, a row for each dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nsabench.plan import PlanError
from nsabench.plan.checks import Choice, Rule
from nsabench.verify import named, peer_subjects, rules, rules_layer, rules_lists, rules_meaning
from nsabench.verify.ours import subjects_for
from nsabench.verify.subjects import Subject
from nsabench.verify.trial import CHECKS, Oracle, Trial, run_trial

RULE_MODULES = (rules, rules_layer, rules_lists, rules_meaning, named)
"""Entering their rules in ``CHECKS`` when they are imported."""

Row = dict[str, Any]


def run_scorecard(choice: Choice, on_row: Callable[[Row], None], told: Callable[[str], None]) -> list[Row]:
    """Put the rules of ``choice`` to its subjects; each row goes to ``on_row`` as soon as it is there.

    ``told`` gets a line of progress for each rule. A subject that raises fails that rule and the run goes on.

    Raises:
        PlanError: a subject of no such name, or a device that is not here.
    """
    check_device(choice.device)
    found = subjects_for(choice, peer_subjects.peer_subjects(choice))
    wanted = choice.asked_rules
    told(f"{len(wanted)} rules, {len(found)} subjects, {', '.join(choice.asked_dtypes)} on {choice.device}")
    rows: list[Row] = []
    oracle = Oracle()
    for number, (name, rule) in enumerate(wanted.items(), 1):
        told(f"{number}/{len(wanted)} {name}: {rule.title}")
        for subject in found:
            for row in rule_rows(name, rule, subject, choice, oracle):
                rows.append(row)
                on_row(row)
        oracle.forget()
    return rows


def rule_rows(name: str, rule: Rule, subject: Subject, choice: Choice, oracle: Oracle) -> Iterator[Row]:
    """The rows of one rule for one subject: one a dtype, or one in the first dtype that it takes."""
    if subject.branch not in rule.branches or (rule.subjects and subject.name not in rule.subjects):
        return
    full = choice.level == "full"
    dtypes = [dtype for dtype in choice.asked_dtypes if dtype in subject.dtypes]
    every = full or rule.every_dtype
    for place, dtype in enumerate(dtypes):
        trial = Trial(name, subject, dtype, full=full, oracle=oracle)
        row = run_trial(trial, CHECKS[name])
        if every or row["status"] != "unsupported" or place == len(dtypes) - 1:
            yield row
        if not every and row["status"] != "unsupported":
            return


def check_device(device: str) -> None:
    """PlanError, in one line, where torch has no such device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise PlanError(f"device {device!r} cannot be used: {said}") from error
