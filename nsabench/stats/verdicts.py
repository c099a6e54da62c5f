"""From intervals to a verdict: what may be said of two arms that were timed in the same rounds.

A comparison has a margin, `delta`, 1 %: smaller differences are not worth a word. One arm runs twice under
two names, and that A/A interval is the session's own noise: where it is wider than the margin, a difference
must be beyond it too. Equality is never granted for noise: SAME always means inside `delta`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from nsabench.stats.intervals import (
    MIN_VALUES,
    Interval,
    Labels,
    StatsError,
    Values,
    hodges_lehmann,
    mean_between,
    over_processes,
    paired_logs,
    paired_ratio,
    unpaired_ratio,
    widened,
)

DELTA = 0.01
"""Smallest margin, as a fraction: the largest difference in time that counts as none."""

VERDICTS = ("FASTER", "SLOWER", "SAME", "INCONCLUSIVE", "INVALID")

Verdict = Literal["FASTER", "SLOWER", "SAME", "INCONCLUSIVE", "INVALID"]


@dataclass(frozen=True)
class Judgement:
    """What a comparison says of `b` beside `a`.

    `ratio` is time of b over time of a (below 1, b is faster), with the signed-rank interval; `mean` the
    geometric mean ratio with the t-interval, beside it for whoever prefers that. `delta` is what a difference
    had to pass, a fraction: the margin or the session's noise; `aa` the ratio of one arm to itself; `p_value`
    that of the signed-rank test, or of the t-test over processes where that is larger, corrected where
    several comparisons were judged together; `why` the verdict in words.
    """

    verdict: Verdict
    ratio: Interval
    mean: Interval
    delta: float
    aa: Interval | None
    p_value: float | None
    why: str


def judge(
    a: Values,
    b: Values,
    *,
    aa: tuple[Values, Values] | None = None,
    delta: float = DELTA,
    confidence: float = 0.95,
    processes: Labels | None = None,
    aa_processes: Labels | None = None,
) -> Judgement:
    """Judge times `b` against times `a`, pair by pair of the same round, any one unit.

    `aa`: times of one arm that ran twice in these rounds. `delta`: the smallest margin, a fraction above 0.
    `processes`, `aa_processes`: which process measured each pair of the two, as `paired_ratio` has it; None
    takes all rounds for those of one.

    FASTER and SLOWER: the interval excludes 1 and the point is beyond `delta` and beyond the A/A interval.
    SAME: the interval is inside `delta`. INCONCLUSIVE: neither, or fewer than 6 rounds. INVALID: the arm that
    ran twice differs from itself by more than `delta`. StatsError for unequal lengths, no pairs, or a value
    that is not positive.
    """
    _check_delta(delta)
    ratio = paired_ratio(b, a, confidence, processes=processes)
    own = None if aa is None else paired_ratio(aa[1], aa[0], confidence, processes=aa_processes)
    margin = max(delta, noise_floor(own))
    verdict, why = _verdict(ratio, own, delta, margin)
    p_value = _p_value(b, a, processes) if ratio.n >= MIN_VALUES else None
    mean = mean_ratio(b, a, confidence, processes)
    return Judgement(verdict, ratio, mean, margin, own, p_value, why)


def judge_unpaired(a: Values, b: Values, *, delta: float = DELTA, confidence: float = 0.95) -> Judgement:
    """Judge times `b` of one session against times `a` of another, as `judge` does, by rank sums.

    No arm ran in both, so there is no A/A interval: what changed between the sessions is taken for a
    difference. Raises StatsError as `judge`.
    """
    _check_delta(delta)
    ratio = unpaired_ratio(b, a, confidence)
    verdict, why = _verdict(ratio, None, delta, delta)
    if ratio.n < MIN_VALUES:
        point = float(np.mean(np.log(b)) - np.mean(np.log(a)))
        return Judgement(
            verdict, ratio, Interval(math.exp(point), None, None, ratio.n), delta, None, None, why
        )
    from scipy import stats as scipy_stats  # late: half a second that no table or figure need wait for

    p_value = float(scipy_stats.mannwhitneyu(b, a).pvalue)
    return Judgement(verdict, ratio, _welch(b, a, confidence), delta, None, p_value, why)


def noise_floor(aa: Interval | None) -> float:
    """How far an arm may lie from itself, as a fraction: the farther end of its A/A interval, or 0."""
    if aa is None or aa.lo is None or aa.hi is None:
        return 0.0
    return math.expm1(max(abs(math.log(aa.lo)), abs(math.log(aa.hi))))


def mean_ratio(a: Values, b: Values, confidence: float = 0.95, processes: Labels | None = None) -> Interval:
    """Geometric mean of a/b over pairs, with the t-interval of the log-ratios; no bounds below 6 pairs.

    `processes` and StatsError as in `paired_ratio`.
    """
    from scipy import stats as scipy_stats  # late: half a second that no table or figure need wait for

    logs = paired_logs(a, b)
    point, n = float(np.mean(logs)), len(logs)
    if n < MIN_VALUES:
        return Interval(math.exp(point), None, None, n)
    reach = float(scipy_stats.t.ppf((1 + confidence) / 2, n - 1) * scipy_stats.sem(logs))
    lo, hi = point - reach, point + reach
    if processes is not None:
        lo, hi = widened(lo, hi, over_processes(logs, processes, np.mean), confidence)
    return Interval(math.exp(point), math.exp(lo), math.exp(hi), n)


def geometric_mean(
    pairs: Sequence[tuple[Values, Values]],
    *,
    processes: Sequence[Labels] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Geometric mean over cells of a/b, each cell by its Hodges-Lehmann ratio; `n` counts the cells.

    The interval resamples the rounds of each cell (percentile bootstrap): it says how well these cells are
    known, not what other cells would give. It is widened by what differs between the `processes` of each
    cell, as in `paired_ratio`. None below 6 rounds in any cell. StatsError for no cells, and as
    `paired_ratio`.
    """
    if not pairs:
        raise StatsError("a geometric mean needs at least one cell, got none")
    logs = [paired_logs(a, b) for a, b in pairs]
    point = float(np.mean([hodges_lehmann(cell) for cell in logs]))
    if min(len(cell) for cell in logs) < MIN_VALUES:
        return Interval(math.exp(point), None, None, len(logs))
    random = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for cell in logs:
        total += hodges_lehmann(cell[random.integers(0, len(cell), (resamples, len(cell)))])
    low, high = np.quantile(total / len(logs), [(1 - confidence) / 2, (1 + confidence) / 2])
    if processes is not None:
        between = mean_between(
            [over_processes(cell, one, hodges_lehmann) for cell, one in zip(logs, processes, strict=True)]
        )
        low, high = widened(low, high, between, confidence)
    return Interval(math.exp(point), math.exp(low), math.exp(high), len(logs))


def correct(judgements: Sequence[Judgement], method: Literal["holm", "bh"]) -> list[Judgement]:
    """Judgements of several comparisons, each with its p-value corrected for their number.

    `holm` holds the chance of any false alarm at 5 % (gates), `bh` the part of alarms that are false
    (Benjamini-Hochberg; reports). FASTER and SLOWER whose corrected p-value is above 5 % become INCONCLUSIVE.
    """
    if method not in ("holm", "bh"):
        raise StatsError(f"correction {method!r} is unknown; allowed: holm, bh")
    places = [i for i, j in enumerate(judgements) if j.p_value is not None and j.verdict != "INVALID"]
    p_values = np.array([judgements[i].p_value for i in places], dtype=np.float64)
    corrected = dict(zip(places, _holm(p_values) if method == "holm" else _bh(p_values), strict=True))
    found = []
    for place, judgement in enumerate(judgements):
        if place in corrected:
            judgement = replace(judgement, p_value=float(corrected[place]))
            if judgement.verdict in ("FASTER", "SLOWER") and corrected[place] > 0.05:
                why = f"not beyond chance among {len(places)} comparisons (p = {corrected[place]:.2g})"
                judgement = replace(judgement, verdict="INCONCLUSIVE", why=why)
        found.append(judgement)
    return found


def _welch(b: Values, a: Values, confidence: float) -> Interval:
    """Ratio of the geometric means of b and a, with Welch's t-interval of the logs."""
    from scipy import stats as scipy_stats  # late: half a second that no table or figure need wait for

    logs = np.log(np.asarray(b, dtype=np.float64)), np.log(np.asarray(a, dtype=np.float64))
    point = float(logs[0].mean() - logs[1].mean())
    parts = [float(values.var(ddof=1)) / len(values) for values in logs]
    reach = 0.0
    if variance := sum(parts):
        freedom = variance**2 / sum(
            part**2 / (len(values) - 1) for part, values in zip(parts, logs, strict=True)
        )
        reach = float(scipy_stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    n = min(map(len, logs))
    return Interval(math.exp(point), math.exp(point - reach), math.exp(point + reach), n)


def _check_delta(delta: float) -> None:
    if not (isinstance(delta, int | float) and 0 < delta < 1):
        raise StatsError(f"delta is {delta}; it must be a fraction between 0 and 1, as 0.01 for 1 %")


def _verdict(ratio: Interval, aa: Interval | None, delta: float, margin: float) -> tuple[Verdict, str]:
    if aa is not None and _beyond(aa, delta):
        return "INVALID", f"an arm timed twice differs from itself by {_percent(aa.point)}"
    if ratio.lo is None or ratio.hi is None:
        return "INCONCLUSIVE", f"{ratio.n} rounds give no interval; {MIN_VALUES} do"
    if 1 / (1 + delta) <= ratio.lo and ratio.hi <= 1 + delta:
        return "SAME", f"the interval lies inside the margin of {100 * delta:.2g} %"
    within = f"the {'margin' if margin == delta else 'A/A noise'} of {100 * margin:.2g} %"
    if ratio.lo > 1 and ratio.point > 1 + margin:
        return "SLOWER", f"{_percent(ratio.point)} in time, beyond {within}"
    if ratio.hi < 1 and ratio.point < 1 / (1 + margin):
        return "FASTER", f"{_percent(ratio.point)} in time, beyond {within}"
    if ratio.lo > 1 or ratio.hi < 1:
        return (
            "INCONCLUSIVE",
            f"a difference of {_percent(ratio.point)}, no more than {within}; more rounds tell",
        )
    return "INCONCLUSIVE", f"the interval holds 1 and reaches beyond {within}; more rounds narrow it"


def _beyond(interval: Interval, delta: float) -> bool:
    """Whether an interval lies wholly outside the margin; one without bounds does not."""
    if interval.lo is None or interval.hi is None:
        return False
    return interval.lo > 1 + delta or interval.hi < 1 / (1 + delta)


def _percent(ratio: float) -> str:
    percent = 100 * (ratio - 1)
    return f"{percent:+.0f} %" if abs(percent) >= 100 else f"{percent:+.2g} %"


def _p_value(a: Values, b: Values, processes: Labels | None) -> float:
    """Of the signed-rank test over rounds, or of the t-test over processes where that is larger."""
    from scipy import stats as scipy_stats  # late: half a second that no table or figure need wait for

    logs = paired_logs(a, b)
    if not np.any(logs):
        return 1.0
    p_value = float(scipy_stats.wilcoxon(logs, method="exact" if len(logs) <= 50 else "approx").pvalue)
    between = None if processes is None else over_processes(logs, processes, hodges_lehmann)
    return p_value if between is None else max(p_value, between.p_value)


def _holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p-values: the k-th smallest of m times ``m - k + 1``, never below one before it."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _bh(p_values: np.ndarray) -> np.ndarray:
    from scipy import stats as scipy_stats  # late: half a second that no table or figure need wait for

    return np.asarray(scipy_stats.false_discovery_control(p_values)) if len(p_values) else p_values
