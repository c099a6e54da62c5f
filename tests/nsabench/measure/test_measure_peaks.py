"""Measured limits: what they allow, what they call impossible, and that measuring them gives sane rates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from nsabench.measure import CpuTimer, MeasureError, peaks
from nsabench.measure.peaks import Peaks, calibrate, clock_resolution_us

MIB = 2**20


def made(**changes: object) -> Peaks:
    fields: dict[str, object] = {
        "device": "cpu",
        "copy_gbps": 100.0,
        "matmul_tflops": {"fp32": 2.0, "bf16": 0.5, "fp16": 4.0},
        "cache_bytes": MIB,
        "clock_us": 0.1,
        "launch_us": None,
        "event_us": None,
        "graph_us": None,
        "threads": 2,
    }
    return Peaks(**(fields | changes))  # type: ignore[arg-type]


def test_the_slower_of_compute_and_memory_is_the_limit() -> None:
    found = made()
    assert found.limit_ms(2e9, 0, "fp32", cold=False) == pytest.approx(1.0)
    assert found.limit_ms(2e9, 1e9, "fp32", cold=False) == pytest.approx(10.0)
    assert found.limit_ms(4e9, 0, "fp16", cold=True) == pytest.approx(1.0)
    assert found.limit_ms(1e9, 0, "fp64", cold=True) is None


def test_sixteen_bit_inputs_may_be_computed_in_fp32() -> None:
    assert made().rate("bf16") == 2.0
    assert made().rate("fp16") == 4.0
    assert made().rate("fp32") == 2.0


def test_what_fits_the_cache_is_not_held_to_the_memory() -> None:
    found = made()
    assert found.limit_ms(2e6, MIB, "fp32", cold=False) == pytest.approx(1e-3)
    assert found.limit_ms(2e6, MIB, "fp32", cold=True) == pytest.approx(MIB / 1e8)
    assert found.impossible(1e-3, 0, MIB, "fp32", cold=False) is None
    reason = found.impossible(1e-3, 0, MIB, "fp32", cold=True)
    assert reason == "impossible: 1.05e+03 GB/s, this device was measured at 100"


def test_a_little_above_a_limit_is_measurement_more_is_impossible() -> None:
    found = made()
    assert found.impossible(1.0, 2.09e9, 0, "fp32", cold=True) is None
    assert found.impossible(1.0, 2.11e9, 0, "fp32", cold=True) == (
        "impossible: 2.11 TFLOP/s, this device was measured at 2 in fp32"
    )
    assert found.impossible(1.0, 1e12, 0, "fp64", cold=True) is None


def test_stored_and_taken_back() -> None:
    assert Peaks.from_dict(made().to_dict()) == made()
    for damage in ({"speed": 1}, {}):
        with pytest.raises(MeasureError, match="calibrate again"):
            Peaks.from_dict(damage)


def test_calibration_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_COPY_LEAST": MIB, "_COPY_MOST": 4 * MIB, "_TRY_S": 0.02, "_LONG_S": 0.0}.items():
        monkeypatch.setattr(peaks, name, value)
    said: list[str] = []
    found = calibrate("cpu", tell=said.append)
    assert set(found.matmul_tflops) == {"fp64", "fp32", "fp16", "bf16"}
    assert all(0 < rate < 1000 for rate in found.matmul_tflops.values())
    assert 0.1 < found.copy_gbps < 10_000
    assert 0 < found.clock_us < 1000
    assert (found.launch_us, found.threads) == (None, torch.get_num_threads())
    assert said[0] == "copy bandwidth"
    assert len(said) == 5


def test_the_step_of_a_coarse_clock() -> None:
    def ticks() -> Iterator[float]:
        for second in range(1000):
            yield from [second * 0.25] * 3

    times = ticks()
    assert clock_resolution_us(lambda: next(times), reads=100) == 250_000
    assert math.isinf(clock_resolution_us(lambda: 1.0, reads=10))


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(MeasureError, match="allowed: cpu, cuda"):
        calibrate("tpu")


def test_only_a_gpu_with_triton_is_asked_what_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_copy_gbps", lambda device, size, timer: 7.0)
    monkeypatch.setattr(peaks, "find_spec", lambda name: None)
    said: list[str] = []
    timer = CpuTimer()
    assert peaks._bandwidths(torch.device("cpu"), MIB, timer, said.append) == (7.0, None)
    assert said == ["copy bandwidth"]
    assert peaks._bandwidths(torch.device("cuda", 0), MIB, timer, said.append) == (7.0, None)
    assert said[-1] == "no read bandwidth: Triton is not installed"


def test_peaks_kept_before_reading_was_measured() -> None:
    before = {name: value for name, value in made().to_dict().items() if name != "read_gbps"}
    assert Peaks.from_dict(before).read_gbps is None


@pytest.mark.gpu
def test_calibration_of_this_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = calibrate("cuda")
    assert found.matmul_tflops["bf16"] > found.matmul_tflops["fp64"]
    assert found.launch_us is not None
    assert 0 < found.launch_us < 100
    assert found.event_us is not None
    assert 0 <= found.event_us < 100
    assert found.read_gbps is not None
    assert 0.5 < found.read_gbps / found.copy_gbps < 2
