"""What is read from a profile: events as kineto gives them, hand-made, and a real one of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest
import torch

from nsabench.measure.trace import Op, branches, observe, read_events, short_name

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
NODE = "autograd::engine::evaluate_function: "
BORN = 1_790_000_000_000_000_000  # nanoseconds since 1970, as kineto counts

Factory = Callable[[str], AbstractContextManager[object]]


@dataclass
class Event:
    """Answers like `torch._C._autograd._KinetoEvent`; times in microseconds."""

    title: str
    at: int
    to: int
    number: int = 0
    linked: int = 0
    where: torch.autograd.DeviceType = CPU
    thread: int = 1
    annotation: bool = False

    def name(self) -> str:
        return self.title

    def start_ns(self) -> int:
        return BORN + self.at * 1000

    def end_ns(self) -> int:
        return BORN + self.to * 1000

    def correlation_id(self) -> int:
        return self.number

    def linked_correlation_id(self) -> int:
        return self.linked

    def device_type(self) -> torch.autograd.DeviceType:
        return self.where

    def start_thread_id(self) -> int:
        return self.thread

    def sequence_nr(self) -> int:
        return -1

    def fwd_thread_id(self) -> int:
        return 0

    def is_user_annotation(self) -> bool:
        return self.annotation


def launch(call: int, op: int, at: int, name: str = "cudaLaunchKernel") -> Event:
    return Event(name, at, at + 1, call, op)


def ran(name: str, at: int, to: int, call: int, op: int) -> Event:
    return Event(name, at, to, call, op, CUDA)


EVENTS = [
    Event("nsa::sel", 0, 100, 1, annotation=True),
    Event("aten::mm", 10, 40, 2),
    launch(7, 2, 20),
    ran("gemm", 200, 300, 7, 2),
    # Triton, in no op: its call alone says where it was launched. Its number is another op's.
    launch(2, 0, 60, "cuLaunchKernelEx"),
    ran("_selected_kernel", 300, 350, 2, 0),
    Event("aten::add", 110, 120, 3),
    launch(8, 3, 115),
    ran("add_kernel", 350, 360, 8, 3),
    launch(9, 0, 130, "cudaDeviceSynchronize"),
    ran("Memset (Device)", 360, 361, 99, 0),
    Event("nsa::sel", 200, 350, 1, 0, CUDA, annotation=True),  # the stage's shadow on the device
]


def test_kernels_are_read_with_the_op_that_launched_them() -> None:
    ops, kernels = read_events(EVENTS)
    assert [(op.name, op.id) for op in ops] == [
        ("nsa::sel", 1),
        ("aten::mm", 2),
        ("aten::add", 3),
        ("cuLaunchKernelEx", -2),
    ]
    assert [(kernel.name, kernel.op) for kernel in kernels] == [
        ("gemm", 2),
        ("_selected_kernel", -2),
        ("add_kernel", 3),
        ("Memset (Device)", 0),
    ]
    assert (kernels[0].start, kernels[0].end) == pytest.approx((0.2, 0.3))


def test_a_launch_belongs_to_the_stage_around_it() -> None:
    ops, _ = read_events(EVENTS)
    assert {op.id: branch for op, branch in branches(ops)} == {
        1: "sel",
        2: "sel",
        3: "other",
        -2: "sel",
    }


def test_the_kernels_of_a_graph_share_one_launch() -> None:
    ops, kernels = read_events(
        [launch(5, 0, 10, "cudaGraphLaunch"), ran("a", 20, 30, 5, 0), ran("b", 30, 40, 5, 0)]
    )
    assert [op.name for op in ops] == ["cudaGraphLaunch"]
    assert [kernel.op for kernel in kernels] == [-5, -5]


def test_an_empty_profile() -> None:
    assert read_events([]) == ([], [])


def test_the_innermost_of_stages_and_nodes_counts() -> None:
    ops = [
        Op("nsa::cmp", 0.0, 4.0, 1, id=1),
        Op("aten::mm", 1.0, 3.0, 1, sequence_nr=5, id=2),
        Op(f"{NODE}MmBackward0", 10.0, 20.0, 2, 5, fwd_thread=1, id=3),
        Op("aten::mm", 11.0, 12.0, 2, id=4),
        Op("nsa::win", 13.0, 15.0, 2, id=5),  # a forward that runs again in the backward
        Op("aten::add", 13.5, 14.0, 2, id=6),
        Op("aten::mul", 16.0, 17.0, 2, id=7),
        Op(f"{NODE}AccumulateGrad", 21.0, 22.0, 2, id=8),
    ]
    found = {op.id: branch for op, branch in branches(ops)}
    assert found == {1: "cmp", 2: "cmp", 3: "cmp", 4: "cmp", 5: "win", 6: "win", 7: "cmp", 8: "other"}


@contextmanager
def _stages(factory: Factory) -> Iterator[None]:
    global stage
    stage = factory
    yield


stage: Factory


def _step() -> torch.Tensor:
    x = torch.ones(4, 4)
    with stage("cmp"):
        x = x @ x
    with stage("gate"):
        pass
    return x


def test_what_ran_is_seen_by_stage() -> None:
    out, seen = observe(_step, _stages, "cpu")
    assert out.sum() == 64
    assert seen is not None
    assert "aten::mm" in seen["cmp"]
    assert "aten::mm" not in seen["other"]
    assert seen["gate"] == (), "entered, and nothing ran in it"
    assert "win" not in seen


def test_nothing_is_seen_beside_another_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: torch.profiler.profile) -> None:
        raise RuntimeError("Can't disable Kineto profiler when it's not running")

    monkeypatch.setattr(torch.profiler.profile, "start", start)
    out, seen = observe(lambda: 7, _stages, "cpu")
    assert (out, seen) == (7, None)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64>, false>(Flash_fwd_params)",
            "pytorch_flash::flash_fwd_kernel",
        ),
        (
            "void at::native::(anonymous namespace)::softmax_warp_forward<float, 10>(float*, float const*)",
            "at::native::softmax_warp_forward",
        ),
        ("triton_tem_fused_flex_attention_0", "triton_tem_fused_flex_attention_0"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("aten::mm", "aten::mm"),
        ("(all in brackets)", "(all in brackets)"),
        ("operator()<void ()(int)>", "operator"),
    ],
)
def test_names_lose_what_templates_add(name: str, short: str) -> None:
    assert short_name(name) == short
