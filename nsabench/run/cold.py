"""A row that says cold says so on proof."""

from __future__ import annotations

from functools import cache
from typing import Any

from nsabench.measure.probe import COLDEST, ColdProbe, probe_cold
from nsabench.plan import Cell
from nsabench.run.impl import Refused
from nsabench.run.policy import Policy


def prove_cold(cell: Cell, policy: Policy, fields: dict[str, Any]) -> str:
    """Fill ``cold_probe`` of a row whose cache is cold; returns what to note where nothing is proved.

    A CPU shares its last-level cache with whoever else is there, and its times are noisy: where nobody asked
    for a cold cache (``cache`` is ``auto``) a failed proof is noted, not refused.

    Raises:
        Refused: a marker was still in the cache after the flush.
    """
    if policy.cache_for(cell) != "cold":
        return ""
    found = known_probe(cell.device)
    fields["cold_probe"] = found.rate
    if not found.warm:
        return found.note
    why = f"after a flush a marker is read at {found.rate:.2f} times memory's rate; allowed {COLDEST:g}"
    if cell.device == "cpu" and policy.cache != "cold":
        return f"the cache may not be cold: {why}"
    raise Refused("invalid", f"the cache is not cold: {why}")


@cache
def known_probe(device: str) -> ColdProbe:
    """The proof for a device, made once in a process."""
    return probe_cold(device)
