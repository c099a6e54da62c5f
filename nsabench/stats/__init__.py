"""Pure functions on samples. Needs neither torch nor nsa."""

from nsabench.stats.intervals import Interval, StatsError, median_interval, paired_ratio

__all__ = ["Interval", "StatsError", "median_interval", "paired_ratio"]
