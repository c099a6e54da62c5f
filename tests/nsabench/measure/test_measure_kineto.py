"""What the profiler's timer makes of kernels: their union, step by step, without the gaps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nsabench.measure import KinetoTimer, MeasureError
from nsabench.measure.kineto import MARK, busy_ms
from nsabench.measure.trace import Kernel, Op


def mark(start: float, end: float) -> Op:
    return Op(MARK, start, end, 1)


@pytest.mark.parametrize(
    ("kernels", "busy"),
    [
        ([(1.0, 2.0), (3.0, 3.5)], 1.5),  # the gap does not count
        ([(1.0, 3.0), (2.0, 4.0)], 3.0),  # two streams at once: once
        ([(1.0, 5.0), (2.0, 3.0)], 4.0),  # one inside the other
        ([(0.5, 0.9), (1.0, 2.0), (11.5, 12.0)], 1.0),  # before and after the ranges: a flush
        ([(3.0, 4.0), (1.0, 2.0), (10.5, 11.0)], 2.5),  # two ranges, in any order
    ],
)
def test_busy_is_the_union_of_kernels_that_began_in_a_step(kernels: list[Any], busy: float) -> None:
    ops = [mark(10.0, 11.2), mark(1.0, 6.0), Op("aten::add", 0.0, 20.0, 1)]
    assert busy_ms(ops, [Kernel(a, b, 0) for a, b in kernels]) == pytest.approx(busy)


def test_a_profiler_that_sees_no_kernel_has_no_time() -> None:
    with pytest.raises(MeasureError, match="saw no kernel of the step"):
        busy_ms([mark(0.0, 1.0)], [Kernel(2.0, 3.0, 0)])


def test_a_sample_is_the_mean_over_its_steps(fake_cuda: Any) -> None:
    trace: list[tuple[list[Op], list[Kernel]]] = []

    @contextmanager
    def record() -> Iterator[object]:
        fake_cuda.log.clear()
        ops, kernels = [mark(0.0, 2.0), mark(3.0, 5.0)], [Kernel(0.5, 1.0, 0), Kernel(3.5, 4.5, 0)]
        trace.append((ops, kernels))
        yield trace

    timer = KinetoTimer(
        cache="cold",
        flush=lambda: fake_cuda.kernel(0.1, "flush"),
        api=fake_cuda,
        clock=fake_cuda.clock,
        record=record,
        read=lambda profiler: profiler[-1],
    )
    timer.prepare(lambda: fake_cuda.kernel(0.5, "step"))
    assert timer.sample(2) == pytest.approx(0.75)
    assert fake_cuda.log == ["flush", "synchronize", "step", "synchronize"] * 2
    assert (timer.name, timer.steps, timer.gated_steps) == ("kineto", 2, 0)
