"""Timers on fake clocks: what is inside the time, what is outside, and what is refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsabench.measure import (
    CaptureError,
    CpuTimer,
    EventTimer,
    GraphTimer,
    HostTimer,
    MeasureError,
    Timer,
    choose_iters,
    make_timer,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class TestCpu:
    def test_a_sample_is_the_mean_of_its_steps(self) -> None:
        clock = Clock()
        lengths = iter([9.0, 0.001, 0.002, 0.006])  # the first is the warm-up
        timer = CpuTimer(clock=clock)
        timer.prepare(lambda: clock.advance(next(lengths)))
        assert timer.warmup_ms == pytest.approx(9000)
        assert timer.sample(3) == pytest.approx(3.0)
        assert (timer.name, timer.cache, timer.regime) == ("cpu", "warm", "latency")
        assert (timer.steps, timer.gated_steps) == (3, 0)

    def test_warm_up_is_three_steps_or_a_second(self) -> None:
        clock = Clock()
        ran: list[int] = []
        CpuTimer(clock=clock).prepare(lambda: ran.append(1))
        assert len(ran) == 3
        ran.clear()
        CpuTimer(clock=clock).prepare(lambda: (ran.append(1), clock.advance(0.6)))
        assert len(ran) == 2

    def test_cold_flushes_before_each_step_outside_the_time(self) -> None:
        clock = Clock()
        log: list[str] = []

        def flush() -> None:
            log.append("flush")
            clock.advance(5.0)

        timer = CpuTimer(cache="cold", flush=flush, clock=clock)
        timer.prepare(lambda: None)
        timer.prepare(lambda: (log.append("step"), clock.advance(0.002)))
        log.clear()
        assert timer.sample(2) == pytest.approx(2.0)
        assert log == ["flush", "step", "flush", "step"]

    def test_warm_never_flushes(self) -> None:
        timer = CpuTimer(cache="warm", flush=lambda: pytest.fail("flushed"))
        timer.prepare(lambda: None)
        timer.sample(2)

    def test_sustained_reads_the_clock_once_around_all_steps(self) -> None:
        clock = Clock()
        reads: list[float] = []

        def counted() -> float:
            reads.append(clock.now)
            return clock.now

        timer = CpuTimer(regime="sustained", clock=counted)
        timer.prepare(lambda: clock.advance(0.004))
        reads.clear()
        assert timer.sample(5) == pytest.approx(4.0)
        assert len(reads) == 2

    def test_the_last_output_is_kept_and_freed_before_the_next_step(self) -> None:
        timer = CpuTimer(clock=Clock())
        seen: list[object] = []
        outputs = iter(range(100))

        def step() -> int:
            seen.append(timer.output)
            return next(outputs)

        timer.prepare(step)
        seen.clear()
        timer.sample(2)
        assert seen == [None, None]
        assert timer.output == 4

    def test_no_garbage_collection_inside_a_sample(self) -> None:
        timer = CpuTimer(clock=Clock())
        states: list[bool] = []
        timer.prepare(lambda: states.append(gc.isenabled()))
        states.clear()
        timer.sample(1)
        assert states == [False]
        assert gc.isenabled()

    def test_a_step_that_raises_leaves_the_collector_on(self) -> None:
        timer = CpuTimer(clock=Clock())
        fail = False

        def step() -> None:
            if fail:
                raise RuntimeError("boom")

        timer.prepare(step)
        fail = True
        with pytest.raises(RuntimeError, match="boom"):
            timer.sample(1)
        assert gc.isenabled()

    def test_a_real_step_takes_time(self) -> None:
        timer = make_timer("cpu", "cpu", "cold")
        x = torch.randn(64, 64)
        timer.prepare(lambda: x @ x)
        assert timer.sample(2) > 0
        assert isinstance(timer.output, torch.Tensor)


class TestHost:
    def test_launches_and_the_wait_are_in_the_time_and_the_flush_is_not(self, fake_cuda: Any) -> None:
        timer = HostTimer(
            cache="cold",
            flush=lambda: fake_cuda.kernel(3.0, "flush"),
            api=fake_cuda,
            clock=fake_cuda.clock,
        )

        def step() -> None:
            fake_cuda.think(0.5)
            fake_cuda.kernel(1.0)

        timer.prepare(step)
        assert timer.sample(2) == pytest.approx(0.5 + 0.005 + 1.0)
        assert timer.name == "host"


class TestEvent:
    def test_the_device_time_alone(self, fake_cuda: Any) -> None:
        timer = EventTimer(api=fake_cuda, clock=fake_cuda.clock)

        def step() -> str:
            for _ in range(3):
                fake_cuda.think(0.2)
                fake_cuda.kernel(0.01)
            return "out"

        timer.prepare(step)
        assert timer.sample(4) == pytest.approx(0.03)
        assert (timer.steps, timer.gated_steps) == (4, 0)
        assert timer.output == "out"
        assert timer.warmup_ms > 0

    def test_cold_flushes_before_each_step(self, fake_cuda: Any) -> None:
        timer = EventTimer(
            cache="cold",
            flush=lambda: fake_cuda.kernel(0.1, "flush"),
            api=fake_cuda,
            clock=fake_cuda.clock,
        )
        timer.prepare(lambda: fake_cuda.kernel(0.02, "step"))
        fake_cuda.log.clear()
        assert timer.sample(2) == pytest.approx(0.02)
        assert fake_cuda.log == ["sleep", "flush", "step"] * 2

    def test_sustained_runs_the_steps_back_to_back_between_two_events(self, fake_cuda: Any) -> None:
        timer = EventTimer(regime="sustained", api=fake_cuda, clock=fake_cuda.clock)
        timer.prepare(lambda: fake_cuda.kernel(0.05, "step"))
        fake_cuda.log.clear()
        assert timer.sample(3) == pytest.approx(0.05)
        assert fake_cuda.log == ["sleep", "step", "step", "step"]
        assert timer.gated_steps == 0

    def test_a_host_that_cannot_keep_up_is_counted(self, fake_cuda: Any) -> None:
        timer = EventTimer(regime="sustained", api=fake_cuda, clock=fake_cuda.clock)

        def step() -> None:
            fake_cuda.think(1.0)
            fake_cuda.kernel(0.01)

        timer.prepare(step)
        assert timer.sample(50) == pytest.approx(0.01), "a spin for all of them"
        assert timer.gated_steps == 0
        assert timer.sample(1000) > 0.5, "more than the longest spin covers"
        assert 800 <= timer.gated_steps < 1000
        assert timer.steps == 1050

    def test_a_step_that_waits_is_gated_every_time(self, fake_cuda: Any) -> None:
        timer = EventTimer(api=fake_cuda, clock=fake_cuda.clock)

        def step() -> None:
            fake_cuda.kernel(0.01)
            fake_cuda.synchronize()
            fake_cuda.kernel(0.01)

        timer.prepare(step)
        timer.sample(3)
        assert timer.gated_steps == timer.steps == 3


class TestGraph:
    def test_warm_up_on_a_side_stream_then_one_capture_then_replays(self, fake_cuda: Any) -> None:
        ran: list[int] = []

        def step() -> str:
            ran.append(1)
            fake_cuda.think(0.3)
            fake_cuda.kernel(0.010, "a")
            fake_cuda.kernel(0.005, "b")
            return "captured result"

        timer = GraphTimer(api=fake_cuda, clock=fake_cuda.clock)
        timer.prepare(step)
        assert len(ran) == 4, "three to warm up, one to capture"
        log = fake_cuda.log
        assert log[:2] == ["side waits", "side stream on"]
        assert log.index("side stream off") < log.index("main waits") < log.index("captured a")
        assert timer.output == "captured result"
        log.clear()
        assert timer.sample(3) == pytest.approx(0.015)
        assert len(ran) == 4, "replays run no Python"
        assert log == ["sleep", "replay"] * 3
        assert (timer.name, timer.gated_steps) == ("graph", 0)

    def test_cold_flushes_before_each_replay_outside_the_graph(self, fake_cuda: Any) -> None:
        timer = GraphTimer(
            cache="cold",
            flush=lambda: fake_cuda.kernel(0.1, "flush"),
            api=fake_cuda,
            clock=fake_cuda.clock,
        )
        timer.prepare(lambda: fake_cuda.kernel(0.010, "step"))
        assert "captured flush" not in fake_cuda.log
        fake_cuda.log.clear()
        assert timer.sample(2) == pytest.approx(0.010)
        assert fake_cuda.log == ["sleep", "flush", "replay"] * 2

    def test_several_steps_in_one_graph_share_its_time(self, fake_cuda: Any) -> None:
        timer = GraphTimer(
            cache="cold",
            flush=lambda: fake_cuda.kernel(0.1, "flush"),
            api=fake_cuda,
            clock=fake_cuda.clock,
        )

        def copy(name: str, ms: float) -> Any:
            return lambda: (fake_cuda.kernel(ms, name), name)[1]

        timer.prepare(copy("a", 0.010), copy("b", 0.020), copy("c", 0.030))
        assert [name for name in fake_cuda.log if name.startswith("captured")] == [
            *("captured a", "captured b", "captured c")
        ]
        assert fake_cuda.log.index("c") < fake_cuda.log.index("captured a"), "each is warmed up"
        assert (timer.output, timer.outputs) == ("a", ("a", "b", "c"))
        fake_cuda.log.clear()
        assert timer.sample(5) == pytest.approx(0.020)
        assert fake_cuda.log == ["sleep", "flush", "replay"] * 2, "whole graphs, a flush before each"
        assert (timer.steps, timer.gated_steps) == (6, 0)

    def test_a_step_that_no_graph_can_hold(self, fake_cuda: Any) -> None:
        timer = GraphTimer(api=fake_cuda, clock=fake_cuda.clock)
        with pytest.raises(CaptureError, match=r"cannot hold the step: operation not permitted .*capturing$"):
            timer.prepare(lambda: fake_cuda.synchronize())
        with pytest.raises(MeasureError, match="before prepare"):
            timer.sample(1)

    def test_out_of_memory_stays_out_of_memory(self, fake_cuda: Any) -> None:
        def step() -> None:
            if fake_cuda.capturing:
                raise torch.OutOfMemoryError("too big")

        with pytest.raises(torch.OutOfMemoryError):
            GraphTimer(api=fake_cuda, clock=fake_cuda.clock).prepare(step)

    def test_an_error_of_the_step_itself_stays_what_it_is(self, fake_cuda: Any) -> None:
        def step() -> None:
            if fake_cuda.capturing:
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            GraphTimer(api=fake_cuda, clock=fake_cuda.clock).prepare(step)


class TestChoices:
    @pytest.mark.parametrize(
        ("step_ms", "target_ms", "iters"),
        [(1.0, 10.0, 10), (3.0, 10.0, 4), (100.0, 10.0, 1), (1e-9, 10.0, 10_000), (5.0, 0.0, 1)],
    )
    def test_iters_fill_the_target(self, step_ms: float, target_ms: float, iters: int) -> None:
        assert choose_iters(step_ms, target_ms) == iters

    def test_iters_have_a_limit(self) -> None:
        assert choose_iters(1.0, 1000.0, limit=7) == 7

    @pytest.mark.parametrize("step_ms", [0.0, -1.0, float("nan"), float("inf")])
    def test_iters_of_no_time(self, step_ms: float) -> None:
        with pytest.raises(MeasureError, match="must be finite and above 0"):
            choose_iters(step_ms, 10.0)

    def test_timers_by_name(self) -> None:
        timer: Timer = make_timer("cpu", "cpu", "warm", "sustained")
        assert (timer.name, timer.cache, timer.regime) == ("cpu", "warm", "sustained")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: make_timer("clock", "cpu", "warm"),
                "timer is 'clock'; allowed: cpu, host, event, graph, kineto",
            ),
            (lambda: make_timer("event", "cpu", "warm"), "timer is 'event', but device is 'cpu'"),
            (lambda: make_timer("graph", "cpu", "warm"), "timer is 'graph', but device is 'cpu'"),
            (lambda: make_timer("host", "cpu", "warm"), "timer is 'host', but device is 'cpu'"),
            (lambda: make_timer("kineto", "cpu", "warm"), "timer is 'kineto', but device is 'cpu'"),
            (lambda: CpuTimer(cache="hot"), "cache is 'hot'; allowed: cold, warm"),
            (lambda: CpuTimer(regime="fast"), "regime is 'fast'; allowed: latency, sustained"),
            (lambda: CpuTimer(cache="cold", regime="sustained", flush=int), "back to back"),
        ],
    )
    def test_refusals(self, make: Callable[[], object], message: str) -> None:
        with pytest.raises(MeasureError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)

    def test_samples_need_a_step_and_a_count(self) -> None:
        timer = CpuTimer(clock=Clock())
        with pytest.raises(MeasureError, match="before prepare"):
            timer.sample(1)
        timer.prepare(lambda: None)
        with pytest.raises(MeasureError, match="iters is 0"):
            timer.sample(0)
