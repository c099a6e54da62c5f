"""Cells small enough for a test, a run to store them in, and bugs to plant in a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nsa.refusals
import nsa.routes
from nsabench.plan import Cell
from nsabench.run import Policy
from nsabench.store import RunDir

MakeCell = Callable[..., Cell]
CreateRun = Callable[..., RunDir]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def _auto_is_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs are planted in backends of torch: where a compiler is found, `auto` would pass them over."""
    table = [replace(row, avoid=_compiled) if row.backend == "cpp" else row for row in nsa.routes.TABLE]
    monkeypatch.setattr(nsa.routes, "TABLE", tuple(table))


def _compiled(request: nsa.routes.Request) -> str:
    return "compiled on the spot"


@pytest.fixture
def make_cell() -> MakeCell:
    def make(**changes: Any) -> Cell:
        fields: dict[str, Any] = {
            "phase": "prefill",
            "passes": "fwd",
            "mode": "batched",
            "S": 40,
            "B": 1,
            "dim": 16,
            "heads": 4,
            "groups": 2,
            "dk": 8,
            "dv": 4,
            "l": 8,
            "d": 4,
            "l_sel": 8,
            "n_sel": 4,
            "w": 12,
            "dtype": "fp32",
            "device": "cpu",
            "seed": 3,
            "route": "auto",
        }
        return Cell(**{**fields, **changes})

    return make


@pytest.fixture
def quick() -> Policy:
    """Six rounds of almost single steps, and nothing besides."""
    return Policy(rounds=6, sample_ms=0.01, shares=False, alone=False, share_runs=2)


@pytest.fixture
def create_run(tmp_path: Path) -> Iterator[CreateRun]:
    made: list[RunDir] = []

    def create(cells: list[Cell]) -> RunDir:
        made.append(
            RunDir.create(
                tmp_path / "results",
                name=cells[0].phase,
                argv=[],
                repro="nsabench",
                plan=[cell.to_dict() for cell in cells],
                environment={},
                policy={},
                seed=cells[0].seed,
            )
        )
        return made[-1]

    yield create
    for run in made:
        run.close()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Replace the function behind a target, such as `backends.sdpa:sliding_attention`, by one that gets the
    true function first."""

    @contextmanager
    def planted(target: str, bug: Callable[..., Any]) -> Iterator[None]:
        load = nsa.refusals.load
        true = load(f"nsa.{target}")

        def broken(*args: Any, **kwargs: Any) -> Any:
            return bug(true, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(
                nsa.refusals, "load", lambda name: broken if name == f"nsa.{target}" else load(name)
            )
            yield

    return planted
