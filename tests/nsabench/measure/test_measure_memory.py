"""Peak memory: exact on hand-made cases, and aware of temporaries that Python never sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from nsabench.measure import MeasureError, PeakMemory, available_bytes, peak_memory
from nsabench.measure.memory import peak_of


def _cpu(fn: Any) -> int:
    fn()
    peak = peak_memory(fn, "cpu")
    assert peak.reserved_bytes is None
    return peak.alloc_bytes


def test_the_peak_is_of_what_lives_at_once() -> None:
    def fn() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(5000, dtype=torch.uint8)
        del a
        c = torch.empty(300, dtype=torch.uint8)
        del b, c
        torch.empty(5200, dtype=torch.uint8)

    assert _cpu(fn) == 6000


def test_what_is_returned_counts_and_what_was_there_before_does_not() -> None:
    before = torch.zeros(100_000)
    assert _cpu(lambda: torch.empty(10, dtype=torch.int64)) == 80
    assert _cpu(lambda: before.add_(before)) == 0
    assert _cpu(lambda: None) == 0


def test_freeing_what_was_there_before_gives_nothing_back() -> None:
    held = [torch.empty(4096, dtype=torch.uint8) for _ in range(2)]

    def fn() -> None:
        if held:
            held.pop()
        torch.empty(100, dtype=torch.uint8)

    assert peak_memory(fn, "cpu").alloc_bytes == 100


def test_temporaries_inside_an_operator_are_seen() -> None:
    x = torch.randn(100, 1000)
    # kthvalue copies its input and makes indices of it: (4 + 8) bytes an element, and the two results.
    assert _cpu(lambda: torch.kthvalue(x, 5, dim=1)) == 12 * x.numel() + 12 * 100
    # A mask becomes int64 indices inside the operator.
    mask = torch.ones(1000, dtype=torch.bool)
    assert _cpu(lambda: x[0][mask]) == 8 * 1000 + 4 * 1000
    # logsumexp returns 100 numbers and holds exp of the whole input on the way.
    assert 4 * x.numel() <= _cpu(lambda: torch.logsumexp(x, 1)) < 4 * x.numel() + 4096


def test_a_backward_pass_counts_its_saved_tensors_and_gradients() -> None:
    x = torch.randn(1000, requires_grad=True)

    def fn() -> None:
        y = x * x  # 4000 saved by nobody else, 4000 for the gradient and its two parts
        torch.autograd.grad(y, x, torch.ones_like(y))

    assert _cpu(fn) >= 3 * 4000


def test_a_second_measurement_is_not_misled_by_the_first() -> None:
    kept: list[torch.Tensor] = []
    assert peak_memory(lambda: kept.append(torch.empty(1000, dtype=torch.uint8)), "cpu").alloc_bytes == 1000
    kept.clear()
    assert peak_memory(lambda: torch.empty(1000, dtype=torch.uint8), "cpu").alloc_bytes == 1000


def test_an_error_in_the_call_comes_out_and_the_next_one_works() -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        peak_memory(fail, "cpu")
    assert _cpu(lambda: torch.empty(10, dtype=torch.uint8)) == 10


def test_peak_of_events() -> None:
    assert peak_of([]) == (0, 0)
    assert peak_of([(3, 1, -100), (1, 1, 100), (2, 2, 50), (4, 3, 90)]) == (150, 2), "in time order"
    assert peak_of([(1, 9, -500), (2, 1, 10)]) == (10, 2), "a release of something older"
    assert peak_of([(1, 1, 100), (2, 1, 40), (3, 2, 30)]) == (100, 1), "an address given out again"
    assert peak_of([(1, 1, 100), (2, 1, -7), (3, 2, 50)]) == (100, 1), "a release frees what was allocated"


def test_cuda_peak_is_above_entry_and_the_pool_is_whole(fake_cuda: Any) -> None:
    fake_cuda.allocate(1000)
    fake_cuda.allocate(5000)
    fake_cuda.allocated -= 5000  # freed, but still in the peak and in the pool

    def fn() -> None:
        fake_cuda.allocate(300)
        fake_cuda.allocated -= 300
        fake_cuda.allocate(200)

    assert peak_memory(fn, "cuda", api=fake_cuda) == PeakMemory(alloc_bytes=300, reserved_bytes=1300)


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(MeasureError, match="allowed: cpu, cuda"):
        peak_memory(lambda: None, "tpu")


Factory = Callable[[str], AbstractContextManager[object]]


def staged(steps: list[tuple[str, Callable[[], object]]]) -> tuple[Callable[[], None], Any]:
    """A step in stages, and the hook that shows them."""
    factory: list[Factory] = []

    @contextmanager
    def hook(given: Factory) -> Iterator[None]:
        factory.append(given)
        try:
            yield
        finally:
            factory.pop()

    def fn() -> None:
        for stage, work in steps:
            with factory[-1](stage) if stage and factory else nullcontext():
                work()

    return fn, hook


def _take(size: int) -> Callable[[], object]:
    return lambda: torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("steps", "stage", "size"),
    [
        ([("cmp", _take(100)), ("win", _take(300)), ("gate", _take(200))], "win", 300),
        ([("cmp", _take(100)), ("", _take(300))], "other", 300),
        ([("", lambda: None)], "other", 0),
    ],
)
def test_the_stage_of_the_peak(steps: Any, stage: str, size: int) -> None:
    fn, hook = staged(steps)
    assert peak_memory(fn, "cpu", hook=hook) == PeakMemory(size, None, stage)
    assert peak_memory(fn, "cpu").stage == ""


def test_the_peak_of_a_backward_is_in_the_backward() -> None:
    x = torch.randn(1000, requires_grad=True)

    def work() -> None:
        y = (x * 1.0).sin()
        torch.autograd.grad(y.expand(50, -1).sum() * 2, x)
        torch.autograd.grad((x.expand(500, -1) * 1.0)[0, 0], x)

    fn, hook = staged([("proj", work)])
    assert peak_memory(fn, "cpu", hook=hook).stage == "backward"


def test_the_stage_of_the_peak_on_a_gpu(fake_cuda: Any) -> None:
    fake_cuda.allocate(1000)

    def take(size: int) -> Callable[[], object]:
        def work() -> None:
            fake_cuda.allocate(size)
            fake_cuda.allocated -= size

        return work

    fn, hook = staged([("cmp", take(100)), ("win", take(300)), ("gate", take(200))])
    found = peak_memory(fn, "cuda", hook=hook, api=fake_cuda)
    assert (found.alloc_bytes, found.stage) == (300, "win")
    assert found.reserved_bytes is not None
    assert found.reserved_bytes >= 1300


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 50\n"}, 350),
        ({"memory.max": "max\n", "memory.current": "700", "memory.stat": "inactive_file 50\n"}, None),
        ({"memory.max": "1000\n", "memory.current": "1700", "memory.stat": ""}, 0),
        ({"memory.max": "1000\n"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "600",
                "memory/memory.stat": "inactive_file 10",
            },
            410,
        ),
        ({}, None),
    ],
)
def test_what_is_available_is_what_the_control_group_leaves(
    tmp_path: Path, files: dict[str, str], left: int | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = available_bytes("cpu", root=tmp_path)
    if left is None:
        assert found > 2**20
    else:
        assert found == left


def test_what_is_available_on_a_gpu_is_what_its_driver_says(fake_cuda: Any) -> None:
    fake_cuda.mem_get_info = lambda where: (123, 456)
    assert available_bytes("cuda", api=fake_cuda) == 123
