"""Intervals: against textbook tables, against their own definition, and by simulated coverage."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nsabench.stats import Interval, StatsError, median_interval, paired_ratio, paired_ratios, unpaired_ratio

POSITIVE = st.floats(1e-6, 1e6)

# Two-sided 5 % critical values of the sign test and of the signed-rank test, from published tables.
SIGN_TABLE = {6: 0, 9: 1, 10: 1, 12: 2, 15: 3, 20: 5, 25: 7}
RANK_TABLE = {6: 0, 7: 2, 8: 3, 9: 5, 10: 8, 12: 13, 15: 25, 20: 52, 25: 89}


@pytest.mark.parametrize(("n", "critical"), SIGN_TABLE.items())
def test_median_bounds_are_the_ranks_of_the_sign_test_table(n: int, critical: int) -> None:
    values = np.arange(1, n + 1, dtype=float)
    interval = median_interval(np.random.default_rng(n).permutation(values))
    assert interval == Interval((n + 1) / 2, values[critical], values[n - 1 - critical], n)


@pytest.mark.parametrize(("n", "critical"), RANK_TABLE.items())
def test_ratio_bounds_are_the_ranks_of_the_signed_rank_table(n: int, critical: int) -> None:
    logs = np.random.default_rng(n).normal(size=n)
    means = sorted((x + y) / 2 for x, y in itertools.combinations_with_replacement(logs, 2))
    interval = paired_ratio(np.exp(logs), np.ones(n))
    assert interval.point == pytest.approx(math.exp(np.median(means)), rel=1e-12)
    assert interval.lo == pytest.approx(math.exp(means[critical]), rel=1e-12)
    assert interval.hi == pytest.approx(math.exp(means[-1 - critical]), rel=1e-12)
    assert interval.n == n


@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_values_have_a_point_and_no_bounds(n: int) -> None:
    values = [float(i + 1) for i in range(n)]
    assert median_interval(values) == Interval(float(np.median(values)), None, None, n)
    assert median_interval(values, confidence=0.1).lo is None
    ratio = paired_ratio([2 * v for v in values], values)
    assert (ratio.lo, ratio.hi, ratio.n) == (None, None, n)
    assert ratio.point == pytest.approx(2.0)


def test_six_values_reach_95_percent_and_not_99() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert median_interval(values) == Interval(3.5, 1.0, 6.0, 6)
    assert median_interval(values, confidence=0.99).lo is None
    assert paired_ratio(values, [1.0] * 6, confidence=0.99).hi is None


@pytest.mark.parametrize("n", [6, 15, 40, 199, 200, 201, 400])
def test_more_confidence_is_wider_also_where_the_normal_distribution_takes_over(n: int) -> None:
    logs = np.random.default_rng(n).normal(size=n)
    low, high = paired_ratio(np.exp(logs), np.ones(n), 0.5), paired_ratio(np.exp(logs), np.ones(n), 0.95)
    assert low.lo is not None
    assert low.hi is not None
    assert high.lo is not None
    assert high.hi is not None
    assert high.lo < low.lo <= low.point <= low.hi < high.hi
    # The asymptotic half-width of the Hodges-Lehmann interval under normal errors.
    expected = 1.96 * logs.std() * math.sqrt(math.pi / 3 / n)
    if n >= 40:
        assert math.log(high.hi / high.lo) / 2 == pytest.approx(expected, rel=0.2)


def test_the_exact_and_the_normal_distribution_meet() -> None:
    logs = np.random.default_rng(0).normal(size=201)
    exact = paired_ratio(np.exp(logs[:200]), np.ones(200))
    normal = paired_ratio(np.exp(logs), np.ones(201))
    assert exact.lo == pytest.approx(normal.lo, rel=0.02)
    assert exact.hi == pytest.approx(normal.hi, rel=0.02)


@given(st.lists(POSITIVE, min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_a_median_lies_in_its_interval_and_ignores_order(values: list[float], random: "object") -> None:
    interval = median_interval(values)
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert median_interval(shuffled) == interval
    assert interval.point == np.median(values)
    assert (interval.lo is None) == (interval.hi is None) == (len(values) < 6)
    if interval.lo is not None and interval.hi is not None:
        assert {interval.lo, interval.hi} <= set(values)
        assert interval.lo <= interval.point <= interval.hi


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_a_ratio_scales_with_a_and_turns_over_with_its_arguments(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    a, b = np.array(pairs).T
    ratio, scaled, turned = paired_ratio(a, b), paired_ratio(a * factor, b), paired_ratio(b, a)
    assert scaled.point == pytest.approx(ratio.point * factor, rel=1e-9)
    assert turned.point == pytest.approx(1 / ratio.point, rel=1e-9)
    assert (ratio.lo is None) == (len(pairs) < 6)
    if ratio.lo is not None and ratio.hi is not None:
        assert ratio.lo <= ratio.point <= ratio.hi
        assert (a / b).min() * (1 - 1e-9) <= ratio.lo
        assert ratio.hi <= (a / b).max() * (1 + 1e-9)
        assert turned.lo == pytest.approx(1 / ratio.hi, rel=1e-9)
        assert scaled.hi == pytest.approx(ratio.hi * factor, rel=1e-9)


@given(st.lists(POSITIVE, min_size=6, max_size=30))
@settings(max_examples=30)
def test_equal_pairs_have_the_ratio_one_exactly(values: list[float]) -> None:
    assert paired_ratio(values, values) == Interval(1.0, 1.0, 1.0, len(values))


@given(st.lists(POSITIVE, min_size=6, max_size=30), st.integers(0, 29))
@settings(max_examples=50)
def test_one_wild_round_does_not_carry_the_interval_away(values: list[float], where: int) -> None:
    assume(len(values) >= 10)
    slow = np.array(values)
    slow[where % len(values)] *= 1e6
    assert paired_ratio(slow, values).point == pytest.approx(1.0)
    assert paired_ratio(slow, values).lo == pytest.approx(1.0)


@pytest.mark.parametrize("n", [6, 15, 30])
def test_intervals_cover_the_truth_as_often_as_they_claim(n: int) -> None:
    """Skewed times with a slow tail for the median; shared drift plus noise for the ratio."""
    random = np.random.default_rng(20240607)
    trials = 1500
    true_ratio, covered_median, covered_ratio = 1.02, 0, 0
    for _ in range(trials):
        times = random.lognormal(0.0, 0.3, size=n)
        median = median_interval(times)
        assert median.lo is not None
        assert median.hi is not None
        covered_median += median.lo <= 1.0 <= median.hi
        drift = np.exp(np.cumsum(random.normal(0, 0.05, size=n)))
        a = true_ratio * drift * np.exp(random.normal(0, 0.01, size=n))
        b = drift * np.exp(random.normal(0, 0.01, size=n))
        ratio = paired_ratio(a, b)
        assert ratio.lo is not None
        assert ratio.hi is not None
        covered_ratio += ratio.lo <= true_ratio <= ratio.hi
    # At least what is claimed, by three standard errors; at most what discrete ranks cost.
    error = 3 * math.sqrt(0.95 * 0.05 / trials)
    assert 0.95 - error <= covered_median / trials <= 0.98 + error
    assert 0.95 - error <= covered_ratio / trials <= 0.97 + error


def test_coverage_follows_the_confidence_asked_for() -> None:
    random = np.random.default_rng(7)
    trials, hits = 1500, 0
    for _ in range(trials):
        interval = paired_ratio(np.exp(random.normal(size=15)), np.ones(15), confidence=0.8)
        assert interval.lo is not None
        assert interval.hi is not None
        hits += interval.lo <= 1.0 <= interval.hi
    assert hits / trials == pytest.approx(0.81, abs=0.03)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "at least one number"),
        ([[1.0, 2.0]], "at least one number"),
        ([1.0, math.nan], "holds nan"),
        ([1.0, math.inf], "holds inf"),
        ([1.0, 0.0], "holds 0.0"),
        ([-1.0], "holds -1.0"),
    ],
)
def test_values_without_a_statistic_are_refused(values: list[float], message: str) -> None:
    with pytest.raises(StatsError, match=message):
        median_interval(values)
    with pytest.raises(StatsError, match=f"^a .*{message}"):
        paired_ratio(values, values)
    with pytest.raises(StatsError, match=f"^b .*{message}"):
        paired_ratio([1.0], values)


@given(
    st.lists(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=12), max_size=8),
    st.sampled_from([0.8, 0.95, 0.99]),
)
def test_many_ratios_are_those_of_each_pair_alone(
    pairs: list[list[tuple[float, float]]], confidence: float
) -> None:
    arrays = [tuple(np.array(side) for side in zip(*pair, strict=True)) for pair in pairs]
    alone = [paired_ratio(a, b, confidence) for a, b in arrays]
    assert paired_ratios([(a, b) for a, b in arrays], confidence) == alone


def test_one_bad_pair_of_many_is_refused() -> None:
    with pytest.raises(StatsError, match=r"b holds 0.0"):
        paired_ratios([([1.0], [1.0]), ([1.0], [0.0])])
    assert paired_ratios([]) == []


def test_pairs_must_match_and_confidence_must_be_a_probability() -> None:
    with pytest.raises(StatsError, match="a has 1 values and b has 2"):
        paired_ratio([1.0], [1.0, 2.0])
    for confidence in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(StatsError, match="confidence is"):
            median_interval([1.0] * 9, confidence)


def test_statistics_need_neither_torch_nor_the_attention() -> None:
    code = "import sys, nsabench.stats; print(sorted({'torch', 'nsa'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unpaired_ratio_of_a_worked_example() -> None:
    """Hollander and Wolfe, table 4.1: shift of two samples of 10 and 5, here as logs."""
    a = [0.73, 0.80, 0.83, 1.04, 1.38, 1.45, 1.46, 1.64, 1.89, 1.91]
    b = [0.74, 0.88, 0.90, 1.15, 1.21]
    found = unpaired_ratio(np.exp(a), np.exp(b))
    assert math.log(found.point) == pytest.approx(0.305)
    assert (found.lo, found.hi, found.n) == (None, None, 5)
    whole = unpaired_ratio(np.exp(a), np.exp([*b, 0.95]))
    assert whole.lo is not None
    assert whole.hi is not None
    assert whole.lo < whole.point < whole.hi


@pytest.mark.parametrize(("n", "m", "critical"), [(6, 6, 5), (8, 7, 10), (10, 10, 23), (15, 12, 49)])
def test_unpaired_interval_against_the_rank_sum_table(n: int, m: int, critical: int) -> None:
    """Two-sided 5 % critical values of U: the interval's ends are the next differences from either end."""
    random = np.random.default_rng(n)
    a, b = np.exp(random.normal(0, 1, n)), np.exp(random.normal(0, 1, m))
    shifts = np.sort(np.subtract.outer(np.log(a), np.log(b)).ravel())
    found = unpaired_ratio(a, b)
    assert found.lo == pytest.approx(math.exp(shifts[critical]))
    assert found.hi == pytest.approx(math.exp(shifts[-critical - 1]))


@pytest.mark.parametrize(("n", "m"), [(12, 15), (40, 45)])
def test_unpaired_interval_covers(n: int, m: int) -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        found = unpaired_ratio(1.3 * np.exp(random.normal(0, 0.1, n)), np.exp(random.normal(0, 0.1, m)))
        assert found.lo is not None
        assert found.hi is not None
        held += found.lo <= 1.3 <= found.hi
    assert held >= 0.93 * 400


@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_unpaired_ratio_turned_round(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    a, b = np.exp(random.normal(0, 0.3, 9)) * scale, np.exp(random.normal(0, 0.3, 7))
    there, back = unpaired_ratio(a, b), unpaired_ratio(b, a)
    assert back.point == pytest.approx(1 / there.point)
    assert back.lo == pytest.approx(1 / there.hi)  # type: ignore[operator]


@pytest.mark.parametrize("n", [6, 7, 15, 40, 199, 1000, 10_001])
def test_order_statistics_are_those_of_the_binomial(n: int) -> None:
    from scipy.stats import binom

    found = median_interval(np.arange(1.0, n + 1))
    k = int(np.searchsorted(binom.cdf(np.arange(n), n, 0.5), 0.025, side="right"))
    assert (found.lo, found.hi) == (k, n + 1 - k)
