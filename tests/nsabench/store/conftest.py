"""Runs to write to, and cells to write."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nsabench.store import RunDir


class CellData(NamedTuple):
    """What `RunDir.append` takes for one cell."""

    row: dict[str, Any]
    samples: list[dict[str, Any]]
    telemetry: list[dict[str, Any]]
    kernels: list[dict[str, Any]]


CreateRun = Callable[..., RunDir]
MakeCell = Callable[[int], CellData]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def create_run(root: Path) -> Iterator[CreateRun]:
    made: list[RunDir] = []

    def create(**changes: Any) -> RunDir:
        settings: dict[str, Any] = {
            "name": "decode",
            "argv": ["nsabench", "decode", "--S", "512"],
            "repro": "nsabench decode --S 512",
            "plan": [{"S": 512}],
            "environment": {"commit": "0123456789abcdef", "dirty": False},
            "policy": {"rounds": 15},
            "seed": 7,
        }
        made.append(RunDir.create(changes.pop("root", root), **{**settings, **changes}))
        return made[-1]

    yield create
    for run in made:
        run.close()


@pytest.fixture
def make_cell() -> MakeCell:
    def make(i: int) -> CellData:
        times = [0.1 * (i + 1) + r / 7 for r in range(3)]
        return CellData(
            {
                "cell_id": f"{i:012x}",
                "S": 2**i,
                "status": "ok",
                "route": "cmp=fa2,sel=gather",
                "ms_total": times[1],
            },
            [{"process": 0, "round": r, "position": 0, "iters": 8, "ms": t} for r, t in enumerate(times)],
            [{"t_s": 0.1 * i, "gpu_uuid": "GPU-1", "power_w": 301.7}] if i % 2 else [],
            [{"kernel": 'void f<int, "x">', "branch": "cmp", "calls": 1, "ms": times[0]}],
        )

    return make
