"""Forward shares: borders on fake clocks, closing to the total, and honest refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

from nsabench.measure import STAGES, MeasureError, Shares, StageRecorder

Factory = Callable[[str], AbstractContextManager[object]]


class Stages:
    """What a measured library offers: `stage(name)`, and a hook that takes a factory."""

    def __init__(self) -> None:
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


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now

    def ms(self, ms: float) -> None:
        self.now += ms / 1e3


@pytest.fixture
def lib() -> Stages:
    return Stages()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _close(shares: Shares) -> None:
    assert shares.ms is not None
    assert sum(shares.ms.values()) == pytest.approx(shares.total_ms)
    assert shares.pct is not None
    assert sum(shares.pct.values()) == pytest.approx(100)
    assert shares.note == ""


class TestOnAHost:
    def test_stages_get_their_time_and_other_the_rest(self, lib: Stages, clock: Clock) -> None:
        def step() -> None:
            clock.ms(1)
            with lib.stage("proj"):
                clock.ms(4)
            clock.ms(2)
            with lib.stage("sel"):
                clock.ms(3)
            with lib.stage("proj"):
                clock.ms(6)

        shares = StageRecorder("cpu", clock=clock).run(step, lib.hook)
        assert shares.ms == pytest.approx({"proj": 10, "sel": 3, "other": 3})
        assert list(shares.ms or ()) == ["proj", "sel", "other"], "in the order of STAGES"
        assert shares.total_ms == pytest.approx(16)
        _close(shares)

    def test_a_stage_inside_another_interrupts_it(self, lib: Stages, clock: Clock) -> None:
        def step() -> None:
            with lib.stage("cmp"):
                clock.ms(1)
                with lib.stage("score"):
                    clock.ms(2)
                clock.ms(4)

        shares = StageRecorder("cpu", clock=clock).run(step, lib.hook)
        assert shares.ms == pytest.approx({"cmp": 5, "score": 2, "other": 0})

    def test_the_mean_is_of_shares(self, lib: Stages, clock: Clock) -> None:
        lengths = iter([99.0, 1.0, 3.0])  # the first run does not count

        def step() -> None:
            with lib.stage("win"):
                clock.ms(next(lengths))
            clock.ms(1.0)

        shares = StageRecorder("cpu", clock=clock).run(step, lib.hook, n=2)
        assert shares.total_ms == pytest.approx(3.0)
        assert shares.pct == pytest.approx({"win": (50 + 75) / 2, "other": (50 + 25) / 2})
        _close(shares)

    def test_a_stage_that_runs_only_sometimes(self, lib: Stages, clock: Clock) -> None:
        turns = iter([0, 0, 1])

        def step() -> None:
            clock.ms(1.0)
            if next(turns):
                with lib.stage("compress"):
                    clock.ms(1.0)

        runs = StageRecorder("cpu", clock=clock).run(step, lib.hook, n=2)
        assert runs.ms is None, "one of the runs entered no stage"
        assert runs.note == "the step entered no stage"

    def test_a_step_without_stages_has_no_shares(self, lib: Stages, clock: Clock) -> None:
        shares = StageRecorder("cpu", clock=clock).run(lambda: clock.ms(1), lib.hook)
        assert shares.ms is None
        assert shares.pct is None
        assert shares.note == "the step entered no stage"

    def test_cold_flushes_outside_the_total(self, lib: Stages, clock: Clock) -> None:
        def step() -> None:
            with lib.stage("gate"):
                clock.ms(2)

        recorder = StageRecorder("cpu", cache="cold", flush=lambda: clock.ms(50), clock=clock)
        assert recorder.run(step, lib.hook).total_ms == pytest.approx(2)

    def test_unknown_stages_are_refused(self, lib: Stages) -> None:
        recorder = StageRecorder("cpu")
        with pytest.raises(MeasureError, match="stage is 'attn'; allowed: proj, compress"):
            recorder.run(lambda: lib.stage("attn"), lib.hook)

    def test_outside_a_run_and_in_other_threads_a_stage_does_nothing(self, lib: Stages, clock: Clock) -> None:
        recorder = StageRecorder("cpu", clock=clock)
        with recorder.factory("proj"):
            pass

        def elsewhere() -> None:
            with lib.stage("sel"):
                pass

        def step() -> None:
            with lib.stage("proj"):
                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()
                clock.ms(3)

        assert recorder.run(step, lib.hook).ms == pytest.approx({"proj": 3, "other": 0})

    def test_a_step_that_raises_leaves_no_open_stage(self, lib: Stages, clock: Clock) -> None:
        fail = True

        def step() -> None:
            with lib.stage("proj"):
                clock.ms(1)
                if fail:
                    raise RuntimeError("boom")

        recorder = StageRecorder("cpu", clock=clock)
        with pytest.raises(RuntimeError, match="boom"):
            recorder.run(step, lib.hook)
        fail = False
        assert recorder.run(step, lib.hook).ms == pytest.approx({"proj": 1, "other": 0})

    def test_a_stage_that_is_never_left_ends_with_its_run(self, lib: Stages, clock: Clock) -> None:
        def step() -> None:
            with lib.stage("proj"):
                clock.ms(2)
            clock.ms(1)
            lib.stage("sel").__enter__()
            clock.ms(3)

        shares = StageRecorder("cpu", clock=clock).run(step, lib.hook, n=3)
        assert shares.ms == pytest.approx({"proj": 2, "sel": 3, "other": 1})

    def test_on_the_real_clock_it_closes(self, lib: Stages) -> None:
        def step() -> None:
            for name in STAGES[:-1]:
                with lib.stage(name):
                    sum(range(1000))

        shares = StageRecorder("cpu").run(step, lib.hook)
        _close(shares)
        assert tuple(shares.ms or ()) == STAGES

    def test_refusals(self, lib: Stages) -> None:
        with pytest.raises(MeasureError, match="cache is 'hot'"):
            StageRecorder("cpu", cache="hot")
        with pytest.raises(MeasureError, match="n is 0"):
            StageRecorder("cpu").run(lambda: None, lib.hook, n=0)


class TestOnAGpu:
    def test_launch_gaps_are_in_no_stage(self, lib: Stages, fake_cuda: Any) -> None:
        def step() -> None:
            fake_cuda.think(0.4)
            with lib.stage("proj"):
                fake_cuda.think(0.3)
                fake_cuda.kernel(0.02)
            fake_cuda.kernel(0.01)
            with lib.stage("sel"):
                fake_cuda.kernel(0.05)

        recorder = StageRecorder("cuda", api=fake_cuda, clock=fake_cuda.clock)
        shares = recorder.run(step, lib.hook)
        assert shares.ms == pytest.approx({"proj": 0.02, "sel": 0.05, "other": 0.01})
        _close(shares)

    def test_cold_flushes_before_the_first_border(self, lib: Stages, fake_cuda: Any) -> None:
        def step() -> None:
            with lib.stage("win"):
                fake_cuda.kernel(0.02)

        recorder = StageRecorder(
            "cuda",
            cache="cold",
            flush=lambda: fake_cuda.kernel(7.0, "flush"),
            api=fake_cuda,
            clock=fake_cuda.clock,
        )
        assert recorder.run(step, lib.hook).total_ms == pytest.approx(0.02)

    def test_a_step_that_waits_for_the_device_has_no_shares(self, lib: Stages, fake_cuda: Any) -> None:
        def step() -> None:
            with lib.stage("sel"):
                fake_cuda.kernel(0.02)
                fake_cuda.synchronize()
                fake_cuda.think(0.08)
                fake_cuda.kernel(0.02)

        recorder = StageRecorder("cuda", api=fake_cuda, clock=fake_cuda.clock)
        shares = recorder.run(step, lib.hook, n=3)
        assert shares.ms is None
        assert "waited for the host in 3 of 3 runs" in shares.note
        # Unless the gaps are asked for.
        recorder = StageRecorder("cuda", queue_ahead=False, api=fake_cuda, clock=fake_cuda.clock)
        shares = recorder.run(step, lib.hook, n=3)
        assert shares.ms is not None
        assert shares.total_ms > 0.12

    def test_borders_out_of_order_have_no_shares(self, lib: Stages, fake_cuda: Any) -> None:
        def step() -> None:
            fake_cuda.kernel(1.0)
            with lib.stage("proj"):
                fake_cuda.kernel(1.0)
                fake_cuda.busy_until_ms -= 1.5  # what follows runs on a stream that is further back

        recorder = StageRecorder("cuda", queue_ahead=False, api=fake_cuda, clock=fake_cuda.clock)
        shares = recorder.run(step, lib.hook, n=1)
        assert shares.ms is None
        assert shares.note == "the end of 'proj' comes before its start: not on one stream"


class TestShares:
    def test_closing(self) -> None:
        shares = Shares.closing(10.0, {"sel": 6.0, "cmp": 1.0})
        assert shares.ms == {"cmp": 1.0, "sel": 6.0, "other": 3.0}

    def test_within_one_percent_it_is_made_to_close(self) -> None:
        shares = Shares.closing(10.0, {"sel": 10.05})
        assert shares.ms == pytest.approx({"sel": 10.0, "other": 0.0})

    @pytest.mark.parametrize(
        ("total", "ms"), [(10.0, {"sel": 10.2}), (10.0, {"sel": -1.0}), (0.0, {"sel": 0.0})]
    )
    def test_beyond_it_there_are_none(self, total: float, ms: dict[str, float]) -> None:
        shares = Shares.closing(total, ms)
        assert shares.ms is None
        assert "of a total of" in shares.note

    def test_scaled_keeps_the_shares(self) -> None:
        shares = Shares(4.0, {"sel": 3.0, "other": 1.0}).scaled(8.0)
        assert shares == Shares(8.0, {"sel": 6.0, "other": 2.0})
        assert Shares(4.0, None, "why").scaled(8.0) == Shares(8.0, None, "why")

    def test_plus_adds_two_passes(self) -> None:
        forward = Shares(4.0, {"sel": 3.0, "other": 1.0})
        backward = Shares(6.0, {"proj": 2.0, "sel": 3.0, "other": 1.0})
        both = forward.plus(backward)
        assert both == Shares(10.0, {"proj": 2.0, "sel": 6.0, "other": 2.0})
        assert list(both.ms or ()) == ["proj", "sel", "other"]
        assert forward.plus(Shares(6.0, None, "why")) == Shares(10.0, None, "why")
