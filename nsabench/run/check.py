"""An arm's attention against the specification in fp64, on the inputs it will be timed on.

All of the arm's output is computed; the specification is evaluated on segments of it (every query when that
is cheap, else queries around each border of the geometry, in the middle and at the end), because it holds
whole score matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nsa import NSAConfig, nsa_attention, reference
from nsa.blocks import num_selection_blocks, own_block
from nsa.routes import Route
from nsa.testing import Check, check, error_budget
from nsabench.run.workload import Inputs

# Elements of the specification's score matrix, all heads: a few seconds of fp64 on a laptop.
SPEC_ELEMENTS = 2**24
LEAST_ROWS = 16

GRADIENTS = ("q", "k_cmp", "v_cmp", "k_sel", "v_sel", "k_win", "v_win", "gates")


@dataclass(frozen=True)
class Verdict:
    """Whether an arm is right. ``error`` is its worst quantity against its budget; ``overlap`` the part of
    the specification's blocks it selected (None without a selected branch); ``reason`` is empty when it is
    right. ``output`` is what the arm computed, ``(B,T,HQ,DV)``.
    """

    error: Check
    overlap: float | None
    reason: str
    output: torch.Tensor
    has_nan: bool = False


def check_arm(
    inputs: Inputs,
    route: Route,
    routing: str,
    config: NSAConfig,
    *,
    gradients: bool,
    elements: int = SPEC_ELEMENTS,
) -> Verdict:
    """Run the attention of ``routing`` on ``inputs``; compare values, the selection, ``gradients`` if asked.

    ``elements`` bounds the specification's score matrix, which is its cost.
    """
    segments = _segments(inputs, config, elements)
    given = _prepared(inputs, None, None, gradients)
    out = nsa_attention(**given, config=config, routing=routing)
    upstream = _upstream(out, segments) if gradients else None
    mine = {"output": _pick(out.detach(), segments)}
    if upstream is not None:
        out.backward(upstream)
        mine |= _gradients(given)

    chosen, overlap, wrong = _check_selection(inputs, route, config, segments)
    exact = _specification(inputs, torch.float64, route, config, segments, chosen, upstream)
    eager = _specification(inputs, None, route, config, segments, chosen, upstream)
    tensors = [t.detach() for t in given.values() if isinstance(t, torch.Tensor) and t.numel()]
    largest = max(float(t.abs().max()) for t in tensors)
    found = {
        name: check(mine[name], truth, error_budget(truth, eager[name], largest))
        for name, truth in exact.items()
    }
    name = max(found, key=lambda name: part_of_budget(found[name]))
    error = found[name]
    reason, has_nan = wrong, False
    if not error.ok:
        has_nan = not all(bool(torch.isfinite(t).all()) for t in mine.values())
        what = f"differs from the specification by {error.max_abs_err:.3g}; allowed {error.budget:.3g}"
        reason = f"{name} is not finite" if has_nan else wrong or f"{name} {what}"
    return Verdict(error, overlap, reason, out.detach(), has_nan)


def part_of_budget(error: Check) -> float:
    """The error over its budget: above 1 is wrong."""
    return error.max_abs_err / error.budget if error.budget else error.max_abs_err


def _segments(inputs: Inputs, config: NSAConfig, elements: int) -> list[tuple[int, int]]:
    """Row ranges to check: all, or short ones where something begins or ends."""
    (batch, rows), length = inputs["q"].shape[:2], inputs["k_sel"].shape[1]
    affordable = max(LEAST_ROWS, elements // (batch * config.num_heads * length))
    if rows <= affordable:
        return [(0, rows)]
    reach = config.num_selected_blocks * config.selection_block_size
    marks = {0, config.compression_block_size, config.window_size, reach, rows // 2, rows}
    part = max(1, affordable // len(marks))
    starts = sorted({min(max(0, mark - part // 2), rows - part) for mark in marks if mark <= rows})
    segments: list[tuple[int, int]] = []
    for start in starts:
        begin = max(start, segments[-1][1] if segments else 0)
        if begin < start + part:
            segments.append((begin, start + part))
    return segments


def _prepared(inputs: Inputs, device: str | None, dtype: torch.dtype | None, gradients: bool) -> Inputs:
    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.clone().to(device=device, dtype=dtype).detach().requires_grad_(gradients)

    return {name: place(value) for name, value in inputs.items()}


def _pick(t: torch.Tensor, segments: list[tuple[int, int]]) -> torch.Tensor:
    return torch.cat([t[:, a:b] for a, b in segments], 1).cpu()


def _upstream(out: torch.Tensor, segments: list[tuple[int, int]]) -> torch.Tensor:
    """An upstream gradient that is zero outside the segments, so that the specification needs only those."""
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    kept = torch.zeros_like(noise)
    for a, b in segments:
        kept[:, a:b] = noise[:, a:b]
    return kept


def _gradients(given: Inputs) -> dict[str, torch.Tensor]:
    """Gradients by input; zero where an input takes no part, as with a branch that is off."""
    found = {}
    for name in GRADIENTS:
        grad = given[name].grad
        found[f"gradient of {name}"] = (torch.zeros_like(given[name]) if grad is None else grad).cpu()
    return found


def _check_selection(
    inputs: Inputs, route: Route, config: NSAConfig, segments: list[tuple[int, int]]
) -> tuple[torch.Tensor | None, float | None, str]:
    """The arm's blocks on the segments, the part the specification chose too, and what is wrong with them."""
    if route.score is None:
        return None, None, ""
    q, k_cmp, start = inputs["q"], inputs["k_cmp"], inputs["q_start"]
    length = inputs["k_sel"].shape[1]
    chosen = _pick(route.score(q, k_cmp, config, q_start=start, kv_len=length), segments)
    chosen = chosen.where(chosen < num_selection_blocks(length, config), -1)
    keys = k_cmp.cpu()
    same = total = row = 0
    wrong = ""
    for a, b in segments:
        span, mine = q[:, a:b].cpu(), chosen[:, row : row + b - a]
        row += b - a
        where = {"q_start": start + a, "kv_len": length}
        spec = reference.select_blocks(span.double(), keys.double(), config, **where)
        scores = reference.block_scores(span.double(), keys.double(), config, **where)
        single = reference.block_scores(span.float(), keys.float(), config, **where)
        took, should = _members(mine, scores.shape[-1]), _members(spec, scores.shape[-1])
        same += int((took & should).sum())
        total += int(should.sum())
        wrong = wrong or _exchanged(
            took, should, _ranks(scores, start + a, config), error_budget(scores, single, 1.0)
        )
    return chosen, same / total if total else 1.0, wrong


def _exchanged(took: torch.Tensor, should: torch.Tensor, ranks: torch.Tensor, allowed: float) -> str:
    """What is wrong with the blocks queries took: they may differ from the specification's only where fp32
    cannot tell their scores apart.
    """
    if bool((took.sum(-1) != should.sum(-1)).any()):
        return "a query selects another number of blocks than the specification"
    extra = ranks.masked_fill(~(took & ~should), float("inf")).amin(-1)
    missed = ranks.masked_fill(~(should & ~took), float("-inf")).amax(-1)
    gap = float((missed - extra).max()) if missed.numel() else 0.0
    if gap == float("inf"):
        return "a query selects a block past its own, or leaves out one that is always selected"
    if gap > allowed:
        return f"a query selects a block whose score is lower by {gap:.3g}; allowed {allowed:.3g}"
    return ""


def _ranks(scores: torch.Tensor, start: int, config: NSAConfig) -> torch.Tensor:
    """Scores ``(B,T,H,blocks)``, those of blocks always selected at inf, of blocks past the query at -inf."""
    block = torch.arange(scores.shape[-1])
    own = own_block(torch.arange(start, start + scores.shape[1]), config)[:, None, None]
    forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
    return scores.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))


def _members(indices: torch.Tensor, blocks: int) -> torch.Tensor:
    slots = torch.where(indices < 0, blocks, indices).long()
    shape = (*indices.shape[:-1], blocks + 1)
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, slots, True)[..., :blocks]


def _specification(
    inputs: Inputs,
    dtype: torch.dtype | None,
    route: Route,
    config: NSAConfig,
    segments: list[tuple[int, int]],
    chosen: torch.Tensor | None,
    upstream: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """What the specification gives on the segments, with the blocks the arm selected (those are checked
    apart).
    """
    given = _prepared(inputs, "cpu", dtype, upstream is not None)
    start, parts, row = given["q_start"], [], 0
    for a, b in segments:
        q, gates = given["q"][:, a:b], given["gates"][:, a:b].unsqueeze(-1)
        out = torch.zeros(())
        if route.cmp is not None:
            branch = reference.compressed_attention(
                q, given["k_cmp"], given["v_cmp"], config, q_start=start + a
            )
            out = out + gates[..., 0, :] * branch[0]
        if route.sel is not None and chosen is not None:
            blocks = chosen[:, row : row + b - a]
            branch = reference.selected_attention(
                q, given["k_sel"], given["v_sel"], blocks, config, q_start=start + a
            )
            out = out + gates[..., 1, :] * branch[0]
        if route.win is not None:
            first = start + a - given["win_start"]
            branch = reference.sliding_attention(q, given["k_win"], given["v_win"], config, q_start=first)
            out = out + gates[..., 2, :] * branch[0]
        parts.append(out)
        row += b - a
    whole = torch.cat(parts, 1)
    results = {"output": whole.detach()}
    if upstream is not None:
        whole.backward(_pick(upstream, segments).to(whole))
        results |= _gradients(given)
    return results
