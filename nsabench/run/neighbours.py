"""Who else uses the device of a group: waited for before it, watched over its rounds, and told of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial

from nsabench.measure import MeasureError, open_sampler
from nsabench.measure.preflight import CpuWatch, Look, family, look_at_cpu, look_at_gpu, wait_for_quiet
from nsabench.run import worker
from nsabench.run.policy import Policy
from nsabench.run.worker import Sink
from nsabench.stats.neighbours import LOUD_PCT

_looked_at: set[str] = set()


class Neighbours:
    """What other processes use of a device. Made before anything of a group runs: with ``policy.quiet_s`` it
    waits at most so long for them to leave the device alone.

    Without, a GPU is looked at before a process's first group only, while nothing of ours has run on it; what
    is used of the cores is counted over the rounds anyway, at no cost.
    """

    def __init__(self, device: str, policy: Policy, sink: Sink) -> None:
        self._device, self._sink = device, sink
        self._root = worker.driver() or os.getpid()
        self.load_pct: float | None = None
        """The most that they used, in percent of the device; None where nothing tells."""
        first = device not in _looked_at
        _looked_at.add(device)
        if policy.quiet_s or (first and device != "cpu"):
            self._look(policy.quiet_s)

    @contextmanager
    def over_rounds(self) -> Iterator[None]:
        """Around the rounds: what is used of the cores from the first to the last."""
        watch = CpuWatch(self._root) if self._device == "cpu" else None
        yield
        if watch is not None:
            self._note(watch.load_pct(), "during the rounds")

    def _look(self, limit_s: float) -> None:
        self._sink.mark(None)
        self._sink.doing("looking for other processes on the device")
        if self._device == "cpu":
            found = self._waited(limit_s, partial(look_at_cpu, self._root))
        else:
            found = Look(None)
            # A GPU that is not there is told of by whoever wants to measure on it.
            with suppress(MeasureError, RuntimeError), closing(open_sampler(self._device)) as sampler:
                if not sampler.reason:
                    found = self._waited(limit_s, partial(look_at_gpu, sampler, family(self._root)))
        for text in found.notes:
            self._sink.doing(text)
        self._note(found.load_pct, "before the rounds")

    def _waited(self, limit_s: float, look: Callable[[], Look]) -> Look:
        def loud(found: Look) -> None:
            self._sink.mark(None)
            self._sink.doing(f"waiting: {self._used(found.load_pct)}")

        return wait_for_quiet(look, quiet_pct=LOUD_PCT, limit_s=limit_s, loud=loud)

    def _note(self, load_pct: float | None, when: str) -> None:
        if load_pct is None:
            return
        self.load_pct = max(load_pct, self.load_pct or 0.0)
        if load_pct > LOUD_PCT:
            self._sink.doing(f"{self._used(load_pct)} {when}")

    def _used(self, load_pct: float | None) -> str:
        what = "cores" if self._device == "cpu" else "GPU"
        return f"other processes use {load_pct or 0.0:.0f} % of the {what}"
