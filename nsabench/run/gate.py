"""The gate before any timing: what a cell's step computes is right, or the cell has no number.

Three links make the chain. The cache holds what the whole prompt gives without one (checked once a shape);
the attention on what comes out of the cache is what the specification gives (:mod:`nsabench.run.check`, once
a route); and the step's output is that attention's, also as captured in a graph (once a timer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nsa.blocks import num_compressed_blocks
from nsa.routes import Route
from nsa.testing import Check, check, error_budget
from nsabench.run.check import SPEC_ELEMENTS, Verdict, check_arm, part_of_budget
from nsabench.run.steps import Span, steps_of
from nsabench.run.workload import Inputs, Workload

# Calls of one step to check, spread from the first to the last: a prompt fed token by token has thousands.
CHECKED_SPANS = 6
# A product over another number of rows adds in another order, and rotation and compression round what comes
# of it again. A wrong cache is wrong by the size of its values.
CACHE_BUDGETS = 8.0


class Refused(Exception):
    """An arm that is not measured: its status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def refuse_wrong_cache(workload: Workload) -> None:
    """Hold what comes out of the cache against the whole prompt without one; Refused where they differ."""
    if workload.cache is None and workload.cell.mode == "batched":
        return
    truth = workload.inputs_without_cache()
    for step in steps_of(workload.cell):
        for span, cached in workload.inputs(step, _spread(step.spans)):
            for name, part in _seen(truth, cached, span, workload).items():
                if cached[name].shape != part.shape:
                    shapes = f"has shape {tuple(cached[name].shape)}, not {tuple(part.shape)}"
                    raise Refused("wrong", f"{name} for token {span[1] - 1} through the cache {shapes}")
                allowed = CACHE_BUDGETS * error_budget(part.double(), part)
                found = check(cached[name], part.double(), allowed)
                if not found.ok:
                    what = f"{name} for token {span[1] - 1} through the cache"
                    raise Refused("wrong", f"{what} {_differs(found)} without one")


def _seen(truth: Inputs, cached: Inputs, span: Span, workload: Workload) -> dict[str, torch.Tensor]:
    """The part of the whole prompt's inputs that a span sees."""
    start, end = span
    tokens = {
        **dict.fromkeys(("q", "gates"), slice(start, end)),
        **dict.fromkeys(("k_cmp", "v_cmp"), slice(0, num_compressed_blocks(end, workload.config))),
        **dict.fromkeys(("k_sel", "v_sel"), slice(0, end)),
        **dict.fromkeys(("k_win", "v_win"), slice(cached["win_start"], end)),
    }
    return {name: truth[name][:, part] for name, part in tokens.items()}


def judge(
    workload: Workload, routing: str, route_of: Callable[[Span], Route]
) -> tuple[Verdict, dict[str, torch.Tensor]]:
    """Check the attention of every step of an arm against the specification, on a spread of its spans.

    Returns the worst verdict, or the first that is wrong, and the layer's output for each step's last span.
    """
    spans = [(step, _spread(step.spans)) for step in steps_of(workload.cell)]
    elements = SPEC_ELEMENTS // sum(len(wanted) for _, wanted in spans)
    gradients = workload.cell.passes != "fwd"
    verdicts: list[Verdict] = []
    outputs: dict[str, torch.Tensor] = {}
    for step, wanted in spans:
        for span, inputs in workload.inputs(step, wanted):
            found = check_arm(
                inputs, route_of(span), routing, workload.config, gradients=gradients, elements=elements
            )
            if found.reason:
                return found, {}
            verdicts.append(found)
            outputs[step.name] = workload.output(found.output)
    worst = max(verdicts, key=lambda verdict: part_of_budget(verdict.error))
    overlaps = [verdict.overlap for verdict in verdicts if verdict.overlap is not None]
    return replace(worst, overlap=min(overlaps, default=None)), outputs


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
