"""Ratios over several processes: never narrower than rounds or processes alone allow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from nsabench.stats import StatsError, geometric_mean, judge, mean_ratio, paired_ratio, paired_ratios
from nsabench.stats.intervals import Between, hodges_lehmann, mean_between, over_processes

LOGS = st.floats(-0.2, 0.2).map(lambda x: round(x, 6))


@st.composite
def sessions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Log-ratios and the process of each: 1 to 5 processes of 2 to 9 rounds, 6 rounds at least."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= 6))
    logs = draw(st.lists(LOGS, min_size=sum(sizes), max_size=sum(sizes)))
    return np.array(logs), np.repeat(np.arange(len(sizes)), sizes)


def ratio(logs: np.ndarray, **more: Any) -> Any:
    return paired_ratio(np.exp(logs), np.ones(len(logs)), **more)


@given(sessions())
def test_the_interval_holds_that_of_the_rounds_and_that_of_the_processes(
    found: tuple[np.ndarray, np.ndarray],
) -> None:
    logs, processes = found
    rounds, nested = ratio(logs), ratio(logs, processes=processes)
    assert nested.point == rounds.point
    assert nested.n == rounds.n
    assert nested.lo <= rounds.lo <= rounds.hi <= nested.hi
    if len(set(processes)) == 1:
        assert nested == rounds
        return
    points = [float(hodges_lehmann(logs[processes == p])) for p in sorted(set(processes))]
    if np.ptp(points):
        t = scipy_stats.t.interval(0.95, len(points) - 1, np.mean(points), scipy_stats.sem(points))
        assert math.log(nested.lo) == pytest.approx(min(t[0], math.log(rounds.lo)), abs=1e-9)
        assert math.log(nested.hi) == pytest.approx(max(t[1], math.log(rounds.hi)), abs=1e-9)


@given(sessions(), st.randoms(use_true_random=False), st.floats(0.1, 10))
def test_order_names_and_units_do_not_matter(
    found: tuple[np.ndarray, np.ndarray], random: Any, unit: float
) -> None:
    logs, processes = found
    there = ratio(logs, processes=processes)
    order = list(range(len(logs)))
    random.shuffle(order)
    shuffled = paired_ratio(unit * np.exp(logs[order]), np.full(len(logs), unit), processes=-processes[order])
    assert (shuffled.point, shuffled.lo, shuffled.hi) == pytest.approx((there.point, there.lo, there.hi))
    back = paired_ratio(np.ones(len(logs)), np.exp(logs), processes=processes)
    assert (back.lo, back.hi) == pytest.approx((1 / there.hi, 1 / there.lo))


@given(st.lists(sessions(), max_size=4))
def test_many_ratios_are_those_of_each_pair_alone(found: list[tuple[np.ndarray, np.ndarray]]) -> None:
    pairs = [(np.exp(logs), np.ones(len(logs))) for logs, _ in found]
    together = paired_ratios(pairs, processes=[processes for _, processes in found])
    assert together == [ratio(logs, processes=processes) for logs, processes in found]


@given(sessions(), st.floats(0.9, 1.1))
def test_a_verdict_agrees_with_its_p_value_and_interval(
    found: tuple[np.ndarray, np.ndarray], slower: float
) -> None:
    logs, processes = found
    said = judge(np.ones(len(logs)), slower * np.exp(logs), processes=processes)
    assert said.ratio == paired_ratio(slower * np.exp(logs), np.ones(len(logs)), processes=processes)
    assert said.p_value is not None
    assert 0 <= said.p_value <= 1
    alone = judge(np.ones(len(logs)), slower * np.exp(logs))
    assert alone.p_value is not None
    assert said.p_value >= alone.p_value
    assert said.mean.lo <= alone.mean.lo + 1e-12
    between = over_processes(np.log(slower) + logs, processes, hodges_lehmann)
    if between is not None and between.error:
        points = [float(hodges_lehmann(np.log(slower) + logs[processes == p])) for p in set(processes)]
        test = scipy_stats.ttest_1samp(points, 0.0)
        assert said.p_value == pytest.approx(max(alone.p_value, test.pvalue), abs=1e-9)


def test_few_rounds_of_many_processes_have_no_interval() -> None:
    assert ratio(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), processes=[0, 1, 2, 3, 4]).lo is None


def test_processes_that_disagree_take_a_verdict_back() -> None:
    random = np.random.default_rng(0)
    base = np.exp(random.normal(0, 0.002, 45))
    processes = np.repeat(np.arange(3), 15)
    slower = base * np.exp(random.normal(0, 0.002, 45)) * np.array([1.0, 1.03, 1.06])[processes]
    assert judge(base, slower).verdict == "SLOWER"
    found = judge(base, slower, processes=processes)
    assert found.verdict == "INCONCLUSIVE"
    assert found.p_value is not None
    assert found.p_value > 0.05


def test_an_arm_that_differs_from_itself_in_one_process_is_noise_not_a_fault() -> None:
    random = np.random.default_rng(0)
    base = np.exp(random.normal(0, 0.002, 45))
    processes = np.repeat(np.arange(3), 15)
    again = base * np.exp(random.normal(0, 0.002, 45)) * np.array([1.0, 1.02, 1.05])[processes]
    assert judge(base, base * 1.2, aa=(base, again)).verdict == "INVALID"
    nested = judge(base, base * 1.2, aa=(base, again), processes=processes, aa_processes=processes)
    assert nested.verdict == "SLOWER"
    assert nested.delta > 0.05


def test_each_pair_needs_its_process() -> None:
    with pytest.raises(StatsError, match="7 pairs have 3 processes"):
        ratio(np.zeros(7), processes=[0, 1, 2])


def test_a_mean_over_shapes_holds_what_differs_between_processes() -> None:
    processes = np.repeat(np.arange(3), 8)
    random = np.random.default_rng(3)
    effects = [random.normal(0, 0.03, 3)[processes] for _ in range(4)]
    pairs = [(np.exp(0.1 + effect + random.normal(0, 0.001, 24)), np.ones(24)) for effect in effects]
    pooled = geometric_mean(pairs, resamples=200)
    nested = geometric_mean(pairs, processes=[processes] * 4, resamples=200)
    assert nested.point == pooled.point
    assert nested.lo is not None
    assert pooled.lo is not None
    assert nested.lo < pooled.lo - 0.01
    single = geometric_mean(pairs, processes=[np.zeros(24, int), *[processes] * 3], resamples=200)
    assert single == pooled


def test_a_mean_of_independent_parts_is_welchs() -> None:
    a, b = [0.1, 0.2, 0.4], [0.0, -0.3, 0.1, 0.25, 0.3]
    parts = [Between(float(np.mean(x)), float(scipy_stats.sem(x)), len(x) - 1) for x in (a, b)]
    whole = mean_between(parts)
    assert whole is not None
    welch = scipy_stats.ttest_ind(a, [-x for x in b], equal_var=False)
    assert 2 * whole.mean == pytest.approx(np.mean(a) + np.mean(b))
    assert whole.p_value == pytest.approx(welch.pvalue)
    assert whole.freedom == pytest.approx(welch.df)
    assert mean_between([]) is None
    assert mean_between([parts[0], None]) is None
    still = mean_between([Between(0.1, 0.0, 2)])
    assert still is not None
    assert (still.reach(0.95), still.p_value) == (0.0, 0.0)
    assert Between(0.0, 0.0, 2).p_value == 1.0


def test_the_mean_ratio_is_widened_too() -> None:
    logs = np.array([0.0, 0.001, -0.001, 0.05, 0.051, 0.049])
    processes = [0, 0, 0, 1, 1, 1]
    alone = mean_ratio(np.exp(logs), np.ones(6))
    nested = mean_ratio(np.exp(logs), np.ones(6), processes=processes)
    low, high = scipy_stats.t.interval(0.95, 1, 0.025, scipy_stats.sem([0.0, 0.05]))
    assert nested.point == alone.point
    assert (nested.lo, nested.hi) == pytest.approx((math.exp(low), math.exp(high)))
