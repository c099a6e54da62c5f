"""Stored comparisons made by hand: made-up times with a seeded noise, as the CSV files hold them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nsabench.plan import Cell
from nsabench.plan.sides import compared, parse_side
from nsabench.stats import median_interval
from nsabench.store import Run
from nsabench.store.schema import CELL_COLUMNS, SAMPLE_COLUMNS, check_row

_WORDS = {"phase": "prefill", "passes": "fwd", "mode": "batched", "dtype": "fp32", "device": "cpu"}
_SIZES = {"B": 1, "dim": 256, "heads": 8, "groups": 2, "dk": 32, "dv": 32, "seed": 0}
_BLOCKS = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512}
SHARED: dict[str, Any] = {**_WORDS, **_SIZES, **_BLOCKS, "route": "auto"}


def make_contest(
    times: Mapping[str, float | str],
    *,
    S: Sequence[int] = (512,),
    rounds: int = 15,
    processes: int = 3,
    noise: float = 0.002,
    again: float | str = 1.0,
    delta: float = 0.01,
    width: float = 0.005,
    correct: str = "bh",
    spread: float = 0.5,
    missing: Sequence[str] = (),
    run_id: str = "20250102T030405Z-compare-1a2b3c4",
    **fixed: Any,
) -> Run:
    """A comparison of the sides that `times` names, by the time of each (relative) or its status.

    `again` is the first side's control; sides that are `missing` have no row.
    """
    sides = [parse_side(text) for text in times]
    groups = [compared(Cell(**{**SHARED, "S": size, **fixed}), sides) for size in S]
    rows, samples = [], []
    for group in groups:
        names = [*times, "again"]
        for place, (name, cell) in enumerate(zip(names, group, strict=True)):
            if name not in missing:
                what = again if name == "again" else times[name]
                row, mine = _measured(cell, what, place, len(group), rounds, processes, noise, run_id)
                rows.append(row | {"canary_spread_pct": spread})
                samples += mine
    for row in rows:
        check_row(row)
    told = {
        "sides": list(times),
        "delta": delta,
        "width": width,
        "processes": processes,
        "correct": correct,
        "groups": [[cell.cell_id for cell in group] for group in groups],
    }
    info = {
        "run_id": run_id,
        "name": "compare",
        "created": "2025-01-02T03:04:05Z",
        "comparison": told,
        "policy": {"rounds": rounds},
        "plan": [cell.to_dict() for group in groups for cell in group],
        "environment": {
            "commit": "1a2b3c4d5e6f",
            "dirty": False,
            "cpu": {"model": "AMD EPYC 7B13"},
            "gpus": [],
        },
    }
    return Run(
        info=info,
        cells=pd.DataFrame(rows, columns=[c.name for c in CELL_COLUMNS]),
        samples=pd.DataFrame(samples, columns=[c.name for c in SAMPLE_COLUMNS]),
        telemetry=pd.DataFrame(),
        kernels=pd.DataFrame(),
        path=Path("/tmp/somewhere") / run_id,
    )


def _measured(
    cell: Cell,
    what: float | str,
    place: int,
    arms: int,
    rounds: int,
    processes: int,
    noise: float,
    run_id: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    random = np.random.default_rng(zlib.crc32(f"{run_id} {cell.cell_id}".encode()))
    ids = {"run_id": run_id, "cell_id": cell.cell_id}
    row: dict[str, Any] = {**cell.to_dict(), **ids, "status": "ok", "reason": ""}
    if isinstance(what, str):
        return row | {"status": what, "reason": f"{what} in the third round"}, []
    samples: list[dict[str, Any]] = [
        {
            **ids,
            "process": process,
            "round": number,
            "position": (place + number) % arms,
            "variant": "",
            "iters": 3,
            "ms": what * cell.S / 256 * (1 + 0.1 * process) * float(random.lognormal(0, noise)),
            "t_s": float(100 * process + number),
        }
        for process in range(processes)
        for number in range(rounds)
    ]
    interval = median_interval([sample["ms"] for sample in samples])
    row |= {"ms_total": interval.point, "ms_lo": interval.lo, "ms_hi": interval.hi, "n_rounds": len(samples)}
    return row | {"timer": "cpu", "regime": "latency", "cache": "warm"}, samples
