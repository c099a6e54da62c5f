"""The specification of every branch, in plain eager torch: any device, any dtype, autograd, no kernel's
limits.

Layouts are ``(B, T, H, D)``: queries ``q (B,T,HQ,D)``, keys and values ``(B,S,H,D)`` and ``(B,S,H,DV)``,
compressed ones ``(B,C,H,...)``. ``q_start`` is the absolute position of ``q[:, 0]``: an int, or an integer
tensor ``(B,)``. Products run in the inputs' dtype, softmax and block scores in fp32 at least. A row without
an allowed key gives output 0 and lse -inf. Every ``lse`` is ``(B,T,HQ)``, fp32 (fp64 for fp64 inputs),
natural logarithm, and carries no gradient.
"""

from __future__ import annotations

import torch

from nsa.blocks import (
    num_selection_blocks,
    overlap_weights,
    own_block,
    query_positions,
    visible_compressed_blocks,
)
from nsa.config import NSAConfig

Output = tuple[torch.Tensor, torch.Tensor]


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits, probabilities and lse: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, config: NSAConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax ``(B,H,G,T,S)`` over the allowed keys, and lse ``(B,H,G,T)``. ``allowed`` is
    ``(B|1,H|1,T,S)``.
    """
    grouped = q.unflatten(2, (config.num_kv_heads, config.group_size))
    logits = torch.einsum("bthgd,bshd->bhgts", grouped, k).to(softmax_dtype(q.dtype)) * config.scale
    allowed = allowed.unsqueeze(2)
    some = allowed.any(-1, keepdim=True)
    # Empty rows get finite logits, so that neither softmax nor its gradient ever sees a row of -inf.
    logits = logits.masked_fill(~allowed, float("-inf")).masked_fill(~some, 0.0)
    if logits.shape[-1] == 0:
        return logits, logits.new_full(logits.shape[:-1], float("-inf"))
    lse = logits.detach().logsumexp(-1).masked_fill(~some.squeeze(-1), float("-inf"))
    return logits.softmax(-1) * some, lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, config: NSAConfig
) -> Output:
    p, lse = _probabilities(q, k, allowed, config)
    o = torch.einsum("bhgts,bshd->bthgd", p.to(v.dtype), v)
    return o.flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def _compressed_allowed(
    num_blocks: int, num_queries: int, config: NSAConfig, q_start: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    visible = visible_compressed_blocks(query_positions(q_start, num_queries, device), config)
    return (torch.arange(num_blocks, device=device) < visible.unsqueeze(-1)).unsqueeze(1)


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """Attention over the compressed blocks that end at or before each query (eq. 7; rules 1 to 3).

    ``q (B,T,HQ,D), k_cmp (B,C,H,D), v_cmp (B,C,H,DV) -> o (B,T,HQ,DV), lse (B,T,HQ)``. Queries at ``t < l -
    1`` see
    no block: output 0, lse -inf.
    """
    allowed = _compressed_allowed(k_cmp.shape[1], q.shape[1], config, q_start, q.device)
    return _attend(q, k_cmp, v_cmp, allowed, config)


@torch.no_grad()
def block_scores(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
) -> torch.Tensor:
    """Importance of each selection block, ``(B,T,H,ceil(kv_len/l'))`` in softmax dtype (eq. 8 to 10)."""
    length = _kv_length(q, q_start, kv_len)
    num_blocks = num_selection_blocks(length, config)
    allowed = _compressed_allowed(k_cmp.shape[1], q.shape[1], config, q_start, q.device)
    dtype = softmax_dtype(q.dtype)  # rule 6: 16-bit products would choose other blocks
    p = _probabilities(q.to(dtype), k_cmp.to(dtype), allowed, config)[0]
    p = p.sum(2)  # eq. 10: over the group's heads
    first, weights = overlap_weights(config)
    per_block = config.selection_block_size // config.compression_stride
    scores = p.new_zeros(*p.shape[:-1], num_blocks)
    for offset, weight in enumerate(weights, start=first):
        index = torch.arange(num_blocks, device=p.device) * per_block + offset
        exists = (index >= 0) & (index < p.shape[-1])
        scores[..., exists] += weight * p[..., index[exists]]
    return scores.transpose(1, 2)


def _kv_length(q: torch.Tensor, q_start: int | torch.Tensor, kv_len: int | None) -> int:
    if kv_len is not None:
        return kv_len
    last = int(q_start.max()) if isinstance(q_start, torch.Tensor) else q_start
    return last + q.shape[1]


@torch.no_grad()
def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
) -> torch.Tensor:
    """The ``n`` selection blocks of each (token, KV head) (eq. 11, 12; rule 6), without gradient.

    ``q (B,T,HQ,D), k_cmp (B,C,H,D) -> (B,T,H,n)`` int32, ascending; -1 marks the empty slots at the tail of
    rows with fewer than ``n`` existing blocks. Initial and local blocks are always chosen, the rest by score,
    ties to the lower index. ``kv_len`` is the number of tokens that exist, ``max(q_start) + T`` when None.
    """
    scores = block_scores(q, k_cmp, config, q_start=q_start, kv_len=kv_len)
    block = torch.arange(scores.shape[-1], device=q.device)
    own = own_block(query_positions(q_start, q.shape[1], q.device), config)[:, :, None, None]
    forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
    scores = scores.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    n = config.num_selected_blocks
    chosen = ranked.indices[..., :n].masked_fill(ranked.values[..., :n] == float("-inf"), scores.shape[-1])
    chosen = chosen.sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == scores.shape[-1], -1)
    return torch.nn.functional.pad(chosen, (0, n - chosen.shape[-1]), value=-1).to(torch.int32)


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """Attention over the tokens of the selected blocks, causal inside the own block (eq. 11, rule 7).

    ``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV), block_indices (B,T,H,N) -> o (B,T,HQ,DV), lse (B,T,HQ)``.
    Indices may come in any order, repeat (a repeated block counts once), or be -1 (empty); a row of -1 gives
    0 and lse -inf.
    """
    num_blocks = num_selection_blocks(k.shape[1], config)
    shape = (*block_indices.shape[:3], num_blocks + 1)
    chosen = torch.zeros(shape, dtype=torch.bool, device=q.device)
    slots = torch.where(block_indices < 0, num_blocks, block_indices).long()
    chosen = chosen.scatter(-1, slots, True)[..., :num_blocks].transpose(1, 2)
    key = torch.arange(k.shape[1], device=q.device)
    allowed = chosen[..., own_block(key, config)]
    causal = key <= query_positions(q_start, q.shape[1], q.device).unsqueeze(-1)
    return _attend(q, k, v, allowed & causal.unsqueeze(1), config)


def sliding_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: int | torch.Tensor = 0
) -> Output:
    """Attention over the last ``w`` keys, the query's own included: ``[max(0, t - w + 1), t]`` (rule 8).

    ``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV) -> o (B,T,HQ,DV), lse (B,T,HQ)``.
    """
    position = query_positions(q_start, q.shape[1], q.device).unsqueeze(-1)
    key = torch.arange(k.shape[1], device=q.device)
    allowed = (key <= position) & (key > position - config.window_size)
    return _attend(q, k, v, allowed.unsqueeze(1), config)
