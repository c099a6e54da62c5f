"""The blocks that a layer selects on a cell's own tokens, captured into a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsa import selection_hook
from nsabench.plan import Cell, PlanError
from nsabench.run.gate import Refused, judge, refuse_wrong_cache
from nsabench.run.policy import Policy
from nsabench.run.selection_file import save_selection
from nsabench.run.worker import Sink
from nsabench.run.workload import Workload, workload_for

CAPTURE = "nsabench.run.capture:capture"
"""The function that captures, as ``module:name``, for an executor."""


@dataclass(frozen=True, kw_only=True)
class Capturing(Policy):
    """Where to: ``path``, a new file; ``source`` says in a line what is captured."""

    path: str
    source: str


def capture(
    cells: Sequence[Cell], policy: Capturing, sink: Sink, *, process: int = 0, clock: object = None
) -> None:
    """Run the prompt of one cell and write what it selects; its row says what became of it."""
    (cell,) = cells
    sink.mark(cell)
    row: dict[str, Any] = {"cell_id": cell.cell_id, "status": "ok", "reason": ""}
    try:
        blocks = captured(cell, sink)
        save_selection(policy.path, blocks.numpy(), cell, policy.source)
    except Refused as error:
        row |= {"status": error.status, "reason": str(error)}
    except PlanError as error:
        row |= {"status": "error", "reason": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        row |= {"status": "oom", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
    sink.done(row)


def captured(cell: Cell, sink: Sink) -> torch.Tensor:
    """The blocks that the forward of ``cell``, whose B is 1, selects: ``(S,H,n)`` int32 on the CPU.

    Refused where its route cannot run or is wrong.
    """
    forward = replace(cell, passes="fwd")
    sink.doing("building")
    workload = workload_for(forward)
    workload.settle(cell.route)
    sink.doing("checking against the specification")
    refuse_wrong_cache(workload)
    verdict, _ = judge(workload, cell.route)
    if verdict.reason:
        raise Refused("nan" if verdict.has_nan else "wrong", verdict.reason)
    sink.doing("selecting")
    return _selected(workload, cell.route)


def _selected(workload: Workload, route: str) -> torch.Tensor:
    parts: list[torch.Tensor] = []

    def record(chosen: torch.Tensor, q_start: int | torch.Tensor) -> torch.Tensor:
        parts.append(chosen[0].cpu())
        return chosen

    (variant,) = workload.variants(route)
    with selection_hook(record):
        variant.step()
    return torch.cat(parts)
