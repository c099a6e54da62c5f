"""Selected attention by gathering: keys to each query, or queries to each key block. No loop over queries,
any device.

``gather:keys`` packs the selected K and V of each query, in chunks of bounded memory: one query at a time
(decode), or a GPU. ``gather:queries`` turns the loop around: for each block of keys, the queries that
selected it form one matrix product, so K and V are read once and nothing is masked but the diagonal. Work
grows with ``T * n * l'``, never with S^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nsa.backends._by_queries import ByQueries
from nsa.backends._fused import attend_pieces
from nsa.backends._pieces import NEG_INF, Output, causal_pieces, dense_prefix
from nsa.blocks import query_positions
from nsa.config import NSAConfig

# Bytes of gathered K and V of one chunk.
PACKED_BYTES = 2**26
PACKED_BYTES_CPU = 2**22
# Fewer queries than this a sequence do not fill a matrix product per block.
QUERIES_FROM = 64


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.selected_attention`. Gathers queries on a CPU from 64 rows on, keys
    otherwise.
    """
    by_queries = q.device.type == "cpu" and q.shape[1] >= QUERIES_FROM
    fn = selected_attention_by_queries if by_queries else selected_attention_by_keys
    return fn(q, k, v, block_indices, config, q_start=q_start)


def selected_attention_by_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.selected_attention`. Packs each query's K and V; no host synchronisation."""
    position = query_positions(q_start, q.shape[1], q.device).expand(q.shape[0], -1)
    result: Output = _ByKeys.apply(q, k, v, block_indices, position, config)
    return result


class _ByKeys(torch.autograd.Function):
    """Packs a chunk of queries at a time, and packs it again in the backward instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_indices: torch.Tensor,
        position: torch.Tensor,
        config: NSAConfig,
    ) -> Output:
        parts = []
        for span in _key_chunks(block_indices, k, v, config):
            token, allowed = _packed_tokens(block_indices[:, span], position[:, span], k.shape[1], config)
            packed_k, packed_v = _pack(k, token), _pack(v, token)
            grouped = q[:, span].unflatten(2, (config.num_kv_heads, -1))  # (B, T, H, G, D)
            logits = _packed_logits(grouped, packed_k, allowed, config)
            some = allowed.any(-1, keepdim=True)
            logits.masked_fill_(~some, 0.0)  # an empty row must not meet its own -inf
            lse = logits.logsumexp(-1).masked_fill_(~some.squeeze(-1), NEG_INF)
            p = logits.softmax(-1).mul_(some).to(v.dtype)
            parts.append(((p @ packed_v).flatten(2, 3), lse.flatten(2, 3)))
        o, lse = (
            parts[0] if len(parts) == 1 else tuple(torch.cat(side, 1) for side in zip(*parts, strict=True))
        )
        ctx.save_for_backward(q, k, v, block_indices, position, o, lse)
        ctx.config = config
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, block_indices, position, o, lse = ctx.saved_tensors
        config, dtype = ctx.config, lse.dtype
        heads = (config.num_kv_heads, -1)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # A key's gradient is a sum over many queries: fp32 at least.
        dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
        for span in _key_chunks(block_indices, k, v, config):
            token, allowed = _packed_tokens(block_indices[:, span], position[:, span], k.shape[1], config)
            packed_k, packed_v = _pack(k, token), _pack(v, token)
            grouped, upstream, out, log_sum = (
                t[:, span].unflatten(2, heads) for t in (q, grad, o, lse.unsqueeze(-1))
            )
            logits = _packed_logits(grouped, packed_k, allowed, config)
            p = (logits - log_sum.masked_fill(log_sum == NEG_INF, 0.0)).exp()
            delta = (upstream.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
            ds = ((upstream @ packed_v.mT).to(dtype) - delta) * p * config.scale
            _unpack_add(dv, token, p.mT @ upstream.to(dtype))
            _unpack_add(dk, token, ds.mT @ grouped.to(dtype))
            dq[:, span] = (ds.to(k.dtype) @ packed_k).flatten(2, 3)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _key_chunks(
    block_indices: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig
) -> list[slice]:
    batch, rows, kv_heads, slots = block_indices.shape
    tokens = batch * kv_heads * slots * config.selection_block_size
    per_row = tokens * (k.shape[-1] + v.shape[-1]) * k.element_size()
    budget = PACKED_BYTES_CPU if k.device.type == "cpu" else PACKED_BYTES
    step = max(1, budget // max(1, per_row))
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def _packed_tokens(
    block_indices: torch.Tensor, position: torch.Tensor, length: int, config: NSAConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers ``(B,T,H,N l')``, safe to gather, and which of them a query may attend ``(B,T,H,1,N
    l')``.
    """
    size = config.selection_block_size
    ordered = block_indices.sort(-1).values
    repeated = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    first = ordered.masked_fill(repeated, -1).long() * size
    token = (first.unsqueeze(-1) + torch.arange(size, device=first.device)).flatten(-2)
    allowed = (token >= 0) & (token <= position[..., None, None]) & (token < length)
    return token.clamp_(0, max(0, length - 1)), allowed.unsqueeze(-2)


def _flat_index(t: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Rows of ``t.flatten(0, 2)``, ``t (B,S,H,D)``, that hold ``token (B,T,H,...)``."""
    batch, length, heads = t.shape[:3]
    b = torch.arange(batch, device=t.device)[:, None, None, None]
    h = torch.arange(heads, device=t.device)[:, None]
    return ((b * length + token) * heads + h).flatten()


def _pack(t: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``t (B,S,H,D), token (B,T,H,K) -> (B,T,H,K,D)``."""
    if t.shape[1] == 0:
        return t.new_zeros(*token.shape, t.shape[-1])
    if t.is_contiguous():  # several times faster than indexing by three tensors
        return t.flatten(0, 2).index_select(0, _flat_index(t, token)).view(*token.shape, t.shape[-1])
    b = torch.arange(t.shape[0], device=t.device)[:, None, None, None]
    return t[b, token, torch.arange(t.shape[2], device=t.device)[:, None]]


def _unpack_add(total: torch.Tensor, token: torch.Tensor, part: torch.Tensor) -> None:
    """Add ``part (B,T,H,K,D)`` to the tokens of ``total (B,S,H,D)`` it belongs to."""
    if total.shape[1]:
        total.view(-1, total.shape[-1]).index_add_(0, _flat_index(total, token), part.flatten(0, 3))


def _packed_logits(
    grouped: torch.Tensor, packed_k: torch.Tensor, allowed: torch.Tensor, config: NSAConfig
) -> torch.Tensor:
    dtype = torch.promote_types(grouped.dtype, torch.float32)
    return ((grouped @ packed_k.mT).to(dtype) * config.scale).masked_fill_(~allowed, NEG_INF)


def selected_attention_by_queries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.selected_attention`. One matrix product per block of keys; reads sizes on the
    host.

    Leading rows that select everything are plain causal attention instead.
    """
    dense = 0
    if not isinstance(q_start, torch.Tensor) and q_start == 0:
        dense = min(dense_prefix(block_indices, config, 0), k.shape[1])
    parts: list[Output] = []
    if dense:
        parts.append(attend_pieces(q[:, :dense], k, v, causal_pieces(q, dense, k.shape[1], 0), config.scale))
    if dense < q.shape[1]:
        start = q_start + dense
        parts.append(ByQueries.apply(q[:, dense:], k, v, block_indices[:, dense:], config, start))
    return (
        parts[0]
        if len(parts) == 1
        else (torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1))
    )
