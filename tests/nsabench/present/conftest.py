"""Stored runs made by hand: plausible times with noise from a fixed seed, as the CSV files hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nsabench.plan.cells import Cell, sweep
from nsabench.stats import median_interval
from nsabench.store import Run
from nsabench.store.schema import CELL_COLUMNS, SAMPLE_COLUMNS, STAGES, check_row

CPU = {"model": "AMD EPYC 7B13", "cores": 2}
GPU = {"name": "NVIDIA H200", "uuid": "GPU-1"}

_CPU_SHAPE = {"dim": 256, "heads": 8, "groups": 2, "dk": 32, "dv": 32, "dtype": "fp32", "device": "cpu"}
_GPU_SHAPE = {"dim": 8192, "heads": 64, "groups": 4, "dk": 192, "dv": 128, "dtype": "bf16", "device": "cuda"}
_BLOCKS = {"mode": "batched", "l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512, "seed": 7}
_SLOWNESS = {"dense": 0.4, "auto": 1.0, "sdpa": 1.9, "gather": 1.3, "triton": 0.55, "reference": 40.0}
_SHARES = {
    "decode": (9.0, 7.0, 13.0, 18.0, 24.0, 11.0, 5.0, 13.0),
    "prefill": (6.0, 2.0, 14.0, 21.0, 41.0, 10.0, 1.0, 5.0),
    "train": (8.0, 3.0, 17.0, 12.0, 43.0, 11.0, 2.0, 4.0),
}
_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}

MakeRun = Callable[..., Run]


def make_run(
    *,
    S: Sequence[int] = (1024, 2048, 4096),
    routes: Sequence[str] = ("sdpa", "gather"),
    phase: str = "decode",
    passes: Sequence[str] = ("fwd",),
    B: Sequence[int] = (1,),
    gpu: bool = False,
    failed: Mapping[tuple[str, int], tuple[str, str]] | None = None,
    changes: Mapping[tuple[str, int], Mapping[str, Any]] | None = None,
    rounds: int = 15,
    run_id: str = "20250102T030405Z-decode-1a2b3c4",
    commit: str = "1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d",
    dirty: bool = False,
    speed: float = 1.0,
    created: str = "2025-01-02T03:04:05Z",
    tags: Sequence[str] = (),
    baselines: Sequence[str] = (),
    **fixed: Any,
) -> Run:
    """A run with `info`, `cells` and `samples`. `failed` and `changes` are by (route or baseline, S)."""
    shape: dict[str, Any] = {**(_GPU_SHAPE if gpu else _CPU_SHAPE), **_BLOCKS, **fixed}
    cells = sweep(
        S=list(S),
        B=list(B),
        routes=list(routes),
        passes=list(passes),
        phase=phase,
        baselines=list(baselines),
        **shape,
    )
    arms = list(dict.fromkeys(map(_arm, cells)))
    rng = np.random.default_rng(3)
    rows, samples = [], []
    for cell in cells:
        row = _planned(cell, run_id)
        key = (_arm(cell), cell.S)
        if failed and key in failed:
            row["status"], row["reason"] = failed[key]
        else:
            drawn = _samples(cell, run_id, rounds, rng, speed * (0.004 if gpu else 1.0), arms)
            samples += drawn
            row |= _measured(cell, drawn, gpu)
        row |= (changes or {}).get(key, {})
        check_row(row)
        rows.append(row)
    info = {
        "run_id": run_id,
        "name": phase,
        "created": created,
        "tags": list(tags),
        "plan": [cell.to_dict() for cell in cells],
        "environment": {"commit": commit, "dirty": dirty, "cpu": CPU, "gpus": [GPU] if gpu else []},
    }
    return Run(
        info=info,
        cells=pd.DataFrame(rows, columns=[c.name for c in CELL_COLUMNS]),
        samples=pd.DataFrame(samples, columns=[c.name for c in SAMPLE_COLUMNS]),
        telemetry=pd.DataFrame(),
        kernels=pd.DataFrame(),
        path=Path("/tmp/somewhere") / run_id,
    )


def _arm(cell: Cell) -> str:
    return cell.arm


def _planned(cell: Cell, run_id: str) -> dict[str, Any]:
    row: dict[str, Any] = cell.to_dict() | {
        "run_id": run_id,
        "cell_id": cell.cell_id,
        "status": "ok",
        "reason": "",
    }
    width = (cell.dk + cell.dv) * cell.groups * cell.B * _BYTES[cell.dtype]
    if cell.phase == "decode":
        row["kv_cache_cmp_bytes"] = cell.S // cell.d * width
        row["kv_cache_sel_bytes"] = cell.S * width
        row["kv_cache_win_bytes"] = cell.w * width
        row["kv_cache_bytes"] = sum(row[f"kv_cache_{b}_bytes"] for b in ("cmp", "sel", "win"))
    row["reads_tokens"] = min(cell.S, cell.S // cell.d + cell.n_sel * cell.l_sel + cell.w)
    row["reads_tokens_dense"] = cell.S
    return row


def _step_ms(cell: Cell, arms: Sequence[str], variant: str) -> float:
    slowness = _SLOWNESS.get(_arm(cell), 1.0 + 0.3 * list(arms).index(_arm(cell)))
    if cell.impl.startswith("dense"):
        slowness *= cell.S / 1024
    backward = {"fwd": 1.0, "bwd": 2.1, "fwd_bwd": 3.1}[cell.passes]
    if cell.phase == "decode":
        return slowness * cell.B**0.5 * (0.9 + 4e-5 * cell.S) * (1.25 if variant == "emit" else 1.0)
    return slowness * backward * cell.B * (cell.S / 512) ** 1.15 * 5


def _samples(
    cell: Cell, run_id: str, rounds: int, rng: np.random.Generator, scale: float, arms: Sequence[str]
) -> list[dict[str, Any]]:
    drift = 1 + 0.02 * np.sin(np.arange(rounds))
    place = list(arms).index(_arm(cell))
    variants = ("emit", "plain") if cell.phase == "decode" and cell.impl == "nsa" else ("",)
    return [
        {
            "run_id": run_id,
            "cell_id": cell.cell_id,
            "process": 0,
            "round": r,
            "position": (place + r) % len(arms),
            "variant": variant,
            "iters": 10,
            "ms": scale * _step_ms(cell, arms, variant) * drift[r] * float(rng.lognormal(0, 0.006)),
            "t_s": float(r),
        }
        for r in range(rounds)
        for variant in variants
    ]


def _measured(cell: Cell, samples: list[dict[str, Any]], gpu: bool) -> dict[str, Any]:
    by_variant = {v: np.array([s["ms"] for s in samples if s["variant"] == v]) for v in ("emit", "plain", "")}
    times = by_variant[""]
    if len(by_variant["emit"]):
        times = by_variant["emit"] / cell.d + by_variant["plain"] * (1 - 1 / cell.d)
    total = median_interval(times)
    growth = np.array([1, 1, 1, 1 + cell.S / 16384, 1, 1, 1, 1])
    shares = np.array(_SHARES[cell.phase]) * growth
    shares = shares / shares.sum() * 100
    row: dict[str, Any] = {
        "ms_total": total.point,
        "ms_lo": total.lo,
        "ms_hi": total.hi,
        "n_samples": len(samples),
        "n_rounds": len(times),
        "timer": "graph" if gpu else "cpu",
        "regime": "latency",
        "cache": "cold" if cell.phase == "decode" else "warm",
        "peak_alloc_bytes": int(cell.B * cell.dim * 4 * (64 if cell.phase == "decode" else cell.S * 9)),
    }
    row |= {f"share_{s}_pct": float(p) for s, p in zip(STAGES, shares, strict=True)}
    row |= {f"ms_{s}": float(p) * total.point / 100 for s, p in zip(STAGES, shares, strict=True)}
    return row | ({"power_w": 412.3, "sm_clock_mhz": 1980.0, "temp_c": 48.0} if gpu else {})


@pytest.fixture(name="make_run")
def _make_run() -> MakeRun:
    return make_run
