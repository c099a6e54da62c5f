"""The gate before any timing: what a cell's step computes is right, or the cell has no number.

Three links make the chain. The cache holds what the whole prompt gives without one (checked once a shape);
the attention on what comes out of the cache is what the specification gives (:mod:`nsabench.run.check`, once
a route); and the step's output is that attention's, also as captured in a graph (once a timer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nsa.testing import Check, check, error_budget
from nsabench.run.check import SPEC_ELEMENTS, Verdict, part_of_budget
from nsabench.run.impl import Refused
from nsabench.run.selection import NOTHING
from nsabench.run.steps import Span
from nsabench.run.workload import Workload

__all__ = ["Refused", "judge", "refuse_other_output", "refuse_wrong_cache"]

# Calls of one step to check, spread from the first to the last: a prompt fed token by token has thousands.
CHECKED_SPANS = 6
# Tokens on which the rounding of keys and values is measured in fp64: enough to meet the worst of it.
ROUNDING_TOKENS = 2048


def refuse_wrong_cache(workload: Workload) -> None:
    """Hold what comes out of the cache against the whole prompt without one; Refused where they differ.

    Both are rounded, each in its own order of sums: they may differ by twice what the whole prompt's errs
    against fp64.
    """
    if not workload.has_cache:
        return
    whole = workload.inputs_without_cache()
    budgets = _budgets(workload, whole)
    for step in workload.steps:
        for span, cached in workload.inputs(step, _spread(step.spans)):
            for name, part in workload.impl.seen(whole, span, cached).items():
                if isinstance(part, torch.Tensor):
                    _refuse_other_part(cached[name], part, budgets[name], name, span)


def _refuse_other_part(
    cached: torch.Tensor, part: torch.Tensor, allowed: float, name: str, span: Span
) -> None:
    what = f"{name} for token {span[1] - 1} through the cache"
    if cached.shape != part.shape:
        raise Refused("wrong", f"{what} has shape {tuple(cached.shape)}, not {tuple(part.shape)}")
    found = check(cached, part.double(), allowed)
    if not found.ok:
        raise Refused("wrong", f"{what} {_differs(found)} without one")


def _budgets(workload: Workload, whole: dict[str, object]) -> dict[str, float]:
    """By name of an input, what two roundings of it may differ by."""
    some = max(ROUNDING_TOKENS, 2 * workload.config.compression_block_size)
    exact = workload.inputs_without_cache(some, dtype=torch.float64)
    rounded = workload.inputs_without_cache(some)
    found = {}
    for name, t in whole.items():
        if isinstance(t, torch.Tensor):
            largest = float(t.abs().max()) if t.numel() else 0.0
            found[name] = error_budget(exact[name], rounded[name], largest)
            if workload.dtype == torch.float64:
                # Nothing is finer to measure by: the roundings of a sum walk at random.
                found[name] += workload.cell.dim**0.5 * torch.finfo(torch.float64).eps * largest
    return found


def judge(workload: Workload, route: str) -> tuple[Verdict, dict[str, torch.Tensor]]:
    """Check the attention of every step of an arm against the specification, on a spread of its spans.

    Returns the worst verdict, or the first that is wrong, and the output for each step's last span.
    """
    spans = [(step, _spread(step.spans)) for step in workload.steps]
    elements = SPEC_ELEMENTS // sum(len(wanted) for _, wanted in spans)
    verdicts: list[Verdict] = []
    outputs: dict[str, torch.Tensor] = {}
    for step, wanted in spans:
        for span, inputs in workload.inputs(step, wanted):
            found = workload.check(inputs, span, route, elements=elements)
            if found.reason:
                return found, {}
            verdicts.append(found)
            outputs[step.name] = workload.output(found.output)
    worst = max(verdicts, key=lambda verdict: part_of_budget(verdict.error))
    overlaps = [verdict.overlap for verdict in verdicts if verdict.overlap is not None]
    shared = sum((verdict.sharing for verdict in verdicts), NOTHING)
    proofs = dict.fromkeys(part for verdict in verdicts for part in verdict.proof.split("; ") if part)
    overlap = min(overlaps, default=None)
    return replace(worst, overlap=overlap, sharing=shared, proof="; ".join(proofs)), outputs


def refuse_other_output(got: torch.Tensor, expected: torch.Tensor, which: str) -> None:
    """Hold the last tokens that a step returned against what the checked attention gives for them."""
    last = got[:, got.shape[1] - expected.shape[1] :].cpu()
    truth = expected.cpu().double()
    found = check(last, truth, error_budget(truth, expected.cpu()))
    if found.ok:
        return
    if not bool(torch.isfinite(last).all()):
        raise Refused("nan", f"the output{which} is not finite")
    raise Refused("wrong", f"the output{which} {_differs(found)} outside the timer")


def _spread(spans: Sequence[Span]) -> list[Span]:
    """At most CHECKED_SPANS of the spans, evenly from the first to the last."""
    last, picked = len(spans) - 1, min(len(spans), CHECKED_SPANS)
    return [spans[last * i // max(1, picked - 1)] for i in range(picked)]


def _differs(found: Check) -> str:
    return f"differs by {found.max_abs_err:.3g}, allowed {found.budget:.3g}, from the one"
