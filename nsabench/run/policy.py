"""How a sweep is measured: what a run stores under ``policy`` and a resumed run takes up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nsabench.plan import CACHES, REGIMES, TIMERS, Cell, PlanError

_OPTION = {"sample_ms": "--sample-ms", "timeout_s": "--timeout"}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Rounds and what surrounds them.

    ``rounds``: visits to every arm (an interval needs 6). ``sample_ms``: steps are repeated to fill this many
    ms a sample. ``timer``: ``auto`` is cpu on a CPU, graph for decode and event for prefill on a GPU.
    ``regime``: ``latency``, every step by itself, or ``sustained``, the steps of a sample back to back.
    ``cache``: state of the last-level cache before a step; ``auto`` is cold for decode, between whose steps
    other layers evict it, and warm for all else; sustained is always warm, for a step finds its own data.
    ``shares``, ``alone``: whether stages, and branches by themselves, are measured; ``share_runs``: steps in
    which stages are measured; ``kernels``: whether the kernels of a step are listed with its stages;
    ``memory``: whether the peak memory of a step is measured.
    ``timeout_s``: longest a cell may take, builds, checks and all of its rounds together; one that shows no
    progress for half of it hangs. ``settle``: whether rounds wait, a few seconds at most, for a steady
    device.
    ``quiet_s``: longest wait for other processes to leave the device alone; 0 does not look for them.
    """

    rounds: int = 15
    sample_ms: float = 20.0
    timer: str = "auto"
    cache: str = "warm"
    regime: str = "latency"
    shares: bool = True
    kernels: bool = True
    memory: bool = True
    alone: bool = True
    share_runs: int = 20
    timeout_s: float = 600.0
    settle: bool = False
    quiet_s: float = 0.0

    def __post_init__(self) -> None:
        for name, words in (("timer", TIMERS), ("cache", CACHES), ("regime", REGIMES)):
            if getattr(self, name) not in words:
                raise PlanError(f"--{name}: {getattr(self, name)!r} is unknown; allowed: {', '.join(words)}")
        if (self.cache, self.regime) == ("cold", "sustained"):
            raise PlanError("--cache: 'cold' does not go with --regime sustained; allowed there: auto, warm")
        if type(self.rounds) is not int or not 1 <= self.rounds <= 10_000:
            raise PlanError(
                f"--rounds: {self.rounds!r} is not allowed; allowed: 1 to 10000, 6 or more for an interval"
            )

        for name, most in (("sample_ms", 60_000.0), ("timeout_s", 7 * 86_400.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= most:
                allowed = f"allowed: above 0, up to {most:g}"
                raise PlanError(f"{_OPTION[name]}: {value!r} is not allowed; {allowed}")
        if type(self.share_runs) is not int or not 1 <= self.share_runs <= 10_000:
            raise PlanError(f"--share-runs: {self.share_runs!r} is not allowed; allowed: 1 to 10000")

        if type(self.quiet_s) not in (int, float) or not 0 <= self.quiet_s <= 600:
            raise PlanError(f"quiet_s is {self.quiet_s!r}; allowed: 0 to 600 seconds")

    def timer_for(self, cell: Cell) -> str:
        """The timer's name for a cell; PlanError where the device cannot have it."""
        on_cpu = cell.device == "cpu"
        if self.timer == "auto":
            if on_cpu:
                return "cpu"
            return "graph" if cell.phase == "decode" else "event"
        if on_cpu != (self.timer == "cpu"):
            allowed = "auto, cpu" if on_cpu else ", ".join(word for word in TIMERS if word != "cpu")
            raise PlanError(f"--timer: {self.timer!r} does not time {cell.device}; allowed there: {allowed}")
        return self.timer

    def cache_for(self, cell: Cell) -> str:
        """``cold`` or ``warm``."""
        if self.cache == "auto":
            return "cold" if (cell.phase, self.regime) == ("decode", "latency") else "warm"
        return self.cache

    def how_for(self, cell: Cell) -> str:
        """In words: timer, regime and cache."""
        return f"timer {self.timer_for(cell)}, {self.regime}, {self.cache_for(cell)} cache"

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Policy:
        """The policy of a stored run; PlanError for settings this version does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(stored) - known)
        if unknown:
            raise PlanError(f"policy: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**stored)
