"""Selected attention: each query over the tokens of the blocks it selected (rule 7).

Three ways, each a row of the route table. ``union``: a tile of neighbouring tokens walks the union of their
blocks, a bit per token saying who may look; K and V are read once a tile. ``kv_outer``: each block of keys
meets the queries that selected it, and the parts are merged; its cost does not depend on what neighbours
share. ``query_major``: one token at a time, no lists at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.config import NSAConfig
from nsa.kernels._by_keys import attend_by_keys
from nsa.kernels._by_keys import launched as launched_by_keys
from nsa.kernels._by_keys import static as static_by_keys
from nsa.kernels._key_tile import (
    INDEX_TYPES,
    LEAST_KEYS,
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
    layout_of,
    load_queries,
    on_its_device,
    padded,
    rows_of,
    split,
    starts,
    unit_stride,
)
from nsa.kernels._union import MOST_TOKENS, Asked, lists_of_tiles, tile_chunks
from nsa.kernels._union import static as static_lists
from nsa.kernels.work import Call, Launched
from nsa.packing import Packed

_UNION_LENGTHS = [
    "q_start",
    "num_queries",
    "num_keys",
    "kv_heads",
    "token_start",
    "num_tiles",
    "num_blocks",
    "capacity",
]


@triton.jit(do_not_specialize=_UNION_LENGTHS)
def _union_kernel(
    q, k, v, o, lse, words, units, members, counts, q_bounds, k_bounds, starts,
    q_start, num_queries, num_keys, kv_heads, token_start, num_tiles, num_blocks, capacity, scale_log2,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    G: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PER_UNIT: tl.constexpr, PIECES: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` of the ``TOKENS * G`` rows of a tile, over the units that its tokens selected.

    A tile has ``PARTS`` programs, a unit ``PIECES`` tiles of keys. A head's tiles are neighbours in the grid,
    so that its keys stay in L2.
    """
    tile = tl.program_id(0) // PARTS % num_tiles
    head = tl.program_id(0) // PARTS // num_tiles
    sequence, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    first_row, _ = rows_of(q_bounds, sequence, num_queries, num_queries, 1)
    q_at, num_queries = rows_of(q_bounds, sequence, num_queries, stride_qb, stride_qt)
    v_at, _ = rows_of(k_bounds, sequence, num_keys, stride_vb, stride_vs)
    k_at, num_keys = rows_of(k_bounds, sequence, num_keys, stride_kb, stride_ks)

    row = tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    within = row // G
    token = token_start + tile * TOKENS + within
    exists = (within < TOKENS) & (token < num_queries)
    start_of = first_position(starts, q_start, sequence)
    position = start_of + token
    # Keys after the tile's last query are not read.
    tokens_end = tl.minimum(token_start + tile * TOKENS + TOKENS, num_queries)
    keys_end = tl.minimum(start_of + tokens_end, num_keys).to(tl.int32)
    limit = tl.where(exists, tl.minimum(position, num_keys - 1), -1).to(tl.int32)

    q_head = kv_head * G + row % G
    q_row = q + q_at + token.to(tl.int64) * stride_qt + q_head * stride_qh
    q0, q1 = load_queries(q_row, exists, D, D0, D1)
    k_head = k + k_at + kv_head * stride_kh
    v_head = v + v_at + kv_head * stride_vh

    at_tile = tl.cast(head, tl.int64) * num_tiles + tile
    units += at_tile * capacity
    members += at_tile * capacity
    words += at_tile * num_blocks
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, DV_PADDED), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(tl.load(counts + at_tile) * PIECES):
        unit = tl.load(units + step // PIECES)
        inside = step % PIECES * BLOCK_N + column
        start = unit * (BLOCK_SIZE * PER_UNIT) + step % PIECES * BLOCK_N
        end = tl.minimum(unit * (BLOCK_SIZE * PER_UNIT) + BLOCK_SIZE * PER_UNIT, keys_end)
        if PER_UNIT == 1:
            member = (tl.load(members + step // PIECES) >> within) & 1
            # A row that did not select the block has its end before every key.
            reach = tl.where(member != 0, limit - start, -1)
            seen = column[None, :] <= reach[:, None]
        else:
            block = unit * PER_UNIT + inside // BLOCK_SIZE
            here = (inside < BLOCK_SIZE * PER_UNIT) & (block < num_blocks)
            word = tl.load(words + block, mask=here, other=0)
            seen = ((word[None, :] >> within[:, None]) & 1) != 0
            seen = seen & (column[None, :] <= (limit - start)[:, None])
        if PIECES * BLOCK_N != BLOCK_SIZE * PER_UNIT:
            seen = seen & (inside < BLOCK_SIZE * PER_UNIT)[None, :]
        acc, m, l = attend_keys(
            acc, m, l, q0, q1, k_head, v_head, stride_ks, stride_vs, start, column, end - start, seen,
            scale_log2, D, D0, D1, DV, DV_PADDED,
        )  # fmt: skip
    at = (first_row + token) * (kv_heads * G) + q_head
    store_rows(o, lse, at, exists, acc, m, l, DV, DV_PADDED)


_QUERY_LENGTHS = ["q_start", "num_queries", "num_keys", "kv_heads", "slots"]


@triton.jit(do_not_specialize=_QUERY_LENGTHS)
def _query_kernel(
    q, k, v, o, lse, indices, q_bounds, k_bounds, starts,
    q_start, num_queries, num_keys, kv_heads, slots, scale_log2,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ib, stride_it, stride_ih, stride_in,
    G: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PIECES: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_M`` of the ``G`` heads of one token, slot by slot."""
    token = tl.program_id(0) // PARTS % num_queries
    head = tl.program_id(0) // PARTS // num_queries
    sequence, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    first_row, _ = rows_of(q_bounds, sequence, num_queries, num_queries, 1)
    index_at, _ = rows_of(q_bounds, sequence, num_queries, stride_ib, stride_it)
    q_at, num_queries = rows_of(q_bounds, sequence, num_queries, stride_qb, stride_qt)
    v_at, _ = rows_of(k_bounds, sequence, num_keys, stride_vb, stride_vs)
    k_at, num_keys = rows_of(k_bounds, sequence, num_keys, stride_kb, stride_ks)
    if q_bounds is not None and token >= num_queries:  # of a shorter sequence
        return

    row = tl.program_id(0) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < G
    position = first_position(starts, q_start, sequence) + token
    limit = tl.minimum(position, num_keys - 1).to(tl.int32)

    q_head = kv_head * G + row
    q_row = q + q_at + tl.cast(token, tl.int64) * stride_qt + q_head * stride_qh
    q0, q1 = load_queries(q_row, exists, D, D0, D1)
    k_head = k + k_at + kv_head * stride_kh
    v_head = v + v_at + kv_head * stride_vh

    indices += index_at + tl.cast(token, tl.int64) * stride_it + kv_head * stride_ih
    slot = tl.arange(0, SLOTS)
    every = tl.load(indices + slot.to(tl.int64) * stride_in, mask=slot < slots, other=-1).to(tl.int32)
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, DV_PADDED), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(slots * PIECES):
        at = step // PIECES
        block = tl.load(indices + tl.cast(at, tl.int64) * stride_in).to(tl.int32)
        repeated = tl.max(((every == block) & (slot < at)).to(tl.int32), 0)
        first = tl.maximum(block, 0) * BLOCK_SIZE
        start = first + step % PIECES * BLOCK_N
        # An empty or repeated slot ends before its first key.
        end = tl.where((block >= 0) & (repeated == 0), tl.minimum(first + BLOCK_SIZE, limit + 1), first)
        seen = (start + column < end)[None, :] & exists[:, None]
        acc, m, l = attend_keys(
            acc, m, l, q0, q1, k_head, v_head, stride_ks, stride_vs, start, column, end - start, seen,
            scale_log2, D, D0, D1, DV, DV_PADDED,
        )  # fmt: skip
    at = (first_row + token) * (kv_heads * G) + q_head
    store_rows(o, lse, at, exists, acc, m, l, DV, DV_PADDED)


# The rows of a tile: one warpgroup's matrix product. Twice as many would halve what is read of K and V, but
# leave one block per SM, whose products wait for its own softmax, and walk nearly twice the blocks where
# neighbours share little.
UNION_LAUNCHES = (
    Launch(
        64, 64, 4, 3, "64 rows are a warpgroup's product; at d128 two blocks of 112 KiB an SM (predicted)"
    ),
    Launch(64, 64, 4, 2, "where three stages leave room for one block: 192/128, sm_80 (predicted)"),
    Launch(64, 32, 4, 2, "where even that does, as on sm_120 or in fp32 (predicted)"),
)
# Beyond 320 dims of keys and values the above spill registers.
UNION_WIDE_LAUNCHES = (
    Launch(64, 64, 8, 2, "a row's output over twice the threads (predicted)"),
    Launch(64, 32, 8, 2, "where that leaves room for one block: 142 to 178 registers at d256 (compiled)"),
)
UNION_FP32_LAUNCHES = (
    Launch(64, 32, 8, 2, "fp32 products run in registers: larger tiles of fewer threads spill (compiled)"),
)
QUERY_LAUNCHES = (
    Launch(16, 64, 4, 3, "bound by reading keys: small blocks, many an SM, loads ahead (predicted)"),
    Launch(16, 64, 4, 2, "where three stages leave room for one block (predicted)"),
    Launch(16, 32, 4, 2, "where even that does, as in fp32 (predicted)"),
)
# Fewer queries than this leave most of a tile empty, and each launch costs more than its work.
QUERY_MAJOR_BELOW = 16
# Up to this many heads a KV head, 32 tokens do not fill a tile or select too much that is not shared.
KV_OUTER_UP_TO = 4


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    packed: Packed | None = None,
) -> Output:
    """See :func:`nsa.reference.selected_attention`; fp32, fp16 or bf16, forward only.

    Query-major for few queries, kv-outer for small groups, else union: chosen by shapes alone.
    """
    ways = {
        "query_major": selected_attention_query_major,
        "kv_outer": selected_attention_kv_outer,
        "union": selected_attention_union,
    }
    return ways[variant(packed.longest if packed else q.shape[1], config)](
        q, k, v, block_indices, config, q_start=q_start, packed=packed
    )


def variant(num_queries: int, config: NSAConfig) -> str:
    """The way that ``triton`` takes."""
    if num_queries < QUERY_MAJOR_BELOW:
        return "query_major"
    return "kv_outer" if config.group_size <= KV_OUTER_UP_TO else "union"


def launched(call: Call, arch: tuple[int, int], way: str = "") -> Launched:
    """What ``way``, or the one that ``triton`` takes, launches for ``call``, for :mod:`nsa.kernels.work`."""
    config = call.config
    way = way or variant(call.num_queries, config)
    if way == "kv_outer":
        return launched_by_keys(call, arch)
    if way == "query_major":
        launch = choose_query_major(config, call.dtype, arch)
        return {"_query_kernel": query_constants(config, config.num_selected_blocks, launch)}
    facts = union_constants(config, choose_union(config, call.dtype, arch))
    first, *_ = tile_chunks(Asked.by(call), call.num_queries, facts["TOKENS"])
    facts["CHUNK"] = len(first)
    return dict.fromkeys(("_mark_kernel", "_compact_kernel", "_union_kernel"), facts)


@on_its_device
def selected_attention_union(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    packed: Packed | None = None,
) -> Output:
    """See :func:`nsa.reference.selected_attention`: tiles of neighbouring tokens over the union of their
    blocks.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    o, lse = empty_outputs(q, v, config)
    if not o.numel():
        return o, lse
    launch = choose_union(config, q.dtype, capability(q.device))
    constants = union_constants(config, launch)
    asked = Asked.of(block_indices, q_start, k, config, packed)
    layout = asked.layout
    for rows in tile_chunks(asked, layout.num_queries, constants["TOKENS"]):
        lists = lists_of_tiles(asked, rows, constants["TOKENS"], constants["PER_UNIT"])
        heads, tiles, capacity = lists.units.shape
        _union_kernel[(heads * tiles * constants["PARTS"],)](
            q, k, v, o, lse, lists.words, lists.units, lists.members, lists.counts,
            layout.q_bounds, layout.k_bounds, asked.starts,
            asked.q_start, layout.num_queries, layout.num_keys, config.num_kv_heads, rows.start,
            tiles, lists.words.shape[2], capacity, config.scale * LOG2E,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            **constants, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return o, lse


@on_its_device
def selected_attention_query_major(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    packed: Packed | None = None,
) -> Output:
    """See :func:`nsa.reference.selected_attention`: one token of one KV head at a time."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    o, lse = empty_outputs(q, v, config)
    if not o.numel():
        return o, lse
    launch = choose_query_major(config, q.dtype, capability(q.device))
    constants = query_constants(config, block_indices.shape[3], launch)
    layout = layout_of(q, k, packed)
    programs = layout.sequences * config.num_kv_heads * layout.num_queries * constants["PARTS"]
    _query_kernel[(programs,)](
        q, k, v, o, lse, block_indices, layout.q_bounds, layout.k_bounds, *starts(q_start, q),
        layout.num_queries, layout.num_keys, config.num_kv_heads, block_indices.shape[3],
        config.scale * LOG2E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *block_indices.stride(),
        **constants, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return o, lse


@on_its_device
def selected_attention_kv_outer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    packed: Packed | None = None,
) -> Output:
    """See :func:`nsa.reference.selected_attention`: each block of keys with the queries that selected it."""
    asked = Asked.of(block_indices, q_start, k, config, packed)
    return attend_by_keys(unit_stride(q), unit_stride(k), unit_stride(v), asked, config)


def choose_union(config: NSAConfig, dtype: torch.dtype, arch: tuple[int, int]) -> Launch:
    """The launch of the union kernel on compute capability ``arch``."""
    width = sum(split(config.head_dim)) + padded(config.v_dim)
    wanted: Sequence[Launch] = UNION_WIDE_LAUNCHES if width > 320 else UNION_LAUNCHES
    if dtype == torch.float32:
        wanted = UNION_FP32_LAUNCHES
    launch = fitting(wanted, config, dtype, arch)
    rows = tokens_of_tile(config.group_size, launch.block_m) * config.group_size
    return replace(launch, block_m=min(launch.block_m, padded(rows)))


def tokens_of_tile(group: int, block_m: int) -> int:
    """Neighbouring tokens that share a tile of ``block_m`` rows."""
    return min(MOST_TOKENS, max(1, block_m // group))


def union_constants(config: NSAConfig, launch: Launch) -> dict[str, int]:
    """What the union kernel is compiled for, by its arguments' names."""
    size, group = config.selection_block_size, config.group_size
    per_unit = 1
    while 2 * per_unit * size <= LEAST_KEYS:
        per_unit *= 2
    block_n = min(launch.block_n, keys_of_tile(size * per_unit))
    tokens = tokens_of_tile(group, launch.block_m)
    return {
        "G": group,
        "TOKENS": tokens,
        "PARTS": -(-tokens * group // launch.block_m),
        "BLOCK_SIZE": size,
        "PER_UNIT": per_unit,
        "PIECES": -(-size * per_unit // block_n),
        **dims(config.head_dim, config.v_dim),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": block_n,
    }


def choose_query_major(config: NSAConfig, dtype: torch.dtype, arch: tuple[int, int]) -> Launch:
    """The launch of the query-major kernel on compute capability ``arch``."""
    rows = min(64, padded(config.group_size))
    wanted = [replace(launch, block_m=rows) for launch in QUERY_LAUNCHES]
    return fitting(wanted, config, dtype, arch)


def query_constants(config: NSAConfig, slots: int, launch: Launch) -> dict[str, int]:
    """What the query-major kernel is compiled for, by its arguments' names; ``slots`` a token."""
    size = config.selection_block_size
    block_n = min(launch.block_n, keys_of_tile(size))
    return {
        "G": config.group_size,
        "PARTS": -(-config.group_size // launch.block_m),
        "SLOTS": 1 << max(0, slots - 1).bit_length(),
        "BLOCK_SIZE": size,
        "PIECES": -(-size // block_n),
        **dims(config.head_dim, config.v_dim),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": block_n,
    }


def _static() -> Iterator[dict[str, Any]]:
    """What a compiler is given to judge the kernels by, at G = 16; kv-outer at G = 1."""
    index = {"indices": "*i32:16"} | INDEX_TYPES
    output = {"o": "*bf16:16", "lse": "*fp32:16"}
    lists = dict.fromkeys(("words", "units", "members", "counts"), "*i32:16")
    for shape in STATIC_SHAPES:
        config = NSAConfig(64, 4, *shape)
        for arch, launch in launches(choose_union, config):
            types = signature(STRIDES, _UNION_LENGTHS, output | lists)
            yield offered(_union_kernel, "union", arch, launch, union_constants(config, launch), types)
        for arch, launch in launches(choose_query_major, config):
            types = signature(STRIDES, _QUERY_LENGTHS, output | index)
            constants = query_constants(config, config.num_selected_blocks, launch)
            yield offered(_query_kernel, "query_major", arch, launch, constants, types)
    yield from static_by_keys()
    yield from static_lists()


STATIC = tuple(_static())
"""What ``nsabench profile --static`` compiles: the launches of sm_90, and those of others where they differ,
which name the architecture.
"""
