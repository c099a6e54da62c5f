"""What can be verified: every rule and every trip has a check, and a choice of them names what is known."""

from __future__ import annotations

import pytest

from nsabench.plan import PlanError
from nsabench.plan.checks import BRANCHES, DTYPES, LAYER, LEVELS, NAMED, RULES, TRIPS, Choice

KNOWN = [("cmp:sdpa", "cmp", "sdpa"), ("sel:gather", "sel", "gather"), ("layer:auto", "layer", "auto")]


def test_every_numbered_rule_and_every_trip_is_covered() -> None:
    covered = {what for rule in RULES.values() for what in rule.covers}
    assert covered == {*map(str, range(1, 13)), *TRIPS}


def test_rules_are_put_to_branches_that_exist() -> None:
    for name, rule in RULES.items():
        assert rule.title, name
        assert rule.source, name
        assert rule.covers, name
        assert rule.level in LEVELS, name
        assert rule.branches, name
        assert set(rule.branches) <= {*BRANCHES, LAYER}, name


def test_the_reports_have_their_checks() -> None:
    assert NAMED == (
        "no_nan_rows", "smallS_equivalence", "sliding_fa2", "compressed_fa2", "selection_packed",
        "phi_mlp_matches_avg", "batched_equals_stepwise",
    )  # fmt: skip
    reported = {name: rule.reported for name, rule in RULES.items() if rule.reported is not None}
    assert reported == {"smallS_equivalence": 0.152, "sliding_fa2": 0.766, "selection_packed": 0.629}
    assert "0.325" in RULES["selection_packed"].report


def test_a_level_has_its_dtypes_and_rules() -> None:
    quick, full = Choice(), Choice(level="full")
    assert quick.asked_dtypes == ("fp32", "fp16", "bf16")
    assert full.asked_dtypes == DTYPES
    assert list(full.asked_rules) == list(RULES)
    assert set(full.asked_rules) - set(quick.asked_rules) == {"geometries", "int32_offsets"}


def test_names_are_taken_in_the_order_of_the_scorecard() -> None:
    choice = Choice(dtypes=("bf16", "fp32"), rules=("int32_offsets", "values"))
    assert choice.asked_dtypes == ("fp32", "bf16")
    assert list(choice.asked_rules) == ["values", "int32_offsets"]


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ((), [0, 1, 2]),
        (("sel:gather",), [1]),
        (("cmp",), [0]),
        (("gather", "layer"), [1, 2]),
    ],
)
def test_subjects_are_picked_by_name_branch_or_backend(names: tuple[str, ...], places: list[int]) -> None:
    assert Choice(subjects=names).pick(KNOWN) == places


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"level": "fast"}, r"^unknown level 'fast'; known: quick, full$"),
        ({"dtypes": ("fp31",)}, r"^unknown dtype 'fp31'; did you mean fp32\?$"),
        ({"rules": ("causalty",)}, r"^unknown rule 'causalty'; did you mean causality\?$"),
    ],
)
def test_an_unknown_name_is_one_line(given: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Choice(**given)  # type: ignore[arg-type]


def test_an_unknown_subject_is_one_line() -> None:
    with pytest.raises(PlanError, match=r"^unknown subject 'sel:gathr'; did you mean sel:gather\?$"):
        Choice(subjects=("sel:gathr",)).pick(KNOWN)
