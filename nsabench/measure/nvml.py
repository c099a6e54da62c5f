"""What NVML says of a GPU while it is measured: power, energy, clocks, temperature, memory, slow-downs."""

from __future__ import annotations

import importlib
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from types import TracebackType
from typing import Any

import torch

from nsabench.measure.device import gpu_uuid, resolve_device
from nsabench.measure.nvml_reader import READINGS, SLOW_DOWNS, GpuReader, join_reasons, split_reasons

ENERGY_UPDATES = 50
"""Energy means something only from so many counter updates up."""

Row = dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    row: Row
    counters: dict[str, int]


class NvmlSampler:
    """Reads one GPU at `hz` in its own thread between `start` and `stop`, and at `edge` at once.

    Never raises. Without a library, or if NVML will not start or does not know the GPU, `reason` says why,
    `edge` gives a row of None and everything else is empty. `clock` gives the seconds of `t_s`.
    """

    def __init__(
        self,
        uuid: str | None,
        hz: float = 10.0,
        *,
        library: Any = None,
        clock: Callable[[], float] = time.perf_counter,
        reason: str = "no GPU, or no NVML library",
    ) -> None:
        self.uuid = uuid
        self.reason = reason
        """Why there are no readings; empty when there are."""
        self.power_source: str | None = None
        """`instant`, or `average` (over about a second) on a GPU that offers no more."""
        self._period = 1.0 / hz
        self._clock = clock
        self._log: list[_Entry] = []
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._reader: GpuReader | None = None
        if library is None or uuid is None:
            return
        try:
            self._reader = GpuReader(library, uuid)
        except Exception as error:
            self.reason = f"NVML: {error}"
            return
        self.reason = ""
        self.power_source = self._reader.power_source

    @property
    def readings(self) -> list[Row]:
        """Every reading so far, in time order: `t_s`, `gpu_uuid` and READINGS."""
        with self._lock:
            return [dict(entry.row) for entry in self._log]

    def start(self) -> None:
        """Start the thread; nothing if it runs already or nothing can be read."""
        if self._thread is None and self._reader is not None:
            self._halt.clear()
            self._thread = threading.Thread(target=self._run, name="nvml-sampler", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for its end. It may be started again."""
        if self._thread is not None:
            self._halt.set()
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Stop and let go of NVML. What was read stays."""
        self.stop()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
            self.reason = "closed"

    def __enter__(self) -> NvmlSampler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def edge(self) -> Row:
        """Read now, in the caller's thread: the exact reading at the border of a round."""
        with self._lock:
            row: Row = {"t_s": self._clock(), "gpu_uuid": self.uuid}
            if self._reader is None:
                return row | dict.fromkeys(READINGS)
            row |= self._reader.read()
            self._log.append(_Entry(row, self._reader.read_counters()))
            return dict(row)

    def processes(self) -> dict[int, int]:
        """Bytes held on the GPU by process id, as NVML lists them now, 0 where it does not say how many;
        empty where nothing is listed. In a container the ids are the host's.
        """
        with self._lock:
            return {} if self._reader is None else self._reader.processes()

    def window(self, t0: float, t1: float) -> list[Row]:
        """The readings with t0 <= t_s <= t1."""
        return [dict(entry.row) for entry in self._between(t0, t1)]

    def summary(self, t0: float, t1: float) -> Row:
        """READINGS over a window: mean power and utilisation, median clocks, highest temperature and memory,
        energy spent (J), and every event reason seen in a reading or counted by the GPU between two.

        None where nothing was read; energy also where its counter was seen to move fewer than ENERGY_UPDATES
        times.
        """
        entries = self._between(t0, t1)
        energy = _column(entries, "energy_j")
        enough = sum(before != after for before, after in pairwise(energy)) >= ENERGY_UPDATES
        spent = energy[-1] - energy[0] if enough else 0.0
        return {
            "power_w": _of(fmean, _column(entries, "power_w")),
            "energy_j": spent if spent > 0 else None,
            "temp_c": _of(max, _column(entries, "temp_c")),
            "sm_clock_mhz": _of(median, _column(entries, "sm_clock_mhz")),
            "mem_clock_mhz": _of(median, _column(entries, "mem_clock_mhz")),
            "util_pct": _of(fmean, _column(entries, "util_pct")),
            "nvml_used_bytes": _of(max, _column(entries, "nvml_used_bytes")),
            "throttle_reasons": _reasons(entries),
        }

    def validity(self, t0: float, t1: float) -> Row:
        """`power_capped_pct`: the part of the readings under a power cap. `clock_spread_pct`: highest less
        lowest SM clock over the median. None where nothing was read."""
        entries = self._between(t0, t1)
        capped = [100.0 * ("sw_power_cap" in split_reasons(r)) for r in _column(entries, "throttle_reasons")]
        clocks = _column(entries, "sm_clock_mhz")
        middle = median(clocks) if clocks else 0.0
        return {
            "power_capped_pct": _of(fmean, capped),
            "clock_spread_pct": 100.0 * (max(clocks) - min(clocks)) / middle if middle else None,
        }

    def slow_downs(self, t0: float, t1: float) -> str | None:
        """The hardware and thermal slow-downs that held at any time in the window, joined by `+`; empty for
        none, None where neither reasons nor their counters were read.
        """
        reasons = _reasons(self._between(t0, t1))
        if reasons is None:
            return None
        found = SLOW_DOWNS & split_reasons(reasons)
        return join_reasons(found) if found else ""

    def lost(self, t0: float, t1: float) -> list[str]:
        """The READINGS that were had in a window, but no more at its end: NVML failed in the middle."""
        entries = self._between(t0, t1)
        if not entries:
            return []
        last = entries[-1].row
        return [name for name in READINGS if last[name] is None and _column(entries, name)]

    def _run(self) -> None:
        while not self._halt.wait(self._period):
            self.edge()

    def _between(self, t0: float, t1: float) -> list[_Entry]:
        with self._lock:
            first = bisect_left(self._log, t0, key=_time)
            return self._log[first : bisect_right(self._log, t1, key=_time)]


def open_sampler(
    device: str | torch.device,
    hz: float = 10.0,
    *,
    library: Any = None,
    api: Any = torch.cuda,
    clock: Callable[[], float] = time.perf_counter,
) -> NvmlSampler:
    """A sampler of the device's GPU; one without readings, and the reason, on a CPU or without NVML."""
    where = resolve_device(device, api=api)
    if where.type != "cuda":
        return NvmlSampler(None, hz, clock=clock, reason="the device is a CPU")
    try:
        uuid = gpu_uuid(where, api=api)
        library = library or importlib.import_module("pynvml")
    except Exception as error:  # no pynvml, a broken one, or a torch that cannot tell the UUID
        return NvmlSampler(None, hz, clock=clock, reason=f"NVML: {error}")
    return NvmlSampler(uuid, hz, library=library, clock=clock)


def _time(entry: _Entry) -> float:
    return float(entry.row["t_s"])


def _column(entries: Iterable[_Entry], name: str) -> list[Any]:
    return [entry.row[name] for entry in entries if entry.row[name] is not None]


def _of(reduce: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    return reduce(values) if values else None


def _reasons(entries: Sequence[_Entry]) -> str | None:
    """Reasons active in any reading, and those whose counter moved: these fall between two readings."""
    read = _column(entries, "throttle_reasons")
    counted = [entry.counters for entry in entries if entry.counters]
    if not read and len(counted) < 2:
        return None
    seen = {name for text in read for name in split_reasons(text)}
    if counted:
        seen |= {name for name, ns in counted[-1].items() if ns > counted[0].get(name, ns)}
    return join_reasons(seen)
