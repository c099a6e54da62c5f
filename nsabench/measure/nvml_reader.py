"""One reading of a GPU through NVML, field by field: what cannot be read is None, and nothing raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

READINGS = (
    "power_w",
    "energy_j",
    "temp_c",
    "sm_clock_mhz",
    "mem_clock_mhz",
    "util_pct",
    "nvml_used_bytes",
    "throttle_reasons",
)
"""The fields of one reading. `energy_j` is the GPU's running counter."""

FAILURES = 3
"""A field that fails so many times in a row is not asked for again."""

EVENT_REASONS = {
    0x001: "gpu_idle",
    0x002: "app_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "hw_power_brake",
    0x100: "display_clock",
    0x200: "board_limit",
    0x400: "reliability",
}
SLOW_DOWNS = frozenset({"hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake"})
"""Reasons that void what was measured while they held."""

NO_REASON = "none"

# NVML's own numbers, so that an old pynvml need not name them.
_SUCCESS = 0
_TEMPERATURE_GPU = 0
_CLOCK_SM = 1
_CLOCK_MEM = 2
_POWER_INSTANT = 186
_REASON_COUNTERS = {
    74: "sw_power_cap",
    76: "sync_boost",
    269: "sw_thermal",
    270: "hw_thermal",
    271: "hw_power_brake",
}
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


def decode_reasons(bits: int) -> str:
    """The names of the set bits joined by `+`; `none` for no bit, `bit_0x…` for one without a name."""
    names = [EVENT_REASONS.get(1 << i, f"bit_{1 << i:#x}") for i in range(bits.bit_length()) if bits >> i & 1]
    return join_reasons(names)


def join_reasons(names: Iterable[str]) -> str:
    """The names, each once, joined by `+` in NVML's order; `none` for no name."""
    order = list(EVENT_REASONS.values())
    unique = set(names)
    return "+".join([n for n in order if n in unique] + sorted(unique - set(order))) or NO_REASON


def split_reasons(text: str | None) -> set[str]:
    """The inverse of `join_reasons`; empty for None."""
    return set((text or NO_REASON).split("+")) - {NO_REASON}


class GpuReader:
    """Reads the GPU with a UUID through a library that answers like pynvml.

    The constructor raises the library's own error if NVML will not start or does not know the GPU.
    """

    def __init__(self, library: Any, uuid: str) -> None:
        library.nvmlInit()
        self._library = library
        self._gpu = library.nvmlDeviceGetHandleByUUID(uuid)
        self.power_source: str | None = None
        """`instant`, or `average` (over about a second) on a GPU that offers no more; None for neither."""
        self._counters = _Source(self._read_counters)
        self._sources = {
            "power_w": _Source(self._settle_power()),
            "energy_j": _Source(lambda: library.nvmlDeviceGetTotalEnergyConsumption(self._gpu) / 1e3),
            "temp_c": _Source(lambda: float(library.nvmlDeviceGetTemperature(self._gpu, _TEMPERATURE_GPU))),
            "sm_clock_mhz": _Source(lambda: float(library.nvmlDeviceGetClockInfo(self._gpu, _CLOCK_SM))),
            "mem_clock_mhz": _Source(lambda: float(library.nvmlDeviceGetClockInfo(self._gpu, _CLOCK_MEM))),
            "util_pct": _Source(lambda: float(library.nvmlDeviceGetUtilizationRates(self._gpu).gpu)),
            "nvml_used_bytes": _Source(lambda: int(library.nvmlDeviceGetMemoryInfo(self._gpu).used)),
            "throttle_reasons": _Source(self._read_reasons),
        }

    def read(self) -> dict[str, Any]:
        """READINGS now."""
        return {name: self._sources[name]() for name in READINGS}

    def read_counters(self) -> dict[str, int]:
        """Nanoseconds spent under each event reason since the driver was loaded, of those offered."""
        return self._counters() or {}

    def processes(self) -> dict[int, int]:
        """Bytes held by each process that computes on the GPU, by its id; 0 where NVML does not say."""
        found = _Source(lambda: self._library.nvmlDeviceGetComputeRunningProcesses(self._gpu))()
        return {int(one.pid): int(one.usedGpuMemory or 0) for one in found or ()}

    def close(self) -> None:
        """Let go of NVML."""
        _Source(self._library.nvmlShutdown)()

    def _settle_power(self) -> Callable[[], float]:
        # Once for all readings: a series of both kinds would show steps in power that are none.
        if _Source(self._instant_power)() is not None:
            self.power_source = "instant"
            return self._instant_power
        if _Source(self._average_power)() is not None:
            self.power_source = "average"
        return self._average_power

    def _instant_power(self) -> float:
        return _watts(self._fields([_POWER_INSTANT])[_POWER_INSTANT])

    def _average_power(self) -> float:
        return _watts(self._library.nvmlDeviceGetPowerUsage(self._gpu))

    def _read_reasons(self) -> str:
        read = getattr(self._library, "nvmlDeviceGetCurrentClocksEventReasons", None)
        read = read or self._library.nvmlDeviceGetCurrentClocksThrottleReasons  # its older name
        return decode_reasons(int(read(self._gpu)))

    def _read_counters(self) -> dict[str, int]:
        values = self._fields(list(_REASON_COUNTERS))
        return {_REASON_COUNTERS[number]: int(value) for number, value in values.items()}

    def _fields(self, numbers: list[int]) -> dict[int, Any]:
        """Field number to value, of the fields that the GPU offers."""
        values = self._library.nvmlDeviceGetFieldValues(self._gpu, numbers)
        return {
            int(v.fieldId): getattr(v.value, _VALUE_MEMBERS[v.valueType])
            for v in values
            if v.nvmlReturn == _SUCCESS
        }


class _Source:
    """One optional reading: None when it fails, and for good once it failed FAILURES times in a row."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self._left = FAILURES

    def __call__(self) -> Any:
        if not self._left:
            return None
        try:
            value = self._read()
        except Exception:  # NVML's own errors, and a pynvml that lacks the call
            self._left -= 1
            return None
        self._left = FAILURES
        return value


def _watts(milliwatts: float) -> float:
    if milliwatts <= 0:
        raise ValueError(f"power is {milliwatts} mW: no reading")
    return milliwatts / 1e3
