"""Installed peers on the scorecard: their columns, what they refuse, and the row of one not installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa import reference
from nsabench.peers import fla, registry
from nsabench.plan import PlanError
from nsabench.plan.checks import Choice
from nsabench.store.scorecard import check_score
from nsabench.verify import run_scorecard
from nsabench.verify.peer_subjects import PeerSubject, absent_rows, peer_subjects, spelled_out
from nsabench.verify.subjects import Subject
from tests.nsabench.peers.fake_peers import fake_fla

NAIVE = "fla-core:naive 0.6.0 sel"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla-core is installed, or rather its stand-in; lucidrains is not."""
    monkeypatch.setattr(registry.Peer, "version", lambda peer: "0.6.0" if peer.name == "fla-core" else None)
    monkeypatch.setattr(fla, "_ops", fake_fla([]))


def rows_of(choice: Choice) -> list[dict[str, Any]]:
    return run_scorecard(choice, lambda row: None, lambda text: None)


def test_a_column_for_each_branch_of_what_is_installed(installed: None) -> None:
    found = peer_subjects(Choice())
    assert [subject.name for subject in found] == [
        "fla-core:naive 0.6.0 cmp",
        "fla-core:naive 0.6.0 score",
        NAIVE,
        "fla-core 0.6.0 cmp",
        "fla-core 0.6.0 score",
        "fla-core 0.6.0 sel",
    ]
    assert {subject.backend for subject in found} == {"fla-core", "fla-core:naive"}
    assert not any(subject.ours for subject in found)
    subjects: list[Subject] = found  # the protocol, for the type checker
    assert subjects
    assert peer_subjects(Choice(peers=False)) == []
    (first, *_) = peer_subjects(Choice(device="meta"))
    assert isinstance(first, PeerSubject)
    assert first.device == "meta"


def test_rules_are_put_to_it_as_to_any_backend(installed: None) -> None:
    rules = ("values", "gradients", "lengths", "causality", "any_start")
    rows = rows_of(Choice(dtypes=("fp32",), subjects=("fla-core:naive",), rules=rules))
    said = {(row["rule"], row["branch"]): row["status"] for row in rows}
    for rule in rules[:4]:
        assert (said[rule, "cmp"], said[rule, "sel"]) == ("pass", "pass"), rule
    assert said["any_start", "sel"] == "unsupported"
    assert {row["subject"] for row in rows if row["branch"] == "sel"} == {NAIVE}
    for row in rows:
        check_score(row)


def test_what_it_gets_wrong_is_a_failure(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    true = fla._ops("naive").naive_nsa_selection

    def twice(q, k, v, block_indices, block_size, scale):  # type: ignore[no-untyped-def]
        return true(q, k, v, block_indices, block_size, scale) * 2

    monkeypatch.setattr(fla, "_ops", lambda name: SimpleNamespace(naive_nsa_selection=twice))
    (row,) = rows_of(Choice(dtypes=("fp32",), subjects=(NAIVE,), rules=("values",)))
    assert (row["status"], row["backend"]) == ("fail", "fla-core:naive")
    assert row["max_abs_err"] > row["budget"]


def test_what_differs_by_declaration_is_no_failure(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tuple(
        part.__class__(part.branch, part.variant, _doubled, part.refuse, "twice as much")
        for part in fla.BRANCHES
        if (part.branch, part.variant) == ("sel", "naive")
    )
    monkeypatch.setattr(fla, "BRANCHES", declared)
    (row,) = rows_of(Choice(dtypes=("fp32",), subjects=(NAIVE,), rules=("values",)))
    assert row["status"] == "differs"
    assert row["reason"].startswith("twice as much (o differs by ")


def _doubled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, **more: Any
) -> Any:
    return 2 * reference.selected_attention(q, k, v, block_indices, **more)[0], None


def test_one_that_is_not_installed_is_one_row_and_how_to_get_it(installed: None) -> None:
    row, *_ = absent_rows()
    assert (row["subject"], row["status"], row["rule"]) == ("lucidrains", "unsupported", "installed")
    assert row["reason"] == "not installed: pip install 'nsabench[peers]'"
    check_score(row)
    with pytest.raises(PlanError, match=r"lucidrains is not installed: pip install 'nsabench\[peers\]'"):
        spelled_out(("fla-core", "lucidrains"))


def test_a_peers_name_stands_for_all_its_variants(installed: None) -> None:
    assert spelled_out(("cmp", "fla-core", "sel:gather")) == (
        "cmp",
        "fla-core:naive",
        "fla-core",
        "sel:gather",
    )
    assert spelled_out(("fla-core:naive", NAIVE)) == ("fla-core:naive", NAIVE)
    assert spelled_out(()) == ()
