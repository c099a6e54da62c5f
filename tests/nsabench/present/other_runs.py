"""Stored scorecards and trainings made by hand, as the commands leave them on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsabench.plan.checks import RULES
from nsabench.store import TableRun
from nsabench.store.scorecard import KIND as VERIFY
from nsabench.store.scorecard import SCORECARD_TABLES, store_scores
from nsabench.store.training import EVAL_FILE, GATES_FILE, ROUTES_FILE, TRAINING_FILE, TRAINING_TABLES
from nsabench.store.training import KIND as TRAIN

ENVIRONMENT: dict[str, Any] = {
    "commit": "1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d",
    "dirty": False,
    "cpu": {"model": "AMD EPYC 7B13", "cores": 2, "threads": 2, "memory_bytes": 8 << 30},
    "torch": {"version": "2.13.0+cpu", "threads": 2},
    "gpus": [],
}
SUBJECTS = ("cmp:sdpa", "score:sdpa", "sel:gather", "win:sdpa", "layer:auto")


def score(rule: str, subject: str, **changes: Any) -> dict[str, Any]:
    """A row of a scorecard that passes."""
    known = RULES[rule]
    branch, _, backend = subject.partition(":")
    row = {
        "rule": rule,
        "title": known.title,
        "source": known.source,
        "subject": subject,
        "branch": branch,
        "backend": backend,
        "dtype": "fp32",
        "passes": "fwd",
        "status": "pass",
        "max_abs_err": 2.5e-7,
        "budget": 9e-6,
        "cases": 12,
        "failed": 0,
        "worst": "S=65 G=3 dk=64 dv=32",
        "reported": known.reported,
        "reported_note": known.report,
        "seconds": 0.25,
    }
    return row | changes


def passing() -> list[dict[str, Any]]:
    """What every subject passes, and a peer that fails."""
    rows = [
        score(name, subject)
        for name, rule in RULES.items()
        for subject in SUBJECTS
        if subject.partition(":")[0] in rule.branches
    ]
    peer = {"branch": "sel", "backend": "fla", "status": "fail", "reason": "w + 1 keys", "failed": 3}
    refused = {
        "status": "unsupported",
        "reason": "needs a CUDA GPU, got cpu",
        "max_abs_err": None,
        "cases": 0,
    }
    return [
        *rows,
        score("values", "sel:triton", **refused),
        score("values", "fla-core 0.6.0 sel", **peer),
    ]


def make_scorecard(
    root: Path, rows: Sequence[Mapping[str, Any]] | None = None, *, environment: Any = None, **facts: Any
) -> Path:
    """The folder of a stored scorecard."""
    told = {"device": "cpu", "level": "full", "peers": ["fla-core 0.6.0 sel"], "status": "ok"}
    run = TableRun.create(
        root,
        kind=VERIFY,
        name="verify",
        argv=["verify", "--full"],
        repro="nsabench verify --full",
        environment=environment or ENVIRONMENT,
        tables=SCORECARD_TABLES,
        **told | facts,
    )
    with run:
        store_scores(run, *(passing() if rows is None else rows))
    return run.path


def make_training(
    root: Path,
    *,
    steps: int = 300,
    status: str = "ok",
    losses: Callable[[int], float | None] = lambda step: 0.2 + 5.4 * math.exp(-step / 60),
    needle: float | None = 0.97,
    without: float | None = 0.07,
    collapsed: Sequence[tuple[int, int]] = (),
    gates: bool = True,
    settings: Mapping[str, Any] | None = None,
    environment: Any = None,
    **facts: Any,
) -> Path:
    """The folder of a stored training. `collapsed` are (step, layer); without a needle none is evaluated."""
    model = {"dim": 64, "layers": 2, "heads": 4, "groups": 2, "dk": 16, "dv": 16, "l": 16, "d": 8, "w": 32}
    told = {"data": "synthetic", "precision": "fp32", "mode": "batched", "steps": steps, "device": "cpu"}
    run = TableRun.create(
        root,
        kind=TRAIN,
        name="train",
        argv=["train", "--data", "synthetic"],
        repro=f"nsabench train --data synthetic --steps {steps}",
        environment=environment or ENVIRONMENT,
        tables=TRAINING_TABLES,
        status=status,
        settings={**told, "model": model, **(settings or {})},
        parameters=123_456,
        **facts,
    )
    with run:
        run.append(TRAINING_FILE, *(_step(step, losses(step)) for step in range(1, steps + 1)))
        if gates:
            looked = sorted({*range(50, steps + 1, 50), steps})
            run.append(
                GATES_FILE, *(_gate(s, layer, (s, layer) in collapsed) for s in looked for layer in (0, 1))
            )
        # The route as trained comes first; without the other branches nothing is to be read from it.
        others = (("cmp=off", 0.5), ("win=off", 0.4)) if needle is not None else ()
        for route, accuracy in (("auto", needle), ("sel=off", without), *others):
            if accuracy is not None:
                run.append(EVAL_FILE, *_evaluated(steps, route, accuracy))
        run.append(
            ROUTES_FILE,
            {
                "layer": 0,
                "branch": "sel",
                "backend": "triton",
                "calls": 0,
                "refused": 9,
                "reason": "needs a GPU",
            },
            {"layer": 0, "branch": "sel", "backend": "gather", "calls": 300, "refused": 0, "reason": ""},
        )
    return run.path


def _step(step: int, loss: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "tokens_per_s": 5000.0 + 40 * math.sin(step),
        "grad_norm": 1.5,
        "lr": 3e-4,
        "rss_bytes": 700 << 20,
        "seconds": 0.1,
    }


def _gate(step: int, layer: int, collapsed: bool) -> dict[str, Any]:
    parts = (0.01, 0.98, 0.01) if collapsed else (0.3, 0.3 + step / 3000, 0.4 - step / 3000)
    shares = dict(zip(("share_cmp", "share_sel", "share_win"), parts, strict=True))
    told = {"entropy": 1.05, "largest_share": max(parts), "collapsed": int(collapsed)}
    return {"step": step, "layer": layer, **told, **shares}


def _evaluated(step: int, route: str, accuracy: float) -> list[dict[str, Any]]:
    told = {"step": step, "chance": 1 / 16, "route": route}
    far = {"accuracy": accuracy, "count": 300}
    return [
        {**told, "what": "needle within the window", "distance": 3, "accuracy": 1.0, "count": 200},
        {**told, "what": "needle past the window", "distance": 64, "accuracy": accuracy, "count": 600},
        {**told, "what": "needle 64 to 127 back", "distance": 64, **far},
        {**told, "what": "needle 128 to 255 back", "distance": 128, **far},
        {**told, "what": "copy past the window", "distance": 96, **far, "chance": 1 / 26},
    ]
