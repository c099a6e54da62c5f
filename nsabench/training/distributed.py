"""The ranks of a training: one process, or those that torchrun started, with what they tell each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from nsabench.plan import PlanError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: an evaluation or a checkpoint of rank 0 may take minutes."""
_STOPPED = "nsabench/stopped"


class RankFailed(Exception):
    """Rank 0 could not do what the others waited for; it has said why itself."""


class WrongRank(PlanError):
    """What this rank alone cannot do: the others know nothing of it."""


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped: `status` as in run.json."""

    status: str
    reason: str


class World:
    """The ranks. Of one process, every method does what it says without talking to anyone."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store: Any = None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> World:
        """The rank that torchrun says this process is; of a process that it did not start, the only one.

        PlanError for variables that contradict each other.
        """
        if "WORLD_SIZE" not in environ or "RANK" not in environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, size, local = (int(environ.get(name, environ["RANK"])) for name in names)
        except ValueError:
            given = ", ".join(f"{name} {environ.get(name)!r}" for name in names)
            raise PlanError(f"{given}: torchrun sets numbers") from None
        if not 0 <= rank < size:
            raise PlanError(f"RANK is {rank} of WORLD_SIZE {size}; allowed: 0 to {size - 1}")
        return cls(rank, size, local)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes the run and prints."""
        return self.rank == 0

    def device_of(self, device: str) -> str:
        """The device of this rank: of several on GPUs, each its own.

        PlanError for a GPU by number, or fewer GPUs than ranks on this machine.
        """
        if self.size == 1 or device == "cpu":
            return device
        if ":" in device:
            raise PlanError(f"--device: {device} is one GPU for {self.size} ranks; allowed: cuda, cpu")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise WrongRank(f"--device: rank {self.rank} finds no GPU for itself, torch sees {count}")
        return f"{device}:{self.local_rank}"

    def join(self, device: str) -> None:
        """Meet the other ranks: gloo on CPUs, nccl on GPUs. PlanError where they cannot be met."""
        if self.size == 1:
            return
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
            self._store = dist.PrefixStore("nsabench", store)
            on = torch.device(device)
            if on.type == "cuda":
                torch.cuda.set_device(on)
            dist.init_process_group(
                "gloo" if on.type == "cpu" else "nccl",
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=None if on.type == "cpu" else on,
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise WrongRank(f"cannot meet the {self.size} ranks: {' '.join(str(error).split())}") from error

    def leave(self) -> None:
        """Part from the others. Does no harm after a failure, or twice."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, do: Callable[[], T]) -> T:
        """What `do` gives on rank 0, on every rank; where it raises there, RankFailed on the others."""
        if self.size == 1:
            return do()
        box: list[Any] = [None, False]
        try:
            if self.first:
                box = [do(), True]
        finally:
            dist.broadcast_object_list(box)
        if not box[1]:
            raise RankFailed
        found: T = box[0]
        return found

    def gather(self, mine: T) -> list[T]:
        """What each rank has, in their order; on rank 0 only, empty on the others."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size if self.first else []
        dist.gather_object(mine, found if self.first else None)
        return found

    def tell_failure(self, failure: Failure) -> None:
        """Leave word of why this rank stops, for rank 0 to find when it misses it."""
        if self._store is not None:
            word = {"rank": self.rank, "status": failure.status, "reason": failure.reason}
            self._store.set(_STOPPED, json.dumps(word))

    def failure_of_others(self) -> Failure | None:
        """Why another rank stopped, if one left word."""
        if self._store is None:
            return None
        try:
            if not self._store.check([_STOPPED]):
                return None
            word = json.loads(self._store.get(_STOPPED))
        except (RuntimeError, ValueError):  # the store went with the rank that kept it
            return None
        return Failure(word["status"], f"rank {word['rank']}: {word['reason']}")


def started_by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a launcher above, which sends signals of its own."""
    return "TORCHELASTIC_RUN_ID" in environ
