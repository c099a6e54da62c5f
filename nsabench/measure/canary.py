"""A fixed piece of work that tells whether a device is steady: measured until it agrees with itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nsabench.measure.choice import make_timer
from nsabench.measure.device import resolve_device

AGREE = 3
WITHIN = 0.01
LIMIT_S = {"cpu": 0.5, "cuda": 3.0}
"""How long a device is waited for. A GPU's clock rises and settles; a CPU that is not steady at once is
shared, and no steadier later: the time is better spent on another process.
"""

_SIZE = {"cpu": 512, "cuda": 4096}
_COPY_BYTES = 2**24


@dataclass(frozen=True)
class Settled:
    """``steady``: three readings in a row agreed within 1 %. ``ms`` is the last reading, ``readings`` how
    many it took, ``spread`` what the last three differ by, as a fraction of the least.
    """

    steady: bool
    ms: float
    readings: int
    spread: float


def canary(device: str) -> Callable[[], float]:
    """A reading: milliseconds of one matrix product and one copy of fixed size on ``cpu`` or ``cuda[:N]``."""
    where = resolve_device(device)
    timer = make_timer("cpu" if where.type == "cpu" else "event", where, "warm")
    generator = torch.Generator().manual_seed(0)
    size = _SIZE[where.type]
    a = torch.randn(size, size, generator=generator).to(where)
    source = torch.zeros(_COPY_BYTES, dtype=torch.int8, device=where)
    target = torch.ones_like(source)

    def work() -> object:
        target.copy_(source)
        return a @ a

    timer.prepare(work)
    return lambda: timer.sample(5)


def settle(
    read: Callable[[], float],
    *,
    agree: int = AGREE,
    within: float = WITHIN,
    limit_s: float = LIMIT_S["cuda"],
    clock: Callable[[], float] = time.perf_counter,
) -> Settled:
    """Read the canary until ``agree`` readings in a row lie ``within`` a fraction, or time is up.

    A device that never settles is no error: what is measured on it has wide intervals, and says so.
    """
    began, last, count = clock(), [read()], 1
    while True:
        spread = max(last) / min(last) - 1
        steady = len(last) == agree and spread <= within
        if steady or clock() - began >= limit_s:
            return Settled(steady, last[-1], count, spread)
        last = [*last, read()][-agree:]
        count += 1
