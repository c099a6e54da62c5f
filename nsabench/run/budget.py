"""Which group comes next: all in order, or within a budget as far as they fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from nsabench.plan import Cell

Group = list[Cell]


class Agenda:
    """Groups still to be measured, in the order given: a plan for a budget puts the most telling first.

    Within ``budget_s`` seconds, counted from now, a group that is not expected to fit is passed over, and a
    smaller one may come in its place. What a group takes is foretold from the nearest length measured in its
    series (what differs in S alone), scaled by how ``estimate`` (seconds) compares the two; from ``estimate``
    alone where nothing of its series was measured.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        budget_s: float | None,
        estimate: Callable[[Group], float],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = list(groups)
        self._estimate, self._clock = estimate, clock
        self._until = None if budget_s is None else clock() + budget_s
        self._took: dict[tuple[object, ...], list[tuple[Group, float]]] = {}

    @property
    def left_s(self) -> float | None:
        """Seconds left; None without a budget."""
        return None if self._until is None else max(0.0, self._until - self._clock())

    def next(self) -> Group | None:
        """The group to measure now; None when nothing is left, or nothing that fits."""
        left = self.left_s
        for place, group in enumerate(self._waiting):
            if left is None or self.expected_s(group) <= left:
                return self._waiting.pop(place)
        return None

    def took(self, group: Sequence[Cell], seconds: float) -> None:
        """A group has been measured from end to end."""
        self._took.setdefault(_series(group), []).append((list(group), seconds))

    def expected_s(self, group: Group) -> float:
        """What measuring a group is expected to take."""
        known = self._took.get(_series(group))
        if not known:
            return self._estimate(group)
        nearest, seconds = min(known, key=lambda one: abs(math.log(one[0][0].S / group[0].S)))
        return seconds * self._estimate(group) / self._estimate(nearest)


def _series(group: Sequence[Cell]) -> tuple[object, ...]:
    fields = group[0].to_dict()
    return tuple(value for name, value in fields.items() if name not in ("S", "impl", "route"))
