"""A second timer beside the first, after the rounds: whether the two agree, and what the host takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from nsabench.measure import MeasureError, Timer
from nsabench.run.impl import Refused
from nsabench.run.workload import Variant

Timed = Sequence[tuple[Variant, Timer, int]]
"""The steps of an arm, the timer of each, and the steps of a sample."""

SECONDS = {"graph": ("event", "kineto"), "event": ("graph", "kineto"), "host": ("graph", "event")}
"""Who checks whom, the first that can: a CPU's clock has nobody."""

APART_PART, APART_MS = 0.05, 0.003
"""Two timers that differ by more than this part, and by more than this, disagree."""

LATE_PCT = 5.0
"""With more steps for which the host was late, the device's time holds host time."""

SAMPLES = 5
MOST_STEPS = 50  # of a sample of the second timer


def cross_check(timed: Timed, make: Callable[[str], Timer], fields: dict[str, Any]) -> str:
    """Fill ``queue_gated_pct``, ``cross_timer``, ``ms_cross`` and ``host_bound``; returns what to note.

    ``make`` gives a timer by its name. The timers take their samples in turn, so that clocks that drift after
    the rounds part nobody.

    Raises:
        Refused: the device's time holds host time, and more of it than two timers may differ by.
    """
    first = timed[0][1].name
    late = None if first == "host" else late_pct([timer for _, timer, _ in timed])
    fields["queue_gated_pct"] = late
    too_late = late is not None and late > LATE_PCT
    said = f"the host was late in {late:.0f} % of the steps" if too_late else ""
    second, ms, why_not = _beside(timed, first, make)
    if not second:
        return "; ".join(filter(None, (said, f"not cross-checked: {why_not}")))
    fields |= {"cross_timer": second, "ms_cross": ms[second]}
    fields["host_bound"] = ms["host"] / ms[second if first == "host" else first]
    if first == "host":  # what a device's timer leaves out is what this one is for
        return ""
    apart = disagreement(first, ms[first], second, ms[second])
    if apart and too_late and ms[first] > ms[second]:
        raise Refused("invalid", f"{said}: {apart}; --timer host times host and device together")
    return "; ".join(filter(None, (said, apart)))


def late_pct(timers: Sequence[Timer]) -> float | None:
    """Percent of the timers' steps for which the host was late; None before any step."""
    steps = sum(timer.steps for timer in timers)
    return 100 * sum(timer.gated_steps for timer in timers) / steps if steps else None


def disagreement(first: str, first_ms: float, second: str, second_ms: float) -> str:
    """How far two timers' times of one step are apart; empty where they agree."""
    apart = abs(first_ms - second_ms)
    part = apart / min(first_ms, second_ms)
    if part <= APART_PART or apart <= APART_MS:
        return ""
    return f"{first} {first_ms:.4g} ms, {second} {second_ms:.4g} ms a step, {100 * part:.0f} % apart"


def _beside(timed: Timed, first: str, make: Callable[[str], Timer]) -> tuple[str, dict[str, float], str]:
    """The first timer that can check the headline's, the times by it, the host and the headline; or why none
    can.
    """
    why_not = []
    for kind in SECONDS[first]:
        try:
            others = {
                name: [_prepared(make(name), variant) for variant, _, _ in timed]
                for name in dict.fromkeys((kind, "host"))
                if name != first
            }
            ms = _in_turn(timed, others)
        except (MeasureError, torch.OutOfMemoryError) as error:
            why_not.append(f"{kind}: {str(error).strip().splitlines()[0]}")
            continue
        late = late_pct(others[kind])
        if late is None or late <= LATE_PCT:
            return kind, ms, ""
        why_not.append(f"{kind}: the host was late in {late:.0f} % of its steps")
    return "", {}, "; ".join(why_not)


def _prepared(timer: Timer, variant: Variant) -> Timer:
    timer.prepare(variant.step)
    return timer


def _in_turn(timed: Timed, others: Mapping[str, Sequence[Timer]]) -> dict[str, float]:
    """Milliseconds of a step by each timer, its variants combined by weight."""
    total: dict[str, float] = {}
    for place, (variant, headline, iters) in enumerate(timed):
        timers = {headline.name: headline, **{name: mine[place] for name, mine in others.items()}}
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(SAMPLES):
            for name, timer in timers.items():
                times[name].append(timer.sample(iters if timer is headline else min(iters, MOST_STEPS)))
        for name, found in times.items():
            total[name] = total.get(name, 0.0) + variant.weight * median(found)
    return total
