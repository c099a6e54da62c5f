"""The order within a budget: every prefix of it covers the sweep as evenly as it can."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsabench.plan import Cell, groups, informative, sweep
from nsabench.plan.order import coarse_to_fine

FIXED: dict[str, Any] = {
    **dict.fromkeys(("dim", "heads", "groups", "dk", "dv", "l", "d", "l_sel", "n_sel", "w"), 8),
    "phase": "prefill",
    "mode": "batched",
    "dtype": "fp32",
    "device": "cpu",
    "seed": 0,
    "routes": ["auto"],
}


def cells(**more: Any) -> list[Cell]:
    return sweep(**{**FIXED, "S": [1, 2, 4, 8, 16], "B": [1], "passes": ["fwd"], **more})


@pytest.mark.parametrize(
    ("count", "order"),
    [
        (0, []),
        (1, [0]),
        (2, [0, 1]),
        (3, [0, 2, 1]),
        (5, [0, 4, 2, 1, 3]),
        (9, [0, 8, 4, 2, 6, 1, 3, 5, 7]),
    ],
)
def test_ends_first_then_the_middles(count: int, order: list[int]) -> None:
    assert coarse_to_fine(range(count)) == order


@given(st.integers(0, 200))
def test_every_prefix_covers_the_whole(count: int) -> None:
    order = coarse_to_fine(range(count))
    assert sorted(order) == list(range(count))
    for length in range(2, count + 1):
        known = sorted(order[:length])
        gaps = [b - a for a, b in itertools.pairwise(known)]
        assert max(gaps) <= 2 * max(2, -(-count // (length - 1)))


def test_series_take_turns_and_groups_stay_whole() -> None:
    both = cells(passes=["fwd", "bwd"], routes=["auto", "sdpa"], baselines=["dense"])
    ordered = informative(groups(both))
    assert [(group[0].passes, group[0].S) for group in ordered] == [
        (passes, S) for S in (1, 16, 4, 2, 8) for passes in ("fwd", "bwd")
    ]
    assert all([c.route for c in group] == ["auto", "sdpa", "auto"] for group in ordered)
    assert {id(c) for group in ordered for c in group} == {id(c) for c in both}


def test_a_short_series_does_not_hold_up_a_long_one() -> None:
    mixed = cells() + cells(S=[3], seed=1)
    assert [(g[0].seed, g[0].S) for g in informative(groups(mixed))] == [
        *((0, 1), (1, 3)),
        *((0, S) for S in (16, 4, 2, 8)),
    ]


def test_the_order_does_not_depend_on_the_order_of_S_and_ordering_twice_changes_nothing() -> None:
    forwards, backwards = cells(), cells(S=[16, 8, 4, 2, 1])
    assert informative(groups(forwards)) == informative(groups(backwards))
    once = informative(groups(cells(passes=["fwd", "bwd"])))
    assert informative(once) == once


def test_nothing_has_no_order() -> None:
    assert informative([]) == []
