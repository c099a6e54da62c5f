"""Selected attention as packed sequences of FlashAttention, whichever generation it is: one sequence for each
(token, KV head), its keys the selected tokens up to the query itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nsa.backends._flash_library import FULL, Bounds, Library, Output
from nsa.backends._flash_rows import nothing, widened
from nsa.blocks import query_positions
from nsa.config import NSAConfig

# Bytes of packed K and V of one chunk.
PACKED_BYTES = 2**28
# Sequences one launch takes: CUDA's limit for grid.y.
MAX_SEQUENCES = 65535


def selected(
    library: Library,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
) -> Output:
    """``q (B,T,HQ,D)`` over the tokens of ``block_indices (B,T,H,N)``, up to each query."""
    value_dim = v.shape[-1]
    q, k, v = widened(library, q, k, v)
    if min(k.shape[1], block_indices.numel()) == 0:
        return nothing(q, value_dim)
    o, lse = _Selected.apply(library, q, k, v, block_indices, config, q_start)
    return o[..., :value_dim], lse


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_indices: torch.Tensor,
        config: NSAConfig,
        q_start: int | torch.Tensor,
    ) -> Output:
        rows, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2)
        o = rows.new_empty(*rows.shape[:2], v.shape[-1])
        lse = o.new_empty(o.shape[:2], dtype=torch.promote_types(o.dtype, torch.float32))
        for pack in _packs(block_indices, q, k, config, q_start):
            keys, values = pack.gather(flat_k), pack.gather(flat_v)
            o[pack.span], lse[pack.span] = _attend_pack(library, rows[pack.span], keys, values, pack, config)
        ctx.save_for_backward(q, k, v, block_indices)
        ctx.library, ctx.config, ctx.q_start = library, config, q_start
        lse = lse.view(q.shape[:3])
        ctx.mark_non_differentiable(lse)
        return o.unflatten(0, q.shape[:2]), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, block_indices = ctx.saved_tensors
        rows, flat_k, flat_v, grad = q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2), grad.flatten(0, 1)
        dq = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dtype = torch.promote_types(k.dtype, torch.float32)
        # One row more: places that hold no key send their gradient there.
        dk, dv = (t.new_zeros(t.shape[0] + 1, t.shape[1], dtype=dtype) for t in (flat_k, flat_v))
        for pack in _packs(block_indices, q, k, ctx.config, ctx.q_start):
            leaves = [rows[pack.span].detach(), pack.gather(flat_k), pack.gather(flat_v)]
            queries, keys, values = (t.requires_grad_() for t in leaves)
            with torch.enable_grad():
                o, _ = _attend_pack(ctx.library, queries, keys, values, pack, ctx.config)
            dq[pack.span], d_keys, d_values = torch.autograd.grad(o, leaves, grad[pack.span])
            dk.index_add_(0, pack.source, d_keys.to(dtype))
            dv.index_add_(0, pack.source, d_values.to(dtype))
        dk, dv = dk[:-1].to(k.dtype).view(k.shape), dv[:-1].to(v.dtype).view(v.shape)
        return None, dq.view(q.shape), dk, dv, None, None, None


@dataclass(frozen=True)
class _Pack:
    """Some queries and their keys, packed.

    ``span``: which queries of the flattened batch. ``source (P,)``: the row of K flattened to ``(B*S*H, D)``
    that each place holds, ``B*S*H`` where it holds none. ``cu_k``: bounds of each (query, KV head)'s keys, at
    most ``max_k``.
    """

    span: slice
    source: torch.Tensor
    cu_k: torch.Tensor
    max_k: int

    def gather(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.index_select(0, self.source.clamp(max=keys.shape[0] - 1))


def _attend_pack(
    library: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: _Pack, config: NSAConfig
) -> Output:
    """``q (R,HQ,D)`` over its packed keys ``(P,D) -> o (R,HQ,D), lse (R,HQ)``."""
    group = config.group_size
    cu_q = torch.arange(pack.cu_k.numel(), dtype=torch.int32, device=q.device) * group
    bounds = Bounds(cu_q, pack.cu_k, group, pack.max_k)
    queries, k, v = (t.unsqueeze(1) for t in (q.flatten(0, 1), k, v))
    o, lse = library.varlen(queries, k, v, bounds, config.scale, FULL)
    return o.view(*q.shape[:2], -1), lse.reshape(q.shape[:2])


def _packs(
    block_indices: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
) -> Iterator[_Pack]:
    """Chunks of queries that together are the whole batch, in order."""
    batch, rows = q.shape[:2]
    length, heads = k.shape[1:3]
    most = min(block_indices.shape[-1] * config.selection_block_size, length)  # keys of one query
    position = query_positions(q_start, rows, q.device).expand(batch, -1).flatten()
    chosen = block_indices.flatten(0, 1)
    step = PACKED_BYTES // (2 * heads * most * k.shape[-1] * k.element_size())
    step = max(1, min(step, MAX_SEQUENCES // heads))
    for row in range(0, batch * rows, step):
        span = slice(row, min(row + step, batch * rows))
        # How many keys there can be is known on the host, how many there are on the device alone.
        reach = torch.full((span.stop - span.start,), most)
        if not isinstance(q_start, torch.Tensor):
            reach = (torch.arange(span.start, span.stop) % rows + q_start + 1).clamp(max=most)
        places = torch.arange(heads * int(reach.sum()), device=q.device)
        sequence = torch.arange(span.start, span.stop, device=q.device) // rows
        source, cu_k = _sources(chosen[span], position[span], sequence, places, length, config)
        yield _Pack(span, source.where(places < cu_k[-1], batch * length * heads), cu_k, most)


def _sources(
    chosen: torch.Tensor,
    position: torch.Tensor,
    sequence: torch.Tensor,
    places: torch.Tensor,
    length: int,
    config: NSAConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of flattened K that fills each of ``places``, and int32 bounds of each (query, head)'s keys.

    ``chosen (R,H,N)``, ``position, sequence (R,)``. A block counts up to the query and the last key; an empty
    or repeated one counts nothing. Places from the last bound on are meaningless.
    """
    heads, slots = chosen.shape[1:]
    size = config.selection_block_size
    ordered = chosen.sort(-1).values.long()
    repeated = torch.nn.functional.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    first = ordered * size
    end = (position + 1).clamp(max=length)[:, None, None]
    count = (end - first).clamp(0, size).masked_fill(repeated | (ordered < 0), 0)
    filled = count.flatten().cumsum(0)
    slot = torch.searchsorted(filled, places, right=True).clamp(max=filled.numel() - 1)
    token = first.flatten()[slot] + places - (filled - count.flatten())[slot]
    base = (sequence * length * heads).unsqueeze(1) + torch.arange(heads, device=chosen.device)  # (R, H)
    cu_k = torch.nn.functional.pad(filled[slots - 1 :: slots], (1, 0)).int()
    return base.flatten()[slot // slots] + token * heads, cu_k
