"""What other processes use of a device: looked at while nothing of ours runs there, and over the rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from nsabench.measure.nvml import NvmlSampler

LOOK_S = 0.5
"""How long a look takes. The system counts in hundredths of a second, on each core."""

LEAST_S = 0.4
"""A shorter time tells nothing of what was used in it."""

_LOOKS_EVERY_S = 0.1
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Usage:
    """Seconds since some moment: ``at`` of wall time, ``total`` of the cores that this process may use and
    ``busy`` of them, ``ours`` of our processes. ``held`` by all processes of a group that may have no more
    than ``allowed`` cores; 0 where there is no such limit.
    """

    at: float
    total: float
    busy: float
    ours: float
    held: float = 0.0
    allowed: float = 0.0


class CpuWatch:
    """What others use of the cores from now on. ``root``: our processes are that one and all it began."""

    def __init__(self, root: int | None = None, *, read: Callable[[], Usage | None] | None = None) -> None:
        self._read = read or partial(cpu_usage, root or os.getpid())
        self._before = self._read()

    def load_pct(self) -> float | None:
        """Percent of the cores that others have used so far; None where the system does not say, or after
        less than LEAST_S.
        """
        before, now = self._before, self._read()
        if before is None or now is None or now.at - before.at < LEAST_S or now.total <= before.total:
            return None
        ours = now.ours - before.ours
        used = (now.busy - before.busy - ours) / (now.total - before.total)
        if now.allowed:
            # Others of a group with a quota take from it, however many cores of the machine are idle.
            within = (now.held - before.held - ours) / (now.allowed * (now.at - before.at))
            used = max(used, within)
        return 100 * min(1.0, max(0.0, used))


def cpu_usage(root: int, *, cgroup: Path = _CGROUP) -> Usage | None:
    """What is used now; None where the system does not say. Time that a hypervisor took away is busy."""
    try:
        ours = _tree_seconds(psutil.Process(root))
        cores = _own_cores(psutil.cpu_times(percpu=True))
    except (psutil.Error, OSError, NotImplementedError):
        return None
    total = busy = 0.0
    for core in cores:
        # The guests' time is in the user's, too.
        seconds = sum(core) - getattr(core, "guest", 0.0) - getattr(core, "guest_nice", 0.0)
        total += seconds
        busy += seconds - core.idle - getattr(core, "iowait", 0.0)
    held, allowed = _quota(cgroup)
    return Usage(time.monotonic(), total, busy, ours, held, allowed if allowed < len(cores) else 0.0)


@dataclass(frozen=True)
class Look:
    """``load_pct``: what others used of the device, None where it does not say. ``notes``: what else may
    stand in the way, in words.
    """

    load_pct: float | None
    notes: tuple[str, ...] = ()


def look_at_cpu(
    root: int | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    read: Callable[[], Usage | None] | None = None,
) -> Look:
    """Look for LOOK_S what others use of the cores. Nothing of ours need be idle: it does not count."""
    watch = CpuWatch(root, read=read)
    sleep(LOOK_S)
    return Look(watch.load_pct())


def look_at_gpu(
    sampler: NvmlSampler, ours: Collection[int], *, sleep: Callable[[float], None] = time.sleep
) -> Look:
    """Look for LOOK_S what is used of a GPU on which nothing of ours has run for a second.

    ``ours``: our processes' ids. Who else holds memory is told only where the list of processes knows one of
    ours: in a container it does not.
    """
    began = sampler.edge()["t_s"]
    for _ in range(round(LOOK_S / _LOOKS_EVERY_S)):
        sleep(_LOOKS_EVERY_S)
        last = sampler.edge()
    used = [row["util_pct"] for row in sampler.window(began, last["t_s"]) if row["util_pct"] is not None]
    notes = []
    if slow := sampler.slow_downs(began, last["t_s"]):
        notes.append(f"the GPU is slowed down ({slow})")
    holders = sampler.processes()
    if any(pid in holders for pid in ours):
        others = [size for pid, size in holders.items() if pid not in ours]
        if others:
            size = f" with {sum(others) / 2**30:.1f} GiB" if any(others) else ""
            notes.append(f"{len(others)} other processes are on the GPU{size}")
    return Look(fmean(used) if used else None, tuple(notes))


def wait_for_quiet(
    look: Callable[[], Look],
    *,
    quiet_pct: float,
    limit_s: float,
    loud: Callable[[Look], object],
    clock: Callable[[], float] = time.monotonic,
) -> Look:
    """Look until others use no more than ``quiet_pct`` of the device, or ``limit_s`` are over; the last look.

    ``loud`` hears of each look that has another after it. Who does not say what is used is not waited for.
    """
    began = clock()
    while True:
        found = look()
        if (found.load_pct or 0.0) <= quiet_pct or clock() - began >= limit_s:
            return found
        loud(found)


def family(root: int) -> set[int]:
    """The ids of a process and of all it began that are alive; its own alone where nothing more is known."""
    with suppress(psutil.Error):
        return {root, *(child.pid for child in psutil.Process(root).children(recursive=True))}
    return {root}


def _tree_seconds(root: psutil.Process) -> float:
    """Seconds of processor that a process and all it began have used, those that have ended included."""
    seconds = 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):
            used = process.cpu_times()
            seconds += used.user + used.system + used.children_user + used.children_system
    return seconds


def _own_cores(cores: list[Any]) -> list[Any]:
    """Of all cores those that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return cores
    allowed = os.sched_getaffinity(0)
    return [cores[number] for number in sorted(allowed)] if max(allowed) < len(cores) else cores


def _quota(cgroup: Path) -> tuple[float, float]:
    """Seconds used by this process's group and how many cores it may have; infinitely many without a
    limit.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        stat = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
        return int(stat["usage_usec"]) * 1e-6, int(quota) / int(period)
    except (OSError, ValueError, KeyError):
        return 0.0, float("inf")
