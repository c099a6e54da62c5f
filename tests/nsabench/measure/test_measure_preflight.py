"""What other processes use, from made-up counters: ours are told from theirs, and quiet is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from nsabench.measure import NvmlSampler, preflight
from nsabench.measure.preflight import (
    LEAST_S,
    LOOK_S,
    CpuWatch,
    Look,
    Usage,
    cpu_usage,
    family,
    look_at_cpu,
    look_at_gpu,
    wait_for_quiet,
)


def reader(*usages: Usage | None) -> Callable[[], Usage | None]:
    return iter(usages).__next__


START = Usage(at=10.0, total=1000.0, busy=400.0, ours=50.0)


def after(wall: float, busy: float, ours: float, cores: int = 4, **more: float) -> Usage:
    """The counters `wall` seconds after START, of which the cores were `busy` and `ours` so long."""
    return Usage(10.0 + wall, 1000.0 + cores * wall, 400.0 + busy, 50.0 + ours, **more)


@pytest.mark.parametrize(
    ("busy", "ours", "load"),
    [
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 25.0),  # a spinner on one of four cores for a second
        (4.0, 3.0, 25.0),  # beside three threads of ours
        (3.0, 3.0, 0.0),
        (2.9, 3.0, 0.0),  # the system's counters are coarse: never below none
        (4.0, 0.0, 100.0),
        (4.2, 0.0, 100.0),
    ],
)
def test_what_is_busy_and_not_ours_is_theirs(busy: float, ours: float, load: float) -> None:
    watch = CpuWatch(read=reader(START, after(1.0, busy, ours)))
    assert watch.load_pct() == pytest.approx(load)


def test_a_watch_may_be_read_again() -> None:
    watch = CpuWatch(read=reader(START, after(1.0, 1.0, 0.0), after(2.0, 1.0, 0.0)))
    assert [watch.load_pct(), watch.load_pct()] == [25.0, 12.5]


def test_others_of_a_group_with_a_quota_take_from_it() -> None:
    """Two of 64 cores are ours to use: who takes one of them takes half, though the machine is idle."""
    start = START.__class__(10.0, 1000.0, 400.0, 50.0, held=7.0, allowed=2.0)
    watch = CpuWatch(read=reader(start, after(1.0, 1.5, 0.5, cores=64, held=8.5, allowed=2.0)))
    assert watch.load_pct() == pytest.approx(50.0)


@pytest.mark.parametrize(
    "usages",
    [
        (None, after(1.0, 1.0, 0.0)),
        (START, None),
        (START, after(LEAST_S / 2, 1.0, 0.0)),
        (START, Usage(11.0, 1000.0, 400.0, 50.0)),
    ],
    ids=["unknown before", "unknown after", "too short", "counters that stand still"],
)
def test_what_the_system_does_not_say_is_not_known(usages: Sequence[Usage | None]) -> None:
    assert CpuWatch(read=reader(*usages)).load_pct() is None


class Times(SimpleNamespace):
    """A core's times as psutil has them on Linux: `guest` is in `user`, `steal` is nobody's here."""

    def __iter__(self) -> Any:
        return iter(vars(self).values())


def cores(**more: float) -> Any:
    idle = {"user": 0.0, "system": 0.0, "idle": 0.0, "iowait": 0.0, "steal": 0.0, "guest": 0.0}
    return Times(**{**idle, **more})


class Process:
    """A process with its children, as psutil has them."""

    def __init__(self, pid: int, seconds: float, reaped: float = 0.0, children: Sequence[Any] = ()) -> None:
        self.pid, self._seconds, self._reaped, self._children = pid, seconds, reaped, children

    def children(self, recursive: bool) -> list[Any]:
        assert recursive
        return [one for child in self._children for one in (child, *child.children(recursive=True))]

    def cpu_times(self) -> SimpleNamespace:
        return SimpleNamespace(
            user=self._seconds, system=0.5, children_user=self._reaped, children_system=0.25
        )


class Gone(Process):
    def cpu_times(self) -> SimpleNamespace:
        raise psutil.NoSuchProcess(self.pid)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[int, Process]:
    """A driver, a worker it started, that one's compiler, and one that has just ended."""
    compiler = Process(3, 1.0)
    driver = Process(1, 4.0, children=[Process(2, 10.0, reaped=2.0, children=[compiler]), Gone(4, 99.0)])
    by_id = {1: driver}
    monkeypatch.setattr(preflight.psutil, "Process", by_id.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    times = [
        cores(user=10.0, idle=5.0),
        cores(user=1000.0),
        cores(user=4.0, guest=4.0, system=1.0, idle=7.0, iowait=2.0, steal=3.0),
    ]
    monkeypatch.setattr(preflight.psutil, "cpu_times", lambda percpu: times)
    return by_id


def test_usage_is_of_the_cores_and_processes_that_are_ours(machine: object, tmp_path: Path) -> None:
    usage = cpu_usage(1, cgroup=tmp_path)
    assert usage is not None
    # Cores 0 and 2: 15 s and 17 s, of which 5 s idle, and 7 s idle and 2 s waiting; stolen time is busy.
    assert (usage.total, usage.busy) == (15.0 + 17.0, 10.0 + 8.0)
    assert usage.ours == (4.0 + 0.75) + (10.0 + 0.5 + 2.0 + 0.25) + (1.0 + 0.75)
    assert (usage.held, usage.allowed) == (0.0, 0.0)
    assert family(1) == {1, 2, 3, 4}


def test_a_quota_counts_where_it_is_less_than_the_cores(machine: object, tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    for text, allowed in (("150000 100000", 1.5), ("max 100000", 0.0), ("900000 100000", 0.0), ("", 0.0)):
        (tmp_path / "cpu.max").write_text(text)
        usage = cpu_usage(1, cgroup=tmp_path)
        assert usage is not None
        assert usage.allowed == allowed
    (tmp_path / "cpu.max").write_text("150000 100000")
    usage = cpu_usage(1, cgroup=tmp_path)
    assert usage is not None
    assert usage.held == 2.5


def test_a_driver_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(preflight.psutil, "Process", gone)
    assert cpu_usage(7) is None
    assert family(7) == {7}


def test_a_look_at_the_cores_takes_its_time() -> None:
    slept: list[float] = []
    found = look_at_cpu(sleep=slept.append, read=reader(START, after(LOOK_S, 1.0, 0.0)))
    assert slept == [LOOK_S]
    assert found == Look(pytest.approx(100 * 1.0 / (4 * LOOK_S)))


SPINNER = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
until = time.monotonic() + 0.9
print(flush=True)
while time.monotonic() < until:
    pass
"""


def test_a_true_stranger_is_seen() -> None:
    """A process outside our tree that spins; nothing is asserted of how fast anything is."""
    with subprocess.Popen([sys.executable, "-c", SPINNER], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = look_at_cpu(os.getpid())
    if found.load_pct is None:
        pytest.skip("this system does not say how busy its cores are")
    assert found.load_pct > 25.0 / (os.cpu_count() or 1)


def at_readings(fake_nvml: Any, *readings: dict[str, Any]) -> Callable[[float], None]:
    """A GPU that gives these readings, one after each nap."""
    base = fake_nvml.recording[1] | {"reasons": 0, "counters_ns": {}}
    fake_nvml.recording = [base | reading for reading in readings]

    def nap(seconds: float) -> None:
        fake_nvml.at = min(fake_nvml.at + 1, len(fake_nvml.recording) - 1)

    return nap


def test_a_look_at_a_gpu(fake_nvml: Any) -> None:
    nap = at_readings(fake_nvml, {"util_pct": 0}, {"util_pct": 60}, {"util_pct": 60, "reasons": 0x48})
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml)
    holding = {100: 2**30, 101: 3 * 2**30, 102: None}
    fake_nvml.nvmlDeviceGetComputeRunningProcesses = lambda gpu: [
        SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in holding.items()
    ]
    found = look_at_gpu(sampler, {100, 7}, sleep=nap)
    assert found.load_pct == pytest.approx(60 * 5 / 6)
    assert found.notes == (
        "the GPU is slowed down (hw_slowdown+hw_thermal)",
        "2 other processes are on the GPU with 3.0 GiB",
    )
    assert look_at_gpu(sampler, {100, 101, 102}, sleep=nap).notes == found.notes[:1]


def test_a_list_of_processes_without_ours_is_a_containers_and_lies(fake_nvml: Any) -> None:
    nap = at_readings(fake_nvml, {"util_pct": 0})
    sampler = NvmlSampler(fake_nvml.uuid, library=fake_nvml)
    fake_nvml.nvmlDeviceGetComputeRunningProcesses = lambda gpu: [
        SimpleNamespace(pid=4242, usedGpuMemory=2**30)
    ]
    assert look_at_gpu(sampler, {100}, sleep=nap) == Look(0.0)


def test_a_gpu_that_tells_nothing_is_no_error(fake_nvml: Any) -> None:
    sampler = NvmlSampler("GPU-other", library=fake_nvml)
    assert look_at_gpu(sampler, {100}, sleep=lambda seconds: None) == Look(None)
    assert sampler.processes() == {}


@pytest.mark.parametrize(
    ("loads", "limit_s", "seen", "last"),
    [
        ([5.0], 5.0, [], 5.0),
        ([60.0, 60.0, 3.0], 5.0, [60.0, 60.0], 3.0),
        ([60.0, 55.0, 50.0, 45.0], 4.0, [60.0, 55.0, 50.0], 45.0),
        ([60.0], 0.5, [], 60.0),
        ([None], 5.0, [], None),
    ],
)
def test_quiet_is_waited_for_so_long_and_no_longer(
    loads: list[float | None], limit_s: float, seen: list[float], last: float | None
) -> None:
    now = [0.0]
    given = iter(loads)

    def look() -> Look:
        now[0] += 1.0
        return Look(next(given))

    heard: list[float | None] = []
    found = wait_for_quiet(
        look,
        quiet_pct=10.0,
        limit_s=limit_s,
        loud=lambda one: heard.append(one.load_pct),
        clock=lambda: now[0],
    )
    assert (found.load_pct, heard) == (last, seen)
