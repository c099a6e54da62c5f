"""Backward shares: real autograd sequence numbers, hand-made times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from nsabench.measure import MeasureError, backward_shares
from nsabench.measure.backward import host_shares, kernel_shares
from nsabench.measure.profiling import profile
from nsabench.measure.trace import Kernel, Op, read_profile

NODE = "autograd::engine::evaluate_function: "


class Products(torch.autograd.Function):
    """x times a matrix, with a backward of as many products as asked for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, times: int) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.times = times
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, w = ctx.saved_tensors
        for _ in range(ctx.times):
            dx = grads[0] @ w.t()
        return dx, x.t() @ grads[0], None


class Toy:
    """Three stages: `proj` one product, `sel` a custom function, `gate` elementwise."""

    def __init__(self, size: int = 8, times: int = 1) -> None:
        self.x = torch.randn(size, size)
        self.w = torch.randn(size, size, requires_grad=True)
        self.v = torch.randn(size, size, requires_grad=True)
        self.times = times
        self.factory: Callable[[str], AbstractContextManager[object]] | None = None

    @contextmanager
    def hook(self, factory: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
        self.factory = factory
        try:
            yield
        finally:
            self.factory = None

    def stage(self, name: str) -> AbstractContextManager[object]:
        return self.factory(name) if self.factory else nullcontext()

    def forward(self) -> torch.Tensor:
        with self.stage("proj"):
            y = self.x @ self.w
            torch.arange(10)  # makes no node, and comes last in its stage
        with self.stage("sel"):
            y.detach().topk(2)  # shares its number with the node that follows
            y = Products.apply(y, self.v, self.times)
        with self.stage("gate"):
            y = torch.sigmoid(y)
        return y * 2.0

    def step(self) -> None:
        self.forward().sum().backward()


def _profiled(toy: Toy) -> list[Op]:
    with toy.hook(lambda name: torch.profiler.record_function(f"nsa::{name}")), profile() as profiler:
        toy.step()
    return read_profile(profiler)[0]


def test_nodes_go_to_the_stage_that_made_them() -> None:
    """Real ops and sequence numbers; each node is given one kernel of a known, made-up time."""
    ops = _profiled(Toy())
    costs = {"MmBackward0": 1.0, "ProductsBackward": 10.0, "SigmoidBackward0": 100.0, "MulBackward0": 1000.0}
    kernels = []
    now = 0.0
    for op in ops:
        if op.is_node:
            cost = costs.get(op.name.removeprefix(NODE), 0.25)
            kernels.append(Kernel(now, now + cost, op.id))
            now += cost
    shares = kernel_shares(ops, kernels)
    # Outside the stages: the product with 2, the sum and the two accumulations of a gradient.
    expected = {"proj": 1.0, "sel": 10.0, "gate": 100.0, "other": 1000.0 + 3 * 0.25}
    assert shares.ms == pytest.approx(expected)
    assert shares.total_ms == pytest.approx(sum(expected.values()))


def test_end_to_end_on_a_cpu() -> None:
    toy = Toy(size=128, times=200)
    shares = backward_shares(toy.step, toy.hook, "cpu", n=2)
    assert shares.ms is not None
    assert list(shares.ms) == ["proj", "sel", "gate", "other"]
    assert sum(shares.ms.values()) == pytest.approx(shares.total_ms)
    assert shares.ms["sel"] > shares.ms["proj"], "two hundred products against one"


def test_a_step_without_a_backward_pass() -> None:
    toy = Toy()
    shares = backward_shares(toy.forward, toy.hook, n=1)
    assert (shares.ms, shares.note) == (None, "the step ran no backward pass")


def test_a_backward_pass_without_stages() -> None:
    w = torch.randn(4, requires_grad=True)
    shares = backward_shares(lambda: (w * w).sum().backward(), Toy().hook, n=1)
    assert (shares.ms, shares.note) == (None, "no backward node comes from a stage")


def test_refusals() -> None:
    with pytest.raises(MeasureError, match="n is 0"):
        backward_shares(lambda: None, nullcontext, n=0)


def _forward(stage: str, start: float, number: int, id: int = 0) -> list[Op]:
    return [
        Op(f"nsa::{stage}", start, start + 1.0, thread=1),
        Op("aten::mm", start + 0.1, start + 0.9, thread=1, sequence_nr=number, id=id),
    ]


def _node(start: float, end: float, number: int, thread: int = 1, id: int = 0) -> Op:
    return Op(f"{NODE}MmBackward0", start, end, thread, number, fwd_thread=1 if number >= 0 else 0, id=id)


def test_host_time_from_first_node_to_last() -> None:
    ops = [
        *_forward("cmp", 0.0, 1),
        *_forward("win", 1.0, 2),
        Op("aten::ones_like", 2.0, 9.0, thread=1),
        _node(10.0, 14.0, 2),
        Op("aten::mm", 10.5, 13.0, thread=1),
        _node(15.0, 17.0, 1),
        _node(17.0, 18.0, -1),
    ]
    shares = host_shares(ops)
    assert shares.ms == pytest.approx({"cmp": 2.0, "win": 4.0, "other": 2.0})
    assert shares.total_ms == pytest.approx(8.0)


def test_a_backward_pass_inside_a_node_is_not_counted_twice() -> None:
    ops = [
        *_forward("cmp", 0.0, 1),
        *_forward("win", 1.0, 2),
        _node(10.0, 20.0, 2),
        _node(12.0, 15.0, 1),
    ]
    assert host_shares(ops).ms == pytest.approx({"cmp": 3.0, "win": 7.0, "other": 0.0})


def test_of_the_ops_with_one_number_the_last_made_the_node() -> None:
    ops = [
        *_forward("cmp", 0.0, 7),
        *_forward("win", 1.0, 7),
        _node(10.0, 14.0, 7),
    ]
    assert host_shares(ops).ms == pytest.approx({"win": 4.0, "other": 0.0})
    assert host_shares(list(reversed(ops))).ms == pytest.approx({"win": 4.0, "other": 0.0})


def test_an_op_outside_the_stages_takes_its_number_with_it() -> None:
    ops = [
        *_forward("cmp", 0.0, 7),
        *_forward("win", 1.0, 6),
        Op("aten::mul", 3.0, 3.5, thread=1, sequence_nr=7),
        _node(10.0, 14.0, 7),
        _node(14.0, 15.0, 6),
    ]
    assert host_shares(ops).ms == pytest.approx({"win": 1.0, "other": 4.0})


def test_numbers_of_another_thread_are_other_numbers() -> None:
    elsewhere = Op("aten::mm", 0.2, 0.3, thread=2, sequence_nr=1)
    ops = [*_forward("cmp", 0.0, 1), elsewhere, _node(10.0, 11.0, 1, thread=3)]
    assert host_shares(ops).ms == pytest.approx({"cmp": 1.0, "other": 0.0})


def test_a_stage_holds_the_ops_of_its_own_thread() -> None:
    elsewhere = [
        Op("aten::mm", 0.2, 0.3, thread=2, sequence_nr=5),
        Op(f"{NODE}MmBackward0", 11.0, 13.0, thread=1, sequence_nr=5, fwd_thread=2),
    ]
    ops = [*_forward("cmp", 0.0, 1), *elsewhere, _node(10.0, 11.0, 1)]
    assert host_shares(ops).ms == pytest.approx({"cmp": 1.0, "other": 2.0})


def test_kernels_belong_to_the_node_around_their_op() -> None:
    ops = [
        *_forward("cmp", 0.0, 1, id=1),
        *_forward("win", 1.0, 2, id=2),
        _node(10.0, 14.0, 2, thread=2, id=3),
        Op("aten::mm", 11.0, 12.0, thread=2, id=4),
        Op("aten::t", 11.1, 11.2, thread=2, id=5),
        _node(14.0, 15.0, 1, thread=2, id=6),
        _node(15.0, 16.0, -1, thread=2, id=7),
    ]
    kernels = [
        Kernel(0.5, 2.5, 1),  # forward
        Kernel(5.0, 6.0, 0),  # forward, launched by no op
        Kernel(20.0, 24.0, 4),
        Kernel(24.0, 25.0, 3),
        Kernel(26.0, 28.0, 6),
        Kernel(28.0, 29.0, 7),
        Kernel(30.0, 31.0, 0),  # after it
    ]
    shares = kernel_shares(ops, kernels)
    assert shares.ms == pytest.approx({"cmp": 2.0, "win": 5.0, "other": 1.0})
    assert shares.total_ms == pytest.approx(8.0), "the gap of 1 ms is no kernel's"


def test_a_kernel_of_unknown_origin_inside_the_backward_pass() -> None:
    ops = [*_forward("cmp", 0.0, 1), _node(10.0, 14.0, 1, id=3), _node(14.0, 15.0, -1, id=4)]
    kernels = [Kernel(20.0, 24.0, 3), Kernel(24.0, 24.5, 0), Kernel(25.0, 26.0, 4)]
    shares = kernel_shares(ops, kernels)
    assert shares.ms is None
    assert shares.note == "backward nodes launched 5 ms of the 5.5 ms of kernels in the backward pass"
    shares = kernel_shares(ops, [kernels[0], Kernel(24.0, 24.01, 0), kernels[2]])
    assert shares.ms == pytest.approx({"cmp": 4.0, "other": 1.01})


def test_a_backward_pass_without_kernels() -> None:
    ops = [*_forward("cmp", 0.0, 1), _node(10.0, 14.0, 1, id=3)]
    shares = kernel_shares(ops, [])
    assert (shares.ms, shares.note) == (None, "the backward pass launched no kernel")
    assert kernel_shares(ops[:2], []).note == "the step ran no backward pass"
