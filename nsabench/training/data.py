"""What is learned: the bytes of a file, or the synthetic task. Any batch can be made again at any time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsabench.plan import PlanError
from nsabench.plan.training import SYNTHETIC_DATA, Settings
from nsabench.training.synthetic import Sequences, Task, retrieval, task_of

Batch = tuple[torch.Tensor, torch.Tensor]
Array = np.ndarray[Any, Any]

# Set the numbers drawn for training and for judging apart from each other and from others of a seed.
TRAINING, JUDGING = 0x7A1, 0xE7A1
HELD_OUT, MOST_HELD_OUT = 0.1, 2**20
"""Part of a file's bytes, at its end, that is never trained on, and the most bytes that it may be."""


@dataclass(frozen=True)
class FileData:
    """Random crops of a file's bytes, ``content (N,)`` uint8. The last ``held`` of them are for judging."""

    content: Array
    held: int
    S: int
    size: int
    seed: int

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """A batch of ``rank``: tokens ``(B,S+1)`` int64 of the part that is trained on, and mask ``(B,S)``
        bool of the targets ``tokens[:, 1:]`` that count, which is every one.
        """
        trained = len(self.content) - self.held
        begin = generator(TRAINING, self.seed, step, rank).integers(0, trained - self.S, self.size)
        return self._crops(begin)

    def held_out(self, most: int) -> Batch:
        """Up to ``most`` crops that lie evenly in the held-out part."""
        places = self.held - self.S
        count = min(most, max(1, self.held // (self.S + 1)))
        return self._crops(len(self.content) - self.held + np.linspace(0, places - 1, count).astype(np.int64))

    def commonest(self) -> int:
        """The byte that occurs most in what is trained on: the best answer of one who reads nothing."""
        seen = self.content[: min(len(self.content) - self.held, MOST_HELD_OUT)]
        return int(np.bincount(seen, minlength=256).argmax())

    def _crops(self, begin: Array) -> Batch:
        crops = self.content[begin[:, None] + np.arange(self.S + 1)].astype(np.int64)
        return torch.from_numpy(crops), torch.ones(len(crops), self.S, dtype=torch.bool)


@dataclass(frozen=True)
class SyntheticData:
    """The synthetic task."""

    task: Task
    size: int
    seed: int

    def sequences(self, step: int, rank: int) -> Sequences:
        """The batch of `batch`, with what is known of it."""
        return retrieval(generator(TRAINING, self.seed, step, rank), self.size, self.task)

    def batch(self, step: int, rank: int, world: int) -> Batch:
        """As `sequences`; the mask holds every answer."""
        made = self.sequences(step, rank)
        return torch.from_numpy(made.tokens), torch.from_numpy(made.kind != 0)

    def fresh(self, number: int, count: int) -> Sequences:
        """Sequences for judging: no training sees them."""
        return retrieval(generator(JUDGING, self.seed, number, 0), count, self.task)


def open_data(settings: Settings) -> FileData | SyntheticData:
    """What ``settings.data`` names.

    Raises:
        PlanError: a file that is missing, no file, empty, or too short for ``S``; an ``S`` too short for the
            synthetic task.
    """
    if settings.data == SYNTHETIC_DATA:
        task = task_of(settings.S, settings.model.w, settings.model.layers)
        return SyntheticData(task, settings.batch, settings.seed)
    content = _content(Path(settings.data), settings.S)
    share = min(int(len(content) * HELD_OUT), MOST_HELD_OUT)
    return FileData(content, max(share, settings.S + 1), settings.S, settings.batch, settings.seed)


def generator(purpose: int, seed: int, number: int, rank: int) -> np.random.Generator:
    """Random numbers that depend on these four and nothing else."""
    return np.random.default_rng([purpose, seed, number, rank])


def _content(path: Path, S: int) -> Array:
    """The bytes of a file, mapped into memory."""
    try:
        if path.is_dir():
            raise PlanError(f"--data: {path} is a folder; allowed: {SYNTHETIC_DATA}, or a file")
        if not path.is_file():
            what = "is no ordinary file" if path.exists() else "does not exist"
            raise PlanError(f"--data: {path} {what}; allowed: {SYNTHETIC_DATA}, or a file")
        length, least = path.stat().st_size, 2 * (S + 1)
        if length == 0:
            raise PlanError(f"--data: {path} is empty")
        if length < least:
            raise PlanError(
                f"--data: {path} has {length} bytes; one sequence of S + 1 = {S + 1} to train on and one to "
                f"judge by need at least {least}"
            )
        return np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise PlanError(f"--data: {path} cannot be read: {error.strerror or error}") from None
