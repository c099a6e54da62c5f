"""The same meters on a real GPU. Nothing here asserts how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from nsabench.measure import (
    CaptureError,
    EventTimer,
    GraphTimer,
    MeasureError,
    StageRecorder,
    backward_shares,
    gpu_uuid,
    make_timer,
    open_sampler,
    peak_memory,
    resolve_device,
)
from nsabench.measure.attribution import attribute
from nsabench.measure.probe import probe_cold

pytestmark = pytest.mark.gpu

Factory = Callable[[str], AbstractContextManager[object]]


class Model:
    """Two stages of unequal work: `sel` multiplies eight times, `win` once."""

    def __init__(self) -> None:
        self.x = torch.randn(1024, 1024, device="cuda")
        self.w = torch.randn(1024, 1024, device="cuda", requires_grad=True)
        self.factory: Factory | None = None

    def stage(self, name: str) -> AbstractContextManager[object]:
        return self.factory(name) if self.factory else nullcontext()

    @contextmanager
    def hook(self, factory: Factory) -> Iterator[None]:
        self.factory = factory
        try:
            yield
        finally:
            self.factory = None

    def forward(self) -> torch.Tensor:
        y = self.x
        with self.stage("sel"):
            for _ in range(8):
                y = y @ self.w / 32
        with self.stage("win"):
            y = y @ self.w / 32
        return y

    def step(self) -> None:
        self.forward().sum().backward()


@pytest.mark.parametrize("kind", ["host", "event", "graph", "kineto"])
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_timers(kind: str, cache: str) -> None:
    model = Model()
    timer = make_timer(kind, "cuda", cache)
    with torch.no_grad():
        timer.prepare(model.forward)
        assert timer.sample(5) > 0
    assert timer.gated_steps in range(6)
    assert isinstance(timer.output, torch.Tensor)
    torch.testing.assert_close(timer.output, model.forward().detach())


def test_sustained_event_timer() -> None:
    model = Model()
    timer = EventTimer(regime="sustained")
    timer.prepare(model.step)
    assert timer.sample(5) > 0


def test_a_graph_replays_new_inputs_into_the_same_output() -> None:
    x = torch.ones(16, device="cuda")
    timer = GraphTimer()
    timer.prepare(lambda: x * 2)
    x.fill_(21)
    timer.sample(1)
    torch.cuda.synchronize()
    assert isinstance(timer.output, torch.Tensor)
    assert (timer.output == 42).all()


def test_a_graph_of_several_steps_runs_each_of_them() -> None:
    tensors = [torch.full((16,), float(n), device="cuda") for n in range(4)]
    timer = GraphTimer()
    timer.prepare(*(lambda x=x: x * 2 for x in tensors))
    assert timer.sample(6) > 0
    assert timer.steps == 8
    torch.cuda.synchronize()
    for n, output in enumerate(timer.outputs):
        assert isinstance(output, torch.Tensor)
        assert (output == 2 * n).all()


def test_a_flush_proves_itself_and_none_does_not() -> None:
    assert not probe_cold("cuda").warm
    found = probe_cold("cuda", flush=lambda: None)
    assert found.warm or found.note


def test_a_step_that_waits_cannot_be_captured_and_the_gpu_goes_on() -> None:
    x = torch.ones(16, device="cuda")
    with pytest.raises(CaptureError):
        GraphTimer().prepare(lambda: x.sum().item())
    assert (x + 1).sum().item() == 32


def test_a_step_that_waits_is_gated() -> None:
    x = torch.ones(16, device="cuda")
    timer = EventTimer()
    timer.prepare(lambda: (x + x.sum().item()).sum())
    timer.sample(3)
    assert timer.gated_steps == 3


def test_the_cpu_timer_is_not_for_a_gpu() -> None:
    with pytest.raises(MeasureError, match="allowed: host, event, graph"):
        make_timer("cpu", "cuda", "warm")


def test_peak_memory() -> None:
    def fn() -> None:
        a = torch.empty(2**20, dtype=torch.uint8, device="cuda")
        b = torch.empty(2**21, dtype=torch.uint8, device="cuda")
        del a, b
        torch.empty(2**20, dtype=torch.uint8, device="cuda")

    held = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    peak = peak_memory(fn, "cuda")
    assert peak.alloc_bytes == 3 * 2**20
    assert peak.reserved_bytes is not None
    assert peak.reserved_bytes >= peak.alloc_bytes + held.nbytes


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_forward_shares(cache: str) -> None:
    model = Model()
    with torch.no_grad():
        shares = StageRecorder("cuda", cache=cache).run(model.forward, model.hook)
    assert shares.ms is not None, shares.note
    assert set(shares.ms) == {"sel", "win", "other"}
    assert sum(shares.ms.values()) == pytest.approx(shares.total_ms)
    assert shares.ms["sel"] > shares.ms["win"]


def test_backward_shares() -> None:
    model = Model()
    shares = backward_shares(model.step, model.hook, "cuda")
    assert shares.ms is not None, shares.note
    assert set(shares.ms) == {"sel", "win", "other"}
    assert sum(shares.ms.values()) == pytest.approx(shares.total_ms)
    assert shares.ms["sel"] > shares.ms["win"]


def test_nvml_knows_this_gpu_by_its_uuid() -> None:
    pytest.importorskip("pynvml")
    assert gpu_uuid(resolve_device("cuda")).startswith(("GPU-", "MIG-"))
    with open_sampler("cuda") as sampler:
        if sampler.reason:
            pytest.skip(sampler.reason)
        first, last = sampler.edge(), sampler.edge()
    assert last["t_s"] >= first["t_s"]
    assert first["nvml_used_bytes"] is None or first["nvml_used_bytes"] > 0
    assert sampler.summary(first["t_s"], last["t_s"])["sm_clock_mhz"] is not None


def test_kernels_go_to_the_stages_that_launched_them() -> None:
    model = Model()
    found = attribute(model.step, model.hook, "cuda", runs=2)
    assert found.note == ""
    assert found.ms is not None
    assert sum(found.ms.values()) + found.idle_ms == pytest.approx(found.total_ms, rel=0.01)
    assert found.ms["sel"] > found.ms["win"], "eight products against one, forward and backward"
    assert "aten::mm" in found.seen["sel"]


def test_kernels_of_a_graph_go_to_the_stages_of_the_eager_step() -> None:
    model = Model()
    model.w.requires_grad_(False)
    replay = GraphTimer("cuda").captured(model.forward)
    found = attribute(model.forward, model.hook, "cuda", runs=2, graph=replay)
    assert found.note == ""
    assert found.ms is not None
    assert found.ms["sel"] > found.ms["win"]
    calls = dict.fromkeys(("sel", "win"), 0.0)
    for kernel in found.kernels:
        calls[kernel.branch] += kernel.calls
    assert calls["sel"] == 8 * calls["win"]
