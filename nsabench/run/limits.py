"""What this machine was measured to be capable of, for holding results against."""

from __future__ import annotations

from functools import cache
from typing import Any

from nsabench.measure import MeasureError
from nsabench.measure.peaks import Peaks
from nsabench.run.gate import Refused
from nsabench.store import StoreError, capture_environment
from nsabench.store.machine import load_peaks, peaks_file


@cache
def known_peaks(device: str) -> Peaks | None:
    """The peaks of a device as `doctor --calibrate` kept them; None where there are none that can be read."""
    try:
        stored = load_peaks(peaks_file(capture_environment(), device))
        return Peaks.from_dict(stored) if stored else None
    except (StoreError, MeasureError):
        return None


def part_of_limit(fields: dict[str, Any], peaks: Peaks | None) -> dict[str, float]:
    """``pct_of_limit`` of a timed row, empty where the machine is not calibrated.

    Raises:
        Refused: the time cannot be true on this machine.
    """
    if peaks is None:
        return {}
    cold = fields["cache"] == "cold"
    work = float(fields["flops"]), float(fields["bytes"]), str(fields["dtype"])
    reason = peaks.impossible(fields["ms_total"], *work, cold=cold)
    if reason:
        raise Refused("invalid", f"{reason}; if that is too low, doctor --calibrate on a quiet machine")
    limit = peaks.limit_ms(*work, cold=cold)
    return {} if limit is None else {"pct_of_limit": 100 * limit / fields["ms_total"]}
