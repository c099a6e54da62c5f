"""Compressed, selected and sliding attention through torch's FlexAttention: one mask per branch, one kernel.

The G queries of a token are neighbouring rows over one KV head, so that a tile of rows is few tokens and any
G is the same. A mask reads the bounds of each row from tensors and captures no number, so that neither
lengths nor positions nor block sizes compile anything anew; which tiles hold anything comes from the bounds
and the block lists. No mask of T x S exists but in ``flex:eager``, FlexAttention's own unfused form.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from nsa.blocks import num_selection_blocks, query_positions, visible_compressed_blocks
from nsa.config import NSAConfig

Output = tuple[torch.Tensor, torch.Tensor]
Compiler = str | Callable[..., Any]
Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Rows and keys of a tile: FlexAttention's own, which its kernels' tiles divide on every GPU.
TILE = 128


class Flex:
    """The three branches through FlexAttention as ``compiler`` makes it, a backend of ``torch.compile``; its
    unfused form when None.
    """

    def __init__(self, compiler: Compiler | None) -> None:
        self.compiler = compiler

    def compressed_attention(
        self,
        q: torch.Tensor,
        k_cmp: torch.Tensor,
        v_cmp: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """See :func:`nsa.reference.compressed_attention`. A row sees the blocks before its last."""
        return _attend(
            q, k_cmp, v_cmp, config, self.compiler, lambda: compressed_tiles(q, k_cmp, config, q_start)
        )

    def sliding_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """See :func:`nsa.reference.sliding_attention`. A row sees the keys between two bounds."""
        return _attend(q, k, v, config, self.compiler, lambda: sliding_tiles(q, k, config, q_start))

    def selected_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_indices: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """See :func:`nsa.reference.selected_attention`. A tile of rows reads every block one of its tokens
        selected, and masks what the others did not: work grows with what neighbours do not share.
        """
        if block_indices.numel() == 0:
            return _nothing(q, v)
        return _attend(
            q, k, v, config, self.compiler, lambda: selected_tiles(q, k, block_indices, config, q_start)
        )


COMPILED, EAGER = Flex("inductor"), Flex(None)


@dataclass(frozen=True)
class Tiles:
    """What the rows of a call see, of ``keys`` keys.

    ``mask`` says it for one row and key; ``slots`` is the one number it has captured. ``some, whole (B, 1 or
    H, row tiles, key tiles)``: which tiles hold something, and which of them need no mask; None where none is
    known to be whole.
    """

    mask: Mask
    some: torch.Tensor
    whole: torch.Tensor | None
    rows: int
    keys: int
    slots: int = 0

    def block_mask(self, backward: bool) -> BlockMask:
        """For FlexAttention; ``backward`` also lists the row tiles of each key tile."""
        partial = self.some if self.whole is None else self.some & ~self.whole
        count, index = _listed(partial)
        full_count, full_index = (None, None) if self.whole is None else _listed(self.whole)
        return BlockMask.from_kv_blocks(
            count,
            index,
            full_count,
            full_index,
            BLOCK_SIZE=TILE,
            mask_mod=self.mask,
            seq_lengths=(self.rows, self.keys),
            compute_q_blocks=backward,
        )


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row's tiles are true, and the tiles, true ones first and ascending; int32."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.int()


def compressed_tiles(
    q: torch.Tensor, k_cmp: torch.Tensor, config: NSAConfig, q_start: int | torch.Tensor
) -> Tiles:
    """Rows of ``q (B,T,HQ,D)`` over compressed blocks ``k_cmp (B,C,H,D)``."""
    position = query_positions(q_start, q.shape[1], q.device).expand(q.shape[0], -1)
    last = visible_compressed_blocks(position, config) - 1
    return _between(torch.zeros_like(last), last, k_cmp.shape[1], config)


def sliding_tiles(q: torch.Tensor, k: torch.Tensor, config: NSAConfig, q_start: int | torch.Tensor) -> Tiles:
    """Rows of ``q (B,T,HQ,D)`` over the window that ends at each."""
    last = query_positions(q_start, q.shape[1], q.device).expand(q.shape[0], -1)
    return _between(last - (config.window_size - 1), last, k.shape[1], config)


def _between(first: torch.Tensor, last: torch.Tensor, keys: int, config: NSAConfig) -> Tiles:
    """Token t of sequence b sees keys ``first[b,t] .. last[b,t]``, both ``(B,T)``."""
    first, last = (
        bound.clamp(-1, keys).int().repeat_interleave(config.group_size, 1) for bound in (first, last)
    )

    def mask(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= first[b, row]) & (key <= last[b, row])

    begin, end = _key_tiles(keys, first.device)
    lowest, highest = _by_tile(first, keys).amin(-1, keepdim=True), _by_tile(last, -1).amax(-1, keepdim=True)
    some = (lowest <= end) & (highest >= begin)
    # A tile that sticks out, of the rows or of the keys, is masked.
    inside = (_by_tile(first, keys).amax(-1, keepdim=True) <= begin) & (
        _by_tile(last, -1).amin(-1, keepdim=True) >= begin + TILE - 1
    )
    return Tiles(mask, some.unsqueeze(1), (inside & some).unsqueeze(1), first.shape[1], keys)


def _by_tile(rows: torch.Tensor, fill: int) -> torch.Tensor:
    """``(B, R) -> (B, row tiles, TILE)``; rows that do not exist hold ``fill``."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % TILE), value=fill).unflatten(1, (-1, TILE))


def _key_tiles(keys: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last existing key of each key tile."""
    begin = torch.arange(0, keys, TILE, device=device)
    return begin, (begin + TILE).clamp(max=keys) - 1


def selected_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
) -> Tiles:
    """Rows of ``q (B,T,HQ,D)`` over the tokens of ``block_indices (B,T,H,N)`` up to each."""
    group, size, keys = config.group_size, config.selection_block_size, k.shape[1]
    batch, tokens, heads, slots = block_indices.shape
    last = query_positions(q_start, tokens, q.device).expand(batch, -1).clamp(max=keys).int().contiguous()
    lists = block_indices.transpose(1, 2).int().contiguous()  # (B, H, T, N)
    token = torch.arange(tokens, dtype=torch.int32, device=q.device).repeat_interleave(group)
    block = torch.arange(keys, dtype=torch.int32, device=q.device) // size

    def mask(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        t, mine = token[row], block[key]
        chosen = lists[b, h, t, 0] == mine
        for slot in range(1, slots):
            chosen = chosen | (lists[b, h, t, slot] == mine)
        return chosen & (key <= last[b, t])

    # Which blocks the tokens of each row tile selected; a token's rows may lie in several tiles.
    blocks, row_tiles = num_selection_blocks(keys, config), -(-tokens * group // TILE)
    chosen = torch.zeros(batch, heads, row_tiles * (blocks + 1), dtype=torch.bool, device=q.device)
    slot = lists.masked_fill((lists < 0) | (lists >= blocks), blocks).long()
    for row in {*range(0, group, TILE), group - 1}:
        tile = (torch.arange(tokens, device=q.device) * group + row) // TILE
        chosen.scatter_(-1, (tile.unsqueeze(-1) * (blocks + 1) + slot).flatten(2), True)
    before = torch.nn.functional.pad(
        chosen.unflatten(-1, (row_tiles, -1)).cumsum(-1, dtype=torch.int32), (1, 0)
    )
    begin, end = _key_tiles(keys, q.device)
    latest = _by_tile(last.repeat_interleave(group, 1), -1).amax(-1)[:, None, :, None]
    some = (before[..., end // size + 1] > before[..., begin // size]) & (latest >= begin)
    return Tiles(mask, some, None, tokens * group, keys, slots)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: NSAConfig,
    compiler: Compiler | None,
    tiles: Callable[[], Tiles],
) -> Output:
    """``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV) -> o (B,T,HQ,DV), lse (B,T,HQ)``."""
    if min(q.numel(), k.shape[1]) == 0:
        return _nothing(q, v)
    rows = q.unflatten(2, (config.num_kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    keys, values = (
        t.transpose(1, 2) if t.stride(-1) == 1 else t.transpose(1, 2).contiguous() for t in (k, v)
    )
    o, lse = _call(rows, keys, values, tiles(), config.scale, compiler)
    o, lse = (t.unflatten(2, (q.shape[1], -1)).transpose(1, 2).flatten(2, 3) for t in (o, lse.detach()))
    return o, lse


def _nothing(q: torch.Tensor, v: torch.Tensor) -> Output:
    """Rows without a key: zeros that stay in the graph, and lse -inf."""
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    o = q[..., :1].masked_fill(everywhere, 0.0).expand(-1, -1, -1, v.shape[-1])
    dtype = torch.promote_types(q.dtype, torch.float32)
    return o, torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, scale: float, compiler: Compiler | None
) -> Output:
    """``q (B,H,R,D), k (B,H,S,D), v (B,H,S,DV) -> o (B,H,R,DV), lse (B,H,R)``."""
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    mask = tiles.block_mask(grad)
    if compiler is None:  # the public function compiles even its unfused form, anew for most shapes
        options = {"PRESCALE_QK": False}
        unfused = torch.ops.higher_order.flex_attention
        with record_function("flex_attention"):  # its parts alone would not tell a profiler whose they are
            o, lse = unfused(q, k, v, _as_it_is, mask.as_tuple(), scale, options)[:2]
        return o, lse * math.log(2.0)
    few = q.shape[2] < TILE
    if few:  # the kernel that splits the keys wants to know the batch
        for t in (q, k, v):
            torch._dynamo.mark_static(t, 0)
    heads_and_dims = (k.shape[1], k.shape[3], v.shape[3], few and q.shape[0])
    ones = tuple(size == 1 for t in (q, k, tiles.some) for size in t.shape)
    kind = (q.dtype, q.device.type, grad, tiles.whole is None, tiles.slots, heads_and_dims, ones)
    return _compiled(compiler, *kind)(q, k, v, mask, scale)


def _as_it_is(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return score


@lru_cache(maxsize=256)
def _compiled(compiler: Compiler, *constant: Any) -> Callable[..., Output]:
    """FlexAttention compiled for any length, batch and block geometry.

    ``constant`` is what the compiler takes for constant: heads, head dims, flags and which sizes are 1. It
    counts by code object what it compiled anew and stops at a limit, so that each set has its own.
    """
    if compiler == "inductor":
        with warnings.catch_warnings():  # torch warns of itself as its compiler is imported
            warnings.simplefilter("ignore")
            import_module("torch._inductor.compile_fx")
    fn = FunctionType(_flex.__code__.replace(), globals())
    compiled: Callable[..., Any] = torch.compile(fn, backend=compiler, dynamic=True, fullgraph=True)
    return compiled


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, scale: float) -> Output:
    o, more = flex_attention(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    assert more.lse is not None
    return o, more.lse
