"""What an executor is given and what it tells: plain data that can go through a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nsabench.plan import Cell
from nsabench.run.policy import Policy
from nsabench.run.worker import Fields


@dataclass(frozen=True)
class Job:
    """Cells of one group, to be measured in the same rounds. ``seconds``: stop it after so long, if given,
    with the cells that have no row yet left as they were.
    """

    cells: tuple[Cell, ...]
    policy: Policy
    number: int
    seconds: float | None = None


@dataclass(frozen=True)
class Began:
    """Measuring begins; ``worker`` is the number of the slot."""

    worker: int
    job: Job


@dataclass(frozen=True)
class Doing:
    """What a worker is at."""

    worker: int
    text: str


@dataclass(frozen=True)
class Done:
    """A cell is finished, well or not."""

    worker: int
    row: Fields
    samples: Sequence[Fields] = ()
    telemetry: Sequence[Fields] = ()
    kernels: Sequence[Fields] = ()


@dataclass(frozen=True)
class Over:
    """A job has ended; ``left`` are the cells without a row, because it was stopped."""

    worker: int
    job: Job
    left: tuple[Cell, ...]


Event = Began | Doing | Done | Over


@dataclass(frozen=True)
class Slot:
    """A place for one worker: which devices it measures on, and the UUIDs of the GPUs among them.

    ``alone``: its worker sees these GPUs and no other, so that ``cuda`` is the first of them.
    """

    number: int
    devices: frozenset[str]
    gpus: tuple[str, ...] = ()
    alone: bool = False
