"""An arm's attention against the specification in fp64, on the inputs it will be timed on.

All of the arm's output is computed; the specification is evaluated on segments of it (every query when that
is cheap, else queries around each border of the geometry, in the middle and at the end), because it holds
whole score matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from nsa import NSAConfig, nsa_attention, reference
from nsa.blocks import num_selection_blocks, own_block
from nsa.routes import Route
from nsa.testing import Check, check, error_budget
from nsabench.run.proof import Proof, proven
from nsabench.run.selection import NOTHING, Sharing, attending, sharing

# Elements of the specification's score matrix, all heads: a few seconds of fp64 on a laptop.
SPEC_ELEMENTS = 2**24
LEAST_ROWS = 16

ATTENDING = ("cmp", "sel", "win")
GRADIENTS = ("q", "k_cmp", "v_cmp", "k_sel", "v_sel", "k_win", "v_win", "gates")

Inputs = dict[str, Any]
"""Arguments of an attention, by name."""

Segment = tuple[int, int]
"""Rows ``[first, last)`` of the queries."""


@dataclass(frozen=True)
class Verdict:
    """Whether an arm is right. ``error`` is its worst quantity against its budget; ``reason`` is empty when
    it is right. ``output`` is what the arm computed, ``(B,T,HQ,DV)``. ``overlap`` is the part of the
    specification's blocks it selected (None where nothing is selected), ``sharing`` how far the blocks that
    neighbouring queries attended agree; ``proof`` what was seen to run, and ``fell_back`` which branch ran
    something else than asked for.
    """

    error: Check
    reason: str
    output: torch.Tensor
    has_nan: bool = False
    overlap: float | None = None
    sharing: Sharing = NOTHING
    proof: str = ""
    fell_back: str = ""


def compare(
    inputs: Inputs,
    segments: Sequence[Segment],
    attend: Callable[[Inputs], torch.Tensor],
    specify: Callable[[Inputs, Segment], torch.Tensor],
    gradients: Collection[str] = (),
) -> Verdict:
    """Hold ``attend(inputs)`` against what ``specify`` gives for the ``segments`` of its rows, and the
    gradients of the inputs named in ``gradients``.

    ``specify`` runs on the CPU in fp64, and in the inputs' own dtype for the budget.
    """
    given = _prepared(inputs, None, None, gradients)
    out = attend(given)
    upstream = _upstream(out, segments) if gradients else None
    mine = {"output": _pick(out.detach(), segments)}
    if upstream is not None:
        out.backward(upstream)
        mine |= _gradients(given, gradients)

    exact = _specified(inputs, torch.float64, segments, specify, gradients, upstream)
    eager = _specified(inputs, None, segments, specify, gradients, upstream)
    tensors = [t.detach() for t in given.values() if isinstance(t, torch.Tensor) and t.numel()]
    largest = max(float(t.abs().max()) for t in tensors)
    found = {
        name: check(mine[name], truth, error_budget(truth, eager[name], largest))
        for name, truth in exact.items()
    }
    name = max(found, key=lambda name: part_of_budget(found[name]))
    error = found[name]
    if error.ok:
        return Verdict(error, "", out.detach())
    if not all(bool(torch.isfinite(t).all()) for t in mine.values()):
        return Verdict(error, f"{name} is not finite", out.detach(), has_nan=True)
    what = f"differs from the specification by {error.max_abs_err:.3g}; allowed {error.budget:.3g}"
    return Verdict(error, f"{name} {what}", out.detach())


def check_arm(
    inputs: Inputs,
    route: Route,
    routing: str,
    config: NSAConfig,
    *,
    gradients: bool,
    elements: int = SPEC_ELEMENTS,
    blocks: torch.Tensor | None = None,
) -> Verdict:
    """Run the NSA of ``routing`` on ``inputs``; compare values, the selection, ``gradients`` if asked.

    ``elements`` bounds the specification's score matrix, which is its cost. ``blocks`` are attended in place
    of those that the scores choose: what they choose is held against the specification all the same.
    """
    chosen = None
    if route.score is not None:
        where: dict[str, Any] = {"q_start": inputs["q_start"], "kv_len": inputs["k_sel"].shape[1]}
        if route.shares_lse and route.cmp is not None:
            keys = (inputs[name] for name in ("q", "k_cmp", "v_cmp"))
            where["lse"] = route.cmp(*keys, config, q_start=inputs["q_start"])[1]
        chosen = route.score(inputs["q"], inputs["k_cmp"], config, **where)
    proofs: list[Proof] = []

    def attend(given: Inputs) -> torch.Tensor:
        run = partial(nsa_attention, **given, config=config, routing=routing)
        out, proof = proven(run, route, config, given)
        proofs.append(proof)
        return out

    with attending({} if blocks is None else {inputs["q_start"]: blocks}):
        found = check_branches(
            inputs,
            attend,
            [branch for branch in ATTENDING if route.backend(branch) != "off"],
            chosen,
            config,
            gradients=gradients,
            elements=elements,
            blocks=blocks,
        )
    return replace(found, proof=proofs[0].text, fell_back=proofs[0].fell_back)


def check_branches(
    inputs: Inputs,
    attend: Callable[[Inputs], torch.Tensor],
    branches: Collection[str],
    chosen: torch.Tensor | None,
    config: NSAConfig,
    *,
    gradients: bool = False,
    elements: int = SPEC_ELEMENTS,
    blocks: torch.Tensor | None = None,
) -> Verdict:
    """Hold ``attend(inputs)`` against the gated sum of ``branches`` (of cmp, sel, win), and the blocks
    ``chosen (B,T,H,n)`` for it against those of the specification. ``blocks`` as in :func:`check_arm`.
    """
    segments = _segments(inputs, config, elements)
    overlap, wrong = _check_selection(inputs, chosen, config, segments)
    attended = chosen if chosen is None or blocks is None else blocks
    found = compare(
        inputs,
        segments,
        attend,
        lambda given, rows: _specification(given, rows, branches, config, attended),
        GRADIENTS if gradients else (),
    )
    reason = found.reason if found.has_nan else wrong or found.reason
    shared = NOTHING if attended is None else sharing(attended, inputs["q_start"], config)
    return replace(found, reason=reason, overlap=overlap, sharing=shared)


def part_of_budget(error: Check) -> float:
    """The error over its budget: above 1 is wrong."""
    return error.max_abs_err / error.budget if error.budget else error.max_abs_err


def segments_of(rows: int, affordable: int, marks: Collection[int]) -> list[Segment]:
    """All rows, or ``affordable`` of them (LEAST_ROWS at least) in short segments around ``marks``."""
    affordable = max(LEAST_ROWS, affordable)
    if rows <= affordable:
        return [(0, rows)]
    part = max(1, affordable // len(marks))
    starts = sorted({min(max(0, mark - part // 2), rows - part) for mark in marks if mark <= rows})
    segments: list[Segment] = []
    for start in starts:
        begin = max(start, segments[-1][1] if segments else 0)
        if begin < start + part:
            segments.append((begin, start + part))
    return segments


def _segments(inputs: Inputs, config: NSAConfig, elements: int) -> list[Segment]:
    """Rows to check: all, or those where something begins or ends."""
    (batch, rows), length = inputs["q"].shape[:2], inputs["k_sel"].shape[1]
    reach = config.num_selected_blocks * config.selection_block_size
    marks = {0, config.compression_block_size, config.window_size, reach, rows // 2, rows}
    return segments_of(rows, elements // (batch * config.num_heads * length), marks)


def _prepared(
    inputs: Inputs, device: str | None, dtype: torch.dtype | None, gradients: Collection[str]
) -> Inputs:
    def place(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.clone().to(device=device, dtype=dtype).detach().requires_grad_(name in gradients)

    return {name: place(name, value) for name, value in inputs.items()}


def _pick(t: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    return torch.cat([t[:, a:b] for a, b in segments], 1).cpu()


def _upstream(out: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """An upstream gradient that is zero outside the segments, so that the specification needs only those."""
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    kept = torch.zeros_like(noise)
    for a, b in segments:
        kept[:, a:b] = noise[:, a:b]
    return kept


def _gradients(given: Inputs, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Gradients by input; zero where an input takes no part, as with a branch that is off."""
    found = {}
    for name in names:
        grad = given[name].grad
        found[f"gradient of {name}"] = (torch.zeros_like(given[name]) if grad is None else grad).cpu()
    return found


def _specified(
    inputs: Inputs,
    dtype: torch.dtype | None,
    segments: Sequence[Segment],
    specify: Callable[[Inputs, Segment], torch.Tensor],
    gradients: Collection[str],
    upstream: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    given = _prepared(inputs, "cpu", dtype, gradients)
    whole = torch.cat([specify(given, rows) for rows in segments], 1)
    results = {"output": whole.detach()}
    if upstream is not None:
        whole.backward(_pick(upstream, segments).to(whole))
        results |= _gradients(given, gradients)
    return results


def _check_selection(
    inputs: Inputs, chosen: torch.Tensor | None, config: NSAConfig, segments: Sequence[Segment]
) -> tuple[float | None, str]:
    """The part of the ``chosen`` blocks that the specification chooses too, and what is wrong with them."""
    if chosen is None:
        return None, ""
    q, k_cmp, start = inputs["q"], inputs["k_cmp"], inputs["q_start"]
    length = inputs["k_sel"].shape[1]
    keys = k_cmp.cpu()
    same = total = 0
    wrong = ""
    for a, b in segments:
        mine = _existing(chosen[:, a:b].cpu(), length, config)
        span = q[:, a:b].cpu()
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
    return same / total if total else 1.0, wrong


def _existing(blocks: torch.Tensor, length: int, config: NSAConfig) -> torch.Tensor:
    """The blocks that begin within ``length`` tokens; -1 for others, which the specification cannot hold."""
    return blocks.where(blocks < num_selection_blocks(length, config), -1)


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
    given: Inputs,
    rows: Segment,
    branches: Collection[str],
    config: NSAConfig,
    attended: torch.Tensor | None,
) -> torch.Tensor:
    """What the specification gives for some rows, with the blocks that the arm attends in them (what its
    scores choose is checked apart).
    """
    a, b = rows
    start = given["q_start"] + a
    q, gates = given["q"][:, a:b], given["gates"][:, a:b].unsqueeze(-1)
    out = torch.zeros(())
    if "cmp" in branches:
        branch = reference.compressed_attention(q, given["k_cmp"], given["v_cmp"], config, q_start=start)
        out = out + gates[..., 0, :] * branch[0]
    if "sel" in branches and attended is not None:
        keys, values = given["k_sel"], given["v_sel"]
        blocks = _existing(attended[:, a:b].cpu(), keys.shape[1], config)
        branch = reference.selected_attention(q, keys, values, blocks, config, q_start=start)
        out = out + gates[..., 1, :] * branch[0]
    if "win" in branches:
        first = start - given["win_start"]
        branch = reference.sliding_attention(q, given["k_win"], given["v_win"], config, q_start=first)
        out = out + gates[..., 2, :] * branch[0]
    return out
