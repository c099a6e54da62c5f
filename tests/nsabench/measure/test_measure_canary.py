"""The canary: when a device counts as steady, on made-up readings and on this CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, count, repeat

import pytest

from nsabench.measure import MeasureError
from nsabench.measure.canary import canary, settle


def reader(*readings: float) -> Callable[[], float]:
    """These readings, then the last one for ever."""
    values = chain(readings, repeat(readings[-1]))
    return lambda: next(values)


def ticking(step: float = 0.1) -> Callable[[], float]:
    times: Iterator[float] = (n * step for n in count())
    return lambda: next(times)


def test_three_readings_that_agree() -> None:
    found = settle(reader(1.0, 1.005, 1.009), clock=ticking())
    assert (found.steady, found.readings, found.ms) == (True, 3, 1.009)
    assert found.spread == pytest.approx(0.009)


def test_a_clock_that_ramps_up_is_waited_for() -> None:
    found = settle(reader(2.0, 1.6, 1.3, 1.1, 1.0), clock=ticking())
    assert (found.steady, found.readings) == (True, 7)


def test_two_that_agree_and_one_that_does_not() -> None:
    found = settle(reader(1.0, 1.0, 1.02, 1.02, 1.0, 1.0, 1.0), clock=ticking())
    assert (found.steady, found.readings) == (True, 7)


def test_time_is_up() -> None:
    jumping = chain.from_iterable(repeat((1.0, 2.0)))
    found = settle(lambda: next(jumping), limit_s=1.0, clock=ticking(0.1))
    assert not found.steady
    assert found.spread == 1.0
    assert found.readings <= 11


def test_this_cpu() -> None:
    read = canary("cpu")
    assert 0 < read() < 1000
    assert settle(read, limit_s=0.05).readings >= 1


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(MeasureError, match="allowed: cpu, cuda"):
        canary("tpu")
