"""Selected attention by gathering: keys to each query, or queries to each key block. No loop over queries, any device.

``gather:keys`` packs the selected K and V of each query, in chunks of bounded memory: one query at a time (decode), or a
GPU. ``gather:queries`` turns the loop around: for each block of keys, the queries that selected it form one matrix
product, so K and V are read once and nothing is masked but the diagonal. Work grows with ``T * n * l'``, never with S^2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nsa.blocks import num_selection_blocks, query_positions
from nsa.config import NSAConfig

Output = tuple[torch.Tensor, torch.Tensor]

NEG_INF = float("-inf")
# Bytes of gathered K and V of one chunk.
PACKED_BYTES = 2**26
PACKED_BYTES_CPU = 2**22
# Fewer queries than this a sequence do not fill a matrix product per block.
QUERIES_FROM = 64
# Logits of one matrix product (rows x l'), so that they stay in the cache.
TILE_ELEMENTS = 2**19
# 2^logit neither overflows in a sum nor turns subnormal while |logit| stays under this, so no row maximum is needed.
SAFE_LOGIT = 96.0
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
    """See :func:`nsa.reference.selected_attention`. Gathers queries on a CPU from 64 rows on, keys otherwise."""
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
    batch, rows, kv_heads, slots = block_indices.shape
    position = query_positions(q_start, rows, q.device).expand(batch, -1)
    per_row = (
        batch
        * kv_heads
        * slots
        * config.selection_block_size
        * (k.shape[-1] + v.shape[-1])
        * k.element_size()
    )
    budget = PACKED_BYTES_CPU if q.device.type == "cpu" else PACKED_BYTES
    step = max(1, budget // max(1, per_row))
    outputs = []
    for row in range(0, rows, step):
        span = slice(row, row + step)
        args = (q[:, span], k, v, block_indices[:, span], position[:, span], config)
        # What a chunk packs is packed again in the backward instead of being kept.
        recompute = torch.is_grad_enabled() and rows > step
        outputs.append(checkpoint(_packed, *args, use_reentrant=False) if recompute else _packed(*args))
    if len(outputs) == 1:
        o, lse = outputs[0]
    else:
        o, lse = torch.cat([o for o, _ in outputs], 1), torch.cat([lse for _, lse in outputs], 1)
    return o, lse.detach()


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    position: torch.Tensor,
    config: NSAConfig,
) -> Output:
    size, length = config.selection_block_size, k.shape[1]
    ordered = block_indices.sort(-1).values
    repeated = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    ordered = ordered.masked_fill(repeated, -1)
    token = ordered.long().unsqueeze(-1) * size + torch.arange(size, device=q.device)
    token = token.flatten(-2)  # (B, T, H, N * l')
    allowed = (token >= 0) & (token <= position[..., None, None]) & (token < length)
    token = token.clamp(0, max(0, length - 1))
    b = torch.arange(k.shape[0], device=q.device)[:, None, None, None]
    h = torch.arange(k.shape[2], device=q.device)[:, None]
    packed_k, packed_v = k[b, token, h], v[b, token, h]  # (B, T, H, N * l', D)

    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(2, (config.num_kv_heads, -1))  # (B, T, H, G, D)
    logits = (grouped @ packed_k.transpose(-1, -2)).to(dtype) * config.scale
    allowed = allowed.unsqueeze(-2)
    some = allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~allowed, NEG_INF).masked_fill(~some, 0.0)
    lse = logits.detach().logsumexp(-1).masked_fill(~some.squeeze(-1), NEG_INF)
    p = (logits.softmax(-1) * some).to(v.dtype)
    return (p @ packed_v).flatten(2, 3), lse.flatten(2, 3)


def selected_attention_by_queries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.selected_attention`. One matrix product per block of keys; reads sizes on the host."""
    result: Output = _ByQueries.apply(q, k, v, block_indices, config, q_start)  # type: ignore[no-untyped-call]
    return result


class _Tile(NamedTuple):
    """Queries of one sequence and KV head that selected one block: row numbers, key range, and the additive mask
    ``(own rows, 1, keys)`` of the leading rows that lie inside the block, None when there are none."""

    rows: torch.Tensor
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
    """Tiles of one sequence and head. ``block_indices (T,N), position (T,)`` ascending; rows ascend inside a tile."""
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
            tiles.append(_Tile(rows, key, key_end, diagonal))
        start += count
    return tiles


def _scores(flat: torch.Tensor, k: torch.Tensor, tile: _Tile, group: int) -> torch.Tensor:
    """Logits ``(rows * G, keys)`` of a tile; ``flat (T, G * D)``."""
    logits = flat.index_select(0, tile.rows).view(-1, k.shape[1]) @ k[tile.key : tile.key_end].t()
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
        batch, rows, _, dim = q.shape
        kv_heads, group = config.num_kv_heads, config.group_size
        dtype = torch.promote_types(q.dtype, torch.float32)
        position = query_positions(q_start, rows, q.device).expand(batch, -1)
        o = torch.empty(batch, rows, kv_heads, group, v.shape[-1], dtype=q.dtype)
        lse = torch.empty(batch, rows, kv_heads, group, dtype=dtype)
        plan = []
        for b in range(batch):
            for h in range(kv_heads):
                tiles = _tiles(block_indices[b, :, h], position[b], k.shape[1], group, config, dtype)
                plan.append(tiles)
                queries = q[b].unflatten(1, (kv_heads, group))[:, h].to(dtype) * (config.scale / LN_2)
                out, log_sum = _forward_head(queries, k[b, :, h].to(dtype), v[b, :, h].to(dtype), tiles)
                o[b, :, h], lse[b, :, h] = out, log_sum
        o, lse = o.flatten(2, 3), lse.flatten(2, 3)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.plan, ctx.config = plan, config
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        config = ctx.config
        kv_heads, group = config.num_kv_heads, config.group_size
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        plan = iter(ctx.plan)
        grouped = [t.unflatten(2, (kv_heads, group)) for t in (q, grad, o, lse, dq)]
        for b in range(q.shape[0]):
            for h in range(kv_heads):
                queries, upstream, out, log_sum = (t[b, :, h].to(lse.dtype) for t in grouped[:4])
                head = _backward_head(
                    queries * (config.scale / LN_2), k[b, :, h].to(lse.dtype), v[b, :, h].to(lse.dtype),
                    out, log_sum, upstream, next(plan),
                )  # fmt: skip
                grouped[4][b, :, h] = head[0] * config.scale
                dk[b, :, h], dv[b, :, h] = head[1], head[2]
        return dq, dk, dv, None, None, None


def _forward_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: list[_Tile]) -> Output:
    """``q (T,G,D)`` scaled to base 2, ``k (S,D), v (S,DV) -> o (T,G,DV), lse (T,G)``; empty rows 0 and -inf."""
    rows, group, _ = q.shape
    flat = q.flatten(1)
    shift = _shift(flat, k, tiles, group)
    total = q.new_zeros(rows, group * v.shape[1])
    sums = q.new_zeros(rows, group)
    for tile in tiles:
        p = _scores(flat, k, tile, group)
        if shift is not None:
            p -= shift.index_select(0, tile.rows).view(-1, 1)
        p.exp2_()
        sums.index_add_(0, tile.rows, p.sum(-1).view(-1, group))
        total.index_add_(0, tile.rows, (p @ v[tile.key : tile.key_end]).view(len(tile.rows), -1))
    empty = sums == 0
    lse = sums.log() if shift is None else sums.log() + shift * LN_2
    o = total.view(rows, group, -1) / sums.masked_fill(empty, 1.0).unsqueeze(-1)
    return o, lse.masked_fill(empty, NEG_INF)


def _shift(flat: torch.Tensor, k: torch.Tensor, tiles: list[_Tile], group: int) -> torch.Tensor | None:
    """What to take from each row's logits before exp2: None while no logit can leave the safe range, else the maximum.

    |q| |k| bounds every logit (Cauchy-Schwarz), so the common case costs two norms; a row's own maximum ``(T,G)``, and not
    one shared by several rows, is used otherwise.
    """
    if not tiles or bool(_longest(flat.view(-1, k.shape[1])) * _longest(k) <= SAFE_LOGIT**2):
        return None
    best = flat.new_full((flat.shape[0], group), NEG_INF)
    for tile in tiles:
        top = _scores(flat, k, tile, group).amax(-1).view(-1, group)
        best[tile.rows] = torch.maximum(best[tile.rows], top)
    return best.masked_fill(best == NEG_INF, 0.0)


def _longest(t: torch.Tensor) -> torch.Tensor:
    """Largest squared norm of a row, as a product with ones: torch's norm over a short last dim is not vectorised."""
    return (t.square() @ t.new_ones(t.shape[1])).max()


def _backward_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    tiles: list[_Tile],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one head from logits ``q k``: to the queries ``(T,G,D)`` (base 2), keys ``(S,D)``, values ``(S,DV)``."""
    group, dim = q.shape[1:]
    delta = (grad * o).sum(-1)
    lse = lse.masked_fill(lse == NEG_INF, 0.0) / LN_2
    flat, upstreams = q.flatten(1), grad.flatten(1)
    dq, dk, dv = torch.zeros_like(flat), torch.zeros_like(k), torch.zeros_like(v)
    for tile in tiles:
        keys = slice(tile.key, tile.key_end)
        upstream = upstreams.index_select(0, tile.rows).view(-1, v.shape[1])
        p = _scores(flat, k, tile, group)
        p -= lse.index_select(0, tile.rows).view(-1, 1)
        p.exp2_()
        dv[keys] += p.t() @ upstream
        ds = upstream @ v[keys].t()
        ds -= delta.index_select(0, tile.rows).view(-1, 1)
        ds *= p
        dk[keys] += ds.t() @ flat.index_select(0, tile.rows).view(-1, dim)
        dq.index_add_(0, tile.rows, (ds @ k[keys]).view(len(tile.rows), -1))
    return dq.view_as(q), dk * LN_2, dv
