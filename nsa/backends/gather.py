"""Selected attention by gathering: keys to each query, or queries to each key block. No loop over queries,
any device.

``gather:keys`` packs the selected K and V of each query, in chunks of bounded memory: one query at a time
(decode), or a GPU. ``gather:queries`` turns the loop around: for each block of keys, the queries that
selected it form one matrix product, so K and V are read once and nothing is masked but the diagonal. Work
grows with ``T * n * l'``, never with S^2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from nsa.backends._fused import attend_pieces
from nsa.backends._pieces import NEG_INF, Output, causal_pieces, dense_prefix
from nsa.blocks import num_selection_blocks, query_positions
from nsa.config import NSAConfig

# Bytes of gathered K and V of one chunk.
PACKED_BYTES = 2**26
PACKED_BYTES_CPU = 2**22
# Fewer queries than this a sequence do not fill a matrix product per block.
QUERIES_FROM = 64
# Logits of one matrix product (rows x l'), so that they stay in the cache.
TILE_ELEMENTS = 2**19
# 2^logit neither overflows in a sum nor turns subnormal while |logit| stays under this, so no row maximum is
# needed.
SAFE_LOGIT = 96.0
# Rows are filled up to a multiple of this: a matrix product computes the rows of its last, partial tile by
# another kernel, and how many later rows chose a block must not change an earlier row by a bit.
FULL_ROWS = 16
LN_2 = math.log(2.0)


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
        parts.append(_ByQueries.apply(q[:, dense:], k, v, block_indices[:, dense:], config, start))
    return (
        parts[0]
        if len(parts) == 1
        else (torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1))
    )


class _Tile(NamedTuple):
    """Queries of one sequence and KV head that selected one block: row numbers, the same filled up to whole
    matrix tiles, key range, and the additive mask ``(own rows, 1, keys)`` of the leading rows that lie inside
    the block, None when there are none.
    """

    rows: torch.Tensor
    filled: torch.Tensor
    key: int
    key_end: int
    diagonal: torch.Tensor | None


def _tiles(
    block_indices: torch.Tensor,
    position: torch.Tensor,
    length: int,
    group: int,
    config: NSAConfig,
    dtype: torch.dtype,
) -> list[_Tile]:
    """Tiles of one sequence and head. ``block_indices (T,N), position (T,)`` ascending; rows ascend inside
    a tile.
    """
    size = config.selection_block_size
    num_blocks = num_selection_blocks(length, config)
    chosen = torch.zeros(len(position), num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(1, torch.where(block_indices < 0, num_blocks, block_indices).long(), True)
    block = torch.arange(num_blocks)
    own = (position // size).unsqueeze(1)
    # A block that begins after the query is never attended, whoever put it in the list.
    chosen = chosen[:, :num_blocks] & (block <= own)
    counts = chosen.sum(0).tolist()
    own_counts = (chosen & (block == own)).sum(0).tolist()
    row_of = chosen.t().nonzero()[:, 1]
    step = max(size, TILE_ELEMENTS // (size * group))
    triangle = torch.full((size, size), NEG_INF, dtype=dtype).triu(1).unsqueeze(1)
    tiles, start = [], 0
    for index, (count, inside) in enumerate(zip(counts, own_counts, strict=True)):
        key, key_end = index * size, min((index + 1) * size, length)
        for first in range(start, start + count, step):
            rows = row_of[first : min(first + step, start + count)]
            diagonal = None
            if inside and first == start:
                offset = position[rows[:inside]] - key
                diagonal = triangle[offset, :, : key_end - key]
            filled = torch.nn.functional.pad(rows, (0, -len(rows) % FULL_ROWS))
            tiles.append(_Tile(rows, filled, key, key_end, diagonal))
        start += count
    return tiles


def _scores(flat: torch.Tensor, k: torch.Tensor, tile: _Tile, group: int) -> torch.Tensor:
    """Logits ``(filled rows * G, keys)`` of a tile; ``flat (T, G * D)``."""
    logits = flat.index_select(0, tile.filled).view(-1, k.shape[1]) @ k[tile.key : tile.key_end].t()
    if tile.diagonal is not None:
        inside = tile.diagonal.shape[0]
        logits[: inside * group].view(inside, group, -1).add_(tile.diagonal)
    return logits


class _ByQueries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_indices: torch.Tensor,
        config: NSAConfig,
        q_start: int | torch.Tensor,
    ) -> Output:
        batch, rows = q.shape[:2]
        kv_heads, group = config.num_kv_heads, config.group_size
        dtype = torch.promote_types(q.dtype, torch.float32)
        position = query_positions(q_start, rows, q.device).expand(batch, -1)
        queries = _by_head(q, kv_heads, dtype) * (config.scale / LN_2)
        keys, values = _by_head(k, kv_heads, dtype).squeeze(3), _by_head(v, kv_heads, dtype).squeeze(3)
        o = torch.empty(batch, rows, kv_heads, group, v.shape[-1], dtype=q.dtype)
        lse = torch.empty(batch, rows, kv_heads, group, dtype=dtype)
        plan = []
        for b in range(batch):
            for h in range(kv_heads):
                tiles = _tiles(block_indices[b, :, h], position[b], k.shape[1], group, config, dtype)
                plan.append(tiles)
                o[b, :, h], lse[b, :, h] = _forward_head(
                    queries[b, h], keys[b, h], values[b, h], position[b], tiles
                )
        o, lse = o.flatten(2, 3), lse.flatten(2, 3)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.config = plan, config
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        kv_heads, scale, dtype = ctx.config.num_kv_heads, ctx.config.scale, lse.dtype
        queries, upstream, out = (_by_head(t, kv_heads, dtype) for t in (q, grad, o))
        queries = queries * (scale / LN_2)
        keys, values = _by_head(k, kv_heads, dtype).squeeze(3), _by_head(v, kv_heads, dtype).squeeze(3)
        log_sum = lse.unflatten(2, (kv_heads, -1)).transpose(1, 2).contiguous()
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
        grouped = dq.unflatten(2, (kv_heads, -1))
        plan = iter(ctx.plan)
        for b in range(q.shape[0]):
            for h in range(kv_heads):
                q_head, k_head, v_head = queries[b, h], keys[b, h], values[b, h]
                grads = out[b, h], log_sum[b, h], upstream[b, h]
                head = _backward_head(q_head, k_head, v_head, *grads, next(plan))
                grouped[b, :, h] = head[0] * scale
                dk[b, :, h], dv[b, :, h] = head[1], head[2]
        return dq, dk, dv, None, None, None


def _by_head(t: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """``(B,T,H*G,D) -> (B,H,T,G,D)``, contiguous: a strided K makes torch's CPU matrix product twice as
    slow.
    """
    return t.unflatten(2, (kv_heads, -1)).transpose(1, 2).to(dtype).contiguous()


def _forward_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor, tiles: list[_Tile]
) -> Output:
    """``q (T,G,D)`` scaled to base 2, ``k (S,D), v (S,DV) -> o (T,G,DV), lse (T,G)``; empty rows 0 and
    -inf.
    """
    rows, group, _ = q.shape
    flat = q.flatten(1)
    shift = _shift(flat, k, position, tiles, group)
    total = q.new_zeros(rows, group * v.shape[1])
    sums = q.new_zeros(rows, group)
    for tile in tiles:
        p = _scores(flat, k, tile, group)
        if shift is not None:
            p -= shift.index_select(0, tile.filled).view(-1, 1)
        p.exp2_()
        count = len(tile.rows)
        sums.index_add_(0, tile.rows, p.sum(-1).view(-1, group)[:count])
        part = p @ v[tile.key : tile.key_end]
        total.index_add_(0, tile.rows, part.view(len(tile.filled), -1)[:count])
    empty = sums == 0
    lse = sums.log() if shift is None else sums.log() + shift * LN_2
    o = total.view(rows, group, -1) / sums.masked_fill(empty, 1.0).unsqueeze(-1)
    return o, lse.masked_fill(empty, NEG_INF)


def _shift(
    flat: torch.Tensor, k: torch.Tensor, position: torch.Tensor, tiles: list[_Tile], group: int
) -> torch.Tensor | None:
    """What to take from each row's logits before exp2, ``(T,G)``: 0 while none can leave the safe range, else
    the row's own maximum; None when it is 0 everywhere.

    |q| times the longest key up to the query bounds a row's logits (Cauchy-Schwarz), so the common case costs
    two norms. Later keys take no part in it: they must not change a row by a bit.
    """
    longest = _squares(k).cummax(0).values[position.clamp_max(k.shape[0] - 1)]
    safe = _squares(flat.view(-1, k.shape[1])).view(-1, group) * longest.unsqueeze(1) <= SAFE_LOGIT**2
    if bool(safe.all()):
        return None
    best = flat.new_full((flat.shape[0], group), NEG_INF)
    for tile in tiles:
        top = _scores(flat, k, tile, group).amax(-1).view(-1, group)[: len(tile.rows)]
        best[tile.rows] = torch.maximum(best[tile.rows], top)
    return best.masked_fill(safe | (best == NEG_INF), 0.0)


def _squares(t: torch.Tensor) -> torch.Tensor:
    """Squared norm of each row, as a product with ones: torch's norm over a short dim is not vectorised."""
    return t.square() @ t.new_ones(t.shape[1])


def _backward_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    tiles: list[_Tile],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one head from logits ``q k``: to the queries ``(T,G,D)`` (base 2), keys ``(S,D)``,
    values ``(S,DV)``.
    """
    group, dim = q.shape[1:]
    delta = (grad * o).sum(-1)
    lse = lse.masked_fill(lse == NEG_INF, 0.0) / LN_2
    flat, upstreams = q.flatten(1), grad.flatten(1)
    dq, dk, dv = torch.zeros_like(flat), torch.zeros_like(k), torch.zeros_like(v)
    for tile in tiles:
        keys, count = slice(tile.key, tile.key_end), len(tile.rows) * group
        upstream = upstreams.index_select(0, tile.rows).view(count, -1)
        p = _scores(flat, k, tile, group)[:count]
        p -= lse.index_select(0, tile.rows).view(-1, 1)
        p.exp2_()
        dv[keys] += p.t() @ upstream
        ds = upstream @ v[keys].t()
        ds -= delta.index_select(0, tile.rows).view(-1, 1)
        ds *= p
        dk[keys] += ds.t() @ flat.index_select(0, tile.rows).view(-1, dim)
        dq.index_add_(0, tile.rows, (ds @ k[keys]).view(len(tile.rows), -1))
    return dq.view_as(q), dk * LN_2, dv
