"""Top-n of block scores: the ``n`` blocks of each (token, KV head), exactly, in any number of blocks.

Forced blocks lie at both ends of a query's blocks, so only those between compete, for the slots left over.
Scores are not negative, so their bits order as they do: the threshold that keeps as many as there are slots
is found by bisection of an int32, and a prefix sum puts what is kept in ascending order. Nothing is sorted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa.config import NSAConfig
from nsa.kernels._installed import interpreted
from nsa.kernels._tiles import Layout, first_position, rows_of

# Predicted: one warp holds a segment of 4 rows in 8 registers a thread and never waits for another warp;
# twice the segment leaves room for three quarters of the warps. The interpreter's time goes by programs.
SEGMENT = 128 if interpreted() else 64
ROWS = 512 if interpreted() else 4
NUM_WARPS = 1

# The bits of +inf: a score of infinity or NaN, which only inputs that are not finite give, is the best.
_MOST = tl.constexpr(0x7F800000)


@triton.jit
def _keys(scores, row, block, mask, width, ROWS_OF_TILE: tl.constexpr):
    """The scores of ``block (M,R)`` as ordered int32, 0 for blocks that were not scored, -1 outside of
    ``mask``.
    """
    found = tl.load(scores + row + block * ROWS_OF_TILE, mask=mask & (block < width), other=0.0)
    bits = tl.minimum(tl.maximum(found.to(tl.int32, bitcast=True), 0), _MOST)
    return tl.where(mask, bits, -1)


@triton.jit
def _threshold(keys, held, need, floor):
    """The largest ``x (R,)`` that at least ``need`` of both reach, or one that exactly ``need`` reach.

    ``floor``: as many are known to reach it. A row with no more than ``need`` keys keeps it.
    """
    low = floor
    high = tl.maximum(tl.max(keys, 0), tl.max(held, 0)) + 1
    count = tl.sum((keys >= 0).to(tl.int32), 0) + tl.sum((held >= 0).to(tl.int32), 0)
    searching = (count > need) & (high - low > 1)
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = low + (high - low) // 2
        here = tl.sum((keys >= middle[None, :]).to(tl.int32), 0)
        count = here + tl.sum((held >= middle[None, :]).to(tl.int32), 0)
        low = tl.where(searching & (count >= need), middle, low)
        high = tl.where(searching & (count < need), middle, high)
        searching = searching & (count != need) & (high - low > 1)
    return low


_LENGTHS = [
    "q_start", "first_item", "num_queries", "heads", "kv_heads", "width", "num_blocks", "block_size",
    "initial", "local", "n",
]  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def _top_n_kernel(
    scores,
    chosen,
    q_bounds,
    starts,
    q_start,
    first_item,
    num_queries,
    heads,
    kv_heads,
    width,
    num_blocks,
    block_size,
    initial,
    local,
    n,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    N_PADDED: tl.constexpr,
):
    """``ROWS`` of the ``TOKENS`` tokens of one item, a segment of blocks at a time.

    The best so far are kept in ``chosen`` itself and compete again with the next segment.
    """
    parts: tl.constexpr = TOKENS // ROWS
    local_item = tl.program_id(0) // parts
    item = first_item + local_item
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    token = (tl.cdiv(num_queries, TOKENS) - 1 - item // heads) * TOKENS + row
    sequence = (item % heads // kv_heads).to(tl.int64)
    first_row, num_queries = rows_of(q_bounds, sequence, num_queries, num_queries, 1)

    own = (first_position(starts, q_start, sequence).to(tl.int32) + token) // block_size
    end = tl.where(token < num_queries, tl.minimum(own + 1, num_blocks), 0)
    first = tl.minimum(initial, end)
    last = tl.minimum(tl.maximum(own + 1 - local, first), end)
    need = n - first - (end - last)

    scores += local_item.to(tl.int64) * width * TOKENS
    begin = token - row  # of the item
    chosen += ((first_row + begin) * kv_heads + item % kv_heads) * n
    # 32-bit offsets of the rows' first slots, and of the first one after the initial blocks.
    out = row * kv_heads * n
    free = (out + first)[None, :]
    slot = tl.arange(0, N_PADDED)[:, None]
    taken = tl.zeros_like(first)
    floor = tl.zeros_like(first)
    for start in range(0, tl.max(last, 0), SEGMENT):
        block = start + tl.arange(0, SEGMENT)[:, None] + tl.zeros_like(row)[None, :]
        competes = (block >= first[None, :]) & (block < last[None, :])
        keys = _keys(scores, row[None, :], block, competes, width, TOKENS)
        holds = slot < taken[None, :]
        before = tl.load(chosen + free + slot, mask=holds, other=0)
        held = _keys(scores, row[None, :], before, holds, width, TOKENS)

        floor = _threshold(keys, held, need, floor)
        # Above the threshold in the lower half of a word, at it in the upper: one sum and one scan for both.
        kind = tl.where(keys > floor[None, :], 1, tl.where(keys == floor[None, :], 65536, 0))
        held_kind = tl.where(held > floor[None, :], 1, tl.where(held == floor[None, :], 65536, 0))
        count, held_count = tl.sum(kind, 0), tl.sum(held_kind, 0)
        scan, held_scan = tl.cumsum(kind, 0), tl.cumsum(held_kind, 0)
        # Of those at the threshold the first ones, so that a tie goes to the lower index.
        held_left = need - count % 65536 - held_count % 65536
        left = tl.maximum(held_left - held_count // 65536, 0)
        held_left = tl.minimum(held_left, held_count // 65536)
        keep = (kind == 1) | ((kind > 1) & (scan // 65536 <= left[None, :]))
        held_keep = (held_kind == 1) | ((held_kind > 1) & (held_scan // 65536 <= held_left[None, :]))
        held_taken = held_count % 65536 + held_left
        place = held_taken[None, :] + scan % 65536 + tl.minimum(scan // 65536, left[None, :]) - 1
        held_place = held_scan % 65536 + tl.minimum(held_scan // 65536, held_left[None, :]) - 1
        tl.debug_barrier()  # all have been read before any is overwritten
        tl.store(chosen + free + held_place, before, mask=held_keep)
        tl.store(chosen + free + place, block, mask=keep)
        tl.debug_barrier()
        taken = held_taken + count % 65536 + tl.minimum(count // 65536, left)

    after = slot - (first + taken)[None, :]
    forced = tl.where(slot < first[None, :], slot, last[None, :] + after)
    filled = (slot < first[None, :]) | ((after >= 0) & (after < (end - last)[None, :]))
    write = (token < num_queries)[None, :] & (slot < n) & ((slot < first[None, :]) | (after >= 0))
    tl.store(chosen + out[None, :] + slot, tl.where(filled, forced, -1), mask=write)


def top_n(
    chosen: torch.Tensor,
    scores: torch.Tensor,
    starts: tuple[torch.Tensor | None, int],
    layout: Layout,
    config: NSAConfig,
    *,
    num_blocks: int,
    first_item: int,
    num_items: int,
) -> None:
    """Fill ``chosen (B,T,H,n)`` int32 for the items ``first_item ..`` from ``scores (items, width, tokens)``
    fp32.

    Items are numbered as in :mod:`nsa.kernels._block_scores`. Blocks from ``width`` on score 0; none exists
    from ``num_blocks`` on.
    """
    _, width, tokens = scores.shape
    kv_heads, n = chosen.shape[2:]
    shape = constexprs(config, tokens)
    _top_n_kernel[(num_items * (tokens // shape["ROWS"]),)](
        scores,
        chosen,
        layout.q_bounds,
        *starts,
        first_item,
        layout.num_queries,
        layout.sequences * kv_heads,
        kv_heads,
        width,
        num_blocks,
        config.selection_block_size,
        config.num_initial_blocks,
        config.num_local_blocks,
        n,
        **shape,
        num_warps=NUM_WARPS,
    )


def constexprs(config: NSAConfig, tokens: int) -> dict[str, int]:
    """What the kernel is compiled for, by its arguments' names."""
    slots = triton.next_power_of_2(config.num_selected_blocks)
    return {"TOKENS": tokens, "ROWS": min(ROWS, tokens), "SEGMENT": SEGMENT, "N_PADDED": slots}


def static(config: NSAConfig, tokens: int) -> dict[str, Any]:
    """What a compiler is given to judge the kernel by, for items of ``tokens``."""
    return {
        "kernel": _top_n_kernel,
        "name": "top_n",
        "signature": {"scores": "*fp32:16", "chosen": "*i32:16", **dict.fromkeys(_LENGTHS, "i32")},
        "constexprs": {"q_bounds": None, "starts": None, **constexprs(config, tokens)},
        "num_warps": NUM_WARPS,
    }
