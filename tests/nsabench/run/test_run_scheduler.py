"""The whole scheduler on a device that drifts, throttles, fails and is late: what its numbers still say."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from nsabench.measure.probe import ColdProbe
from nsabench.plan import Cell
from nsabench.run import Policy, session
from nsabench.run.comparison import Effort, run_comparison
from nsabench.stats import DELTA, Interval, paired_ratio
from nsabench.store import load_run
from tests.nsabench.run.fake_device import GPU, Device, Kept, Planted, PlantedWorkload, Rig, nvml

MakeCell = Callable[..., Cell]

POLICY = Policy(rounds=15, sample_ms=20.0, cache="auto", shares=False, alone=False)
A, B = "auto", "win=reference"


@pytest.fixture
def rig_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rig]:
    def make(device: Device | None = None, **more: Any) -> Rig:
        rig = Rig(monkeypatch, device or Device(), **more)
        rig.arms = {A: Planted(), B: Planted(), **rig.arms}
        return rig

    return make


RigOn = Callable[..., Rig]


@pytest.fixture
def cell(make_cell: MakeCell) -> Cell:
    return make_cell(device=GPU)


def ratio(a: list[float], b: list[float]) -> Interval:
    found = paired_ratio(a, b)
    assert found.lo is not None
    assert found.hi is not None
    return found


def drift(factor: float, span: tuple[float, float]) -> Callable[[float], float]:
    """Slower and slower, by ``factor`` from one second to the other."""
    return lambda t: factor ** ((t - span[0]) / (span[1] - span[0]))


def rounds_of(rig_on: RigOn, cells: list[Cell]) -> tuple[float, float]:
    """When the first and the last sample of a group begin, on a device that is well."""
    samples = [one for mine in rig_on().measure(cells, POLICY).samples.values() for one in mine]
    return min(one["t_s"] for one in samples), max(one["t_s"] for one in samples)


def within(span: tuple[float, float], part: float) -> float:
    return span[0] + part * (span[1] - span[0])


def test_drift_falls_on_all_arms_alike(rig_on: RigOn, cell: Cell) -> None:
    again = replace(cell, twin=1)
    rig = rig_on(Device(drift(1.15, rounds_of(rig_on, [cell, again])), noise=0.002))
    kept = rig.measure([cell, again], POLICY)
    first, second = kept.times(cell), kept.times(again)
    assert max(first) / min(first) > 1.10, "the device did drift over the run"
    found = ratio(second, first)
    assert abs(found.point - 1) < DELTA
    assert found.lo <= 1 <= found.hi


def test_one_arm_after_the_other_would_have_been_wrong(rig_on: RigOn, cell: Cell) -> None:
    """The control of the test above: the same two arms on the same device, not in turn."""
    again = replace(cell, twin=1)
    rig = rig_on(Device(drift(1.15, rounds_of(rig_on, [cell, again])), noise=0.002))
    first = rig.measure([cell], POLICY).times(cell)
    second = rig.measure([again], POLICY).times(again)
    found = ratio(second, first)
    assert found.lo > 1 + 4 * DELTA


def test_a_true_difference_is_found_in_spite_of_drift(rig_on: RigOn, make_cell: MakeCell) -> None:
    cells = [make_cell(device=GPU, route=route) for route in (A, B)]
    rig = rig_on(Device(drift(1.15, (0.0, 1.0)), noise=0.002), arms={B: Planted(ms=1.02)})
    kept = rig.measure(cells, POLICY)
    found = ratio(kept.times(cells[1]), kept.times(cells[0]))
    assert found.lo > 1.01
    assert found.point == pytest.approx(1.02, abs=0.004)


def test_who_comes_second_in_a_round_pays_no_price_for_it(
    rig_on: RigOn, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = replace(cell, twin=1)
    policy = replace(POLICY, rounds=60)
    device = Device(slots=(1.0, 1.05), noise=0.001)
    kept = rig_on(device).measure([cell, again], policy)
    found = ratio(kept.times(again), kept.times(cell))
    assert found.lo <= 1 <= found.hi

    class InOrder(random.Random):
        def shuffle(self, x: Any) -> None: ...

    monkeypatch.setattr(session.random, "Random", InOrder)
    kept = rig_on(Device(slots=(1.0, 1.05), noise=0.001)).measure([cell, again], policy)
    assert ratio(kept.times(again), kept.times(cell)).lo > 1.04, "in one order it is not their difference"


def test_an_episode_of_throttling_drops_its_rounds_whole(rig_on: RigOn, cell: Cell) -> None:
    again = replace(cell, twin=1)
    device = Device()
    slow_from = within(rounds_of(rig_on, [cell, again]), 0.9)
    device.slowness = lambda t: 3.0 if t >= slow_from else 1.0
    kept = rig_on(device, library=nvml(device, slow_from=slow_from)).measure([cell, again], POLICY)
    for one, row in zip((cell, again), kept.rows, strict=True):
        dropped = [sample for sample in kept.samples[one.cell_id] if sample.get("dropped")]
        assert dropped
        assert {sample["dropped"] for sample in dropped} == {"hw_thermal"}
        assert (row["status"], row["dropped_rounds"]) == ("ok", len(dropped))
        assert row["ms_total"] == pytest.approx(1.0)
        assert len(kept.times(one)) == POLICY.rounds, "no sample is deleted"


def test_a_device_that_slows_down_for_most_of_the_rounds_has_no_time(rig_on: RigOn, cell: Cell) -> None:
    device = Device()
    kept = rig_on(device, library=nvml(device, slow_from=0.0)).measure([cell], POLICY)
    assert kept.rows[0]["status"] == "invalid"
    assert "rounds dropped for hw_thermal; allowed 20 %" in kept.rows[0]["reason"]


def test_an_nvml_that_vanishes_changes_nothing_else(rig_on: RigOn, cell: Cell) -> None:
    again = replace(cell, twin=1)
    gone_from = within(rounds_of(rig_on, [cell, again]), 0.5)
    device = Device()
    steady = rig_on(Device()).measure([cell, again], POLICY)
    kept = rig_on(device, library=nvml(device, gone_from=gone_from)).measure([cell, again], POLICY)
    assert any("NVML stopped answering" in text for text in kept.said)
    assert any(reading["power_w"] is None for reading in kept.telemetry)
    read = ("power_w", "temp_c", "sm_clock_mhz", "dropped_rounds")
    for row, other in zip(kept.rows, steady.rows, strict=True):
        changed = {name for name in row if row[name] != other.get(name)}
        assert row["status"] == "ok"
        assert not changed & {"ms_total", "ms_lo", "ms_hi", "n_rounds", "timer", "ms_cross", "host_bound"}
        assert {name for name in read if other[name] is None} == set()
    for one in (cell, again):
        assert kept.times(one) == pytest.approx(steady.times(one))


def test_a_device_lost_in_the_middle_leaves_samples_and_a_status(rig_on: RigOn, make_cell: MakeCell) -> None:
    cells = [make_cell(device=GPU, route=route) for route in (A, B)]
    rig = rig_on(Device(dies_at_s=within(rounds_of(rig_on, cells), 0.6)))
    kept = Kept()
    with pytest.raises(session.DeviceLost, match=r"the device was lost when .* failed: the device is gone"):
        session.measure_group(cells, POLICY, kept, clock=rig.device.clock)
    (row,) = kept.rows
    assert (row["status"], "illegal memory access" in row["reason"]) == ("error", True)
    samples = kept.samples[row["cell_id"]]
    assert 0 < len(samples) < POLICY.rounds
    assert [sample["ms"] for sample in samples] == pytest.approx([1.0] * len(samples))


def test_an_unsteady_canary_is_on_record_and_ends_by_itself(rig_on: RigOn, cell: Cell) -> None:
    device, readings = Device(), iter(range(10**6))

    def unsteady() -> float:
        device.wait(0.2)
        return 1.0 + 0.1 * (next(readings) % 2)

    rig = rig_on(device, canary_ms=unsteady)
    (row,) = rig.measure([cell], replace(POLICY, settle=True)).rows
    assert row["status"] == "ok"
    assert row["canary_spread_pct"] == pytest.approx(10.0)
    (row,) = rig_on().measure([cell], replace(POLICY, settle=True)).rows
    assert row["canary_spread_pct"] == 0.0


def test_a_graph_that_cannot_be_captured_has_no_time_by_graph(rig_on: RigOn, make_cell: MakeCell) -> None:
    cells = [make_cell(device=GPU, phase="decode", route=route) for route in (A, B)]
    kept = rig_on(arms={B: Planted(waits=True)}).measure(cells, POLICY)
    good, bad = kept.rows
    assert (good["status"], good["timer"], good["copies"]) == ("ok", "graph", 1)
    assert bad["status"] == "invalid"
    assert "a CUDA graph cannot hold the step: operation not permitted" in bad["reason"]
    assert (kept.times(cells[1]), bad.get("ms_total")) == ([], None)


class TestCrossCheck:
    def test_two_timers_that_agree_leave_no_note(self, rig_on: RigOn, make_cell: MakeCell) -> None:
        cells = [make_cell(device=GPU, phase=phase) for phase in ("prefill", "decode")]
        for one, first, second in zip(cells, ("event", "graph"), ("graph", "event"), strict=True):
            (row,) = rig_on(arms={A: Planted(ms=1.0, host_ms=0.5)}).measure([one], POLICY).rows
            assert (row["timer"], row["cross_timer"], row["timers_note"]) == (first, second, "")
            assert row["ms_cross"] == pytest.approx(row["ms_total"]) == pytest.approx(1.0)
            assert row["host_bound"] == pytest.approx(1.5, abs=0.02)
            assert row["queue_gated_pct"] == 0.0

    def test_what_drifts_after_the_rounds_parts_no_timers(self, rig_on: RigOn, cell: Cell) -> None:
        rounds_end = rounds_of(rig_on, [cell])[1]
        device = Device(lambda t: 1.0 if t < rounds_end else 1.3)
        (row,) = rig_on(device).measure([cell], POLICY).rows
        assert row["timers_note"] == ""
        assert row["ms_cross"] == pytest.approx(1.3)
        assert row["ms_total"] < 1.29

    def test_a_disagreement_is_on_record(self, rig_on: RigOn, cell: Cell) -> None:
        (row,) = rig_on(biased={"graph": 1.2}).measure([cell], POLICY).rows
        assert row["status"] == "ok"
        assert row["timers_note"] == "event 1 ms, graph 1.2 ms a step, 20 % apart"

    def test_a_late_host_is_counted_and_its_time_refused(self, rig_on: RigOn, make_cell: MakeCell) -> None:
        """A thousand steps back to back, each of which takes the host longer than any spin covers."""
        cell = make_cell(device=GPU)
        policy = replace(POLICY, regime="sustained", sample_ms=1000.0, rounds=6)
        (row,) = rig_on(arms={A: Planted(ms=0.05, host_ms=1.0)}).measure([cell], policy).rows
        assert row["status"] == "invalid"
        assert row["queue_gated_pct"] > 90
        assert row["reason"].startswith("the host was late in 9")
        assert row["reason"].endswith("% apart; --timer host times host and device together")
        assert (row["cross_timer"], row["timers_note"]) == ("graph", "")

    def test_a_step_that_waits_is_late_and_checked_by_nobody(self, rig_on: RigOn, cell: Cell) -> None:
        rig = rig_on(arms={A: Planted(waits=True)}, broken_timers=("kineto",))
        (row,) = rig.measure([cell], POLICY).rows
        assert row["status"] == "ok"
        assert row["queue_gated_pct"] == 100.0
        late, why = row["timers_note"].split("; ", 1)
        assert late == "the host was late in 100 % of the steps"
        assert why.startswith("not cross-checked: graph: a CUDA graph cannot hold the step: ")
        assert why.endswith("; kineto: no kineto here")
        assert (row.get("cross_timer"), row.get("ms_cross"), row.get("host_bound")) == (None, None, None)

    def test_host_and_device_together_are_no_disagreement(self, rig_on: RigOn, cell: Cell) -> None:
        policy = replace(POLICY, timer="host")
        (row,) = rig_on(arms={A: Planted(ms=0.1, host_ms=2.0)}).measure([cell], policy).rows
        assert (row["status"], row["timer"], row["cross_timer"]) == ("ok", "host", "graph")
        assert row["ms_total"] == pytest.approx(2.105)
        assert row["host_bound"] == pytest.approx(21.05, rel=0.02)
        assert (row["queue_gated_pct"], row["timers_note"]) == (None, "")


class TestShortSteps:
    def test_cold_ones_take_turns_on_copies(self, rig_on: RigOn, make_cell: MakeCell) -> None:
        cells = [make_cell(device=GPU, phase="decode", route=route) for route in (A, B)]
        rig = rig_on(arms={A: Planted(ms=0.01), B: Planted(ms=0.11)}, moved_bytes=10**6)
        kept = rig.measure(cells, POLICY)
        short, longer = kept.rows
        assert (short["status"], longer["status"]) == ("ok", "ok"), kept.rows
        assert short["copies"] == 250, "five times the cache of 50 MB, a MB each"
        assert longer["copies"] == 5, "as many as make the start of a graph a hundredth"
        assert short["ms_total"] == pytest.approx(0.01)
        assert longer["ms_total"] == pytest.approx(0.11)
        assert {sample["iters"] % 250 for sample in kept.samples[cells[0].cell_id]} == {0}
        assert short["cold_probe"] == 1.0

    def test_warm_ones_repeat_the_same_step(self, rig_on: RigOn, make_cell: MakeCell) -> None:
        cell = make_cell(device=GPU, phase="decode")
        rig = rig_on(arms={A: Planted(ms=0.01)}, free_bytes=0)
        kept = rig.measure([cell], replace(POLICY, cache="warm"))
        assert (kept.rows[0]["status"], kept.rows[0]["copies"]) == ("ok", 1)
        assert kept.samples[cell.cell_id][0]["iters"] % 50 == 0
        assert kept.rows[0]["ms_total"] == pytest.approx(0.01)
        assert (kept.rows[0].get("cold_probe"), kept.rows[0]["timers_note"]) == (None, "")

    def test_long_ones_have_a_graph_each(self, rig_on: RigOn, make_cell: MakeCell) -> None:
        cell = make_cell(device=GPU, phase="decode")
        (row,) = rig_on(arms={A: Planted(ms=0.021)}, moved_bytes=10**6).measure([cell], POLICY).rows
        assert (row["copies"], row["timers_note"]) == (1, "")

    def test_copies_that_do_not_fit_are_not_made_for_any_arm(
        self, rig_on: RigOn, make_cell: MakeCell
    ) -> None:
        cells = [make_cell(device=GPU, phase="decode", route=route) for route in (A, B)]
        rig = rig_on(arms={A: Planted(ms=0.01), B: Planted(ms=0.1)}, moved_bytes=10**6, free_bytes=2**28)
        kept = rig.measure(cells, POLICY)
        assert [row["copies"] for row in kept.rows] == [1, 1]
        said = "steps under 20 us are timed one to a graph: copies need 0.2 GiB, 0.2 GiB are free"
        assert [row["timers_note"] for row in kept.rows] == [said] * 2

    @pytest.mark.parametrize("error", [TypeError("no copy of this"), RuntimeError("no copy of this\nmore")])
    def test_what_cannot_be_copied_says_so(
        self, rig_on: RigOn, make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def refuse(self: PlantedWorkload, memo: object) -> None:
            raise error

        monkeypatch.setattr(PlantedWorkload, "__deepcopy__", refuse, raising=False)
        cell = make_cell(device=GPU, phase="decode")
        (row,) = rig_on(arms={A: Planted(ms=0.01)}).measure([cell], POLICY).rows
        assert (row["status"], row["copies"]) == ("ok", 1)
        assert row["timers_note"].endswith("one to a graph: copies cannot be made: no copy of this")

    def test_a_copy_with_another_result_is_wrong(
        self, rig_on: RigOn, make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copies = PlantedWorkload.copies

        def spoilt(self: PlantedWorkload, count: int) -> Any:
            found = copies(self, count)
            found[-1].data[2] += 1.0
            return found

        monkeypatch.setattr(PlantedWorkload, "copies", spoilt)
        cell = make_cell(device=GPU, phase="decode")
        (row,) = rig_on(arms={A: Planted(ms=0.01)}, moved_bytes=10**7).measure([cell], POLICY).rows
        assert row["status"] == "wrong"
        assert row["reason"].startswith("the output moved by ")
        assert " in a copy; allowed 0.001" in row["reason"]


class TestCold:
    def test_a_cache_that_is_not_cold_has_no_cold_time(self, rig_on: RigOn, make_cell: MakeCell) -> None:
        cell = make_cell(device=GPU, phase="decode")
        rig = rig_on(probe=ColdProbe(1.8))
        (row,) = rig.measure([cell], replace(POLICY, cache="auto")).rows
        assert (row["status"], row["cold_probe"]) == ("invalid", 1.8)
        said = (
            "the cache is not cold: after a flush a marker is read at 1.80 times memory's rate; allowed 1.15"
        )
        assert row["reason"] == said
        (row,) = rig.measure([cell], replace(POLICY, cache="warm")).rows
        assert (row["status"], row.get("cold_probe")) == ("ok", None)

    def test_what_nothing_proves_is_noted(self, rig_on: RigOn, make_cell: MakeCell) -> None:
        cell = make_cell(device=GPU, phase="decode")
        rig = rig_on(probe=ColdProbe(None, "cold is not proved"))
        (row,) = rig.measure([cell], replace(POLICY, cache="cold")).rows
        assert (row["status"], row["cold_probe"], row["timers_note"]) == ("ok", None, "cold is not proved")


def test_a_comparison_on_a_drifting_device(
    rig_on: RigOn, make_cell: MakeCell, create_run: Callable[..., Any]
) -> None:
    """Three processes, each on a device 5 % slower than the one before: the verdict's ratio is the planted
    one, and the control finds no difference.
    """
    cells = [make_cell(device=GPU, route=A), make_cell(device=GPU, route=B)]
    group = [*cells, replace(cells[0], twin=1)]
    rig = rig_on(Device(drift(1.15, (0.0, 2.0)), noise=0.002), arms={B: Planted(ms=1.05)})
    run = create_run(group)

    class Watcher:
        def activity(self, text: str) -> None: ...

        def finished(self, group: Any, rows: Any, processes: int) -> None: ...

    with run:
        run_comparison(
            [group], POLICY, Effort(budget_s=1.0), run, Watcher(), hire=rig.executor, clock=rig.device.clock
        )
    rows = load_run(run.path).rows
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert {row["cross_timer"] for row in rows} == {"graph"}
    assert rows[0]["aa_lo"] <= 1 <= rows[0]["aa_hi"]
    assert 1 - DELTA < rows[0]["aa_lo"] < rows[0]["aa_hi"] < 1 + DELTA
    samples = load_run(run.path).samples
    times = [
        samples[samples["cell_id"] == one.cell_id].sort_values(["process", "round"])["ms"].tolist()
        for one in cells
    ]
    assert ratio(times[1], times[0]).point == pytest.approx(1.05, abs=0.005)
    by_process = samples[samples["cell_id"] == cells[0].cell_id].groupby("process")["ms"].agg(fmean)
    assert by_process.iloc[-1] > 1.1 * by_process.iloc[0]
