"""The judge of chosen blocks, whoever chose them: a row of the route table, or a kernel by itself."""

from __future__ import annotations

from typing import Any

import torch

import nsa.reference as reference
from nsa.blocks import num_selection_blocks
from nsa.config import NSAConfig
from nsa.testing import error_budget


def assert_well_formed(
    chosen: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
) -> None:
    """int32, ascending, -1 at the tail only, none twice or of the future, all that exist, forced ones too."""
    assert chosen.dtype == torch.int32
    assert chosen.shape[-1] == config.num_selected_blocks
    chosen = chosen.cpu().long()
    position = torch.as_tensor(q_start).cpu().reshape(-1, 1) + torch.arange(chosen.shape[1])
    own = (
        (position // config.selection_block_size)
        .expand(chosen.shape[:2])[:, :, None]
        .expand(chosen.shape[:3])
    )
    end = int(own.max()) + 1
    if kv_len is not None:
        end = min(end, num_selection_blocks(kv_len, config))
    assert (chosen >= -1).all()
    assert (torch.where(chosen < 0, end, chosen).diff(dim=-1) > -(chosen[..., 1:] < 0).long()).all()
    existing = (own + 1).clamp_max(end)
    assert torch.equal((chosen >= 0).sum(-1), existing.clamp_max(config.num_selected_blocks))
    assert (chosen < existing[..., None]).all()
    for block in range(end):
        forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
        held = (chosen == block).any(-1)
        assert held[forced & (block <= own)].all()


def assert_chosen(
    chosen: torch.Tensor,
    tensors: dict[str, Any],
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
) -> None:
    """The sets of the specification in fp64. Swapped blocks must score the same within fp32 rounding.

    ``chosen (B,T,H,n)`` from ``tensors``: ``q (B,T,HQ,D)`` and ``k_cmp (B,C,H,D)``, of any device. No other
    set than the specification's will do where these are fp64.
    """
    assert_well_formed(chosen, config, q_start=q_start, kv_len=kv_len)
    chosen = chosen.cpu()
    start = q_start.cpu() if isinstance(q_start, torch.Tensor) else q_start
    where: dict[str, Any] = {"q_start": start, "kv_len": kv_len}
    q, k_cmp = (tensors[name].cpu().double() for name in ("q", "k_cmp"))
    expected = reference.select_blocks(q, k_cmp, config, **where)
    differs = (chosen != expected).any(-1)
    if not differs.any():
        return
    assert tensors["q"].dtype != torch.float64, f"other sets in {int(differs.sum())} rows"
    # Logarithms: a relative budget, so that small scores count as much as large ones.
    exact = reference.block_scores(q, k_cmp, config, **where).log()
    eager = reference.block_scores(q.float(), k_cmp.float(), config, **where).log()
    budget = error_budget(exact, eager)
    for place in differs.nonzero().tolist():
        scores = exact[tuple(place)]
        mine, theirs = set(chosen[tuple(place)].tolist()), set(expected[tuple(place)].tolist())
        swapped = scores[sorted(mine ^ theirs)]
        assert (swapped.max() - swapped.min()).item() <= budget, (
            f"{place}: {sorted(mine)}, not {sorted(theirs)}"
        )
