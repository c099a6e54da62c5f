"""Verdicts: each by the case that calls for it, corrections by their definitions, means over cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from nsabench.stats import (
    VERDICTS,
    Judgement,
    StatsError,
    correct,
    geometric_mean,
    judge,
    judge_unpaired,
    mean_ratio,
    noise_floor,
)
from nsabench.stats.intervals import Interval, paired_ratio, unpaired_ratio

RANDOM = np.random.default_rng(7)
BASE = np.exp(RANDOM.normal(0, 0.002, 30))
WOBBLE = np.exp(RANDOM.normal(0, 0.002, 30))


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (1.05, "SLOWER"),
        (0.95, "FASTER"),
        (1.0, "SAME"),
        (1.004, "SAME"),
        (1.012, "SLOWER"),
        (1.0095, "INCONCLUSIVE"),
    ],
)
def test_a_difference_against_the_margin(ratio: float, verdict: str) -> None:
    found = judge(BASE, BASE * WOBBLE * ratio, aa=(BASE, BASE * WOBBLE[::-1]))
    assert found.verdict == verdict, found
    assert found.ratio == paired_ratio(BASE * WOBBLE * ratio, BASE)
    assert found.ratio.lo is not None
    assert found.ratio.lo < ratio * 1.002
    assert found.why


def test_the_margin_can_be_set() -> None:
    slower = BASE * WOBBLE * 1.005
    assert judge(BASE, slower, delta=0.002).verdict == "SLOWER"
    assert judge(BASE, slower, delta=0.05).verdict == "SAME"


def test_noise_raises_the_bar_for_a_difference_but_grants_no_equality() -> None:
    noisy = (BASE, BASE * np.exp(RANDOM.normal(0, 0.1, 30)))
    found = judge(BASE, BASE * WOBBLE * 1.02, aa=noisy)
    assert found.verdict == "INCONCLUSIVE"
    assert found.delta == noise_floor(found.aa) > 0.02
    assert "A/A noise" in found.why
    assert judge(BASE, BASE * WOBBLE * 2, aa=noisy).verdict == "SLOWER"
    assert judge(BASE, BASE * WOBBLE, aa=noisy).verdict == "SAME"


def test_an_arm_that_differs_from_itself_voids_the_comparison() -> None:
    found = judge(BASE, BASE * 2, aa=(BASE, BASE * WOBBLE * 1.03))
    assert found.verdict == "INVALID"
    assert "differs from itself by +3 %" in found.why


@pytest.mark.parametrize("rounds", range(1, 6))
def test_below_six_rounds_nothing_is_concluded(rounds: int) -> None:
    found = judge(BASE[:rounds], BASE[:rounds] * 3)
    assert (found.verdict, found.ratio.lo, found.mean.hi, found.p_value) == ("INCONCLUSIVE", None, None, None)
    assert found.why == f"{rounds} rounds give no interval; 6 do"


@pytest.mark.parametrize("delta", [0, -0.1, 1, math.nan, "1%"])
def test_a_margin_that_is_none(delta: float) -> None:
    with pytest.raises(StatsError, match=r"as 0\.01 for 1 %"):
        judge(BASE, BASE, delta=delta)


@given(st.floats(0.2, 5), st.integers(6, 30), st.integers(0, 10_000))
def test_turned_round_a_verdict_is_its_opposite(ratio: float, rounds: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = np.exp(random.normal(0, 0.05, (2, rounds)))
    there, back = judge(a, b * ratio), judge(b * ratio, a)
    opposite = {"FASTER": "SLOWER", "SLOWER": "FASTER"}
    assert back.verdict == opposite.get(there.verdict, there.verdict)
    assert back.ratio.point == pytest.approx(1 / there.ratio.point)
    assert back.mean.point == pytest.approx(1 / there.mean.point)


@given(st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_the_unit_does_not_matter(unit: float, seed: int) -> None:
    a, b = np.exp(np.random.default_rng(seed).normal(0, 0.02, (2, 12)))
    plain, scaled = judge(a, b, aa=(a, b)), judge(a * unit, b * unit, aa=(a * unit, b * unit))
    assert plain.verdict == scaled.verdict
    assert scaled.ratio.point == pytest.approx(plain.ratio.point)


def test_mean_ratio_is_the_t_interval_of_logs() -> None:
    a, b = np.exp(np.random.default_rng(3).normal(0, 0.1, (2, 10)))
    found, logs = mean_ratio(a, b), np.log(a / b)
    reach = 2.2621571627409915 * logs.std(ddof=1) / math.sqrt(10)  # t(0.975, 9)
    assert found.point == pytest.approx(math.exp(logs.mean()))
    assert (found.lo, found.hi) == pytest.approx(
        (math.exp(logs.mean() - reach), math.exp(logs.mean() + reach))
    )


def test_noise_floor_without_an_interval_is_none() -> None:
    assert noise_floor(None) == noise_floor(Interval(1.2, None, None, 3)) == 0
    assert noise_floor(Interval(1.0, 0.98, 1.01, 9)) == pytest.approx(1 / 0.98 - 1)


def test_geometric_mean_over_cells() -> None:
    random = np.random.default_rng(5)
    cells = []
    for ratio in (0.5, 2.0, 1.1):
        a = np.exp(random.normal(0, 0.01, 15))
        cells.append((a * ratio * np.exp(random.normal(0, 0.01, 15)), a))
    found = geometric_mean(cells)
    assert found.n == 3
    assert found.point == pytest.approx((0.5 * 2 * 1.1) ** (1 / 3), rel=0.01)
    assert found.lo is not None
    assert found.hi is not None
    assert found.lo < found.point < found.hi < found.lo * 1.02
    assert geometric_mean(cells) == found
    assert geometric_mean([(a[:5], b[:5]) for a, b in cells]).lo is None
    with pytest.raises(StatsError, match="at least one cell"):
        geometric_mean([])


def test_geometric_mean_of_one_cell_is_its_ratio() -> None:
    a, b = np.exp(np.random.default_rng(1).normal(0, 0.05, (2, 20)))
    assert geometric_mean([(a, b)]).point == pytest.approx(paired_ratio(a, b).point)


def judged(p_value: float | None, verdict: str = "SLOWER") -> Judgement:
    interval = Interval(1.1, 1.05, 1.2, 15)
    assert verdict in VERDICTS
    return Judgement(verdict, interval, interval, 0.01, None, p_value, "said")  # type: ignore[arg-type]


def test_holm() -> None:
    found = correct([judged(p) for p in (0.01, 0.04, 0.03, 0.005)], "holm")
    assert [j.p_value for j in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [j.verdict for j in found] == ["SLOWER", "INCONCLUSIVE", "INCONCLUSIVE", "SLOWER"]
    assert found[1].why == "not beyond chance among 4 comparisons (p = 0.06)"


def test_benjamini_hochberg() -> None:
    found = correct([judged(p) for p in (0.01, 0.04, 0.03, 0.005)], "bh")
    assert [j.p_value for j in found] == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert {j.verdict for j in found} == {"SLOWER"}


def test_correction_leaves_alone_what_it_does_not_concern() -> None:
    given = [judged(None, "INCONCLUSIVE"), judged(0.9, "INVALID"), judged(0.5, "SAME"), judged(0.04)]
    found = correct(given, "holm")
    assert found[:2] == given[:2]
    assert (found[2].verdict, found[2].p_value) == ("SAME", 0.5)
    assert found[3].verdict == "INCONCLUSIVE"
    assert correct([], "bh") == []
    with pytest.raises(StatsError, match="allowed: holm, bh"):
        correct(given, "bonferroni")  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_correction_never_flatters(p_values: list[float]) -> None:
    for method in ("holm", "bh"):
        found = correct([judged(p) for p in p_values], method)  # type: ignore[arg-type]
        assert all(j.p_value >= p for j, p in zip(found, p_values, strict=True))  # type: ignore[operator]
        assert all(j.p_value <= 1 for j in found)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.05, "SLOWER"), (0.95, "FASTER"), (1.0, "SAME"), (1.0095, "INCONCLUSIVE")]
)
def test_times_of_two_sessions_are_judged_by_rank_sums(ratio: float, verdict: str) -> None:
    other = BASE[:20] * ratio
    found = judge_unpaired(BASE, other)
    assert found.verdict == verdict, found
    assert found.ratio == unpaired_ratio(other, BASE)
    assert (found.delta, found.aa) == (0.01, None)
    assert found.p_value == pytest.approx(scipy_stats.mannwhitneyu(other, BASE).pvalue)
    welch = scipy_stats.ttest_ind(np.log(other), np.log(BASE), equal_var=False).confidence_interval(0.95)
    assert (found.mean.lo, found.mean.hi) == pytest.approx((math.exp(welch.low), math.exp(welch.high)))
    assert found.mean.point == pytest.approx(math.exp(np.mean(np.log(other)) - np.mean(np.log(BASE))))


def test_two_sessions_with_too_few_rounds_or_equal_times() -> None:
    few = judge_unpaired(BASE[:5], BASE * 2)
    assert (few.verdict, few.p_value, few.mean.lo) == ("INCONCLUSIVE", None, None)
    assert few.why == "5 rounds give no interval; 6 do"
    same = judge_unpaired([2.0] * 8, [2.0] * 8)
    assert (same.verdict, same.p_value) == ("SAME", 1.0)
    assert same.mean == Interval(1.0, 1.0, 1.0, 8)


def test_two_sessions_need_a_margin_and_positive_times() -> None:
    with pytest.raises(StatsError, match="delta is 0"):
        judge_unpaired(BASE, BASE, delta=0)
    with pytest.raises(StatsError, match="positive"):
        judge_unpaired(BASE, [*BASE, -1.0])


def test_large_differences_are_told_in_whole_percents() -> None:
    assert judge_unpaired(BASE, BASE * 3).why.startswith("+200 % in time")
