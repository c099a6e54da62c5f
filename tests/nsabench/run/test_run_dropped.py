"""Rounds in which the hardware slowed down: kept, marked, and in no number; NVML that fails costs no cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest

from nsabench.measure import NvmlSampler, PeakMemory
from nsabench.plan import Cell
from nsabench.run import Policy, arm, run_plan, session
from nsabench.run.impl import Refused
from nsabench.run.session import DeviceLost, measure_group
from nsabench.run.timing import by_round, dropped_rounds, time_fields, too_many_dropped
from nsabench.store import RunDir, load_run

MakeCell = Callable[..., Cell]
CreateRun = Callable[[list[Cell]], RunDir]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]

CAPPED, THERMAL, SLOWED = 0x4, 0x40, 0x8


class Gpu:
    """An NVML that has one answer for each reading, the last one for good."""

    def __init__(self, reasons: Sequence[int], counters: Sequence[int] = ()) -> None:
        self.reasons, self.counters = list(reasons), list(counters) or [0]
        self.reads = 0
        self.dies_at: int | None = None

    def _now(self, values: Sequence[int]) -> int:
        if self.dies_at is not None and self.reads > self.dies_at:
            raise RuntimeError("GPU is lost")
        return values[min(self.reads - 1, len(values) - 1)]

    def power(self) -> int:
        self.reads += 1
        return 1000 * self._now([300])

    def sampler(self, device: str = "cpu", *, clock: Callable[[], float]) -> NvmlSampler:
        def counted(gpu: Any, numbers: list[int]) -> list[Any]:
            if numbers == [186]:
                raise RuntimeError("not offered")
            return [_field(number, self._now(self.counters) if number == 270 else 0) for number in numbers]

        library = SimpleNamespace(
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetHandleByUUID=lambda uuid: "gpu",
            nvmlDeviceGetFieldValues=counted,
            nvmlDeviceGetPowerUsage=lambda gpu: self.power(),
            nvmlDeviceGetTemperature=lambda gpu, sensor: self._now([60]),
            nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: self._now(self.reasons),
        )
        made = NvmlSampler("GPU-0", hz=0.001, library=library, clock=clock)
        self.reads = 0
        return made


def _field(number: int, value: int) -> SimpleNamespace:
    return SimpleNamespace(fieldId=number, nvmlReturn=0, valueType=3, value=SimpleNamespace(ullVal=value))


@pytest.fixture(autouse=True)
def _no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm, "peak_memory", lambda step, device: PeakMemory(1000, None))


@pytest.fixture
def ten(quick: Policy) -> Policy:
    return replace(quick, rounds=10)


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.telemetry: list[dict[str, Any]] = []
        self.said: list[str] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None:
        self.said.append(text)

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.rows.append(dict(row))
        self.samples += samples
        self.telemetry += telemetry


def measured(gpu: Gpu, cells: list[Cell], policy: Policy, patch: pytest.MonkeyPatch) -> Kept:
    kept = Kept()
    patch.setattr(session, "open_sampler", gpu.sampler)
    measure_group(cells, policy, kept)
    return kept


def by_number(kept: Kept) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for sample in kept.samples:
        found.setdefault(sample["round"], set()).add(sample.get("dropped", ""))
    return found


def test_a_slow_down_drops_the_round_of_all_arms_and_deletes_nothing(
    make_cell: MakeCell, create_run: CreateRun, ten: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds at the edge between rounds 3 and 4 alone: neither can be trusted."""
    gpu = Gpu([CAPPED] * 4 + [THERMAL | SLOWED] + [CAPPED])
    monkeypatch.setattr(session, "open_sampler", gpu.sampler)
    cells = [make_cell(route=route, phase="decode") for route in ("auto", "win=reference")]
    run = create_run(cells)
    run_plan(cells, ten, run, Watcher())
    stored = load_run(run.path)
    whys = stored.samples.groupby("round")["dropped"].unique().map(list)
    assert list(whys) == [[""]] * 3 + [["hw_slowdown+hw_thermal"]] * 2 + [[""]] * 5
    assert len(stored.samples) == 2 * 2 * 10
    weights = {"emit": 0.25, "plain": 0.75}
    for row in stored.rows:
        assert (row["status"], row["dropped_rounds"]) == ("ok", 2)
        assert (row["n_rounds"], row["n_samples"]) == (8, 16)
        mine = stored.samples[stored.samples["cell_id"] == row["cell_id"]]
        counted = mine[mine["dropped"] == ""].to_dict("records")
        again = time_fields(Cell.from_dict(plan_of(row)), counted, weights, flops=1, moved_bytes=1)
        assert row["ms_total"] == pytest.approx(again["ms_total"], rel=1e-12)
        assert row["ms_min"] == pytest.approx(again["ms_min"], rel=1e-12)
        assert (row["power_capped_pct"], row["throttle_reasons"]) == (
            pytest.approx(100 * 10 / 11),
            "sw_power_cap+hw_slowdown+hw_thermal",
        )


class Watcher:
    def begin(self, group: list[Cell], activity: str, worker: int = 0) -> None: ...

    def activity(self, text: str, worker: int = 0) -> None: ...

    def row(self, row: dict[str, Any], worker: int = 0) -> None: ...


def plan_of(row: dict[str, Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(Cell)}


def test_a_slow_down_between_two_readings_is_known_by_its_counter(
    make_cell: MakeCell, ten: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu([0], counters=[7] * 3 + [8])
    kept = measured(gpu, [make_cell()], ten, monkeypatch)
    assert [number for number, why in by_number(kept).items() if why == {"hw_thermal"}] == [2]
    assert kept.rows[0]["dropped_rounds"] == 1


@pytest.mark.parametrize("reasons", [[CAPPED], [0]])
def test_a_power_cap_drops_nothing(
    make_cell: MakeCell, ten: Policy, monkeypatch: pytest.MonkeyPatch, reasons: list[int]
) -> None:
    (row,) = measured(Gpu(reasons), [make_cell()], ten, monkeypatch).rows
    assert (row["status"], row["dropped_rounds"]) == ("ok", 0)
    assert row["power_capped_pct"] == (100.0 if reasons[0] else 0.0)


def test_more_than_a_fifth_of_the_rounds_is_too_many(
    make_cell: MakeCell, ten: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = measured(
        Gpu([0, THERMAL, THERMAL, 0]), [make_cell(), make_cell(route="win=reference")], ten, monkeypatch
    )
    for row in kept.rows:
        assert (row["status"], row["dropped_rounds"]) == ("invalid", 3)
        assert row["reason"] == "3 of 10 rounds dropped for hw_thermal; allowed 20 %"
    assert len(kept.samples) == 20


def test_where_nothing_is_read_nothing_is_known_of_dropped_rounds(make_cell: MakeCell, quick: Policy) -> None:
    kept = Kept()
    measure_group([make_cell()], quick, kept)
    assert kept.rows[0].get("dropped_rounds") is None


def test_nvml_that_fails_in_the_middle_costs_no_cell(
    make_cell: MakeCell, ten: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu([THERMAL, 0])
    gpu.dies_at = 5
    kept = measured(gpu, [make_cell()], ten, monkeypatch)
    (row,) = kept.rows
    assert (row["status"], row["dropped_rounds"], row["power_w"], row["temp_c"]) == ("ok", 1, 300.0, 60.0)
    assert [reading["power_w"] for reading in kept.telemetry] == [300.0] * 5 + [None] * 6
    assert "NVML stopped answering during the rounds: no more power_w, temp_c, throttle_reasons" in kept.said


def test_the_energy_of_several_arms_is_nobodys(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def summary(self: NvmlSampler, t0: float, t1: float) -> dict[str, Any]:
        return {"energy_j": 12.0}

    monkeypatch.setattr(NvmlSampler, "summary", summary)
    alone = measured(Gpu([0]), [make_cell()], quick, monkeypatch)
    assert [row["energy_j"] for row in alone.rows] == [12.0]
    two = measured(Gpu([0]), [make_cell(), make_cell(route="win=reference")], quick, monkeypatch)
    assert [row["energy_j"] for row in two.rows] == [None, None]


def test_a_device_that_is_lost_in_a_later_round_leaves_the_dropped_marked(
    make_cell: MakeCell, ten: Policy, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))

    def bug(true: Any, *given: Any, **more: Any) -> Any:
        if next(calls) >= 12:
            raise RuntimeError("CUDA error: device lost")
        return true(*given, **more)

    kept = Kept()
    monkeypatch.setattr(session, "open_sampler", Gpu([THERMAL, 0]).sampler)
    monkeypatch.setattr(session, "_lost", lambda device: "gone")
    with (
        plant("backends.sdpa:sliding_attention", bug),
        pytest.raises(DeviceLost),
    ):
        measure_group([make_cell(route="win=sdpa")], replace(ten, sample_ms=1e-6), kept)
    assert kept.rows[0]["status"] == "error"
    whys = by_number(kept)
    assert 1 < len(whys) < 10
    assert [number for number, why in whys.items() if why != {""}] == [0]


def samples(rounds: int, dropped: dict[int, str] | None = None, process: int = 0) -> list[dict[str, Any]]:
    return [
        {"process": process, "round": n, "variant": "", "ms": 1.0 + n, "dropped": (dropped or {}).get(n, "")}
        for n in range(rounds)
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], ""),
        (samples(10, {1: "hw_thermal", 2: "hw_thermal"}), ""),
        (
            samples(10, {1: "hw_thermal", 2: "sw_thermal+hw_thermal", 3: "hw_slowdown"}),
            "3 of 10 rounds dropped for hw_slowdown+hw_thermal+sw_thermal; allowed 20 %",
        ),
        (samples(10, {1: "a", 2: "a", 3: "a"}) + samples(10, process=1), ""),
        (samples(1, {0: "a"}), "1 of 1 rounds dropped for a; allowed 20 %"),
    ],
)
def test_a_fifth_of_the_rounds_of_all_processes(given: list[dict[str, Any]], said: str) -> None:
    assert too_many_dropped(given) == said


def test_times_without_the_dropped(make_cell: MakeCell) -> None:
    given = samples(10, {9: "hw_thermal", 0: "hw_thermal"})
    assert by_round(given, {"": 1.0}) == {(0, n): 1.0 + n for n in range(1, 9)}
    assert dropped_rounds(given) == {(0, 0): "hw_thermal", (0, 9): "hw_thermal"}
    found = time_fields(make_cell(), given, {"": 1.0}, flops=1, moved_bytes=1)
    assert (found["ms_min"], found["ms_p95"], found["n_rounds"], found["n_samples"]) == (2.0, 9.0, 8, 8)
    with pytest.raises(Refused, match="10 of 10 rounds"):
        time_fields(
            make_cell(), samples(10, dict.fromkeys(range(10), "a")), {"": 1.0}, flops=1, moved_bytes=1
        )


def test_samples_of_older_runs_know_no_dropped_rounds() -> None:
    old: Iterator[dict[str, Any]] = ({k: v for k, v in s.items() if k != "dropped"} for s in samples(3))
    assert len(by_round(old, {"": 1.0})) == 3
