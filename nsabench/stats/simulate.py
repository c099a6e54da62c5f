"""What the verdicts are worth under trouble: times drawn with planted faults, judged as real ones are.

A session of simulated times has a true ratio and what spoils measurements on real machines: a clock that
drifts, episodes of throttling, outliers, a penalty for whoever runs second in a round, an arm that is a
little slower or faster in all of a process. Rounds visit the arms in random order, as the runner does; the
same arms timed one after the other show why. Sessions have three processes, as comparisons have, and are
judged process by process; the same rounds taken for independent ones show why.
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
    takes half as long again. `process`: standard deviation of the log of an arm's time from one process to
    the next, each arm's its own: where its tensors came to lie.
    """

    noise: float = 0.01
    drift: float = 0.0
    throttle: float = 0.0
    episodes: float = 0.0
    second_slot: float = 0.0
    outliers: float = 0.0
    process: float = 0.0


TROUBLES = {
    "quiet": Trouble(),
    "noisy": Trouble(noise=0.05),
    "drift of 10 %": Trouble(drift=0.10),
    "throttled by 20 %": Trouble(throttle=0.20, episodes=0.02),
    "second slot 3 % slower": Trouble(second_slot=0.03),
    "outliers in 5 %": Trouble(outliers=0.05),
    "processes 1 % apart": Trouble(process=0.01),
    "all of them": Trouble(0.02, 0.10, 0.20, 0.02, 0.03, 0.05, 0.005),
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
    processes: int = 3,
    interleaved: bool = True,
    pooled: bool = False,
    delta: float = DELTA,
) -> Judgement:
    """Judge one simulated session of `processes` with `rounds` each: an arm, the same arm again, and one
    `ratio` times as slow.

    `interleaved`: each round visits the three in random order; otherwise a process has all times of one arm
    before the next arm's. `pooled`: the rounds of all processes are taken for independent.
    """
    if rounds < 1 or processes < 1 or ratio <= 0:
        given = f"{processes}, {rounds} and {ratio}"
        raise StatsError(f"a session needs processes, rounds and a positive ratio; got {given}")
    times = np.concatenate([_process(random, trouble, rounds, interleaved) for _ in range(processes)], axis=1)
    times[2] *= ratio
    labels = None if pooled else np.repeat(np.arange(processes), rounds)
    aa = times[0], times[1]
    return judge(times[0], times[2], aa=aa, delta=delta, processes=labels, aa_processes=labels)


def rates(
    trouble: Trouble,
    *,
    ratio: float = 1.0,
    rounds: int = 15,
    processes: int = 3,
    sessions: int = 400,
    interleaved: bool = True,
    pooled: bool = False,
    delta: float = DELTA,
    seed: int = 0,
) -> Rates:
    """Verdicts and coverage over many simulated sessions. StatsError for fewer than one session."""
    if sessions < 1:
        raise StatsError(f"sessions is {sessions}; it must be at least 1")
    random = np.random.default_rng(seed)
    judged = [
        session(
            random,
            trouble,
            ratio=ratio,
            rounds=rounds,
            processes=processes,
            interleaved=interleaved,
            pooled=pooled,
            delta=delta,
        )
        for _ in range(sessions)
    ]
    return Rates(sessions, _covered(judged, ratio), _shares([j.verdict for j in judged]))


def _process(random: np.random.Generator, trouble: Trouble, rounds: int, interleaved: bool) -> np.ndarray:
    """Times of three equal arms in the rounds of one process, ``(3, rounds)``."""
    order = np.tile(np.arange(3), (rounds, 1))
    slots = order.copy()
    if interleaved:
        order = random.permuted(order, axis=1)
    else:
        order = np.repeat(np.arange(3), rounds).reshape(rounds, 3)
        slots = np.zeros_like(order)
    times = _conditions(random, trouble, 3 * rounds).reshape(rounds, 3)
    times = times * np.where(slots > 0, 1 + trouble.second_slot, 1.0)
    own = np.exp(random.normal(0.0, trouble.process, 3))
    return np.stack([own[arm] * times[order == arm] for arm in range(3)])


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
