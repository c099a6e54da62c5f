"""The time of a cell from its samples, whichever processes took them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nsabench.plan import Cell
from nsabench.stats import median_interval

Sample = Mapping[str, Any]


def by_round(samples: Iterable[Sample], weights: Mapping[str, float]) -> dict[tuple[int, int], float]:
    """Milliseconds of a step in each round, by ``(process, round)``, its variants combined by weight."""
    found: dict[tuple[int, int], float] = {}
    for sample in samples:
        key = sample["process"], sample["round"]
        found[key] = found.get(key, 0.0) + weights[sample["variant"] or ""] * sample["ms"]
    return found


def time_fields(
    cell: Cell, samples: Sequence[Sample], weights: Mapping[str, float], *, flops: float, moved_bytes: float
) -> dict[str, Any]:
    """The columns of a row that come from its samples: times, counts, rates."""
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
