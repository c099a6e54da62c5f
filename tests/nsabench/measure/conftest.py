"""A GPU that exists only as two clocks, and an NVML that plays back recorded readings."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CYCLES_PER_MS = 2_000_000
LAUNCH_MS = 0.005
REPLAY_MS = 0.010


class FakeEvent:
    def __init__(self, gpu: FakeCuda) -> None:
        self._gpu = gpu
        self.at_ms: float | None = None

    def record(self) -> None:
        self.at_ms = max(self._gpu.host_ms, self._gpu.busy_until_ms)

    def query(self) -> bool:
        return self.at_ms is not None and self.at_ms <= self._gpu.host_ms

    def synchronize(self) -> None:
        assert self.at_ms is not None
        self._gpu.host_ms = max(self._gpu.host_ms, self.at_ms)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query(), "elapsed_time of an event that is not complete"
        assert end.query(), "elapsed_time of an event that is not complete"
        assert self.at_ms is not None
        assert end.at_ms is not None
        return end.at_ms - self.at_ms


class FakeGraph:
    def __init__(self, gpu: FakeCuda) -> None:
        self._gpu = gpu
        self.kernels: list[tuple[float, str]] = []

    def replay(self) -> None:
        self._gpu.log.append("replay")
        self._gpu.host_ms += REPLAY_MS
        for ms, name in self.kernels:
            self._gpu.occupy(ms, name)


class FakeCuda:
    """Answers like `torch.cuda` for one device with one queue: kernels start when launched and it is free."""

    def __init__(self) -> None:
        self.host_ms = 0.0
        self.busy_until_ms = 0.0
        self.all_done_ms = 0.0
        self.log: list[str] = []
        self.capturing: FakeGraph | None = None
        self.allocated = self.peak_allocated = 0
        self.reserved = self.peak_reserved = 0

    # what a step does
    def kernel(self, ms: float, name: str = "kernel") -> None:
        if self.capturing is not None:
            self.capturing.kernels.append((ms, name))
            self.log.append(f"captured {name}")
            return
        self.log.append(name)
        self.host_ms += LAUNCH_MS
        self.occupy(ms, name)

    def think(self, ms: float) -> None:
        """The host is busy; the device goes on."""
        self.host_ms += ms

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def occupy(self, ms: float, name: str = "") -> None:
        self.busy_until_ms = max(self.host_ms, self.busy_until_ms) + ms
        self.all_done_ms = max(self.all_done_ms, self.busy_until_ms)

    def clock(self) -> float:
        """Host time in seconds."""
        return self.host_ms / 1e3

    # torch.cuda
    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, device: object) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1000, uuid="01234567-89ab-cdef-0123-456789abcdef")

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield

    def synchronize(self, device: object = None) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines\n")
        self.log.append("synchronize")
        self.host_ms = max(self.host_ms, self.all_done_ms)

    def Event(self, enable_timing: bool = False) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)

    def _sleep(self, cycles: int) -> None:
        assert isinstance(cycles, int)
        self.kernel(cycles / CYCLES_PER_MS, "sleep")

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda stream: self.log.append("side waits"))

    def current_stream(self) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda stream: self.log.append("main waits"))

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.log.append("side stream on")
        yield
        self.log.append("side stream off")

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @contextmanager
    def graph(self, graph: FakeGraph) -> Iterator[None]:
        self.capturing = graph
        try:
            yield
        except Exception as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            self.capturing = None

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def reset_peak_memory_stats(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak_allocated

    def max_memory_reserved(self) -> int:
        return self.peak_reserved


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """Answers from the recorded reading number `at`.

    `broken[call]` makes a call fail: always (True), or while the function of `at` says so.
    """

    def __init__(self, recording: list[dict[str, Any]], uuid: str) -> None:
        self.recording = recording
        self.uuid = uuid
        self.at = 0
        self.broken: dict[str, bool | Callable[[int], bool]] = {}
        self.fields_offered = {186, 74, 76, 269, 270, 271}
        self.inits = self.shutdowns = 0
        self.calls: list[str] = []
        self.read_enough = threading.Event()
        self.enough = 3

    def _answer(self, call: str, key: str | None = None) -> Any:
        self.calls.append(call)
        broken = self.broken.get(call, False)
        if broken(self.at) if callable(broken) else broken:
            raise FakeNvmlError(f"{call} failed")
        return None if key is None else self.recording[self.at][key]

    def nvmlInit(self) -> None:
        self._answer("nvmlInit")
        self.inits += 1

    def nvmlShutdown(self) -> None:
        self._answer("nvmlShutdown")
        self.shutdowns += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._answer("nvmlDeviceGetHandleByUUID")
        if uuid != self.uuid:
            raise FakeNvmlError("not found")
        return "handle"

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return int(self._answer("nvmlDeviceGetPowerUsage", "power_average_mw"))

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> int:
        if self.calls.count("nvmlDeviceGetTotalEnergyConsumption") + 1 >= self.enough:
            self.read_enough.set()
        return int(self._answer("nvmlDeviceGetTotalEnergyConsumption", "energy_mj"))

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        assert sensor == 0
        return int(self._answer("nvmlDeviceGetTemperature", "temp_c"))

    def nvmlDeviceGetClockInfo(self, gpu: str, which: int) -> int:
        key = {1: "sm_clock_mhz", 2: "mem_clock_mhz"}[which]
        return int(self._answer(f"nvmlDeviceGetClockInfo {which}", key))

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> SimpleNamespace:
        return SimpleNamespace(gpu=self._answer("nvmlDeviceGetUtilizationRates", "util_pct"))

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> SimpleNamespace:
        return SimpleNamespace(used=self._answer("nvmlDeviceGetMemoryInfo", "used_bytes"))

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: str) -> int:
        return int(self._answer("nvmlDeviceGetCurrentClocksEventReasons", "reasons"))

    def nvmlDeviceGetFieldValues(self, gpu: str, numbers: list[int]) -> list[SimpleNamespace]:
        call = "instant power" if numbers == [186] else "counters"
        self._answer(call)
        reading = self.recording[self.at]
        answers = []
        for number in numbers:
            value = (
                reading["power_instant_mw"] if number == 186 else reading["counters_ns"].get(str(number), 0)
            )
            answers.append(
                SimpleNamespace(
                    fieldId=number,
                    nvmlReturn=0 if number in self.fields_offered else 3,
                    valueType=1 if number == 186 else 3,
                    value=SimpleNamespace(uiVal=value, ullVal=value),
                )
            )
        return answers


@pytest.fixture
def fake_cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def fake_nvml() -> FakeNvml:
    recorded = json.loads((Path(__file__).parent / "nvml_recording.json").read_text())
    return FakeNvml(recorded["readings"], recorded["uuid"])
