"""A training small enough for tests: its settings, data that needs no file, and a run to write to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nsabench.plan.training import Settings
from nsabench.store import TableRun
from nsabench.store.training import KIND, TRAINING_TABLES

SMALL: Mapping[str, Any] = {
    "dim": 32,
    "layers": 2,
    "heads": 4,
    "groups": 2,
    "dk": 8,
    "dv": 8,
    "l": 8,
    "d": 4,
    "l_sel": 8,
    "n_sel": 3,
    "w": 8,
    "S": 48,
    "batch": 2,
    "steps": 3,
    "warmup": 0,
    "checkpoint_every": 0,
}
"""48 tokens are 6 selection blocks, of which a query attends 3."""


def settings(**given: Any) -> Settings:
    """SMALL, with these in their place."""
    return Settings.of({**SMALL, **given})


class RandomBytes:
    """The same random bytes for the same number; every target counts."""

    def __init__(self, settings: Settings) -> None:
        self._shape = (settings.batch, settings.S + 1)

    def batch(self, step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step * world + rank)
        tokens = torch.randint(256, self._shape, generator=generator)
        return tokens, torch.ones(self._shape[0], self._shape[1] - 1, dtype=torch.bool)


def new_run(folder: Path, **facts: Any) -> TableRun:
    """An empty run in ``folder``."""
    return TableRun.create(
        folder,
        kind=KIND,
        name="test",
        argv=[],
        repro="nsabench train",
        environment={},
        tables=TRAINING_TABLES,
        **{"status": "running", **facts},
    )
