"""The statistics under planted trouble: what they promise, counted."""

from __future__ import annotations

import numpy as np
import pytest

from nsabench.stats import StatsError
from nsabench.stats.simulate import TROUBLES, Trouble, rates, session

FALSE = ("FASTER", "SLOWER", "INVALID")


@pytest.mark.parametrize("name", TROUBLES)
def test_interleaved_rounds_raise_few_false_alarms(name: str) -> None:
    found = rates(TROUBLES[name], sessions=300)
    assert sum(found.verdicts[verdict] for verdict in FALSE) <= 0.05
    assert found.covered >= 0.90
    assert sum(found.verdicts.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["drift of 10 %", "all of them"])
def test_one_arm_after_the_other_is_caught_or_wrong(name: str) -> None:
    found = rates(TROUBLES[name], sessions=200, interleaved=False, processes=1)
    assert found.covered < 0.6
    assert found.verdicts["INVALID"] > 0.4


@pytest.mark.parametrize("name", ["quiet", "drift of 10 %"])
def test_two_percent_is_found_in_a_steady_session(name: str) -> None:
    assert rates(TROUBLES[name], ratio=1.02, sessions=200).verdicts["SLOWER"] >= 0.9
    assert rates(TROUBLES[name], ratio=1 / 1.02, sessions=200).verdicts["FASTER"] >= 0.9


def test_more_processes_find_five_percent_in_any_session() -> None:
    for trouble in TROUBLES.values():
        assert rates(trouble, ratio=1.05, rounds=10, processes=12, sessions=60).verdicts["SLOWER"] >= 0.9


def test_processes_that_differ_make_pooled_rounds_overconfident() -> None:
    apart = TROUBLES["processes 1 % apart"]
    pooled, nested = (rates(apart, sessions=300, pooled=pooled) for pooled in (True, False))
    assert pooled.covered < 0.6
    assert sum(pooled.verdicts[verdict] for verdict in FALSE) > 0.1
    assert nested.covered >= 0.93


def test_more_rounds_do_not_help_where_processes_differ() -> None:
    apart = TROUBLES["processes 1 % apart"]
    more = rates(apart, rounds=60, sessions=60, pooled=True)
    assert more.covered < 0.4
    assert rates(apart, rounds=60, sessions=60).covered >= 0.9
    assert rates(apart, ratio=1.02, rounds=8, processes=16, sessions=60).verdicts["SLOWER"] >= 0.9


def test_never_the_opposite() -> None:
    for trouble in TROUBLES.values():
        assert rates(trouble, ratio=1.05, sessions=100).verdicts["FASTER"] == 0


def test_a_small_margin_finds_one_percent() -> None:
    steady = Trouble(noise=0.005)
    assert rates(steady, ratio=1.01, delta=0.005, sessions=200).verdicts["SLOWER"] >= 0.9


def test_a_session_is_settled_by_its_seed() -> None:
    first, second = (session(np.random.default_rng(4), TROUBLES["all of them"]) for _ in range(2))
    assert first == second
    assert rates(Trouble(), sessions=20, seed=1) == rates(Trouble(), sessions=20, seed=1)


def test_sessions_that_make_no_sense() -> None:
    with pytest.raises(StatsError, match="got 3, 0 and 1"):
        session(np.random.default_rng(0), Trouble(), rounds=0)
    with pytest.raises(StatsError, match="got 0, 15 and 1"):
        session(np.random.default_rng(0), Trouble(), processes=0)
    with pytest.raises(StatsError, match="sessions is 0"):
        rates(Trouble(), sessions=0)
