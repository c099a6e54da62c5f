"""Pure functions on samples. Needs neither torch nor nsa."""

from nsabench.stats.intervals import (
    Interval,
    StatsError,
    median_interval,
    paired_ratio,
    paired_ratios,
    unpaired_ratio,
)
from nsabench.stats.verdicts import (
    DELTA,
    VERDICTS,
    Judgement,
    correct,
    geometric_mean,
    judge,
    judge_unpaired,
    mean_ratio,
    noise_floor,
)

__all__ = [
    "DELTA",
    "VERDICTS",
    "Interval",
    "Judgement",
    "StatsError",
    "correct",
    "geometric_mean",
    "judge",
    "judge_unpaired",
    "mean_ratio",
    "median_interval",
    "noise_floor",
    "paired_ratio",
    "paired_ratios",
    "unpaired_ratio",
]
