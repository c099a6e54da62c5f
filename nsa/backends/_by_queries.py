"""Selected attention from the keys' side: for each block of keys, the queries that selected it are one matrix
product.

All sequences and KV heads go together, so a block is one batched product and one scatter; shorter lists are
filled up with a row of zeros that nobody reads. Softmax is in base 2: exp2 costs a third of exp in torch's
CPU kernels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from nsa.backends._pieces import NEG_INF, Output
from nsa.blocks import num_selection_blocks, query_positions
from nsa.config import NSAConfig

# Logits of one product (rows x l', all heads), so that they stay in the cache.
TILE_ELEMENTS = 2**19
# 2^logit neither overflows in a sum nor turns subnormal while |logit| stays under this: no row maximum
# needed.
SAFE_LOGIT = 96.0
# Lists are filled up to a multiple of this: a matrix product computes the rows of its last, partial tile by
# another kernel, and how many later rows chose a block must not change an earlier row by a bit.
FULL_ROWS = 16
LN_2 = math.log(2.0)


class Tile(NamedTuple):
    """Queries that selected one block: row numbers ``(B*H, m)`` into all heads' rows, the key range, and the
    additive mask ``(B*H, own rows, 1, keys)`` of the leading rows that may lie inside the block, or None.
    """

    rows: torch.Tensor
    key: int
    key_end: int
    diagonal: torch.Tensor | None


def _tiles(
    block_indices: torch.Tensor, position: torch.Tensor, length: int, config: NSAConfig, dtype: torch.dtype
) -> list[Tile]:
    """``block_indices (N,T,n), position (N,T)`` ascending; rows ascend inside a list."""
    size, num_blocks = config.selection_block_size, num_selection_blocks(length, config)
    heads, count_rows = position.shape
    chosen = torch.zeros(heads, count_rows, num_blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, torch.where(block_indices < 0, num_blocks, block_indices).long(), True)
    block = torch.arange(num_blocks)
    own = (position // size).unsqueeze(-1)
    # A block that begins after the query is never attended, whoever put it in the list.
    chosen = chosen[..., :num_blocks] & (block <= own)
    counts = chosen.sum(1).t()  # (blocks, N)
    inside = (chosen & (block == own)).sum(1).amax(0).tolist()
    widths = counts.amax(1)
    widths += -widths % FULL_ROWS

    # Every list at once: entry r of head h in block b goes to slot base[b] + h * width[b] + r.
    which, head, row = chosen.permute(2, 0, 1).nonzero().unbind(1)
    first = counts.flatten().cumsum(0) - counts.flatten()
    rank = torch.arange(len(which)) - first.view(num_blocks, heads)[which, head]
    ends = (widths * heads).cumsum(0)
    slots = torch.full((int(ends[-1]) if num_blocks else 0,), heads * count_rows)
    slots[ends[which] - widths[which] * (heads - head) + rank] = head * count_rows + row

    at = torch.cat([position.flatten(), position.new_full((1,), length)])
    triangle = torch.full((size, size), NEG_INF, dtype=dtype).triu(1).unsqueeze(1)
    step = max(size, TILE_ELEMENTS // (size * heads * config.group_size)) // FULL_ROWS * FULL_ROWS
    step = max(step, FULL_ROWS, -(-size // FULL_ROWS) * FULL_ROWS)
    tiles = []
    for index, (end, width) in enumerate(zip(ends.tolist(), widths.tolist(), strict=True)):
        key, key_end = index * size, min((index + 1) * size, length)
        lists = slots[end - heads * width : end].view(heads, width)
        for start in range(0, width, step):
            rows, diagonal = lists[:, start : start + step], None
            if start == 0 and inside[index]:
                # A row beyond the block hides nothing, as the triangle's last row.
                offset = (at[rows[:, : inside[index]]] - key).clamp_max(size - 1)
                diagonal = triangle[offset, :, : key_end - key]
            tiles.append(Tile(rows, key, key_end, diagonal))
    return tiles


def _logits(flat: torch.Tensor, keys: torch.Tensor, tile: Tile, group: int) -> torch.Tensor:
    """Logits ``(N, m * G, keys)`` of a tile; ``flat (N*T + 1, G*D)``, ``keys (N,S,D)``."""
    heads, width = tile.rows.shape
    queries = flat.index_select(0, tile.rows.flatten()).view(heads, width * group, -1)
    logits = torch.bmm(queries, keys[:, tile.key : tile.key_end].mT)
    if tile.diagonal is not None:
        logits.unflatten(1, (width, group))[:, : tile.diagonal.shape[1]].add_(tile.diagonal)
    return logits


class ByQueries(torch.autograd.Function):
    """``(q, k, v, block_indices, config, q_start) -> (o, lse)``, as
    :func:`nsa.reference.selected_attention`.
    """

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
        batch, count_rows = q.shape[:2]
        kv_heads, group = config.num_kv_heads, config.group_size
        dtype = torch.promote_types(q.dtype, torch.float32)
        position = query_positions(q_start, count_rows, q.device).expand(batch, -1)
        position = position.repeat_interleave(kv_heads, 0)
        lists = block_indices.transpose(1, 2).flatten(0, 1)
        flat = _flat_rows(q, kv_heads, dtype) * (config.scale / LN_2)
        keys, values = _by_head(k, dtype), _by_head(v, dtype)
        tiles = _tiles(lists, position, k.shape[1], config, dtype)
        shift = _shift(flat, keys, position, tiles, group)
        total = flat.new_zeros(len(flat), group * v.shape[-1])
        sums = flat.new_zeros(len(flat), group)
        for tile in tiles:
            rows = tile.rows.flatten()
            p = _logits(flat, keys, tile, group)
            if shift is not None:
                p -= shift.index_select(0, rows).view(len(p), -1, 1)
            p.exp2_()
            sums.index_add_(0, rows, p.sum(-1).view(-1, group))
            part = torch.bmm(p, values[:, tile.key : tile.key_end])
            total.index_add_(0, rows, part.view(len(rows), -1))
        empty = sums == 0
        lse = sums.log() if shift is None else sums.log() + shift * LN_2
        lse.masked_fill_(empty, NEG_INF)
        o = total.unflatten(1, (group, -1)).div_(sums.masked_fill(empty, 1.0).unsqueeze(-1))
        out = _unflat_rows(o.flatten(1), batch, count_rows, kv_heads, group).to(q.dtype)
        log_sum = _unflat_rows(lse, batch, count_rows, kv_heads, group).squeeze(-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.config = tiles, config
        ctx.mark_non_differentiable(log_sum)
        return out, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        batch, count_rows = q.shape[:2]
        kv_heads, group, scale = ctx.config.num_kv_heads, ctx.config.group_size, ctx.config.scale
        flat = _flat_rows(q, kv_heads, lse.dtype) * (scale / LN_2)
        upstreams = _flat_rows(grad, kv_heads, lse.dtype)
        keys, values = _by_head(k, lse.dtype), _by_head(v, lse.dtype)
        products = upstreams * _flat_rows(out, kv_heads, lse.dtype)
        delta = products.unflatten(1, (group, -1)).sum(-1)
        shift = lse.masked_fill(lse == NEG_INF, 0.0) / LN_2
        dq, dk, dv = torch.zeros_like(flat), torch.zeros_like(keys), torch.zeros_like(values)
        for tile in ctx.tiles:
            rows, seen = tile.rows.flatten(), slice(tile.key, tile.key_end)
            heads = len(tile.rows)
            upstream = upstreams.index_select(0, rows).view(heads, -1, v.shape[-1])
            p = _logits(flat, keys, tile, group)
            p -= shift.index_select(0, rows).view(heads, -1, 1)
            p.exp2_()
            dv[:, seen] += torch.bmm(p.mT, upstream)
            ds = torch.bmm(upstream, values[:, seen].mT)
            ds -= delta.index_select(0, rows).view(heads, -1, 1)
            ds *= p
            dk[:, seen] += torch.bmm(ds.mT, flat.index_select(0, rows).view(heads, -1, k.shape[-1]))
            dq.index_add_(0, rows, torch.bmm(ds, keys[:, seen]).view(len(rows), -1))
        dq *= scale
        dk *= LN_2
        return (
            _unflat_rows(dq, batch, count_rows, kv_heads, group).to(q.dtype),
            dk.unflatten(0, (batch, kv_heads)).transpose(1, 2).to(k.dtype),
            dv.unflatten(0, (batch, kv_heads)).transpose(1, 2).to(v.dtype),
            None,
            None,
            None,
        )


def _by_head(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``(B,S,H,D) -> (B*H,S,D)``, contiguous: torch's CPU matrix product is twice as slow over a strided
    K.
    """
    return t.transpose(1, 2).flatten(0, 1).to(dtype).contiguous()


def _flat_rows(t: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """``(B,T,H*G,D) -> (B*H*T + 1, G*D)``; the last row is zero, for lists to fill up with."""
    rows = t.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(3).flatten(0, 2).to(dtype)
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


def _unflat_rows(t: torch.Tensor, batch: int, rows: int, kv_heads: int, group: int) -> torch.Tensor:
    """The inverse, ``(B*H*T + 1, G*D) -> (B,T,H*G,D)``."""
    heads = t[:-1].unflatten(1, (group, -1)).unflatten(0, (batch, kv_heads, rows))
    return heads.transpose(1, 2).flatten(2, 3)


def _shift(
    flat: torch.Tensor, keys: torch.Tensor, position: torch.Tensor, tiles: list[Tile], group: int
) -> torch.Tensor | None:
    """What to take from each row's logits before exp2, ``(N*T + 1, G)``: 0 while none can leave the safe
    range, else the row's own maximum; None when it is 0 everywhere.

    |q| times the longest key up to the query bounds a row's logits (Cauchy-Schwarz), so the common case costs
    two norms. Later keys take no part in it: they must not change a row by a bit.
    """
    length = keys.shape[1]
    if length == 0:
        return None
    longest = _squares(keys).cummax(1).values.gather(1, position.clamp_max(length - 1))
    longest = torch.nn.functional.pad(longest.flatten(), (0, 1))
    safe = _squares(flat.unflatten(1, (group, -1))) * longest.unsqueeze(1) <= SAFE_LOGIT**2
    if bool(safe.all()):
        return None
    best = flat.new_full((len(flat), group), NEG_INF)
    for tile in tiles:
        rows = tile.rows.flatten()
        top = _logits(flat, keys, tile, group).amax(-1).view(-1, group)
        best[rows] = torch.maximum(best[rows], top)
    return best.masked_fill(safe | (best == NEG_INF), 0.0)


def _squares(t: torch.Tensor) -> torch.Tensor:
    """Squared norm over the last dim, as a product with ones: torch's norm over a short dim is not
    vectorised.
    """
    return t.square() @ t.new_ones(t.shape[-1])
