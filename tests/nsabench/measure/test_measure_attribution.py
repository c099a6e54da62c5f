"""Where the time goes, kernel by kernel: hand-made profiles, a CUDA graph that ran, a real step of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from nsabench.measure import GraphTimer, MeasureError, attribution
from nsabench.measure.attribution import (
    Attribution,
    attribute,
    capture_order,
    host_times,
    kernel_times,
    replay_times,
)
from nsabench.measure.trace import Kernel, Op

RUN = "nsabench::step"

Factory = Callable[[str], AbstractContextManager[object]]


def by_kernel(found: Attribution) -> dict[tuple[str, str], tuple[float, float]]:
    return {(k.kernel, k.branch): (k.calls, k.ms) for k in found.kernels}


def step_ops(at: float, first: int) -> list[Op]:
    """A step of 10 ms: a product in `sel`, an addition in no stage."""
    return [
        Op(RUN, at, at + 10, 1, id=first),
        Op("nsa::sel", at + 1, at + 5, 1, id=first + 1),
        Op("aten::mm", at + 2, at + 4, 1, id=first + 2),
        Op("aten::add", at + 6, at + 7, 1, id=first + 3),
    ]


def test_self_times_of_operators_on_the_host() -> None:
    found = host_times([Op("aten::rand", 0.0, 5.0, 1), *step_ops(10, 1), *step_ops(30, 11)])
    assert by_kernel(found) == {
        ("nsa::other", "other"): (1.0, pytest.approx(5.0)),
        ("aten::mm", "sel"): (1.0, pytest.approx(2.0)),
        ("nsa::sel", "sel"): (1.0, pytest.approx(2.0)),
        ("aten::add", "other"): (1.0, pytest.approx(1.0)),
    }
    assert (found.total_ms, found.idle_ms, found.note) == (10.0, 0.0, "")
    assert found.ms == pytest.approx({"sel": 4.0, "other": 6.0})
    assert [k.ms for k in found.kernels] == sorted((k.ms for k in found.kernels), reverse=True)


def test_an_operator_inside_another_is_not_counted_twice() -> None:
    ops = [
        Op(RUN, 0, 10, 1),
        Op("aten::linear", 1, 9, 1),
        Op("aten::mm", 2, 8, 1),
        Op("aten::mm", 2, 3, thread=2),  # another thread's time is not this one's
    ]
    assert by_kernel(host_times(ops)) == {
        ("aten::mm", "other"): (1.0, 6.0),
        ("aten::linear", "other"): (1.0, 2.0),
        ("nsa::other", "other"): (1.0, 2.0),
    }


def gpu_runs(*runs: Sequence[tuple[str, float, float, int]]) -> tuple[list[Op], list[Kernel]]:
    """Ops of a run each 100 ms, and kernels as (name, start in the run, end, op of the run: 3 mm, 4 add)."""
    ops, kernels = [], []
    for number, run in enumerate(runs):
        ops += step_ops(100.0 * number, 10 * number + 1)
        for name, start, end, op in run:
            shift = 100.0 * number
            kernels.append(Kernel(shift + start, shift + end, 10 * number + op if op else 0, name))
    return ops, kernels


TWO = [("gemm", 20.0, 26.0, 3), ("add_kernel", 27.0, 29.0, 4)]


def test_kernels_by_the_stage_that_launched_them() -> None:
    found = kernel_times(*gpu_runs(TWO, TWO), [10.0, 10.0])
    assert by_kernel(found) == {("gemm", "sel"): (1.0, 6.0), ("add_kernel", "other"): (1.0, 2.0)}
    assert (found.total_ms, found.idle_ms, found.note) == (10.0, pytest.approx(2.0), "")
    assert found.ms is not None
    assert sum(found.ms.values()) + found.idle_ms == pytest.approx(found.total_ms)


def test_what_ran_outside_the_marked_steps_counts_for_nothing() -> None:
    ops, kernels = gpu_runs(TWO)
    ops.append(Op("aten::zero_", -9, -8, 1, id=77))
    kernels += [Kernel(0, 15, 77, "flush"), Kernel(15, 19, 0, "spin")]
    assert by_kernel(kernel_times(ops, kernels, [10.0])) == {
        ("gemm", "sel"): (1.0, 6.0),
        ("add_kernel", "other"): (1.0, 2.0),
    }


@pytest.mark.parametrize(
    ("run", "total", "why"),
    [
        ([], 10.0, "the profiler saw no kernel of the step"),
        ([TWO[0], ("win", 21.0, 26.0, 4)], 10.0, "kernels overlap: 11 ms of them in 6 ms"),
        (TWO, 7.9, "kernels take 8 ms of a total of 7.9 ms"),
        (
            [*TWO, ("lost", 26.0, 26.2, 0)],
            10.0,
            "nothing that was seen launched 0.2 ms of kernels in a total of 10 ms",
        ),
    ],
)
def test_no_stages_where_the_kernels_do_not_account_for_the_time(
    run: list[tuple[str, float, float, int]], total: float, why: str
) -> None:
    found = kernel_times(*gpu_runs(run), [total])
    assert found.note == why
    assert found.ms is None
    assert {kernel.branch for kernel in found.kernels} <= {""}


def test_steps_that_differ() -> None:
    found = kernel_times(*gpu_runs(TWO, TWO[:1]), [10.0, 10.0])
    assert found.note == "the profile holds 1 to 2 kernels a step: it lost some, or steps differ"
    assert by_kernel(found)["gemm", ""] == (1.0, 6.0)


def test_up_to_one_percent_is_let_pass() -> None:
    run = [*TWO, ("lost", 26.0, 26.09, 0)]
    assert kernel_times(*gpu_runs(run), [10.0]).note == ""
    assert kernel_times(*gpu_runs(TWO), [7.95]).note == ""
    assert kernel_times(*gpu_runs(TWO), [7.95]).idle_ms == 0


EAGER = [("gemm", "sel"), ("add_kernel", "other"), ("gemm", "win")]


def test_kernels_of_a_graph_come_in_the_order_of_capture() -> None:
    assert capture_order(EAGER, ["gemm", "add_kernel", "gemm"]) == (["sel", "other", "win"], "")
    assert capture_order([], []) == ([], "")


@pytest.mark.parametrize(
    ("replay", "why"),
    [
        (
            ["gemm", "gemm", "add_kernel"],
            "the graph runs other kernels than the eager step: "
            "kernel 2 is 'add_kernel' eagerly, 'gemm' in the graph",
        ),
        (["gemm", "add_kernel"], "the graph runs 2 kernels, the eager step 3"),
        (["gemm", "add_kernel", "gemm", "gemm"], "the graph runs 4 kernels, the eager step 3"),
        ([], "the graph runs 0 kernels, the eager step 3"),
    ],
)
def test_other_sequences_cannot_be_mapped(replay: list[str], why: str) -> None:
    assert capture_order(EAGER, replay) == ([], why)


def replay_of(*kernels: tuple[str, float, float]) -> tuple[list[Op], list[Kernel], list[float]]:
    ops = [Op(RUN, 0.0, 1.0, 1, id=1), Op("cudaGraphLaunch", 0.2, 0.4, 1, id=-5)]
    return ops, [Kernel(start, end, -5, name) for name, start, end in kernels], [5.0]


def test_a_replay_takes_its_stages_from_the_eager_step() -> None:
    eager = (*gpu_runs(TWO), [10.0])
    found = replay_times(eager, replay_of(("gemm", 2.0, 5.0), ("add_kernel", 5.0, 6.5)))
    assert by_kernel(found) == {("gemm", "sel"): (1.0, 3.0), ("add_kernel", "other"): (1.0, 1.5)}
    assert (found.total_ms, found.idle_ms) == (5.0, pytest.approx(0.5))


def test_a_replay_that_cannot_be_mapped_has_no_stages() -> None:
    eager = (*gpu_runs(TWO), [10.0])
    found = replay_times(eager, replay_of(("gemm", 2.0, 5.0)))
    assert found.note == "the graph runs 1 kernels, the eager step 2"
    assert by_kernel(found) == {("gemm", ""): (1.0, 3.0)}


class Model:
    """`sel` multiplies, `gate` adds; both have a backward."""

    def __init__(self) -> None:
        self.x = torch.randn(16, 16)
        self.w = torch.randn(16, 16, requires_grad=True)
        self.stage: Factory = lambda name: nullcontext()
        self.steps = 0

    @contextmanager
    def hook(self, factory: Factory) -> Iterator[None]:
        self.stage = factory
        yield
        self.stage = lambda name: nullcontext()

    def forward(self) -> torch.Tensor:
        self.steps += 1
        with self.stage("sel"):
            y = self.x @ self.w
        with self.stage("gate"):
            return y + 1


def test_a_step_on_a_cpu() -> None:
    model = Model()
    found = attribute(model.forward, model.hook, "cpu", runs=3)
    assert model.steps == 4, "one that does not count"
    times = by_kernel(found)
    assert times["aten::mm", "sel"][0] == 1
    assert ("aten::add", "gate") in times
    assert found.ms is not None
    assert list(found.ms) == ["sel", "gate", "other"]
    assert sum(found.ms.values()) == pytest.approx(found.total_ms, rel=0.01)
    assert "aten::mm" in found.seen["sel"]


def test_a_backward_on_a_cpu_goes_to_the_stages_of_its_forward() -> None:
    model = Model()
    made: list[torch.Tensor] = []
    found = attribute(
        lambda: made.pop().sum().backward(),
        model.hook,
        "cpu",
        runs=2,
        before=lambda: made.append(model.forward()),
    )
    assert model.steps == 3
    names = {kernel for kernel, branch in by_kernel(found) if branch == "sel"}
    assert "autograd::engine::evaluate_function: MmBackward0" in names
    assert "aten::mm" in names
    assert by_kernel(found)["aten::mm", "sel"][0] == 1, "the forward's product is not among them"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasureError, match="runs is 0"):
        attribute(lambda: None, nullcontext, "cpu", runs=0)

    def start(self: torch.profiler.profile) -> None:
        raise RuntimeError("Profiler is already enabled on this thread\nmore")

    monkeypatch.setattr(torch.profiler.profile, "start", start)
    with pytest.raises(MeasureError, match=r"^torch\.profiler cannot start: Profiler is already enabled"):
        attribute(lambda: None, lambda factory: nullcontext(), "cpu")


class Profiled:
    """Profiles of a device that ran `kernel` ms in `sel`: runs its act, and makes up what was recorded."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.acts = 0

    def __call__(self, act: Callable[[], object], *, cuda: bool) -> tuple[list[Op], list[Kernel]]:
        assert cuda
        self.acts += 1
        began = len(self.gpu.log)
        act()
        runs = [name for name in self.gpu.log[began:] if name in ("step", "replay")]
        if self.acts in (1, 3):
            return [], []  # calibrations
        shapes = [[("gemm", 20.0, 26.0, 3 if name == "step" else 1)] for name in runs]
        return gpu_runs(*shapes)


def test_a_step_on_a_gpu_is_queued_ahead(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "_profiled", Profiled(fake_cuda))
    flushes: list[int] = []
    found = attribute(
        lambda: fake_cuda.kernel(6.5, "step"),
        lambda factory: nullcontext(),
        "cuda",
        runs=2,
        before=lambda: flushes.append(1),
        api=fake_cuda,
    )
    assert found.total_ms == pytest.approx(6.5, rel=0.01), "by events"
    assert by_kernel(found) == {("gemm", "sel"): (1.0, 6.0)}
    assert found.idle_ms == pytest.approx(found.total_ms - 6.0)
    assert found.seen["sel"] == ("aten::mm", "gemm")
    assert len(flushes) == fake_cuda.log.count("step")


def test_a_graph_on_a_gpu(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attribution, "_profiled", Profiled(fake_cuda))
    found = attribute(
        lambda: fake_cuda.kernel(9.0, "step"),
        lambda factory: nullcontext(),
        "cuda",
        runs=3,
        graph=lambda: fake_cuda.kernel(6.2, "replay"),
        api=fake_cuda,
    )
    assert found.total_ms == pytest.approx(6.2, rel=0.01), "the replay's, not the eager step's"
    assert by_kernel(found) == {("gemm", "sel"): (1.0, 6.0)}
    assert found.ms == pytest.approx({"sel": 6.0, "other": 0.0})


def test_a_step_is_captured_alone(fake_cuda: Any) -> None:
    replay = GraphTimer("cuda", api=fake_cuda).captured(lambda: fake_cuda.kernel(3.0, "step"))
    assert fake_cuda.log.count("captured step") == 1
    replay()
    assert fake_cuda.log[-1] == "replay"
