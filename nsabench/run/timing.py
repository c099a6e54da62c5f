"""The time of a cell from its samples, whichever processes took them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nsabench.plan import Cell
from nsabench.run.impl import Refused
from nsabench.stats import median_interval

Sample = Mapping[str, Any]

MOST_DROPPED = 0.2
"""Part of the rounds that may be dropped; with more the rest says nothing of the cell either."""


def by_round(samples: Iterable[Sample], weights: Mapping[str, float]) -> dict[tuple[int, int], float]:
    """Milliseconds of a step in each round that counts, by ``(process, round)``, its variants combined by
    weight.
    """
    found: dict[tuple[int, int], float] = {}
    for sample in _counted(samples):
        key = sample["process"], sample["round"]
        found[key] = found.get(key, 0.0) + weights[sample["variant"] or ""] * sample["ms"]
    return found


def dropped_rounds(samples: Iterable[Sample]) -> dict[tuple[int, int], str]:
    """Why each round that does not count was dropped, by ``(process, round)``."""
    return {(one["process"], one["round"]): one["dropped"] for one in samples if one.get("dropped")}


def too_many_dropped(samples: Sequence[Sample]) -> str:
    """What to say where more than `MOST_DROPPED` of the rounds were dropped; empty where not."""
    dropped = dropped_rounds(samples)
    rounds = {(one["process"], one["round"]) for one in samples}
    if len(dropped) <= MOST_DROPPED * len(rounds):
        return ""
    why = "+".join(sorted({name for text in dropped.values() for name in text.split("+")}))
    return f"{len(dropped)} of {len(rounds)} rounds dropped for {why}; allowed {100 * MOST_DROPPED:g} %"


def time_fields(
    cell: Cell, samples: Sequence[Sample], weights: Mapping[str, float], *, flops: float, moved_bytes: float
) -> dict[str, Any]:
    """The columns of a row that come from its samples: times, counts, rates, of the rounds that count.

    Raises:
        Refused: too many rounds were dropped.
    """
    if too_many := too_many_dropped(samples):
        raise Refused("invalid", too_many)
    samples = _counted(samples)
    rounds = list(by_round(samples, weights).values())
    interval = median_interval(rounds)
    seconds = interval.point * 1e-3
    fields: dict[str, Any] = {
        "ms_total": interval.point,
        "ms_lo": interval.lo,
        "ms_hi": interval.hi,
        "ms_min": min(rounds),
        "ms_p95": sorted(rounds)[math.ceil(0.95 * len(rounds)) - 1],
        "n_samples": len(samples),
        "n_rounds": len(rounds),
        "tflops": flops / seconds * 1e-12,
        "gbps": moved_bytes / seconds * 1e-9,
        "tokens_per_s": cell.B * (1 if cell.phase == "decode" else cell.S) / seconds,
    }
    for name in ("emit", "plain"):
        mine = [sample["ms"] for sample in samples if sample["variant"] == name]
        fields[f"ms_{name}"] = median_interval(mine).point if mine else None
    return fields


def _counted(samples: Iterable[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.get("dropped")]
