"""What the verdicts are worth under trouble: times drawn with planted faults, judged as real ones are.

A session of simulated times has a true ratio and what spoils measurements on real machines: a clock that
drifts, episodes of throttling, outliers, a penalty for whoever runs second in a round. Rounds visit the arms
in random order, as the runner does; the same arms timed one after the other show why.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nsabench.stats.intervals import StatsError
from nsabench.stats.verdicts import DELTA, VERDICTS, Judgement, judge


@dataclass(frozen=True)
class Trouble:
    """What spoils a session; fractions of a time, all 0 by default.

    `noise`: standard deviation of the log of one time. `drift`: slow-down from the first time to the last.
    `throttle`: slow-down during episodes, each a tenth of the session, that begin with chance `episodes` at
    any time. `second_slot`: penalty of every arm but the first of a round. `outliers`: chance that a time
    takes half as long again.
    """

    noise: float = 0.01
    drift: float = 0.0
    throttle: float = 0.0
    episodes: float = 0.0
    second_slot: float = 0.0
    outliers: float = 0.0


TROUBLES = {
    "quiet": Trouble(),
    "noisy": Trouble(noise=0.05),
    "drift of 10 %": Trouble(drift=0.10),
    "throttled by 20 %": Trouble(throttle=0.20, episodes=0.02),
    "second slot 3 % slower": Trouble(second_slot=0.03),
    "outliers in 5 %": Trouble(outliers=0.05),
    "all of them": Trouble(0.02, 0.10, 0.20, 0.02, 0.03, 0.05),
}
"""The sessions that `rates` are quoted for."""


@dataclass(frozen=True)
class Rates:
    """How often each verdict fell, how often the interval held the true ratio, over how many sessions."""

    sessions: int
    covered: float
    verdicts: dict[str, float] = field(default_factory=dict)


def session(
    random: np.random.Generator,
    trouble: Trouble,
    *,
    ratio: float = 1.0,
    rounds: int = 15,
    interleaved: bool = True,
    delta: float = DELTA,
) -> Judgement:
    """Judge one simulated session of `rounds`: an arm, the same arm again, and one `ratio` times as slow.

    `interleaved`: each round visits the three in random order; otherwise all times of one arm come before the
    next arm's.
    """
    if rounds < 1 or ratio <= 0:
        raise StatsError(f"a session needs at least 1 round and a positive ratio, got {rounds} and {ratio}")
    order = np.tile(np.arange(3), (rounds, 1))
    slots = order.copy()
    if interleaved:
        order = random.permuted(order, axis=1)
    else:
        order = np.repeat(np.arange(3), rounds).reshape(rounds, 3)
        slots = np.zeros_like(order)
    times = _conditions(random, trouble, 3 * rounds).reshape(rounds, 3)
    times = times * np.where(slots > 0, 1 + trouble.second_slot, 1.0) * np.where(order == 2, ratio, 1.0)
    arms = [times[order == arm] for arm in range(3)]
    return judge(arms[0], arms[2], aa=(arms[0], arms[1]), delta=delta)


def rates(
    trouble: Trouble,
    *,
    ratio: float = 1.0,
    rounds: int = 15,
    sessions: int = 400,
    interleaved: bool = True,
    delta: float = DELTA,
    seed: int = 0,
) -> Rates:
    """Verdicts and coverage over many simulated sessions. StatsError for fewer than one session."""
    if sessions < 1:
        raise StatsError(f"sessions is {sessions}; it must be at least 1")
    random = np.random.default_rng(seed)
    judged = [
        session(random, trouble, ratio=ratio, rounds=rounds, interleaved=interleaved, delta=delta)
        for _ in range(sessions)
    ]
    return Rates(sessions, _covered(judged, ratio), _shares([j.verdict for j in judged]))


def _covered(judged: Sequence[Judgement], ratio: float) -> float:
    intervals = [j.ratio for j in judged]
    held = [i.lo is not None and i.hi is not None and i.lo <= ratio <= i.hi for i in intervals]
    return sum(held) / len(held)


def _shares(verdicts: Sequence[str]) -> dict[str, float]:
    return {name: verdicts.count(name) / len(verdicts) for name in VERDICTS}


def _conditions(random: np.random.Generator, trouble: Trouble, count: int) -> np.ndarray:
    """Times of `count` equal steps in a row, 1 when nothing is wrong."""
    times = np.exp(random.normal(0.0, trouble.noise, count))
    times *= 1 + trouble.drift * np.linspace(0.0, 1.0, count)
    begins = np.flatnonzero(random.random(count) < trouble.episodes)
    for begin in begins:
        times[begin : begin + max(1, count // 10)] *= 1 + trouble.throttle
    times[random.random(count) < trouble.outliers] *= 1.5
    return times
