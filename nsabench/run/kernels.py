"""The kernels of an arm's steps: rows of kernels.csv, the stages' shares in a CUDA graph, and the proof that
the steps that were timed ran their route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from nsa.routes import BRANCHES
from nsabench.measure import GraphTimer, MeasureError, Shares
from nsabench.measure.attribution import Attribution, attribute
from nsabench.measure.device import cache_flush, no_flush
from nsabench.plan import Cell
from nsabench.run.impl import Fields, Refused
from nsabench.run.proof import idle_branches, prove
from nsabench.run.work import config_of
from nsabench.run.workload import Variant, Workload

PROFILED_CALLS = 64
"""Calls of a step that is profiled at most: torch needs about a second to read the profile of seven."""
RUNS, PROFILED_MS = 3, 300.0

Weighted = list[tuple[float, Attribution]]
"""The steps of an arm, each with its weight."""


def attributed(
    workload: Workload, variants: Sequence[Variant], route: str, fields: Fields, step_ms: float
) -> Weighted:
    """Profile an arm's steps as they were timed: with the cache as ``fields`` say, from a CUDA graph where
    they were. Empty for steps of too many calls, and where torch's profiler cannot run. ``step_ms``: about
    what a step takes.
    """
    if len(workload.steps[0].spans) > PROFILED_CALLS:
        return []
    hook = workload.hook or no_stages
    runs = max(1, min(RUNS, int(PROFILED_MS / step_ms)))
    flush = cache_flush(workload.device) if fields["cache"] == "cold" else no_flush
    found: Weighted = []
    for variant in variants:
        before, step = flush, variant.step
        if workload.cell.passes == "bwd":
            forward, step = workload.backward_step(route)
            before = partial(_both, forward, flush)
        graph = GraphTimer(workload.device).captured(variant.step) if fields["timer"] == "graph" else None
        try:
            step_found = attribute(step, hook, workload.device, runs=runs, before=before, graph=graph)
        except MeasureError:
            return []
        found.append((variant.weight, step_found))
    return found


def _both(first: Callable[[], None], then: Callable[[], None]) -> None:
    first()
    then()


def no_stages(factory: object) -> AbstractContextManager[None]:
    """The hook of a step that has no stages."""
    return nullcontext()


def refuse_fallback(cell: Cell, fields: Fields, steps: Weighted) -> None:
    """Refused where a timed step shows that a branch ran something else than its backend."""
    # Where calls of a step differ in their backends, each has been judged by itself before.
    backends = {branch: fields.get(f"{branch}_backend") or "off" for branch in BRANCHES}
    single = {branch: name for branch, name in backends.items() if "+" not in name}
    idle = idle_branches(cell.S, config_of(cell))
    for _, step in steps:
        proof = prove(single, step.seen, cell.device.partition(":")[0], idle)
        if proof.fell_back:
            raise Refused("invalid", proof.fell_back)


def kernel_rows(steps: Weighted) -> list[Fields]:
    """Rows of kernels.csv, the longest first: calls and ms a step, over the steps by weight."""
    added: dict[tuple[str, str], tuple[float, float]] = {}
    for weight, step in steps:
        for kernel in step.kernels:
            key = kernel.kernel, kernel.branch
            calls, ms = added.get(key, (0.0, 0.0))
            added[key] = calls + weight * kernel.calls, ms + weight * kernel.ms
    rows = sorted(added.items(), key=lambda row: -row[1][1])
    return [
        {"kernel": kernel, "branch": branch, "calls": calls, "ms": ms}
        for (kernel, branch), (calls, ms) in rows
    ]


def graph_shares(step: Attribution) -> Shares:
    """Shares of the stages by the kernels of a graph's replays; gaps between kernels are `other`."""
    if step.ms is None:
        return Shares(step.total_ms, None, step.note)
    return Shares.closing(step.total_ms, {name: ms for name, ms in step.ms.items() if name != "other"})
