"""Scores of selection blocks (eq. 8 to 10) from the lse of the compressed logits, and what its kernel shares.

An item is ``TOKENS`` neighbouring tokens of one KV head with all ``G`` query heads. Items are numbered from
the last tokens, which see the most, to the first, the KV heads of all sequences in turn. Products are ``K
Q^T`` with the queries as columns, heads outermost: the layout of a matrix product then keeps the sum over the
heads inside a thread. Everything after the product is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa.blocks import overlap_weights
from nsa.config import NSAConfig
from nsa.kernels._tiles import LOG2E, ONE_LENGTH, Launch, Layout, dot, first_position, rows_of, split

# Dims of one product in fp32, whose operands pass through registers: all dims at once would spill.
SLICE = 32


@triton.jit
def load_dims(base, D: tl.constexpr, FIRST: tl.constexpr, DIMS: tl.constexpr, mask, TRANSPOSED: tl.constexpr):
    """Dims ``FIRST .. FIRST + DIMS`` of the vectors at ``base (M,)``, zeros beyond ``D`` and outside of
    ``mask (M,)``: ``(M, DIMS)``, or ``(DIMS, M)`` if TRANSPOSED.
    """
    dims = FIRST + tl.arange(0, DIMS)
    if TRANSPOSED:
        at, seen = base[None, :] + dims[:, None], mask[None, :]
        if FIRST + DIMS > D:
            seen = seen & (dims < D)[:, None]
    else:
        at, seen = base[:, None] + dims[None, :], mask[:, None]
        if FIRST + DIMS > D:
            seen = seen & (dims < D)[None, :]
    return tl.load(at, mask=seen, other=0.0)


@triton.jit
def sliced_product(rows, row_exists, columns, column_exists, D: tl.constexpr, SLICE: tl.constexpr):
    """Products ``(M,N)`` of the vectors at ``rows (M,)`` and ``columns (N,)``, ``SLICE`` dims at a time."""
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, D, SLICE):
        dims = first + tl.arange(0, SLICE)
        exists = row_exists[:, None] & (dims < D)[None, :]
        left = tl.load(rows[:, None] + dims[None, :], mask=exists, other=0.0)
        exists = column_exists[None, :] & (dims < D)[:, None]
        right = tl.load(columns[None, :] + dims[:, None], mask=exists, other=0.0)
        product = dot(left, right, product)
    return product


@triton.jit
def load_queries(
    q_row, exists, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SLICE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What stays on chip of the queries at ``q_row (M,)``: both parts of them, or where they are if SLICE."""
    if SLICE > 0:
        return q_row, exists
    else:
        q0 = load_dims(q_row, D, 0, D0, exists, TRANSPOSED)
        if D1 > 0:
            return q0, load_dims(q_row, D, D0, D1, exists, TRANSPOSED)
        else:
            return q0, q0


@triton.jit
def visible_blocks(position, num_keys, block, stride):
    """Compressed blocks complete at ``position``. Not below 0 before the division, which rounds to 0."""
    return tl.minimum(tl.maximum(position + 1 + stride - block, 0) // stride, num_keys)


@triton.jit
def _weight(place, LENGTH: tl.constexpr, PEAK: tl.constexpr):
    """Eq. 9's weight at a place of the stencil of ``blocks.overlap_weights``: a trapezoid, 0 outside."""
    return tl.maximum(tl.minimum(tl.minimum(place + 1, LENGTH - place), PEAK), 0).to(tl.float32)


@triton.jit
def _fold(
    query, k_head, stride_kc, lse, visible, first_block, num_keys, scale_log2, PIECE: tl.constexpr,
    TOKENS: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SLICE: tl.constexpr, PER_BLOCK: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr,
    LENGTH: tl.constexpr, PEAK: tl.constexpr,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the compressed blocks that begin in ``BLOCKS`` selection blocks, or in one piece of one, add to
    their own scores and to those of the next one each, both ``(BLOCKS, TOKENS)``.
    """
    within: tl.constexpr = COLUMNS // BLOCKS
    column = tl.arange(0, COLUMNS)
    inside = PIECE * within + column % within
    key = (first_block + column // within) * PER_BLOCK + inside
    exists = key < num_keys if MASKED else key >= 0
    if PADDED != PER_BLOCK:
        exists = exists & (inside < PER_BLOCK)
    at = k_head + key.to(tl.int64) * stride_kc
    if SLICE > 0:
        logits = sliced_product(at, exists, query[0], query[1], D, SLICE)
    else:
        logits = dot(load_dims(at, D, 0, D0, exists, False), query[0], None)
        if D1 > 0:
            logits = dot(load_dims(at, D, D0, D1, exists, False), query[1], logits)
    exponent = logits * scale_log2 - lse[None, :]
    if MASKED:
        seen = exists[:, None] & (key[:, None] < visible[None, :])
        exponent = tl.where(seen, exponent, float("-inf"))
    p = tl.exp2(exponent)
    p = tl.sum(tl.reshape(p, (COLUMNS, GP, TOKENS)), 1)
    mine = p * _weight(inside - FIRST, LENGTH, PEAK)[:, None]
    mine = tl.sum(tl.reshape(mine, (BLOCKS, within, TOKENS)), 1)
    if FIRST == 0:
        return mine, tl.zeros_like(mine)
    else:
        following = p * _weight(inside - PER_BLOCK - FIRST, LENGTH, PEAK)[:, None]
        return mine, tl.sum(tl.reshape(following, (BLOCKS, within, TOKENS)), 1)


@triton.jit
def _scores_walk(
    carry, query, k_head, stride_kc, lse, visible, scores, begin, stop, width, num_keys, scale_log2,
    TOKENS: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SLICE: tl.constexpr, PER_BLOCK: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr,
    LENGTH: tl.constexpr, PEAK: tl.constexpr,
    BLOCKS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store the scores of the selection blocks ``begin .. stop``; ``carry (TOKENS,)`` is what the last one
    before adds to the first.
    """
    block = tl.arange(0, BLOCKS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    for first_block in range(begin, stop, BLOCKS):
        mine, following = _fold(
            query, k_head, stride_kc, lse, visible, first_block, num_keys, scale_log2, 0,
            TOKENS, GP, D, D0, D1, SLICE, PER_BLOCK, PADDED, FIRST, LENGTH, PEAK, BLOCKS, COLUMNS, MASKED,
        )  # fmt: skip
        for piece in tl.static_range(1, PADDED * BLOCKS // COLUMNS):
            more, after = _fold(
                query, k_head, stride_kc, lse, visible, first_block, num_keys, scale_log2, piece,
                TOKENS, GP, D, D0, D1, SLICE, PER_BLOCK, PADDED, FIRST, LENGTH, PEAK, BLOCKS, COLUMNS, MASKED,
            )  # fmt: skip
            mine += more
            following += after
        if FIRST != 0:
            if BLOCKS == 1:
                mine += carry[None, :]
            else:
                above = tl.maximum(block - 1, 0) + tl.zeros((1, TOKENS), tl.int32)
                mine += tl.where(block == 0, carry[None, :], tl.gather(following, above, 0))
            carry = tl.sum(tl.where(block == BLOCKS - 1, following, 0.0), 0)
        at = (first_block + block) * TOKENS + token
        tl.store(scores + at, mine, mask=first_block + block < width)
    return carry


LENGTHS = ["q_start", "num_queries", "num_keys", "kv_heads", "block", "stride"]
STRIDES = ("stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_kc", "stride_kh")
_SCORE_LENGTHS = [*LENGTHS, "first_item", "heads", "width", "block_size"]


@triton.jit(do_not_specialize=_SCORE_LENGTHS)
def _scores_kernel(
    q, k, lse, scores, q_bounds, k_bounds, starts, q_start, num_queries, num_keys, kv_heads, block, stride,
    first_item, heads, width, block_size, scale_log2, lse_scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kc, stride_kh,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    SLICE: tl.constexpr, PER_BLOCK: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr,
    LENGTH: tl.constexpr, PEAK: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scores ``(width, TOKENS)`` of one item, of every block up to its last token's own.

    A selection block holds ``PER_BLOCK`` compressed blocks, filled up to a power of two with columns nobody
    sees.
    """
    item = first_item + tl.program_id(0)
    tile = tl.cdiv(num_queries, TOKENS) - 1 - item // heads
    head, sequence = (item % kv_heads).to(tl.int64), (item % heads // kv_heads).to(tl.int64)
    first_row, _ = rows_of(q_bounds, sequence, num_queries, num_queries, 1)
    q_at, num_queries = rows_of(q_bounds, sequence, num_queries, stride_qb, stride_qt)
    k_at, num_keys = rows_of(k_bounds, sequence, num_keys, stride_kb, stride_kc)
    if q_bounds is not None and tile * TOKENS >= num_queries:  # of a shorter sequence
        return

    # Columns beyond the last head or token repeat it, and like those that see no block have
    # an lse of +inf: they add 0. Zeros in their place would turn a key of infinity into NaN.
    row = tl.arange(0, GP * TOKENS)
    exists = (tile * TOKENS + row % TOKENS < num_queries) & (row // TOKENS < G)
    token = tl.minimum(tile * TOKENS + row % TOKENS, num_queries - 1)
    start = first_position(starts, q_start, sequence).to(tl.int32)
    visible = visible_blocks(start + token, num_keys, block, stride)
    q_head = head * G + tl.minimum(row // TOKENS, G - 1)
    q_row = q + q_at + token.to(tl.int64) * stride_qt + q_head * stride_qh
    k_head = k + k_at + head * stride_kh
    at = (first_row + token) * (kv_heads * G) + q_head
    shift = tl.load(lse + at, mask=exists & (visible > 0), other=float("inf")) * lse_scale
    query = load_queries(q_row, row >= 0, D, D0, D1, SLICE, True)

    latest = start + tl.minimum(tile * TOKENS + TOKENS, num_queries) - 1
    stop = tl.minimum(latest // block_size + 1, width)
    scores += tl.program_id(0).to(tl.int64) * width * TOKENS
    carry = tl.zeros((TOKENS,), tl.float32)
    whole = 0
    if PADDED == PER_BLOCK:
        seen_by_all = visible_blocks(start + tile * TOKENS, num_keys, block, stride) // PER_BLOCK
        whole = tl.minimum(seen_by_all, stop) // BLOCKS * BLOCKS
        carry = _scores_walk(
            carry, query, k_head, stride_kc, shift, visible, scores, 0, whole, width, num_keys, scale_log2,
            TOKENS, GP, D, D0, D1, SLICE, PER_BLOCK, PADDED, FIRST, LENGTH, PEAK, BLOCKS, COLUMNS, False,
        )  # fmt: skip
    _scores_walk(
        carry, query, k_head, stride_kc, shift, visible, scores, whole, stop, width, num_keys, scale_log2,
        TOKENS, GP, D, D0, D1, SLICE, PER_BLOCK, PADDED, FIRST, LENGTH, PEAK, BLOCKS, COLUMNS, True,
    )  # fmt: skip


def block_scores(
    scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lse_scale: float,
    starts: tuple[torch.Tensor | None, int],
    layout: Layout,
    config: NSAConfig,
    launch: Launch,
    *,
    first_item: int,
    num_items: int,
) -> None:
    """Fill ``scores (items, width, tokens)`` fp32 for the items ``first_item ..``, blocks up to the last
    token's own; what later ones hold stays.

    ``lse (B,T,HQ)`` is contiguous and, times ``lse_scale``, base 2; ``launch`` as in
    :func:`items_of`.
    """
    _scores_kernel[(num_items,)](
        q,
        k,
        lse,
        scores,
        layout.q_bounds,
        layout.k_bounds,
        *starts,
        layout.num_queries,
        layout.num_keys,
        config.num_kv_heads,
        config.compression_block_size,
        config.compression_stride,
        first_item,
        layout.sequences * config.num_kv_heads,
        scores.shape[1],
        config.selection_block_size,
        config.scale * LOG2E,
        lse_scale,
        *q.stride()[:3],
        *k.stride()[:3],
        **constexprs(config, q.dtype, launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def tokens_of_item(config: NSAConfig, launch: Launch) -> int:
    """Tokens of an item where a tile has ``launch.block_n`` queries; one, if the heads of one fill it."""
    return max(1, launch.block_n // triton.next_power_of_2(config.group_size))


def dims(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernels' constants of the keys' dims."""
    first, rest = split(head_dim)
    return {"D": head_dim, "D0": first, "D1": rest, "SLICE": SLICE if dtype == torch.float32 else 0}


def constexprs(config: NSAConfig, dtype: torch.dtype, launch: Launch) -> dict[str, int]:
    """What the kernel is compiled for, by its arguments' names."""
    first, weights = overlap_weights(config)
    per_block = config.selection_block_size // config.compression_stride
    padded = triton.next_power_of_2(per_block)
    return {
        "G": config.group_size,
        "GP": triton.next_power_of_2(config.group_size),
        **dims(config.head_dim, dtype),
        "PER_BLOCK": per_block,
        "PADDED": padded,
        "FIRST": first,
        "LENGTH": len(weights),
        "PEAK": max(weights),
        "TOKENS": tokens_of_item(config, launch),
        "BLOCKS": max(1, launch.block_m // padded),
        "COLUMNS": launch.block_m,
    }


def signature(lengths: list[str]) -> dict[str, str]:
    """Types of the arguments that both kernels take, for bf16, as a compiler is told them."""
    pointers = {"q": "*bf16:16", "k": "*bf16:16", "lse": "*fp32:16", "scale_log2": "fp32"}
    return pointers | dict.fromkeys(lengths, "i32") | dict.fromkeys(STRIDES, "i32:16")


def static(config: NSAConfig, launch: Launch) -> dict[str, Any]:
    """What a compiler is given to judge the kernel by, for bf16."""
    return {
        "kernel": _scores_kernel,
        "name": f"scores_d{config.head_dim}",
        "signature": signature(_SCORE_LENGTHS) | {"scores": "*fp32:16", "lse_scale": "fp32"},
        "constexprs": {**ONE_LENGTH, **constexprs(config, torch.bfloat16, launch)},
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
