"""Which blocks a tile of neighbouring queries selects, and which queries select a block, without a sort.

A tile is ``R <= 32`` consecutive tokens of one (sequence, KV head). A word ``(B*H, tile, block)`` int32 has
bit ``r`` set where the tile's token ``r`` selected the block. Setting a bit twice changes nothing: repeated
indices count once, and the order of the atomic ORs does not matter. A unit is one block, or several small
neighbours that share one tile of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.blocks import num_selection_blocks
from nsa.config import NSAConfig
from nsa.kernels._tiles import Layout, first_position, layout_of, rows_of, starts
from nsa.kernels.work import Call
from nsa.packing import Packed

MOST_TOKENS = 32
# Words and lists of one chunk of queries, all KV heads together.
CHUNK_BYTES = 2**27

_MARK_BLOCK = 1024
_COMPACT_WORDS = 1024
_RANK_WORDS = 1024


_MARK_LENGTHS = ["num_tokens", "num_queries", "num_blocks", "q_start", "token_start", "head_start", "slots"]
_COMPACT_LENGTHS = ["num_tiles", "num_blocks", "capacity"]


@triton.jit(do_not_specialize=_MARK_LENGTHS)
def _mark_kernel(
    indices, words, q_bounds, starts,
    stride_b, stride_t, stride_h, stride_n,
    stride_head, stride_tile, stride_block,
    num_tokens, num_queries, num_blocks, q_start, token_start, head_start, slots,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK`` of the ``num_tokens * slots`` indices of one (sequence, KV head) into words."""
    head = head_start + tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, slot = entry // slots, entry % slots
    row = token.to(tl.int64) + token_start
    first, num_queries = rows_of(q_bounds, head // HEADS, num_queries, stride_b, stride_t)
    inside = (token < num_tokens) & (row < num_queries)
    source = indices + first + head % HEADS * stride_h
    index = tl.load(source + row * stride_t + slot * stride_n, mask=inside, other=-1).to(tl.int64)
    position = first_position(starts, q_start, head // HEADS) + row
    # A block that begins after the query is never attended, whoever put it in the list.
    chosen = inside & (index >= 0) & (index < num_blocks) & (index * BLOCK_SIZE <= position)
    bit = tl.full((BLOCK,), 1, tl.int32) << token % TOKENS
    target = words + tl.program_id(1).to(tl.int64) * stride_head + index * stride_block
    target += (token // TOKENS).to(tl.int64) * stride_tile
    tl.atomic_or(target, bit, mask=chosen, sem="relaxed")


@triton.jit(do_not_specialize=_COMPACT_LENGTHS)
def _compact_kernel(
    words, units, members, counts,
    num_tiles, num_blocks, capacity,
    PER_UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One program: the units that a tile selects, ascending, the bits of its members, and their count."""
    tile = tl.program_id(1).to(tl.int64) * num_tiles + tl.program_id(0)
    source, target = words + tile * num_blocks, tile * capacity
    within = tl.arange(0, PER_UNIT)
    count = 0
    for first in range(0, tl.cdiv(num_blocks, PER_UNIT), UNITS):
        unit = first + tl.arange(0, UNITS)
        block = unit[:, None] * PER_UNIT + within[None, :]
        word = tl.load(source + block, mask=block < num_blocks, other=0)
        # Bits of different blocks of a unit may coincide: only whether there are any is kept of several.
        chosen = tl.max((word != 0).to(tl.int32), 1)
        place = target + count + tl.cumsum(chosen, 0) - 1
        tl.store(units + place, unit, mask=chosen != 0)
        if PER_UNIT == 1:
            tl.store(members + place, tl.sum(word, 1), mask=chosen != 0)
        count += tl.sum(chosen, 0)
    tl.store(counts + tile, count)


@triton.jit
def popcount(x):
    """Set bits of int32 words, ``0 .. 32``."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit(do_not_specialize=["num_tiles"])
def _rank_kernel(words, ranks, totals, num_tiles, WORDS: tl.constexpr):
    """One program, one block: how many queries before each tile select it, and how many altogether."""
    block = tl.program_id(0).to(tl.int64)
    total = 0
    for first in range(0, num_tiles, WORDS):
        tile = first + tl.arange(0, WORDS)
        inside = tile < num_tiles
        here = popcount(tl.load(words + block * num_tiles + tile, mask=inside, other=0))
        tl.store(ranks + block * num_tiles + tile, total + tl.cumsum(here, 0) - here, mask=inside)
        total += tl.sum(here, 0)
    tl.store(totals + block, total)


@dataclass(frozen=True)
class Asked:
    """Whose blocks are asked for: ``indices (B,T,H,N)`` of sequences laid out as ``layout`` says, and the
    first query's position, as kernels take it.

    ``block_size`` is l'. Blocks from ``num_blocks`` on do not exist in any sequence and are ignored.
    """

    indices: torch.Tensor
    layout: Layout
    starts: torch.Tensor | None
    q_start: int
    block_size: int
    num_blocks: int

    @classmethod
    def of(
        cls,
        indices: torch.Tensor,
        q_start: int | torch.Tensor,
        keys: torch.Tensor,
        config: NSAConfig,
        packed: Packed | None,
    ) -> Asked:
        """The request of a branch's arguments."""
        first, start = starts(q_start, indices)
        layout, size = layout_of(indices, keys, packed), config.selection_block_size
        return cls(indices, layout, first, start, size, num_selection_blocks(layout.num_keys, config))

    @classmethod
    def by(cls, call: Call) -> Asked:
        """That of a call of which only the sizes are known."""
        config = call.config
        shape = call.batch, call.num_queries, config.num_kv_heads, config.num_selected_blocks
        indices, keys = (torch.empty(size, device="meta") for size in (shape, (call.batch, call.kv_len)))
        return cls.of(indices, call.q_start, keys, config, None)

    @property
    def heads(self) -> int:
        """KV heads of all sequences."""
        return self.layout.sequences * self.indices.shape[2]

    @property
    def slots(self) -> int:
        """``N``."""
        return self.indices.shape[3]

    def blocks_before(self, token: int) -> int:
        """Blocks that any query before row ``token`` can see, as far as the host knows."""
        if self.starts is not None:
            return self.num_blocks
        return max(0, min(self.num_blocks, -(-(self.q_start + token) // self.block_size)))


@dataclass(frozen=True)
class TileLists:
    """What the tiles of a chunk select: ``units (B*H, tiles, capacity)`` ascending, of which ``counts (B*H,
    tiles)`` hold; ``members`` has the bits beside each where a unit is one block; ``words (B*H, tiles,
    blocks)``.
    """

    words: torch.Tensor
    units: torch.Tensor
    members: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class BlockLists:
    """Who selects the blocks of a chunk: ``words`` and ``ranks (heads, blocks, tiles)``, the queries before a
    tile that select the block; ``totals (heads, blocks)``. All int32.
    """

    words: torch.Tensor
    ranks: torch.Tensor
    totals: torch.Tensor


def mark(asked: Asked, rows: range, heads: range, tokens: int, *, by_block: bool) -> torch.Tensor:
    """Words of the tiles of ``tokens`` queries that make up ``rows``, int32: ``(heads, tiles, blocks)``, or
    ``(heads, blocks, tiles)`` where ``by_block``. Only blocks that one of ``rows`` may see have a place.
    """
    blocks, tiles = asked.blocks_before(rows.stop), -(-len(rows) // tokens)
    shape = (len(heads), blocks, tiles) if by_block else (len(heads), tiles, blocks)
    words = torch.zeros(shape, dtype=torch.int32, device=asked.indices.device)
    if words.numel() and asked.slots:
        steps = (words.stride(2), words.stride(1)) if by_block else (words.stride(1), words.stride(2))
        grid = (triton.cdiv(len(rows) * asked.slots, _MARK_BLOCK), len(heads))
        _mark_kernel[grid](
            asked.indices, words, asked.layout.q_bounds, asked.starts,
            *asked.indices.stride(), words.stride(0), *steps,
            len(rows), asked.layout.num_queries, blocks, asked.q_start, rows.start, heads.start, asked.slots,
            HEADS=asked.indices.shape[2], BLOCK_SIZE=asked.block_size, TOKENS=tokens, BLOCK=_MARK_BLOCK,
        )  # fmt: skip
    return words


def lists_of_tiles(asked: Asked, rows: range, tokens: int, per_unit: int) -> TileLists:
    """The ascending units of ``per_unit`` blocks that each tile of ``tokens`` queries selects."""
    words = mark(asked, rows, range(asked.heads), tokens, by_block=False)
    heads, tiles, blocks = words.shape
    capacity = min(tokens * asked.slots, -(-blocks // per_unit))
    units = words.new_empty(heads, tiles, capacity)
    members = torch.empty_like(units) if per_unit == 1 else words
    counts = words.new_empty(heads, tiles)
    _compact_kernel[(tiles, heads)](
        words, units, members, counts, tiles, blocks, capacity,
        PER_UNIT=per_unit, UNITS=_COMPACT_WORDS // per_unit,
    )  # fmt: skip
    return TileLists(words, units, members, counts)


def lists_of_blocks(asked: Asked, rows: range, heads: range) -> BlockLists:
    """For each block, how many of ``rows`` select it, and how many before each tile of 32."""
    words = mark(asked, rows, heads, MOST_TOKENS, by_block=True)
    ranks, totals = torch.empty_like(words), words.new_empty(words.shape[:2])
    _rank_kernel[(totals.numel(),)](words, ranks, totals, words.shape[2], WORDS=_RANK_WORDS)
    return BlockLists(words, ranks, totals)


def tile_chunks(asked: Asked, num_rows: int, tokens: int) -> list[range]:
    """Rows in chunks of whole tiles whose words and lists take at most ``CHUNK_BYTES``, one tile at least."""
    blocks = asked.blocks_before(num_rows)
    capacity = min(tokens * asked.slots, blocks)
    a_tile = 4 * asked.heads * (blocks + 2 * capacity + 1)
    step = max(1, CHUNK_BYTES // max(1, a_tile)) * tokens
    return [range(row, min(row + step, num_rows)) for row in range(0, num_rows, step)]


def static() -> Iterator[dict[str, Any]]:
    """What a compiler is given to judge the kernels by: blocks of 64, tiles of 4 tokens."""
    words = {"words": "*i32:16"}
    constants = {"HEADS": 4, "BLOCK_SIZE": 64, "TOKENS": 4, "BLOCK": _MARK_BLOCK}
    strides = (f"stride_{name}" for name in ("b", "t", "h", "n", "head", "tile", "block"))
    yield {
        "kernel": _mark_kernel,
        "signature": words | {"indices": "*i32:16"} | dict.fromkeys((*_MARK_LENGTHS, *strides), "i32"),
        "constexprs": {"q_bounds": None, "starts": None, **constants},
    }
    lists = dict.fromkeys(("units", "members", "counts"), "*i32:16")
    yield {
        "kernel": _compact_kernel,
        "signature": words | lists | dict.fromkeys(_COMPACT_LENGTHS, "i32"),
        "constexprs": {"PER_UNIT": 1, "UNITS": _COMPACT_WORDS},
    }
    yield {
        "kernel": _rank_kernel,
        "signature": words | {"ranks": "*i32:16", "totals": "*i32:16", "num_tiles": "i32"},
        "constexprs": {"WORDS": _RANK_WORDS},
    }
