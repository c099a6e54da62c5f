"""NVML through a recording, with failures at every place."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsabench.measure import NvmlSampler, open_sampler
from nsabench.measure.nvml import ENERGY_UPDATES
from nsabench.measure.nvml_reader import (
    EVENT_REASONS,
    FAILURES,
    READINGS,
    GpuReader,
    decode_reasons,
    join_reasons,
    split_reasons,
)

NOTHING = dict.fromkeys(READINGS)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _play(sampler: NvmlSampler, nvml: Any, clock: Clock, n: int = 4) -> None:
    """Read the recording at 0, 1, 2, ... seconds."""
    for i in range(n):
        clock.now = float(i)
        nvml.at = min(i, len(nvml.recording) - 1)
        sampler.edge()


def test_one_reading_in_units(fake_nvml: Any, clock: Clock) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    clock.now = 1.5
    fake_nvml.at = 2
    row = sampler.edge()
    assert row == {
        "t_s": 1.5,
        "gpu_uuid": "GPU-01234567-89ab-cdef-0123-456789abcdef",
        "power_w": 699.9,
        "energy_j": 5130.5,
        "temp_c": 52.0,
        "sm_clock_mhz": 1755.0,
        "mem_clock_mhz": 3201.0,
        "util_pct": 100.0,
        "nvml_used_bytes": 8 * 2**30,
        "throttle_reasons": "sw_power_cap",
    }
    assert sampler.readings == [row]
    assert (sampler.reason, sampler.power_source) == ("", "instant")


def test_a_window_is_summarised(fake_nvml: Any, clock: Clock) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock)
    assert [row["t_s"] for row in sampler.window(1, 2)] == [1, 2], "ends included"
    assert sampler.summary(1, 2) == pytest.approx(
        {
            "power_w": (612.4 + 699.9) / 2,
            "energy_j": None,
            "temp_c": 52.0,
            "sm_clock_mhz": (1950 + 1755) / 2,
            "mem_clock_mhz": 3201.0,
            "util_pct": 98.5,
            "nvml_used_bytes": 8 * 2**30,
            "throttle_reasons": "sw_power_cap",
        }
    )


def test_reasons_add_up_over_a_window_and_counters_see_between_readings(fake_nvml: Any, clock: Clock) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock)
    assert sampler.summary(0, 0)["throttle_reasons"] == "gpu_idle"
    assert sampler.summary(1, 1)["throttle_reasons"] == "none"
    assert sampler.summary(0, 1)["throttle_reasons"] == "gpu_idle"
    # No reading shows hw_thermal; only its counter moved, between 2 and 3.
    assert sampler.summary(0, 3)["throttle_reasons"] == "gpu_idle+sw_power_cap+hw_thermal"
    assert sampler.slow_downs(0, 2) == ""
    assert sampler.slow_downs(2, 3) == "hw_thermal"


def test_slow_downs_are_found_at_the_edges_of_a_round_alone(fake_nvml: Any, clock: Clock) -> None:
    """What lasted from 1 to 2 voids the rounds that end or begin there, and no other; a power cap none."""
    base = fake_nvml.recording[1] | {"counters_ns": {}}
    fake_nvml.recording = [base | {"reasons": bits} for bits in (0x4, 0x8 | 0x40, 0x8, 0x4, 0x0)]
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock, n=5)
    found = [sampler.slow_downs(i, i + 1) for i in range(4)]
    assert found == ["hw_slowdown+hw_thermal", "hw_slowdown+hw_thermal", "hw_slowdown", ""]


@pytest.mark.parametrize(
    ("field", "reason"), [("269", "sw_thermal"), ("270", "hw_thermal"), ("271", "hw_power_brake")]
)
def test_a_slow_down_between_two_readings_is_counted_by_the_gpu(
    field: str, reason: str, fake_nvml: Any, clock: Clock
) -> None:
    base = fake_nvml.recording[1] | {"reasons": 0}
    fake_nvml.recording = [
        base | {"counters_ns": {field: ns, "74": 10 * i}} for i, ns in enumerate((7, 7, 9, 9))
    ]
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    fake_nvml.broken["nvmlDeviceGetCurrentClocksEventReasons"] = True
    _play(sampler, fake_nvml, clock)
    assert [sampler.slow_downs(i, i + 1) for i in range(3)] == ["", reason, ""]


def test_a_gpu_that_tells_no_reasons_has_no_slow_downs_to_tell(fake_nvml: Any, clock: Clock) -> None:
    fake_nvml.broken["nvmlDeviceGetCurrentClocksEventReasons"] = fake_nvml.broken["counters"] = True
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock)
    assert sampler.slow_downs(0, 3) is None
    assert sampler.summary(0, 3)["power_w"] is not None


def test_energy_wants_enough_updates_of_its_counter(fake_nvml: Any, clock: Clock) -> None:
    """A counter that moves with every other reading: a window of a hundred readings has fifty updates."""
    base = fake_nvml.recording[1]
    fake_nvml.recording = [base | {"energy_mj": 1000 * (i // 2)} for i in range(110)]
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock, n=110)
    assert sampler.summary(0, 2 * ENERGY_UPDATES - 1)["energy_j"] is None
    assert sampler.summary(0, 2 * ENERGY_UPDATES)["energy_j"] == ENERGY_UPDATES


def test_nvml_that_fails_in_the_middle_keeps_what_was_read(fake_nvml: Any, clock: Clock) -> None:
    for name in ("nvmlDeviceGetTemperature", "nvmlDeviceGetUtilizationRates"):
        fake_nvml.broken[name] = lambda at: at >= 2
    fake_nvml.broken["nvmlDeviceGetMemoryInfo"] = True
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock)
    assert sampler.lost(0, 1) == []
    assert sampler.lost(0, 3) == ["temp_c", "util_pct"]
    assert sampler.summary(0, 3)["temp_c"] == max(row["temp_c"] for row in sampler.window(0, 1))
    assert sampler.lost(8, 9) == []


def test_validity(fake_nvml: Any, clock: Clock) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock)
    validity = sampler.validity(0, 3)
    assert validity["power_capped_pct"] == pytest.approx(25.0)
    assert validity["clock_spread_pct"] == pytest.approx(100 * (1980 - 1755) / ((1950 + 1770) / 2))
    assert sampler.validity(8, 9) == {"power_capped_pct": None, "clock_spread_pct": None}


def test_an_empty_window_has_nothing(fake_nvml: Any, clock: Clock) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    assert sampler.summary(0, 1) == NOTHING
    assert sampler.window(0, 1) == []
    assert sampler.slow_downs(0, 1) is None


def test_energy_that_did_not_move_or_ran_backwards_is_not_zero(
    fake_nvml: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsabench.measure.nvml.ENERGY_UPDATES", 0)
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    _play(sampler, fake_nvml, clock, n=1)
    assert sampler.summary(0, 0)["energy_j"] is None
    fake_nvml.recording[1]["energy_mj"] = 17
    _play(sampler, fake_nvml, clock, n=2)
    assert sampler.summary(0, 1)["energy_j"] is None


def test_a_field_that_fails_is_none_and_is_given_up_after_failures_in_a_row(
    fake_nvml: Any, clock: Clock
) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    call = "nvmlDeviceGetTemperature"
    for _ in range(2):  # passing failures, more than FAILURES together
        fake_nvml.broken[call] = True
        for _ in range(FAILURES - 1):
            assert sampler.edge()["temp_c"] is None
        fake_nvml.broken[call] = False
        assert sampler.edge()["temp_c"] == 34.0
    fake_nvml.broken[call] = True
    for _ in range(FAILURES):
        assert sampler.edge()["temp_c"] is None
    fake_nvml.broken[call] = False
    asked = fake_nvml.calls.count(call)
    row = sampler.edge()
    assert row["temp_c"] is None, "for good"
    assert fake_nvml.calls.count(call) == asked, "and not asked again"
    assert row["power_w"] == 118.25, "the others go on"


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", {"energy_j"}),
        ("nvmlDeviceGetTemperature", {"temp_c"}),
        ("nvmlDeviceGetClockInfo 1", {"sm_clock_mhz"}),
        ("nvmlDeviceGetClockInfo 2", {"mem_clock_mhz"}),
        ("nvmlDeviceGetUtilizationRates", {"util_pct"}),
        ("nvmlDeviceGetMemoryInfo", {"nvml_used_bytes"}),
        ("nvmlDeviceGetCurrentClocksEventReasons", {"throttle_reasons"}),
        ("instant power", {"power_w"}),
    ],
)
def test_a_failure_in_the_middle_empties_one_field_only(
    call: str, fields: set[str], fake_nvml: Any, clock: Clock
) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    fake_nvml.broken[call] = lambda at: at == 1
    _play(sampler, fake_nvml, clock)
    empty = [{name for name in READINGS if row[name] is None} for row in sampler.readings]
    assert empty == [set(), fields, set(), set()]


def test_everything_failing_is_quiet(fake_nvml: Any, clock: Clock) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    for call in set(fake_nvml.calls) | {"counters"}:
        fake_nvml.broken[call] = True
    for name in ("TotalEnergyConsumption", "Temperature", "ClockInfo 1", "ClockInfo 2", "UtilizationRates"):
        fake_nvml.broken[f"nvmlDeviceGet{name}"] = True
    fake_nvml.broken["nvmlDeviceGetMemoryInfo"] = True
    fake_nvml.broken["nvmlDeviceGetCurrentClocksEventReasons"] = True
    fake_nvml.broken["nvmlShutdown"] = True
    _play(sampler, fake_nvml, clock)
    assert sampler.summary(0, 3) == NOTHING
    sampler.close()


def test_power_falls_back_to_the_average_once_and_for_all(fake_nvml: Any, clock: Clock) -> None:
    fake_nvml.fields_offered = set()
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    assert sampler.power_source == "average"
    fake_nvml.fields_offered = {186}
    assert sampler.edge()["power_w"] == 117.0, "no mix of the two in one series"
    assert sampler.summary(0, 0)["power_w"] == 117.0


@pytest.mark.parametrize("milliwatts", [0, None])
def test_no_power_is_no_reading(milliwatts: int | None, fake_nvml: Any, clock: Clock) -> None:
    for reading in fake_nvml.recording:
        reading["power_instant_mw"] = reading["power_average_mw"] = milliwatts
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml, clock=clock)
    assert sampler.power_source is None
    assert sampler.edge()["power_w"] is None


def test_an_old_library_has_other_names_and_fewer_fields(fake_nvml: Any, clock: Clock) -> None:
    old = SimpleNamespace(
        **{name: getattr(fake_nvml, name) for name in dir(fake_nvml) if name.startswith("nvml")}
    )
    old.nvmlDeviceGetCurrentClocksThrottleReasons = old.nvmlDeviceGetCurrentClocksEventReasons
    del old.nvmlDeviceGetCurrentClocksEventReasons, old.nvmlDeviceGetFieldValues
    del old.nvmlDeviceGetTotalEnergyConsumption
    sampler = NvmlSampler(fake_nvml.uuid, library=old, clock=clock)
    row = sampler.edge()
    assert row["throttle_reasons"] == "gpu_idle"
    assert row["power_w"] == 117.0
    assert row["energy_j"] is None


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_no_start_no_readings_and_no_error(call: str, fake_nvml: Any) -> None:
    fake_nvml.broken[call] = True
    with NvmlSampler(fake_nvml.uuid, library=fake_nvml) as sampler:
        assert sampler.reason == f"NVML: {call} failed"
        row = sampler.edge()
        assert set(row) == {"t_s", "gpu_uuid", *READINGS}
        assert {row[name] for name in READINGS} == {None}
    assert sampler.readings == []
    assert sampler.summary(0, 1e9) == NOTHING
    assert sampler.slow_downs(0, 1e9) is None


def test_an_unknown_gpu_is_no_error(fake_nvml: Any) -> None:
    assert NvmlSampler("GPU-other", library=fake_nvml).reason == "NVML: not found"


def _threads() -> int:
    return sum(thread.name == "nvml-sampler" for thread in threading.enumerate())


def test_the_thread_reads_until_it_is_stopped_and_may_start_again(fake_nvml: Any) -> None:
    sampler = NvmlSampler(fake_nvml.uuid, hz=1000.0, library=fake_nvml)
    for _ in range(2):
        fake_nvml.read_enough.clear()
        fake_nvml.enough = len(sampler.readings) + 3
        sampler.start()
        sampler.start()
        assert fake_nvml.read_enough.wait(timeout=60)
        assert _threads() == 1
        sampler.stop()
        sampler.stop()
        assert _threads() == 0
        count = len(sampler.readings)
        assert count >= 3
    times = [row["t_s"] for row in sampler.readings]
    assert times == sorted(times)
    sampler.close()
    sampler.close()
    assert fake_nvml.shutdowns == 1
    assert sampler.reason == "closed"
    sampler.start()
    sampler.edge()
    assert len(sampler.readings) == count, "closed"


def test_a_failing_gpu_does_not_kill_the_thread(fake_nvml: Any) -> None:
    fake_nvml.broken["nvmlDeviceGetTemperature"] = True
    fake_nvml.enough = FAILURES + 3
    with NvmlSampler(fake_nvml.uuid, hz=1000.0, library=fake_nvml) as sampler:
        assert fake_nvml.read_enough.wait(timeout=60)
    assert len(sampler.readings) >= FAILURES + 2


def test_reasons_are_decoded_to_names() -> None:
    assert decode_reasons(0) == "none"
    assert decode_reasons(0x4) == "sw_power_cap"
    assert decode_reasons(0x44 | 0x8) == "sw_power_cap+hw_slowdown+hw_thermal"
    assert decode_reasons(sum(EVENT_REASONS)) == "+".join(EVENT_REASONS.values())
    assert decode_reasons(0x800 | 0x1) == "gpu_idle+bit_0x800"
    assert split_reasons("a+b") == {"a", "b"}
    assert split_reasons("none") == split_reasons(None) == set()
    assert join_reasons([]) == "none"
    assert join_reasons(["hw_thermal", "gpu_idle", "gpu_idle"]) == "gpu_idle+hw_thermal"


def test_open_sampler_on_a_cpu() -> None:
    sampler = open_sampler("cpu")
    assert sampler.reason == "the device is a CPU"
    assert sampler.uuid is None
    assert sampler.summary(0, 1) == NOTHING


def test_open_sampler_maps_the_device_by_its_uuid(fake_nvml: Any, fake_cuda: Any, clock: Clock) -> None:
    clock.now = 3.0
    sampler = open_sampler("cuda", library=fake_nvml, api=fake_cuda, clock=clock)
    assert sampler.uuid == fake_nvml.uuid
    assert sampler.edge()["t_s"] == 3.0


def test_open_sampler_without_pynvml(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml" in open_sampler("cuda", api=fake_cuda).reason


def test_open_sampler_with_pynvml_and_no_driver(fake_cuda: Any) -> None:
    pytest.importorskip("pynvml")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    sampler = open_sampler("cuda", api=fake_cuda)
    assert sampler.reason.startswith("NVML: ")
    assert sampler.edge()["power_w"] is None


def test_field_values_as_pynvml_gives_them(fake_nvml: Any) -> None:
    """The structures of the real library, of every kind of value."""
    pynvml = pytest.importorskip("pynvml")
    kinds = [
        (pynvml.NVML_VALUE_TYPE_DOUBLE, "dVal"),
        (pynvml.NVML_VALUE_TYPE_UNSIGNED_INT, "uiVal"),
        (pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG, "ulVal"),
        (pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, "ullVal"),
        (pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG, "sllVal"),
    ]
    for kind, member in kinds:
        value = pynvml.c_nvmlFieldValue_t()
        value.fieldId = pynvml.NVML_FI_DEV_POWER_INSTANT
        value.valueType = kind
        value.nvmlReturn = pynvml.NVML_SUCCESS
        setattr(value.value, member, 250_000)
        answer = (pynvml.c_nvmlFieldValue_t * 1)(value)
        fake_nvml.nvmlDeviceGetFieldValues = lambda gpu, numbers, answer=answer: answer
        reader = GpuReader(fake_nvml, fake_nvml.uuid)
        assert reader.power_source == "instant"
        assert reader.read()["power_w"] == 250.0
    assert ctypes.sizeof(pynvml.c_nvmlFieldValue_t) > 0


def test_numbers_and_names_agree_with_pynvml() -> None:
    pynvml = pytest.importorskip("pynvml")
    bits = {
        "GpuIdle": "gpu_idle",
        "ApplicationsClocksSetting": "app_clocks",
        "SwPowerCap": "sw_power_cap",
        "HwSlowdown": "hw_slowdown",
        "SyncBoost": "sync_boost",
        "SwThermalSlowdown": "sw_thermal",
        "HwThermalSlowdown": "hw_thermal",
        "HwPowerBrakeSlowdown": "hw_power_brake",
        "DisplayClockSetting": "display_clock",
    }
    for theirs, ours in bits.items():
        assert decode_reasons(getattr(pynvml, f"nvmlClocksThrottleReason{theirs}")) == ours
    assert pynvml.NVML_FI_DEV_POWER_INSTANT == 186
    assert (pynvml.NVML_TEMPERATURE_GPU, pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM) == (0, 1, 2)
    assert pynvml.NVML_FI_DEV_PERF_POLICY_POWER == 74
