"""What this project's own kernels declare to do in the steps of a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from nsa.kernels.work import Call, declared
from nsa.routes import BRANCHES
from nsabench.plan import Cell
from nsabench.run.selection import TILE
from nsabench.run.steps import DTYPES, Step, route_at
from nsabench.run.work import config_of


def declared_work(cell: Cell, steps: Sequence[Step], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``branch``, ``kernel``, ``flops``, ``l2_bytes`` and ``dram_bytes`` of each Triton kernel of a
    step, over the steps by weight; empty where none runs.

    What tiles select together is as ``row`` has measured it (``union_blocks``, ``neighbour_overlap``), or as
    of random blocks.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if cell.impl != "nsa":
        return []
    for step in steps:
        for start, end in step.spans:
            route = route_at(cell, (start, end))
            call = replace(_call(cell, start, end, row), lse_given=route.shares_lse)
            for branch in BRANCHES:
                backend = route.backend(branch)
                if not backend.startswith("triton"):
                    continue
                for one in declared(branch, backend, call, _arch(cell.device)):
                    work = asdict(one)
                    kernel = work.pop("kernel")
                    held = found.setdefault(
                        (branch, kernel), {"branch": branch, "kernel": kernel} | dict.fromkeys(work, 0.0)
                    )
                    for name, number in work.items():
                        held[name] += step.weight * number
    return list(found.values())


def _call(cell: Cell, start: int, end: int, row: Mapping[str, Any]) -> Call:
    united = row.get("union_blocks")
    return Call(
        config_of(cell),
        end - start,
        end,
        cell.B,
        start,
        DTYPES[cell.dtype],
        overlap=row.get("neighbour_overlap"),
        union_blocks=None if united is None else (TILE, united),
    )


def _arch(device: str) -> tuple[int, int]:
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_capability(device) if on_gpu else (9, 0)
