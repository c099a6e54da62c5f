"""The order in which a sweep tells most for the time it has had."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar

from nsabench.plan.cells import Cell

Item = TypeVar("Item")


def informative(groups: Iterable[list[Cell]]) -> list[list[Cell]]:
    """The groups from coarse to fine over S: both ends of each series, then the middles of what lies between.

    A series is what differs in S alone. Series take turns, in the order in which they first appear, so that
    each has its first points early. Only whole groups are moved: cells to be compared stay together.
    """
    series: dict[tuple[object, ...], list[list[Cell]]] = {}
    for group in groups:
        first = group[0].to_dict()
        key = tuple(value for name, value in first.items() if name not in ("S", "impl", "route"))
        series.setdefault(key, []).append(group)
    sorted_series = (sorted(found, key=lambda group: group[0].S) for found in series.values())
    turns = zip_longest(*(coarse_to_fine(found) for found in sorted_series))
    return [group for turn in turns for group in turn if group is not None]


def coarse_to_fine(items: Sequence[Item]) -> list[Item]:
    """First, last, middle, the middles of the halves, and so on: every prefix covers the whole."""
    if len(items) < 3:
        return list(items)
    order = [0, len(items) - 1]
    gaps = [(0, len(items) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [items[at] for at in order]
