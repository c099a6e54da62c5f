"""Selected attention from the keys' side: each block of keys with the queries that selected it, then a merge.

A block's queries are listed in ascending order, each at a place of its own (:mod:`nsa.kernels._union` counts
who comes before), where the block's part of the output and of the softmax is stored; the merge reads a
query's parts slot by slot. Nothing is added up by atomics, and the grid is an upper bound, so no size is read
on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.config import NSAConfig
from nsa.kernels._key_tile import (
    INDEX_TYPES,
    STATIC_SHAPES,
    STRIDES,
    attend_keys,
    fitting,
    keys_of_tile,
    launches,
    offered,
    signature,
    store_rows,
)
from nsa.kernels._tiles import (
    LOG2E,
    Launch,
    Output,
    capability,
    dims,
    empty_outputs,
    first_position,
    load_queries,
    padded,
    rows_of,
)
from nsa.kernels._union import MOST_TOKENS, Asked, BlockLists, lists_of_blocks, popcount
from nsa.kernels.work import Call, Launched

# Parts of the output and lists of one chunk of queries and KV heads.
CHUNK_BYTES = 2**28
LOG2_OF_E = tl.constexpr(LOG2E)
_PLACE_ENTRIES = 1024
_MERGE_ROWS = 16


_PLACE_LENGTHS = [
    *("num_tokens", "num_queries", "num_blocks", "num_tiles"),
    *("q_start", "token_start", "head_start", "slots"),
]


@triton.jit(do_not_specialize=_PLACE_LENGTHS)
def _place_kernel(
    indices, words, ranks, ends, totals, queries, places, q_bounds, starts,
    stride_ib, stride_it, stride_ih, stride_in,
    num_tokens, num_queries, num_blocks, num_tiles, q_start, token_start, head_start, slots,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the slots of ``ROWS`` tokens of one KV head, each with its place in the block's list, -1
    where it is empty or repeated; and the token into that place.
    """
    local = tl.program_id(1).to(tl.int64)
    head = head_start + local
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    row = token.to(tl.int64) + token_start
    first, num_queries = rows_of(q_bounds, head // HEADS, num_queries, stride_ib, stride_it)
    exists = (token < num_tokens) & (row < num_queries)
    inside = exists[:, None] & (slot < slots)[None, :]
    source = indices + first + head % HEADS * stride_ih + row * stride_it
    at = source[:, None] + slot.to(tl.int64)[None, :] * stride_in
    index = tl.load(at, mask=inside, other=-1).to(tl.int64)
    position = first_position(starts, q_start, head // HEADS) + row
    chosen = (index >= 0) & (index < num_blocks) & (index * BLOCK_SIZE <= position[:, None])
    for earlier in range(slots - 1):
        other = tl.load(source + tl.cast(earlier, tl.int64) * stride_in, mask=exists, other=-1)
        chosen = chosen & ((index != other.to(tl.int64)[:, None]) | (slot <= earlier)[None, :])
    block = local * num_blocks + index
    word = block * num_tiles + (token // TOKENS)[:, None]
    before = (tl.full((ROWS,), 1, tl.int32) << token % TOKENS) - 1
    place = tl.load(ends + block, mask=chosen, other=0) - tl.load(totals + block, mask=chosen, other=0)
    place += tl.load(ranks + word, mask=chosen, other=0)
    place += popcount(tl.load(words + word, mask=chosen, other=0) & before[:, None])
    tl.store(queries + place, tl.broadcast_to(row[:, None], (ROWS, SLOTS)).to(tl.int32), mask=chosen)
    target = places + (local * num_tokens + token)[:, None] * slots + slot[None, :]
    tl.store(target, tl.where(chosen, place, -1).to(tl.int32), mask=inside)


_LENGTHS = ["q_start", "num_queries", "num_keys", "kv_heads", "head_start", "num_lists", "num_blocks"]


@triton.jit(do_not_specialize=_LENGTHS)
def _block_kernel(
    q, k, v, part, part_lse, owners, last_tiles, ends, totals, queries, q_bounds, k_bounds, starts,
    q_start, num_queries, num_keys, kv_heads, head_start, num_lists, num_blocks, scale_log2,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    G: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PIECES: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one block of keys and ``BLOCK_M`` rows of ``TOKENS`` queries of its list.

    ``owners`` has the list of each tile, ``num_lists`` beyond the last; ``last_tiles`` the tiles up to and
    with each list's own.
    """
    tile = tl.program_id(0) // PARTS
    owner = tl.load(owners + tile)
    if owner >= num_lists:
        return
    total = tl.load(totals + owner)
    first = (tile - (tl.load(last_tiles + owner) - tl.cdiv(total, TOKENS))) * TOKENS
    head = head_start + owner // num_blocks
    block = owner % num_blocks
    sequence, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    q_at, _ = rows_of(q_bounds, sequence, num_queries, stride_qb, stride_qt)
    v_at, _ = rows_of(k_bounds, sequence, num_keys, stride_vb, stride_vs)
    k_at, num_keys = rows_of(k_bounds, sequence, num_keys, stride_kb, stride_ks)

    row = tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    within = row // G
    exists = (within < TOKENS) & (first + within < total)
    place = tl.load(ends + owner).to(tl.int64) - total + first + within
    token = tl.load(queries + place, mask=exists, other=0)
    position = first_position(starts, q_start, sequence) + token
    limit = tl.where(exists, tl.minimum(position, num_keys - 1), -1).to(tl.int32)

    q_row = q + q_at + token.to(tl.int64) * stride_qt + (kv_head * G + row % G) * stride_qh
    q0, q1 = load_queries(q_row, exists, D, D0, D1)
    k_head = k + k_at + kv_head * stride_kh
    v_head = v + v_at + kv_head * stride_vh
    column = tl.arange(0, BLOCK_N)
    # Keys after the last query are not read.
    end = tl.minimum(block * BLOCK_SIZE + BLOCK_SIZE, tl.max(limit, 0) + 1)
    acc = tl.zeros((BLOCK_M, DV_PADDED), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for piece in range(PIECES):
        start = block * BLOCK_SIZE + piece * BLOCK_N
        key = start + column
        seen = (key < end)[None, :] & (key[None, :] <= limit[:, None])
        acc, m, l = attend_keys(
            acc, m, l, q0, q1, k_head, v_head, stride_ks, stride_vs, start, column, end - start, seen,
            scale_log2, D, D0, D1, DV, DV_PADDED,
        )  # fmt: skip
    store_rows(part, part_lse, place * G + row % G, exists, acc, m, l, DV, DV_PADDED)


_MERGE_LENGTHS = ["num_queries", "kv_heads", "head_start", "token_start", "num_tokens", "slots"]


@triton.jit(do_not_specialize=_MERGE_LENGTHS)
def _merge_kernel(
    o, lse, part, part_lse, places, q_bounds,
    num_queries, kv_heads, head_start, token_start, num_tokens, slots,
    G: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` rows of one KV head, their parts weighted by the softmax over the slots' lse."""
    local = tl.program_id(1).to(tl.int64)
    head = head_start + local
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // G).to(tl.int64)
    first_row, num_queries = rows_of(q_bounds, head // kv_heads, num_queries, num_queries, 1)
    exists = (token < num_tokens) & (token_start + token < num_queries)
    slot_of = places + (local * num_tokens + token) * slots
    dv = tl.arange(0, DV_PADDED)
    acc = tl.zeros((ROWS, DV_PADDED), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    for slot in range(slots):
        place = tl.load(slot_of + slot, mask=exists, other=-1).to(tl.int64)
        at = place * G + row % G
        here = place >= 0
        weight = tl.load(part_lse + at, mask=here, other=float("-inf")) * LOG2_OF_E
        m_new = tl.maximum(m, weight)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        shrink, grow = tl.exp2(m - shift), tl.exp2(weight - shift)
        mask = here[:, None] & (dv < DV)[None, :]
        some = tl.load(part + at[:, None] * DV + dv[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = acc * shrink[:, None] + some * grow[:, None]
        m, l = m_new, l * shrink + grow
    at = (first_row + token_start + token) * (kv_heads * G)
    at += head % kv_heads * G + row % G
    store_rows(o, lse, at, exists, acc, m, l, DV, DV_PADDED)


LAUNCHES = (
    Launch(128, 64, 8, 1, "one tile of keys a program: nothing to pipeline, 128 rows share it (predicted)"),
    Launch(64, 64, 4, 1, "where 128 rows leave room for one block (predicted)"),
)
FP32_LAUNCHES = (
    Launch(
        64, 32, 8, 1, "fp32 products run in registers: 1 KiB spills at d128, 30 in larger tiles (compiled)"
    ),
)


def attend_by_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked, config: NSAConfig
) -> Output:
    """``(o, lse)`` of selected attention; last dims of ``q``, ``k`` and ``v`` are contiguous."""
    o, lse = empty_outputs(q, v, config)
    launch = choose(config, q.dtype, capability(q.device))
    if not asked.slots or not asked.num_blocks:
        return o.zero_(), lse.fill_(float("-inf"))
    for heads, rows in chunks(asked, asked.layout.num_queries, config, q.dtype.itemsize):
        _attend_chunk(q, k, v, o, lse, asked, config, launch, heads, rows)
    return o, lse


def _attend_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    asked: Asked,
    config: NSAConfig,
    launch: Launch,
    heads: range,
    rows: range,
) -> None:
    """``rows`` of KV heads ``heads`` of all sequences' into ``o`` and ``lse``."""
    constants, kv_heads, group = constexprs(config, launch), config.num_kv_heads, config.group_size
    lists, layout = lists_of_blocks(asked, rows, heads), asked.layout
    totals = lists.totals.flatten()
    tiles = (totals + (constants["TOKENS"] - 1)).div_(constants["TOKENS"], rounding_mode="floor")
    ends, last_tiles = totals.cumsum(0), tiles.cumsum(0)
    queries, places = _place(asked, lists, ends, rows, heads)
    # As many programs as there could be tiles; those beyond the last find no owner.
    programs = queries.numel() // constants["TOKENS"] + totals.numel()
    numbers = torch.arange(programs, device=q.device)
    owners = torch.searchsorted(last_tiles, numbers, right=True, out_int32=True)
    part = torch.empty((queries.numel(), group, config.v_dim), dtype=q.dtype, device=q.device)
    part_lse = torch.empty(part.shape[:2], dtype=torch.float32, device=q.device)
    _block_kernel[(programs * constants["PARTS"],)](
        q, k, v, part, part_lse, owners, last_tiles, ends, totals, queries,
        layout.q_bounds, layout.k_bounds, asked.starts,
        asked.q_start, layout.num_queries, layout.num_keys,
        kv_heads, heads.start, totals.numel(), lists.totals.shape[1], config.scale * LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **constants, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(len(rows) * group, _MERGE_ROWS), len(heads))](
        o, lse, part, part_lse, places, layout.q_bounds,
        layout.num_queries, kv_heads, heads.start, rows.start, len(rows), asked.slots,
        G=group, DV=config.v_dim, DV_PADDED=padded(config.v_dim), ROWS=_MERGE_ROWS,
    )  # fmt: skip


def _place(
    asked: Asked, lists: BlockLists, ends: torch.Tensor, rows: range, heads: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """``queries``, the token at each place of the blocks' lists one after the other, int32, as long as they
    can be; ``places (heads, rows, N)`` int32, -1 for an empty slot.
    """
    places = lists.words.new_empty(len(heads), len(rows), asked.slots)
    queries = lists.words.new_empty(places.numel())
    slots = 1 << (asked.slots - 1).bit_length()
    step = max(1, _PLACE_ENTRIES // slots)
    _place_kernel[(triton.cdiv(len(rows), step), len(heads))](
        asked.indices, lists.words, lists.ranks, ends, lists.totals, queries, places,
        asked.layout.q_bounds, asked.starts,
        *asked.indices.stride(),
        len(rows), asked.layout.num_queries, lists.words.shape[1], lists.words.shape[2],
        asked.q_start, rows.start, heads.start, asked.slots,
        HEADS=asked.indices.shape[2], BLOCK_SIZE=asked.block_size, TOKENS=MOST_TOKENS,
        SLOTS=slots, ROWS=step,
    )  # fmt: skip
    return queries, places


def chunks(asked: Asked, num_rows: int, config: NSAConfig, itemsize: int) -> list[tuple[range, range]]:
    """KV heads (of all sequences) and rows, so that parts and lists of each pair take at most
    ``CHUNK_BYTES``, or are those of 32 rows of one head.
    """
    blocks = asked.blocks_before(num_rows)
    a_slot = config.group_size * (config.v_dim * itemsize + 4) + 8
    # Two words for each block and 32 rows; and, of each block, what finds its tiles.
    a_row = asked.slots * a_slot + -(-8 * blocks // MOST_TOKENS)
    room = max(0, CHUNK_BYTES - 32 * blocks)
    rows = max(1, room // (a_row * MOST_TOKENS)) * MOST_TOKENS
    heads = max(1, CHUNK_BYTES // max(1, num_rows * a_row + 32 * blocks)) if rows >= num_rows else 1
    return [
        (range(head, min(head + heads, asked.heads)), range(row, min(row + rows, num_rows)))
        for row in range(0, num_rows, rows)
        for head in range(0, asked.heads, heads)
    ]


def launched(call: Call, arch: tuple[int, int]) -> Launched:
    """What :func:`attend_by_keys` launches for ``call``, for :mod:`nsa.kernels.work`."""
    _, rows = chunks(Asked.by(call), call.num_queries, call.config, call.dtype.itemsize)[0]
    lists = {"TOKENS": MOST_TOKENS, "CHUNK": len(rows)}
    block = constexprs(call.config, choose(call.config, call.dtype, arch)) | {"CHUNK": len(rows)}
    lists_of_each = dict.fromkeys(("_mark_kernel", "_rank_kernel", "_place_kernel"), lists)
    return lists_of_each | {"_block_kernel": block, "_merge_kernel": {"ROWS": _MERGE_ROWS}}


def choose(config: NSAConfig, dtype: torch.dtype, arch: tuple[int, int]) -> Launch:
    """The launch of the kernel over blocks on compute capability ``arch``."""
    launch = fitting(FP32_LAUNCHES if dtype == torch.float32 else LAUNCHES, config, dtype, arch)
    if config.group_size > launch.block_m:
        return launch
    return replace(launch, block_m=padded(launch.block_m // config.group_size * config.group_size))


def constexprs(config: NSAConfig, launch: Launch) -> dict[str, int]:
    """What the kernel over blocks is compiled for, by its arguments' names."""
    size, group = config.selection_block_size, config.group_size
    block_n, tokens = min(launch.block_n, keys_of_tile(size)), max(1, launch.block_m // group)
    return {
        "G": group,
        "TOKENS": tokens,
        "PARTS": -(-tokens * group // launch.block_m),
        "BLOCK_SIZE": size,
        "PIECES": -(-size // block_n),
        **dims(config.head_dim, config.v_dim),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": block_n,
    }


def static() -> Iterator[dict[str, Any]]:
    """What a compiler is given to judge the kernels by, at G = 1."""
    i64 = dict.fromkeys(("last_tiles", "ends"), "*i64:16")
    i32 = dict.fromkeys(("owners", "totals", "queries"), "*i32:16")
    parts = {"part": "*bf16:16", "part_lse": "*fp32:16"}
    output = {"o": "*bf16:16", "lse": "*fp32:16"}
    for shape in STATIC_SHAPES:
        config = NSAConfig(4, 4, *shape)
        for arch, launch in launches(choose, config):
            types = signature(STRIDES, _LENGTHS, parts | i64 | i32)
            yield offered(_block_kernel, "kv_outer", arch, launch, constexprs(config, launch), types)
    for value_dim in sorted({shape[1] for shape in STATIC_SHAPES}):
        constants = {"G": 1, "DV": value_dim, "DV_PADDED": padded(value_dim), "ROWS": _MERGE_ROWS}
        yield {
            "kernel": _merge_kernel,
            "name": f"kv_outer_merge_dv{value_dim}",
            "signature": parts | output | {"places": "*i32:16"} | dict.fromkeys(_MERGE_LENGTHS, "i32"),
            "constexprs": {"q_bounds": None, **constants},
        }
    lists = dict.fromkeys(("indices", "words", "ranks", "totals", "queries", "places"), "*i32:16")
    constants = {"HEADS": 4, "BLOCK_SIZE": 64, "TOKENS": MOST_TOKENS, "SLOTS": 16, "ROWS": 64}
    yield {
        "kernel": _place_kernel,
        "signature": lists | {"ends": "*i64:16"} | dict.fromkeys(_PLACE_LENGTHS, "i32") | INDEX_TYPES,
        "constexprs": {"q_bounds": None, "starts": None, **constants},
    }
