"""Rows held against the machine's measured peaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nsabench.measure.peaks import Peaks
from nsabench.run import limits
from nsabench.run.gate import Refused
from nsabench.run.limits import known_peaks, part_of_limit
from nsabench.store import capture_environment
from nsabench.store.machine import peaks_file, save_peaks

PEAKS = Peaks("cpu", 10.0, {"fp32": 0.1}, 2**20, 0.1, None, None, None, 2)


def row(**changes: Any) -> dict[str, Any]:
    return {"ms_total": 4.0, "flops": 2e8, "bytes": 1e6, "dtype": "fp32", "cache": "warm"} | changes


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    limits.known_peaks.cache_clear()
    yield
    limits.known_peaks.cache_clear()


def test_the_part_of_the_limit_that_a_step_reaches() -> None:
    assert part_of_limit(row(), PEAKS) == {"pct_of_limit": pytest.approx(50.0)}
    assert part_of_limit(row(cache="cold", bytes=3e7), PEAKS) == {"pct_of_limit": pytest.approx(75.0)}


def test_without_peaks_or_a_rate_it_is_empty() -> None:
    assert part_of_limit(row(), None) == {}
    assert part_of_limit(row(dtype="fp64"), PEAKS) == {}


def test_a_time_that_cannot_be_true_is_refused() -> None:
    with pytest.raises(Refused, match=r"impossible: 0\.2 TFLOP/s.* doctor --calibrate on a quiet") as caught:
        part_of_limit(row(ms_total=1.0), PEAKS)
    assert caught.value.status == "invalid"


def test_peaks_are_found_where_they_were_kept() -> None:
    assert known_peaks("cpu") is None
    path = peaks_file(capture_environment(), "cpu")
    try:
        save_peaks(path, PEAKS.to_dict())
        limits.known_peaks.cache_clear()
        assert known_peaks("cpu") == PEAKS
        for damage in ("{", '{"speed": 1}'):
            path.write_text(damage)
            limits.known_peaks.cache_clear()
            assert known_peaks("cpu") is None
    finally:
        path.unlink(missing_ok=True)
