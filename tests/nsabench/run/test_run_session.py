"""A plan, carried out: every arm once a round, every failure a row, every finished cell safe."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nsabench.store.runs
from nsabench.measure import MeasureError, NvmlSampler, PeakMemory
from nsabench.plan import Cell
from nsabench.run import Policy, arm, run_plan, session
from nsabench.store import DiskError, RunDir, load_run
from nsabench.store.schema import PERFORMANCE_COLUMNS

MakeCell = Callable[..., Cell]
CreateRun = Callable[[list[Cell]], RunDir]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]

SLIDING = "backends.sdpa:sliding_attention"
ROUTES = ("auto", "win=reference", "sel=gather", "cmp=reference")


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of memory takes most of a small cell's time, and no part in these tests."""
    monkeypatch.setattr(arm, "peak_memory", lambda step, device: PeakMemory(1000, None))


class Watcher:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.activities: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def begin(self, group: list[Cell], activity: str, worker: int = 0) -> None:
        self.groups.append([cell.route for cell in group])

    def activity(self, text: str, worker: int = 0) -> None:
        self.activities.append(text)

    def row(self, row: dict[str, Any], worker: int = 0) -> None:
        self.rows.append(row)


def cells_of(make_cell: MakeCell, lengths: tuple[int, ...] = (40,), **more: Any) -> list[Cell]:
    return [make_cell(S=S, route=route, **more) for S in lengths for route in ROUTES]


def statuses(run: RunDir) -> dict[str, str]:
    return {row["route"]: row["status"] for row in run.finished.values()}


def no_performance(row: dict[str, Any]) -> bool:
    return all(row[name] in (None, "") for name in PERFORMANCE_COLUMNS)


def test_every_arm_is_visited_once_a_round_in_a_shuffled_order(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy
) -> None:
    cells = cells_of(make_cell, (40, 20), phase="decode")
    orders = []
    for seed in (3, 3, 4):
        run = create_run([replace(cell, seed=seed) for cell in cells])
        watcher = Watcher()
        run_plan([replace(cell, seed=seed) for cell in cells], replace(quick, rounds=12), run, watcher)
        assert watcher.groups == [list(ROUTES)] * 2
        assert [row["route"] for row in watcher.rows] == list(ROUTES) * 2
        samples = load_run(run.path).samples
        samples["S"] = samples["cell_id"].map({i: row["S"] for i, row in run.finished.items()})
        for S in (40, 20):
            mine = samples[(samples["S"] == S) & (samples["variant"] == "emit")]
            assert Counter(mine["round"]) == dict.fromkeys(range(12), len(ROUTES))
            places = mine.groupby("round")["position"].apply(sorted)
            assert list(places) == [list(range(len(ROUTES)))] * 12
            in_time = mine.sort_values("t_s")
            assert list(in_time["round"]) == sorted(in_time["round"])
        first = samples[(samples["S"] == 40) & (samples["variant"] == "emit")]
        routes = first["cell_id"].map({i: row["route"] for i, row in run.finished.items()})
        orders.append(dict(zip(zip(first["round"], first["position"], strict=True), routes, strict=True)))
    assert orders[0] == orders[1] != orders[2]
    by_round = {tuple(orders[0][r, p] for p in range(len(ROUTES))) for r in range(12)}
    assert len(by_round) > 4
    assert {order[0] for order in by_round} == set(ROUTES)


def test_rows_hold_what_their_samples_say(make_cell: MakeCell, create_run: CreateRun, quick: Policy) -> None:
    cells = cells_of(make_cell)
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher())
    stored = load_run(run.path)
    for cell, row in zip(cells, stored.rows, strict=True):
        mine = stored.samples[stored.samples["cell_id"] == cell.cell_id]
        assert row["status"] == "ok"
        assert row["ms_total"] == pytest.approx(mine["ms"].median(), rel=1e-12)
        assert row["ms_lo"] == mine["ms"].min()  # of six rounds the whole range
        assert row["ms_hi"] == mine["ms"].max()
        assert len(mine) == row["n_samples"] == row["n_rounds"] == 6
        assert set(mine["process"]) == {0}
    assert len(stored.telemetry) == 0
    assert (stored.cells["power_w"].isna()).all()


def raising(error: BaseException, at: int) -> Any:
    """Raise in the call number `at` (from 1) of a backend."""
    count = 0

    def bug(true: Any, *given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count >= at:
            raise error
        return true(*given, **more)

    return bug


@pytest.mark.parametrize("at", [1, 2, 8], ids=["check", "warm-up", "rounds"])
@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("boom\nmore"), "error", "RuntimeError: boom"),
        (RuntimeError(""), "error", "RuntimeError: no message"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "oom", "OutOfMemoryError: CUDA out of memory."),
        (MemoryError("big"), "oom", "MemoryError: big"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "oom", "RuntimeError: DefaultCPU"),
        (MeasureError("no graph"), "invalid", "no graph"),
    ],
)
def test_an_arm_that_fails_becomes_a_row_and_the_others_go_on(
    make_cell: MakeCell,
    create_run: CreateRun,
    quick: Policy,
    plant: Plant,
    error: Exception,
    at: int,
    status: str,
    reason: str,
) -> None:
    cells = [make_cell(route=route) for route in ("win=reference", "win=sdpa", "cmp=off,win=reference")]
    run = create_run(cells)
    with plant(SLIDING, raising(error, at)):
        run_plan(cells, quick, run, Watcher())
    assert statuses(run) == {"win=reference": "ok", "win=sdpa": status, "cmp=off,win=reference": "ok"}
    failed = run.finished[cells[1].cell_id]
    assert failed["reason"].startswith(reason)
    assert "\n" not in failed["reason"]
    assert no_performance(failed)
    for cell in (cells[0], cells[2]):
        assert run.finished[cell.cell_id]["n_rounds"] == 6


@pytest.mark.parametrize("passes", ["fwd", "bwd"])
def test_a_wrong_arm_has_no_number_and_the_sweep_goes_on(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, plant: Plant, passes: str
) -> None:
    cells = [make_cell(S=S, route=r, passes=passes) for S in (20, 16) for r in ("win=sdpa", "win=reference")]
    run = create_run(cells)

    def bug(true: Any, q: Any, k: Any, v: Any, config: Any, **more: Any) -> Any:
        return true(q, k, v, replace(config, window_size=config.window_size + 1), **more)

    with plant(SLIDING, bug):
        run_plan(cells, replace(quick, shares=True, alone=True), run, Watcher())
    rows = list(run.finished.values())
    assert [row["status"] for row in rows] == ["wrong", "ok"] * 2
    for row in rows[::2]:
        assert no_performance(row)
        assert row["max_abs_err"] > row["err_budget"]
        assert "differs from the specification" in row["reason"]
    assert set(load_run(run.path).samples["cell_id"]) == {cells[1].cell_id, cells[3].cell_id}


def test_an_arm_found_wrong_after_the_rounds_keeps_its_samples_but_no_number(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, plant: Plant
) -> None:
    cell = make_cell()
    run = create_run([cell])
    count = 0

    def bug(true: Any, *given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        out, lse = true(*given, **more)
        return (out * 1.5 if count > 10 else out), lse

    with plant(SLIDING, bug):
        run_plan([cell], quick, run, Watcher())
    row = run.finished[cell.cell_id]
    assert (row["status"], no_performance(row)) == ("wrong", True)
    assert "moved by" in row["reason"]
    assert len(load_run(run.path).samples) == 6


def test_a_wrong_cache_makes_every_arm_of_the_shape_wrong(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa import KVCache

    append = KVCache.append

    def broken(self: KVCache, *given: Any) -> Any:
        views = append(self, *given)
        return views._replace(sel=(views.sel[0] * 1.01, views.sel[1]))

    monkeypatch.setattr(KVCache, "append", broken)
    cells = [
        *cells_of(make_cell, phase="decode"),
        make_cell(passes="bwd"),  # keeps no cache
    ]
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher())
    *wrong, right = run.finished.values()
    assert {row["status"] for row in wrong} == {"wrong"}
    assert {row["reason"].split(" differs")[0] for row in wrong} == {"k_sel for token 39 through the cache"}
    assert right["status"] == "ok"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_shape_that_cannot_be_built_is_a_row_for_each_arm(
    make_cell: MakeCell,
    create_run: CreateRun,
    quick: Policy,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    build = session.workload_for

    def too_big(cell: Cell) -> Any:
        if cell.S == 40:
            raise error
        return build(cell)

    monkeypatch.setattr(session, "workload_for", too_big)
    cells = cells_of(make_cell, (40, 20))
    run = create_run(cells)
    watcher = Watcher()
    run_plan(cells, quick, run, watcher)
    assert [row["status"] for row in watcher.rows] == ["oom"] * 4 + ["ok"] * 4
    assert all(row["reason"] for row in watcher.rows[:4])


def test_what_cannot_fit_is_refused_before_it_is_built(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "workload_for", None)
    cell = make_cell(phase="decode", S=2**40)
    run = create_run([cell])
    run_plan([cell], quick, run, Watcher())
    row = run.finished[cell.cell_id]
    assert row["status"] == "oom"
    gib = 2**40 * (10 * 8 + 6 * 4) * 4 / 2**30
    assert row["reason"].startswith(f"needs at least {gib:.1f} GiB, ")


def test_an_unsupported_arm_beside_others(make_cell: MakeCell, create_run: CreateRun, quick: Policy) -> None:
    cells = [make_cell(route=route) for route in ("fa2", "auto")]
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher())
    assert statuses(run) == {"fa2": "unsupported", "auto": "ok"}
    assert "cmp=fa2: needs a CUDA GPU, got cpu" in run.finished[cells[0].cell_id]["reason"]


def test_no_rounds_are_run_for_the_dead(make_cell: MakeCell, create_run: CreateRun, quick: Policy) -> None:
    watcher = Watcher()
    cell = make_cell(route="fa2")
    run_plan([cell], quick, create_run([cell]), watcher)
    assert not any(text.startswith("round") for text in watcher.activities)


def test_a_dead_arm_lets_go_of_what_it_held_at_once(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms: list[arm.Arm] = []
    make = session.Arm

    def kept(*given: Any) -> Any:
        arms.append(make(*given))
        return arms[-1]

    class Looker(Watcher):
        held: tuple[bool, ...] = ()

        def activity(self, text: str, worker: int = 0) -> None:
            if text == "round 6 of 6":
                self.held = tuple(bool(a._timers or a._first) for a in arms)

    monkeypatch.setattr(session, "SAID_EVERY_S", 0.0)
    monkeypatch.setattr(session, "Arm", kept)
    cells = [make_cell(route=route) for route in ("win=sdpa", "win=reference")]
    watcher = Looker()
    with plant(SLIDING, raising(RuntimeError("boom"), 8)):
        run_plan(cells, quick, create_run(cells), watcher)
    assert [a.fields["status"] for a in arms] == ["error", "ok"]
    assert watcher.held == (False, True)
    assert not any(a._timers or a._first for a in arms)


def test_a_disk_that_refuses_ends_the_sweep_and_keeps_what_is_safe(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of(make_cell)
    run = create_run(cells)
    append = nsabench.store.runs.append

    def full(path: Any, data: bytes) -> int:
        if len(run.finished) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(path, data)

    monkeypatch.setattr(nsabench.store.runs, "append", full)
    with pytest.raises(DiskError, match="No space left on device; 2 finished cells are safe"):
        run_plan(cells, quick, run, Watcher())
    run.close()
    assert list(load_run(run.path).cells["route"]) == list(ROUTES[:2])


def test_ctrl_c_keeps_finished_cells_and_a_second_session_does_the_rest(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy
) -> None:
    cells = cells_of(make_cell, (40, 20))
    run = create_run(cells)

    class Impatient(Watcher):
        def row(self, row: dict[str, Any], worker: int = 0) -> None:
            super().row(row)
            if len(self.rows) == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(cells, quick, run, Impatient())
    run.close()
    before = load_run(run.path)
    assert list(before.cells["cell_id"]) == [cell.cell_id for cell in cells[:6]]

    with RunDir.open(run.path) as again:
        watcher = Watcher()
        run_plan(cells, quick, again, watcher, process=1)
        assert watcher.groups == [list(ROUTES[2:])]
        run_plan(cells, quick, again, watcher, process=2)
        assert len(watcher.rows) == 2
    stored = load_run(run.path)
    assert list(stored.cells["cell_id"]) == [cell.cell_id for cell in cells]
    assert list(stored.samples["process"]) == [0] * 36 + [1] * 12
    assert stored.samples.iloc[:36].equals(before.samples)


def fake_nvml() -> SimpleNamespace:
    reads = iter(range(10**6))

    def fields(gpu: Any, numbers: list[int]) -> list[Any]:
        value = SimpleNamespace(uiVal=300_000, ullVal=0)
        return [
            SimpleNamespace(fieldId=n, nvmlReturn=0, valueType=1 if n == 186 else 3, value=value)
            for n in numbers
        ]

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: "gpu",
        nvmlDeviceGetFieldValues=fields,
        nvmlDeviceGetPowerUsage=lambda gpu: 300_000,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: 1000 * next(reads),
        nvmlDeviceGetTemperature=lambda gpu, sensor: 60,
        nvmlDeviceGetClockInfo=lambda gpu, which: {1: 1500, 2: 2600}[which],
        nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=90),
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=10**9),
        nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 4,
    )


def test_the_gpu_is_read_at_the_edges_of_every_round(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fake_nvml()
    opened: list[str] = []

    def open_sampler(device: str, *, clock: Callable[[], float]) -> NvmlSampler:
        opened.append(device)
        return NvmlSampler("GPU-0", hz=0.001, library=library, clock=clock)

    monkeypatch.setattr(session, "open_sampler", open_sampler)
    cells = cells_of(make_cell, (40, 20))
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher())
    assert opened == ["cpu", "cpu"]
    stored = load_run(run.path)
    # Before each round and after the last, once for the arms of a shape: under the first of them.
    assert list(stored.telemetry["cell_id"]) == [cells[0].cell_id] * 7 + [cells[4].cell_id] * 7
    assert set(stored.telemetry["gpu_uuid"]) == {"GPU-0"}
    assert set(stored.telemetry["power_w"]) == {300.0}
    for S in (40, 20):
        of_shape = stored.cells[stored.cells["S"] == S]["cell_id"]
        samples = stored.samples[stored.samples["cell_id"].isin(of_shape)]
        times = stored.telemetry[stored.telemetry["cell_id"].isin(of_shape)]["t_s"].to_numpy()
        for number in range(6):
            inside = samples[samples["round"] == number]["t_s"]
            assert times[number] <= inside.min() <= inside.max() <= times[number + 1]
    for row in stored.rows:
        assert (row["power_w"], row["temp_c"], row["sm_clock_mhz"]) == (300.0, 60.0, 1500.0)
        assert (row["energy_j"], row["util_pct"], row["nvml_used_bytes"]) == (None, 90.0, 10**9)
        assert (row["throttle_reasons"], row["power_capped_pct"]) == ("sw_power_cap", 100.0)
        assert row["clock_spread_pct"] == 0.0


def test_a_failed_cell_has_no_reading_of_the_gpu_but_its_telemetry_stays(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = fake_nvml()
    monkeypatch.setattr(
        session,
        "open_sampler",
        lambda device, clock: NvmlSampler("GPU-0", hz=0.001, library=library, clock=clock),
    )
    cells = [make_cell(route=route) for route in ("fa2", "auto")]
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher())
    failed, good = load_run(run.path).rows
    assert no_performance(failed)
    assert good["power_w"] == 300.0
    assert set(load_run(run.path).telemetry["cell_id"]) == {cells[0].cell_id}


class Sink:
    """What a group's measurement says, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.rows: dict[str, dict[str, Any]] = {}

    def mark(self, cell: Cell | None) -> None:
        self.said.append(("mark", cell.route if cell else "all"))

    def doing(self, text: str) -> None:
        self.said.append(("doing", text))

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.said.append(("done", row["route"]))
        self.rows[row["cell_id"]] = dict(row)


def test_what_would_be_at_fault_is_marked_before_it_is_done(make_cell: MakeCell, quick: Policy) -> None:
    sink = Sink()
    cells = [make_cell(route=route) for route in ("auto", "win=reference")]
    session.measure_group(cells, replace(quick, rounds=2), sink)
    without_rounds = [said for said in sink.said if said[0] != "doing" or "round" in said[1]]
    rounds = without_rounds[5:-4]
    # Built, checked, spread over places in memory.
    assert without_rounds[:5] == [("mark", "all"), *[("mark", "auto"), ("mark", "win=reference")] * 2]
    assert rounds[0] == ("doing", "round 1 of 2")
    assert Counter(route for what, route in rounds if what == "mark") == {"auto": 2, "win=reference": 2}
    assert without_rounds[-4:] == [
        *(("mark", "auto"), ("done", "auto")),
        *(("mark", "win=reference"), ("done", "win=reference")),
    ]


def test_short_rounds_are_not_all_told_of(make_cell: MakeCell, quick: Policy) -> None:
    times = iter(n * session.SAID_EVERY_S / 100 for n in range(10**6))
    sink = Sink()
    session.measure_group([make_cell()], replace(quick, rounds=60), sink, clock=lambda: next(times))
    told = [text for what, text in sink.said if what == "doing" and text.startswith("round")]
    assert told[0] == "round 1 of 60"
    assert 1 < len(told) < 10


def test_an_implementation_that_cannot_be_built_leaves_the_others(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = session.workload_for

    def no_dense(cell: Cell) -> Any:
        if cell.impl == "dense":
            raise MemoryError("too dense")
        return build(cell)

    monkeypatch.setattr(session, "workload_for", no_dense)
    sink = Sink()
    cells = [make_cell(), make_cell(route="win=reference"), make_cell(impl="dense")]
    session.measure_group(cells, quick, sink)
    assert {(row["impl"], row["route"]): row["status"] for row in sink.rows.values()} == {
        ("dense", "auto"): "oom",
        ("nsa", "auto"): "ok",
        ("nsa", "win=reference"): "ok",
    }


def test_a_baseline_is_measured_in_the_same_rounds(
    make_cell: MakeCell, create_run: CreateRun, quick: Policy
) -> None:
    cells = [make_cell(), make_cell(impl="dense")]
    run = create_run(cells)
    run_plan(cells, quick, run, Watcher())
    assert [row["status"] for row in run.finished.values()] == ["ok", "ok"]
    samples = load_run(run.path).samples
    assert Counter(samples["round"]) == dict.fromkeys(range(6), 2)


def test_a_lost_device_ends_the_group_after_the_row_of_its_cell(
    make_cell: MakeCell, quick: Policy, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_lost", lambda device: "AcceleratorError: illegal memory access")
    cells = [make_cell(route=route) for route in ("win=reference", "win=sdpa", "cmp=reference")]
    sink = Sink()
    with (
        plant(SLIDING, raising(RuntimeError("CUDA error: illegal memory access"), 2)),
        pytest.raises(session.DeviceLost, match="the device was lost when win=sdpa failed: Accelerator"),
    ):
        session.measure_group(cells, quick, sink)
    assert [(row["route"], row["status"]) for row in sink.rows.values()] == [("win=sdpa", "error")]


def test_a_device_is_lost_when_it_does_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert session._lost("cpu") == ""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert session._lost("cuda:0") == ""

    def broken(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert session._lost("cuda:0") == "RuntimeError: CUDA error: an illegal memory access was encountered"
