"""A GPU that exists only as a clock, with steps of planted length, for the whole scheduler to run on.

Nothing here takes time: the host's clock moves when the host waits, launches or thinks, the device's when
kernels run. What real devices do to a measurement is planted: clocks that drift, episodes of throttling, a
first place in a round that is better than the others, a host that is late, a device that is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa.testing import Check
from nsabench.measure import MeasureError, NvmlSampler, PeakMemory, make_timer
from nsabench.measure.canary import settle
from nsabench.measure.probe import ColdProbe
from nsabench.plan import Cell
from nsabench.run import arm, cold, rotation, session
from nsabench.run.arm import Arm
from nsabench.run.check import Verdict
from nsabench.run.executor import Began, Done, Event, Job, Over
from nsabench.run.impl import Fields
from nsabench.run.steps import Span, Step
from nsabench.run.work import Work
from nsabench.run.workload import Variant, Workload
from tests.nsabench.measure.conftest import FakeCuda

GPU = "cuda:0"
CACHE_BYTES = 50_000_000

_sample = Arm.sample


@dataclass
class Planted:
    """One arm: ``ms`` of its only kernel, ``host_ms`` of Python before it. ``waits``: whether the step waits
    for the device itself, which no graph holds.
    """

    ms: float = 1.0
    host_ms: float = 0.1
    waits: bool = False

    def run(self, device: Device, name: str) -> None:
        device.think(self.host_ms)
        device.kernel(self.ms, name)
        if self.waits:
            device.synchronize()


class Device(FakeCuda):
    """``slowness(t)``: what kernels take at second ``t``, over what they are planted to take. ``slots``: the
    same by place in a round, the last one for all later places. ``noise``: standard deviation of the log of a
    kernel's time. ``dies_at_s``: when everything fails for good.
    """

    def __init__(
        self,
        slowness: Callable[[float], float] = lambda t: 1.0,
        slots: Sequence[float] = (1.0,),
        noise: float = 0.0,
        dies_at_s: float = float("inf"),
    ) -> None:
        super().__init__()
        self.slowness, self.slots, self.noise, self.dies_at_s = slowness, slots, noise, dies_at_s
        self.lost = False
        self.slot = 0
        self._random = random.Random(0)

    def __deepcopy__(self, memo: object) -> Device:
        return self

    def occupy(self, ms: float, name: str = "") -> None:
        now = max(self.host_ms, self.busy_until_ms) / 1e3
        if now > self.dies_at_s:
            self.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        factor = self.slowness(now)
        if name.startswith("arm "):
            factor *= self.slots[min(self.slot, len(self.slots) - 1)]
            factor *= self._random.lognormvariate(0.0, self.noise) if self.noise else 1.0
        super().occupy(ms * factor, name)

    def flush(self) -> None:
        self.kernel(0.1, "flush")

    def wait(self, seconds: float) -> None:
        """Nobody does anything for so long."""
        self.synchronize()
        self.host_ms += seconds * 1e3


class PlantedWorkload(Workload):
    """Steps of planted length; right, and with one tensor that each step reads."""

    parameters = 0
    hook = None

    def __init__(self, cell: Cell, device: Device, arms: Mapping[str, Planted], moved_bytes: int) -> None:
        self.cell, self.device, self._gpu, self._arms = cell, torch.device(GPU), device, arms
        self.steps = [Step("", 1.0, ((0, cell.S),))]
        self.moved_bytes = moved_bytes
        self.data = torch.arange(4.0)
        self._copies = []

    def settle(self, route: str) -> Fields:
        return {"route_proof": "planted"}

    def work(self, route: str) -> Work:
        return Work(10**6, self.moved_bytes, 1, 1)

    def alone(self, route: str) -> dict[str, str]:
        return {}

    def check(self, inputs: Any, span: Span, route: str, *, elements: int) -> Verdict:
        return Verdict(Check(0.0, 0.0, 1e-3), "", self.data.reshape(1, 1, 4))

    def variants(self, route: str) -> list[Variant]:
        return [Variant("", 1.0, partial(self._run, route))]

    def _run(self, route: str) -> torch.Tensor:
        planted = self._arms[route]
        planted.run(self._gpu, f"arm {route}")
        return self.data.reshape(1, 1, 4).clone()

    def _forward_step(self, step: Step, route: str) -> Callable[[], torch.Tensor]:
        return partial(self._run, route)

    def graph_step(self, route: str) -> Callable[[], torch.Tensor]:
        return partial(self._run, route)

    def _leaves(self) -> list[torch.Tensor]:
        return [self.data]

    def inputs(self, step: Step, wanted: Collection[Span]) -> Iterator[tuple[Span, Any]]:
        for span in wanted:
            yield span, {}

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        return attended

    def held_bytes(self) -> dict[str, int]:
        return {"weights": self.moved_bytes}

    def _held(self) -> dict[str, Sequence[torch.Tensor]]:
        return {}


def nvml(device: Device, slow_from: float = float("inf"), gone_from: float = float("inf")) -> SimpleNamespace:
    """An NVML of the device, by its clock: thermal slow-down from one second on, no answer from another."""

    def answer(value: Any) -> Callable[..., Any]:
        def answered(*given: Any) -> Any:
            if device.clock() >= gone_from:
                raise RuntimeError("GPU is lost")
            return value() if callable(value) else value

        return answered

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: "gpu",
        nvmlDeviceGetFieldValues=answer(list),
        nvmlDeviceGetPowerUsage=answer(300_000),
        nvmlDeviceGetTotalEnergyConsumption=answer(lambda: int(device.host_ms)),
        nvmlDeviceGetTemperature=answer(60),
        nvmlDeviceGetClockInfo=answer(1500),
        nvmlDeviceGetUtilizationRates=answer(SimpleNamespace(gpu=90)),
        nvmlDeviceGetMemoryInfo=answer(SimpleNamespace(used=10**9)),
        nvmlDeviceGetCurrentClocksEventReasons=answer(lambda: 0x40 if device.clock() >= slow_from else 0),
    )


@dataclass
class Rig:
    """The scheduler on a planted device: every door to the true one leads to it instead."""

    patch: pytest.MonkeyPatch
    device: Device
    arms: dict[str, Planted] = field(default_factory=dict)
    moved_bytes: int = 10**9
    probe: ColdProbe = field(default_factory=lambda: ColdProbe(1.0))
    library: Any = None
    free_bytes: int = 10**12
    canary_ms: Callable[[], float] | None = None
    broken_timers: tuple[str, ...] = ()
    biased: dict[str, float] = field(default_factory=dict)
    """Timers whose times are so many times too long."""

    def __post_init__(self) -> None:
        set_attribute = self.patch.setattr
        set_attribute(session, "workload_for", self._workload)
        set_attribute(session, "_refuse_hopeless", lambda cell: None)
        set_attribute(session, "Neighbours", _NoNeighbours)
        set_attribute(session, "canary", lambda name: self.canary_ms or (lambda: 1.0))
        set_attribute(session, "settle", partial(settle, clock=self.device.clock))
        set_attribute(session, "open_sampler", self._sampler)
        set_attribute(session, "_lost", lambda name: "the device is gone" if self.device.lost else "")
        set_attribute(arm, "make_timer", self._timer)
        set_attribute(Arm, "sample", lambda *given: self._sample(*given))
        set_attribute(arm, "peak_memory", lambda step, device: PeakMemory(1000, 2000))
        set_attribute(arm, "known_peaks", lambda name: None)
        set_attribute(cold, "known_probe", lambda name: self.probe)
        set_attribute(rotation, "available_bytes", lambda name: self.free_bytes)
        set_attribute(rotation, "cache_bytes", lambda device: CACHE_BYTES)

    def measure(self, cells: Sequence[Cell], policy: Any, process: int = 0) -> Kept:
        """What a group's measurement leaves."""
        kept = Kept()
        session.measure_group(cells, policy, kept, process=process, clock=self.device.clock)
        return kept

    def executor(self, cells: Sequence[Cell], process: int) -> Executor:
        """For a comparison to hire."""
        return Executor(self, process)

    def _workload(self, cell: Cell) -> PlantedWorkload:
        return PlantedWorkload(cell, self.device, self.arms, self.moved_bytes)

    def _timer(self, kind: str, device: Any, cache: str, regime: str) -> Any:
        if kind in self.broken_timers:
            raise MeasureError(f"no {kind} here")
        gpu = self.device
        timer = make_timer(kind, device, cache, regime, flush=gpu.flush, api=gpu, clock=gpu.clock)
        if kind in self.biased:
            sample = timer.sample
            self.patch.setattr(timer, "sample", lambda iters: self.biased[kind] * sample(iters))
        return timer

    def _sampler(self, name: str, *, clock: Callable[[], float]) -> NvmlSampler:
        return NvmlSampler("GPU-0", hz=0.001, library=self.library or nvml(self.device), clock=clock)

    def _sample(self, measured: Arm, number: int, position: int) -> None:
        self.device.slot = position
        _sample(measured, number, position)


class _NoNeighbours:
    load_pct = None

    def __init__(self, *given: object) -> None: ...

    def over_rounds(self) -> Any:
        return pytest.MonkeyPatch.context()


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.samples: dict[str, list[dict[str, Any]]] = {}
        self.telemetry: list[Any] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None:
        self.said.append(text)

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.rows.append(dict(row))
        self.samples[row["cell_id"]] = [dict(sample) for sample in samples]
        self.telemetry += telemetry

    def times(self, cell: Cell) -> list[float]:
        """Milliseconds of a step, round by round."""
        return [sample["ms"] for sample in self.samples[cell.cell_id]]


class Executor:
    """Measures in this process, on the planted device."""

    slots = ()

    def __init__(self, rig: Rig, process: int) -> None:
        self._rig, self._process = rig, process

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        for job in jobs:
            yield Began(0, job)
            kept = self._rig.measure(job.cells, job.policy, self._process)
            for row in kept.rows:
                yield Done(0, row, kept.samples[row["cell_id"]], [])
            yield Over(0, job, ())
