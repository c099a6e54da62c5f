"""Device names, cache sizes, flushes and the queue the host stays ahead of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsabench.measure.device import (
    FLUSH_FACTOR,
    UNKNOWN_CACHE_BYTES,
    MeasureError,
    QueueAhead,
    cache_bytes,
    cache_flush,
    gpu_uuid,
    gpus_alike,
    last_level_cache_bytes,
    resolve_device,
)


def test_devices_by_name(fake_cuda: Any) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda", api=fake_cuda) == torch.device("cuda", 0)
    assert resolve_device(torch.device("cuda", 0), api=fake_cuda) == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps", ""])
def test_unknown_device_names_are_refused(name: str, fake_cuda: Any) -> None:
    with pytest.raises(MeasureError, match=r"allowed: cpu, cuda, cuda:N"):
        resolve_device(name, api=fake_cuda)


def test_devices_that_are_not_there(fake_cuda: Any) -> None:
    with pytest.raises(MeasureError, match="'cuda:1', but torch sees 1 CUDA"):
        resolve_device("cuda:1", api=fake_cuda)
    fake_cuda.is_available = lambda: False
    with pytest.raises(MeasureError, match="'cuda', but torch sees no CUDA device"):
        resolve_device("cuda", api=fake_cuda)


def test_uuid_is_written_as_nvml_does(fake_cuda: Any) -> None:
    gpu = torch.device("cuda", 0)
    assert gpu_uuid(gpu, api=fake_cuda) == "GPU-01234567-89ab-cdef-0123-456789abcdef"
    fake_cuda.get_device_properties = lambda device: type("P", (), {"uuid": "MIG-1-2"})
    assert gpu_uuid(gpu, api=fake_cuda) == "MIG-1-2"


def test_gpus_alike_are_of_the_model_and_memory_of_the_default_one(fake_cuda: Any) -> None:
    kinds = [("A", 80), ("B", 80), ("A", 80), ("A", 40)]
    fake_cuda.device_count = lambda: len(kinds)
    fake_cuda.current_device = lambda: 2
    fake_cuda.get_device_properties = lambda device: SimpleNamespace(
        uuid=str(device.index), name=kinds[device.index][0], total_memory=kinds[device.index][1]
    )
    assert gpus_alike(api=fake_cuda) == ["GPU-2", "GPU-0"]
    fake_cuda.is_available = lambda: False
    with pytest.raises(MeasureError, match="sees no CUDA device"):
        gpus_alike(api=fake_cuda)


def _cache(root: Path, cpu: int, index: int, level: int, kind: str, size: str, sharers: str) -> None:
    folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", sharers)):
        (folder / name).write_text(f"{text}\n")


def test_last_level_caches_are_added_up_once_each(tmp_path: Path) -> None:
    for cpu, sharers in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        _cache(tmp_path, cpu, 0, 1, "Data", "32K", str(cpu))
        _cache(tmp_path, cpu, 1, 1, "Instruction", "64K", str(cpu))
        _cache(tmp_path, cpu, 3, 3, "Unified", "16M", sharers)
    assert last_level_cache_bytes(tmp_path, range(4)) == 2 * 16 * 2**20
    assert last_level_cache_bytes(tmp_path, [0, 1]) == 16 * 2**20


def test_instruction_caches_do_not_count_and_plain_bytes_do(tmp_path: Path) -> None:
    _cache(tmp_path, 0, 0, 1, "Data", "4096", "0")
    _cache(tmp_path, 0, 1, 2, "Instruction", "1G", "0")
    assert last_level_cache_bytes(tmp_path, [0]) == 4096


def test_a_system_that_does_not_say_its_cache(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path, [0]) == UNKNOWN_CACHE_BYTES
    _cache(tmp_path, 0, 0, 3, "Unified", "lots", "0")
    assert last_level_cache_bytes(tmp_path, [0]) == UNKNOWN_CACHE_BYTES


def test_the_cache_of_a_gpu_is_its_l2(fake_cuda: Any) -> None:
    assert cache_bytes(torch.device("cuda", 0), api=fake_cuda) == 1000
    assert cache_bytes(torch.device("cpu")) == last_level_cache_bytes()


def test_a_flush_rewrites_twice_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    zeros = torch.zeros
    monkeypatch.setattr("nsabench.measure.device.cache_bytes", lambda device, api: 1000)
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: made.append(zeros(*a, **k)) or made[-1])
    flush = cache_flush(torch.device("cpu"))
    flush()
    flush()
    (buffer,) = made
    assert buffer.nbytes == FLUSH_FACTOR * 1000 >= 2000
    assert (buffer == 2).all()


def test_a_step_queued_ahead_is_timed_without_its_launches(fake_cuda: Any) -> None:
    def step() -> None:
        for _ in range(4):
            fake_cuda.think(0.050)
            fake_cuda.kernel(0.010)

    ahead = QueueAhead(api=fake_cuda, clock=fake_cuda.clock)
    bare = ahead.measure(step)
    assert bare.gated == 1
    assert bare.ms > 0.2, "without a spin the launches are in the time"
    assert ahead.calibrate(step)
    span = ahead.measure(step)
    assert span.gated == 0
    assert span.ms == pytest.approx(0.040)


def test_before_runs_outside_the_events_and_after_the_spin(fake_cuda: Any) -> None:
    ahead = QueueAhead(before=lambda: fake_cuda.kernel(0.5, "flush"), api=fake_cuda, clock=fake_cuda.clock)
    assert ahead.calibrate(lambda: fake_cuda.kernel(0.020))
    fake_cuda.log.clear()
    assert ahead.measure(lambda: fake_cuda.kernel(0.020)).ms == pytest.approx(0.020)
    assert fake_cuda.log == ["sleep", "flush", "kernel"]


@pytest.mark.parametrize("steps", [1, 20])
def test_the_spin_outlasts_the_queueing_of_all_steps(fake_cuda: Any, steps: int) -> None:
    spins: list[float] = []
    sleep = fake_cuda._sleep

    def spin(cycles: int) -> None:
        sleep(cycles)
        spins.append(fake_cuda.busy_until_ms)

    queued: list[float] = []

    def step() -> None:
        fake_cuda.think(0.1)
        fake_cuda.kernel(0.01)
        queued.append(fake_cuda.host_ms)

    fake_cuda._sleep = spin
    ahead = QueueAhead(api=fake_cuda, clock=fake_cuda.clock)
    assert ahead.calibrate(step)
    span = ahead.measure(step, steps)
    assert queued[-1] < spins[-1], "the device still slept when the last step was in its queue"
    assert (span.gated, span.ms) == (0, pytest.approx(0.01 * steps))


def test_no_spin_is_longer_than_a_tenth_of_a_second(fake_cuda: Any) -> None:
    def step() -> None:
        fake_cuda.think(1.0)
        fake_cuda.kernel(0.01)

    ahead = QueueAhead(api=fake_cuda, clock=fake_cuda.clock)
    assert ahead.calibrate(step)
    began = fake_cuda.host_ms
    span = ahead.measure(step, 1000)
    assert 800 < span.gated < 1000, "those that the spin did not cover, and no other"
    assert fake_cuda.host_ms - began == pytest.approx(1000, rel=0.01)


def test_flushes_of_a_device_share_their_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    zeros = torch.zeros

    def counted(size: int, **more: Any) -> torch.Tensor:
        made.append(size)
        return zeros(size, **more)

    monkeypatch.setattr("nsabench.measure.device.cache_bytes", lambda device, api: 1500)
    monkeypatch.setattr(torch, "zeros", counted)
    first, second = cache_flush(torch.device("cpu")), cache_flush(torch.device("cpu"))
    first()
    second()
    assert made == [3000]
    del first, second
    cache_flush(torch.device("cpu"))()
    assert made == [3000, 3000], "and give it back when the last of them is gone"


def test_a_step_that_waits_for_the_device_is_not_queued_ahead(fake_cuda: Any) -> None:
    def step() -> None:
        fake_cuda.kernel(0.010)
        fake_cuda.synchronize()
        fake_cuda.think(0.1)
        fake_cuda.kernel(0.010)

    ahead = QueueAhead(api=fake_cuda, clock=fake_cuda.clock)
    assert not ahead.calibrate(step)
    assert ahead.cycles == 0
    fake_cuda.log.clear()
    assert ahead.measure(step).gated == 1
    assert "sleep" not in fake_cuda.log


def test_a_late_host_within_a_batch_is_counted(fake_cuda: Any) -> None:
    pauses = iter([0.0, 0.0, 5.0, 0.0])

    def step() -> None:
        fake_cuda.think(next(pauses))
        fake_cuda.kernel(0.100)

    ahead = QueueAhead(api=fake_cuda, clock=fake_cuda.clock)
    ahead.cycles = 1_000_000
    assert ahead.measure(step, steps=4).gated == 1


def test_the_spin_has_a_limit(fake_cuda: Any) -> None:
    def step() -> None:
        fake_cuda.think(1000.0)
        fake_cuda.kernel(0.010)

    ahead = QueueAhead(api=fake_cuda, clock=fake_cuda.clock)
    assert not ahead.calibrate(step)
    assert fake_cuda.host_ms < 10_000, "a second of launching must not cost many seconds of spinning"
