"""The gate before any timing: an arm's attention against the specification in fp64, on the inputs it will be timed on.

All of the arm's output is computed; the specification is evaluated on segments of it (every query when that is cheap,
else queries around each border of the geometry, in the middle and at the end), because it holds whole score matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nsa import NSAConfig, nsa_attention, reference
from nsa.routes import Route
from nsa.testing import Check, check, error_budget


# Elements of the specification's score matrix, all heads: a few seconds of fp64 on a laptop.
SPEC_ELEMENTS = 2**24
LEAST_ROWS = 16

Inputs = dict[str, Any]
GRADIENTS = ("q", "k_cmp", "v_cmp", "k_sel", "v_sel", "k_win", "v_win", "gates")


@dataclass(frozen=True)
class Verdict:
    """Whether an arm is right. ``error`` is its worst quantity against its budget; ``overlap`` the part of the
    specification's blocks it selected (None without a selected branch); ``reason`` is empty when it is right."""

    error: Check
    overlap: float | None
    reason: str
    has_nan: bool = False


def check_arm(inputs: Inputs, route: Route, routing: str, config: NSAConfig, *, gradients: bool) -> Verdict:
    """Run the attention of ``routing`` on ``inputs`` and compare values, the selection, and ``gradients`` if asked."""
    segments = _segments(
        inputs["q"].shape[0] * config.num_heads, inputs["q"].shape[1], inputs["k_sel"].shape[1], config
    )
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
    largest = max(float(t.abs().max()) for t in given.values() if isinstance(t, torch.Tensor) and t.numel())
    worst: tuple[float, str, Check] | None = None
    for name, truth in exact.items():
        found = check(mine[name], truth, error_budget(truth, eager[name], largest))
        part = found.max_abs_err / found.budget if found.budget else found.max_abs_err
        if worst is None or part > worst[0]:
            worst = (part, name, found)
    assert worst is not None
    _, name, error = worst
    if wrong:
        return Verdict(error, overlap, wrong)
    if error.ok:
        return Verdict(error, overlap, "")
    has_nan = not all(bool(torch.isfinite(t).all()) for t in mine.values())
    what = (
        f"{name} is not finite"
        if has_nan
        else f"{name} differs from the specification by {error.max_abs_err:.3g}"
    )
    return Verdict(error, overlap, f"{what}; allowed {error.budget:.3g}", has_nan)


def _segments(heads: int, rows: int, length: int, config: NSAConfig) -> list[tuple[int, int]]:
    """Row ranges to check: all, or short ones where something begins or ends."""
    affordable = max(LEAST_ROWS, SPEC_ELEMENTS // max(1, heads * length))
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
    grads = {name: given[name].grad for name in GRADIENTS}
    zeros = {name: torch.zeros_like(given[name]) for name, grad in grads.items() if grad is None}
    return {f"gradient of {name}": (zeros.get(name) if g is None else g).cpu() for name, g in grads.items()}


def _check_selection(
    inputs: Inputs, route: Route, config: NSAConfig, segments: list[tuple[int, int]]
) -> tuple[torch.Tensor | None, float | None, str]:
    """The arm's blocks on the segments, the part the specification chose too, and what is wrong with them."""
    if route.score is None:
        return None, None, ""
    q, k_cmp, start = inputs["q"], inputs["k_cmp"], inputs["q_start"]
    length = inputs["k_sel"].shape[1]
    chosen = _pick(route.score(q, k_cmp, config, q_start=start, kv_len=length), segments)
    same = total = 0
    wrong, row = "", 0
    for a, b in segments:
        mine = chosen[:, row : row + b - a]
        row += b - a
        span, keys = q[:, a:b].cpu(), k_cmp.cpu()
        where = {"q_start": start + a, "kv_len": length}
        spec = reference.select_blocks(span.double(), keys.double(), config, **where)
        scores = reference.block_scores(span.double(), keys.double(), config, **where)
        single = reference.block_scores(span.float(), keys.float(), config, **where)
        blocks = scores.shape[-1]
        took, should = _members(mine, blocks), _members(spec, blocks)
        same += int((took & should).sum())
        total += int(should.sum())
        # Blocks may be exchanged only where fp32 cannot tell their scores apart.
        extra = scores.masked_fill(~(took & ~should), float("inf")).amin(-1)
        missed = scores.masked_fill(~(should & ~took), float("-inf")).amax(-1)
        gap = torch.where(torch.isfinite(extra) & torch.isfinite(missed), missed - extra, 0.0).max().item()
        allowed = error_budget(scores, single, 1.0)
        if bool((took.sum(-1) != should.sum(-1)).any()):
            wrong = wrong or "a query selects another number of blocks than the specification"
        elif gap > allowed:
            wrong = wrong or f"selected a block whose score is lower by {gap:.3g}; allowed {allowed:.3g}"
    return chosen, same / total if total else 1.0, wrong


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
    """What the specification gives on the segments, with the blocks the arm selected (those are checked apart)."""
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
