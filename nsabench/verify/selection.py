"""Whether chosen blocks are the specification's, but for ties that fp32 cannot tell apart."""

from __future__ import annotations

import torch

from nsa import reference
from nsa.testing import error_budget
from nsabench.verify.brute import start_list
from nsabench.verify.subjects import Case, Tensors
from nsabench.verify.trial import Trial


def specified(case: Case) -> Tensors:
    """The specification's ``blocks`` and ``scores`` in fp64, and its ``eager`` scores in the precision of
    scores, fp32 at least.
    """
    q, k_cmp = case.tensors["q"], case.tensors["k_cmp"]
    single = torch.promote_types(q.dtype, torch.float32)
    where = {"config": case.config, "q_start": case.q_start, "kv_len": case.kv_len}
    return {
        "blocks": reference.select_blocks(q.double(), k_cmp.double(), **where),  # type: ignore[arg-type]
        "scores": reference.block_scores(q.double(), k_cmp.double(), **where),  # type: ignore[arg-type]
        "eager": reference.block_scores(q.to(single), k_cmp.to(single), **where),  # type: ignore[arg-type]
    }


def meets_selection(trial: Trial, case: Case, exact: Tensors | None = None) -> None:
    """Ask a case of ``score`` and put down what is wrong with the lists. ``exact`` may hold other ``blocks``
    and ``scores`` to compare with.
    """
    found = trial.ask(case)
    if found is None:
        return
    chosen = found["blocks"]
    if not well_formed(trial, case, chosen):
        return
    truth = trial.oracle.once(specified, case) | (exact or {})
    trial.judge(case.name, "score of a block taken for a better one (log)", *exchanged(chosen, truth))


def well_formed(trial: Trial, case: Case, chosen: torch.Tensor) -> bool:
    """int32, ascending, -1 at the tail, none twice, as many as exist up to n, forced ones among them."""
    config = case.config
    shape = (*case.tensors["q"].shape[:2], config.num_kv_heads, config.num_selected_blocks)
    if chosen.shape != shape or chosen.dtype != torch.int32:
        got = f"{tuple(chosen.shape)} {chosen.dtype}".replace("torch.", "")
        raise ValueError(f"blocks are {got}, not {shape} int32")
    lists = chosen.long()
    position = torch.tensor(start_list(case))[:, None] + torch.arange(shape[1])
    own = (position // config.selection_block_size)[:, :, None].expand(shape[:3])
    filled = lists >= 0
    wrong = filled.sum(-1) != (own + 1).clamp_max(config.num_selected_blocks)
    wrong |= (lists > own[..., None]).any(-1)
    end = int(own.max()) + 1
    sorted_lists = torch.where(filled, lists, end)
    steps = sorted_lists.diff(dim=-1)
    wrong |= ((steps <= 0) & filled[..., 1:]).any(-1) | ((steps < 0) & ~filled[..., 1:]).any(-1)
    wrong |= (lists < -1).any(-1)
    for block in range(end):
        forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
        wrong |= forced & (block <= own) & ~(lists == block).any(-1)
    trial.holds(case.name, "lists out of form", wrong.sum())
    return not bool(wrong.any())


def exchanged(chosen: torch.Tensor, truth: Tensors) -> tuple[float, float]:
    """How much better, in logarithms, a block left out scores than one taken for it; and what that may be."""
    # Logarithms: a relative budget, so that small scores count as much as large ones.
    exact, eager = truth["scores"].log(), truth["eager"].log()
    took, should = members(chosen, exact.shape[-1]), members(truth["blocks"], exact.shape[-1])
    swapped = took != should
    low = torch.where(swapped, exact, float("inf")).amin(-1)
    high = torch.where(swapped, exact, float("-inf")).amax(-1)
    gaps = torch.where(swapped.any(-1) & (low != high), high - low, 0.0)
    return float(gaps.max()) if gaps.numel() else 0.0, error_budget(exact, eager)


def members(lists: torch.Tensor, blocks: int) -> torch.Tensor:
    """Which of ``blocks`` blocks each list holds, ``(..., blocks)`` bool."""
    slots = torch.where(lists < 0, blocks, lists).long()
    shape = (*lists.shape[:-1], blocks + 1)
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, slots, True)[..., :blocks]
