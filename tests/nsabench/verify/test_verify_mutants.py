"""Planted mistakes: each turns exactly its rules red, on the row it was planted in and on no other."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

import nsa.routes
from nsabench.plan.checks import Choice
from nsabench.verify import run_scorecard
from tests.nsabench.verify import mutants

ROWS = {"cmp": "sdpa", "score": "chunked", "sel": "gather:keys", "win": "sdpa"}
"""The row of each branch that mistakes are planted in."""


def plant(monkeypatch: pytest.MonkeyPatch, branch: str, mutant: str) -> str:
    """Put a mistake into the route table; returns the subject that has it."""
    backend = ROWS[branch]
    target = f"{mutants.__name__}:{mutant}"
    table = tuple(
        replace(row, target=target) if (row.branch, row.backend) == (branch, backend) else row
        for row in nsa.routes.TABLE
    )
    assert table != nsa.routes.TABLE
    monkeypatch.setattr(nsa.routes, "TABLE", table)
    return f"{branch}:{backend}"


def verified(**choice: Any) -> list[dict[str, Any]]:
    return run_scorecard(Choice(**choice, peers=False), lambda row: None, lambda text: None)


def red(rows: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The rules that failed, by subject."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["status"] == "fail":
            found[row["subject"]].add(row["rule"])
    return dict(found)


SHAPES = {"values", "gradients", "brute_force", "lengths", "group_sizes", "value_dim", "strides", "any_start"}
WINDOW = SHAPES | {"row_maxima", "very_negative", "window_width", "sliding_fa2"}
SCORES = {"brute_force", "group_sizes", "strides", "any_start", "decode", "row_maxima", "selection"}

MUTANTS: dict[str, set[str]] = {
    "win_mask_polarity": WINDOW | {"decode", "causality", "no_nan_rows"},
    "win_one_too_many": WINDOW | {"decode", "no_nan_rows"},
    "win_decode_one_too_many": {"decode", "any_start", "sliding_fa2"},
    "win_shared_maximum": {"row_maxima", "window_width"},  # token 0 reaches every row's rounding
    "win_knows_its_batch": {"batch_invariance"},
    "win_backward_that_varies": {"determinism"},
    "win_crash": {"group_sizes"},
    "cmp_early": SHAPES
    | {"row_maxima", "very_negative", "causality", "block_visibility", "no_nan_rows", "compressed_fa2"},
    "cmp_gradient_of_empty_rows": {"gradients", "group_sizes", "value_dim", "any_start"}
    | {"no_nan_rows", "row_maxima", "determinism"},
    "sel_poisoned_by_empty": {"leading_empty", "no_nan_rows"},
    "sel_nothing_is_nan": {"no_nan_rows"},
    "sel_counts_twice": {"duplicates"},
    "score_fp16_cube": {"small_scores", "score_precision", "selection", "any_start", "row_maxima"},
    "score_higher_ties": {"ties"},
    "score_largest_head": SCORES | {"group_sum"},
    "score_flat_weights": SCORES | {"score_weights", "lengths", "score_precision"},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_mistake_turns_exactly_its_rules_red(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    branch = mutant.partition("_")[0]
    subject = plant(monkeypatch, branch, mutant)
    assert red(verified(subjects=(subject,), dtypes=("fp32",))) == {subject: MUTANTS[mutant]}


def test_no_other_row_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        plant(monkeypatch, mutant.partition("_")[0], mutant): MUTANTS[mutant]
        for mutant in ("cmp_early", "score_higher_ties", "sel_poisoned_by_empty", "win_mask_polarity")
    }
    others = ("cmp:reference", "score:reference", "sel:gather:queries", "sel:reference", "win:reference")
    rules = ("values", "ties", "leading_empty", "block_visibility", "window_width", "own_block")
    found = red(verified(subjects=(*planted, *others), rules=rules, dtypes=("fp32",)))
    assert found == {subject: red_rules & set(rules) for subject, red_rules in planted.items()}


def test_a_layer_is_red_where_it_takes_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverted mask of the small-S report, seen by the check of its name, and by how much."""
    plant(monkeypatch, "win", "win_mask_polarity")
    rows = verified(
        subjects=("layer:sdpa", "layer:reference"), rules=("smallS_equivalence", "gates"), dtypes=("fp32",)
    )
    assert red(rows) == {"layer:sdpa": {"smallS_equivalence", "gates"}}
    (row,) = (r for r in rows if (r["rule"], r["subject"]) == ("smallS_equivalence", "layer:sdpa"))
    assert row["max_abs_err"] > 0.01
    assert row["budget"] == 1e-5
    assert "MAE" in row["reported_note"]


def test_a_crash_is_a_failure_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = plant(monkeypatch, "win", "win_crash")
    (row,) = verified(subjects=(subject,), rules=("group_sizes",), dtypes=("fp32",))
    assert row["status"] == "fail"
    assert row["reason"] == "RuntimeError: G must be a power of two"
    assert (row["cases"], row["failed"]) == (6, 1)
    assert row["max_abs_err"] is None
    assert "G=3" in row["worst"]
