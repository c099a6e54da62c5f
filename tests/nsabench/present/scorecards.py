"""Rows of scorecards, made up."""

from __future__ import annotations

from typing import Any

_REASONS = {"pass": "", "fail": "o differs by 0.5, allowed 1e-06 (S=65)", "unsupported": "needs a CUDA GPU"}


def score(status: str = "pass", **changes: Any) -> dict[str, Any]:
    """A row without its run_id, as a check gives it."""
    row: dict[str, Any] = {
        "rule": "values",
        "title": "output equals the specification's",
        "source": "rules 1 to 9",
        "subject": "win:sdpa",
        "branch": "win",
        "backend": "sdpa",
        "dtype": "fp32",
        "passes": "fwd",
        "status": status,
        "reason": _REASONS.get(status, "by declaration"),
        "max_abs_err": 0.5 if status == "fail" else 1e-7,
        "budget": 1e-6,
        "cases": 4,
        "failed": 1 if status == "fail" else 0,
        "worst": "S=65: o",
        "reported": None,
        "reported_note": "",
        "seconds": 0.25,
    }
    row |= changes
    if "branch" not in changes and ":" in row["subject"]:
        row["branch"] = row["subject"].partition(":")[0]
    return row
