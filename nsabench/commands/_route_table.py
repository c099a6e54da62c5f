"""The route table as rows to show: what refuses on this machine, and the matrix in the README."""

from __future__ import annotations

from typing import Any

import torch

from nsa.routes import BRANCHES, TABLE, Request, Row, backends, refusal
from nsabench.commands._options import ON_CPU, ON_GPU
from nsabench.plan import PlanError
from nsabench.run.steps import DTYPES

TITLES = {"cmp": "compressed", "score": "scores and top-n", "sel": "selected", "win": "sliding"}


def survey(*, S: int, device: str, dtype: str | None) -> list[dict[str, Any]]:
    """Each row of the table for a prefill of S tokens of the default model: runs, refuses, or is passed
    over by auto.
    """
    from nsa import NSAConfig

    model = ON_CPU if device == "cpu" else ON_GPU
    dtype = model.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise PlanError(f"--dtype: {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    config = NSAConfig(model.heads, model.groups, model.dk, model.dv)
    request = Request(torch.device(device).type, DTYPES[dtype], S, S, False, config)
    found, taken = [], set()
    for row in TABLE:
        why = refusal(row, request)
        passed = None if why else row.avoid(request)
        auto = why is None and passed is None and row.branch not in taken
        if auto:
            taken.add(row.branch)
        found.append(
            {
                "branch": row.branch,
                "backend": row.backend,
                "passes": list(row.passes),
                "device": device,
                "dtype": dtype,
                "refuses": why,
                "auto": auto,
                "passed_over": None if auto or why else passed or "an earlier row runs",
                "provider": row.provider() if why is None else None,
            }
        )
    return found


def matrix_markdown() -> str:
    """Branches by backends with where each row runs, from the table's own refusals; the same on every
    machine.
    """
    lines = ["| backend | " + " | ".join(TITLES[branch] for branch in BRANCHES) + " |"]
    lines.append("|---" * (len(BRANCHES) + 1) + "|")
    for backend in backends():
        rows = {row.branch: row for row in TABLE if row.backend == backend}
        cells = [_where(rows[branch]) if branch in rows else "" for branch in BRANCHES]
        lines.append(f"| `{backend}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _where(row: Row) -> str:
    return f"{row.where}: {', '.join(row.passes)}"
