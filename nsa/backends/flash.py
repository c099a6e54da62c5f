"""Compressed, selected and sliding attention through FlashAttention 2, as :func:`provider` names it.

Causality and windows of FlashAttention are aligned to the bottom right, so every branch is a plain call once
its rows and keys are arranged; no branch needs a mask of its own. CUDA, fp16 and bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nsa.backends._flash_library import (
    CAUSAL,
    FULL,
    INF,
    Bounds,
    Output,
    Window,
    load,
    pack_batch,
    provider,
)
from nsa.blocks import num_compressed_blocks, query_positions, visible_compressed_blocks
from nsa.config import NSAConfig

__all__ = [
    "compressed_attention",
    "compressed_attention_varlen",
    "provider",
    "selected_attention",
    "sliding_attention",
    "sliding_attention_varlen",
]

# Bytes of packed K and V of one chunk of selected attention.
PACKED_BYTES = 2**28
# Sequences one launch takes: CUDA's limit for grid.y.
MAX_SEQUENCES = 65535


def sliding_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: int | torch.Tensor = 0
) -> Output:
    """See :func:`nsa.reference.sliding_attention`. One call: ``w - 1`` keys to the left, none to the right.

    A ``q_start`` tensor runs as packed sequences, without a host synchronisation; every query's own key must
    then exist (``q_start + T <= S``), else the device asserts.
    """
    return _sliding(q, k, v, config, q_start, packed=False)


def sliding_attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: int | torch.Tensor = 0
) -> Output:
    """:func:`sliding_attention` through the kernel for packed sequences, whatever ``q_start`` is."""
    return _sliding(q, k, v, config, q_start, packed=True)


def _sliding(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    *,
    packed: bool,
) -> Output:
    rows, length, width = q.shape[1], k.shape[1], config.window_size
    if isinstance(q_start, torch.Tensor):
        lengths = q_start.to(q.device).expand(q.shape[0]) + rows
        torch._assert_async((lengths <= length).all(), f"q_start + {rows} queries is more than {length} keys")
        return _over_prefixes(q, k, v, lengths, (width - 1, 0), config)
    # Keys end with the last query's own, so that bottom right is where the diagonal belongs.
    inside = min(max(length - q_start, 0), rows)
    parts = []
    if inside:
        # One query needs no window once its keys are cut; without one the kernel takes a group's heads as
        # rows.
        window = FULL if inside == 1 else (width - 1, 0)
        parts.append(_Part(0, inside, max(0, q_start - width + 1), q_start + inside, window))
    # Queries whose own key is missing see what is left of their window. NSA has none; they run one by one.
    reach = min(max(length + width - 1 - q_start, 0), rows)
    for row in range(inside, reach):
        parts.append(_Part(row, row + 1, max(0, q_start + row - width + 1), length, FULL))
    return _attend_parts(q, k, v, parts, config, packed)


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.compressed_attention`. At most three calls, whatever the length.

    ``d`` consecutive queries see the same number of blocks. One packed sequence for each such bucket would be
    exact, but it fills ``d`` rows of a tile of 64 or 128 and needs every prefix of the keys packed, half of
    ``C^2`` keys. Taken the other way, every ``d``-th query sees exactly one block more than the one before
    it: each of the ``d`` phases is plain causal attention of ``T/d`` queries over the same ``C`` keys. The
    phases run as heads of one call. That copies either the keys, ``d`` times (``d C`` is about the length),
    or the queries, whichever is less. What fills no whole bucket, at either end, sees one number of blocks
    and is a call without a mask.

    A ``q_start`` tensor with one query a sequence (decode) runs without a host synchronisation; with more
    queries it is read on the host, once a call.
    """
    return _compressed(q, k_cmp, v_cmp, config, q_start, packed=False)


def compressed_attention_varlen(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """:func:`compressed_attention` through the kernel for packed sequences, whatever ``q_start`` is."""
    return _compressed(q, k_cmp, v_cmp, config, q_start, packed=True)


def _compressed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    *,
    packed: bool,
) -> Output:
    if not isinstance(q_start, torch.Tensor):
        parts = _staircase(q.shape[1], k.shape[1], q_start, config)
        return _attend_parts(q, k, v, parts, config, packed)
    if q.shape[1] == 1:
        visible = visible_compressed_blocks(q_start.to(q.device).expand(q.shape[0]), config)
        return _over_prefixes(q, k, v, visible.clamp(max=k.shape[1]), FULL, config)
    outputs = [
        _compressed(q[b : b + 1], k[b : b + 1], v[b : b + 1], config, start, packed=packed)
        for b, start in enumerate(q_start.expand(q.shape[0]).tolist())
    ]
    return torch.cat([o for o, _ in outputs]), torch.cat([lse for _, lse in outputs])


@dataclass(frozen=True)
class _Part:
    """Queries ``[row, row_end)`` attend keys ``[key, key_end)`` in ``window``, aligned to the bottom right.

    With ``phases`` p every p-th query makes up one such attention, p of them over the same keys.
    """

    row: int
    row_end: int
    key: int
    key_end: int
    window: Window
    phases: int = 1


def _staircase(rows: int, blocks: int, q_start: int, config: NSAConfig) -> list[_Part]:
    """What queries ``q_start ..`` see of ``blocks``: a rectangle, whole buckets by phase, a rectangle."""

    def seen(row: int) -> int:
        return min(num_compressed_blocks(q_start + row + 1, config), blocks)

    stride, past = config.compression_stride, q_start - (config.compression_block_size - 1)
    first = min(rows, max(0, -past))  # the first row that sees a block
    if blocks == 0 or first == rows:
        return []
    aligned = min(rows, first + -(past + first) % stride)  # the first row of a bucket
    last_bucket = min(rows, blocks * stride - past)  # rows after it see every block too, but one no more
    steps = max(0, last_bucket - aligned) // stride
    tail = aligned + steps * stride
    body = _Part(aligned, tail, 0, seen(tail - 1), CAUSAL if steps > 1 else FULL, stride if steps > 1 else 1)
    head, rest = (_Part(row, end, 0, seen(row), FULL) for row, end in ((first, aligned), (tail, rows)))
    return [part for part in (head, body, rest) if part.row < part.row_end]


def _attend_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: Sequence[_Part], config: NSAConfig, packed: bool
) -> Output:
    """Ascending, disjoint parts; rows in none are empty: output 0, lse -inf, zero gradient."""
    value_dim = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    pieces: list[tuple[int, _Part | None]] = []
    row = 0
    for part in parts:
        pieces += [(part.row - row, None), (part.row_end - part.row, part)]
        row = part.row_end
    pieces = [piece for piece in [*pieces, (q.shape[1] - row, None)] if piece[0]] or [(0, None)]
    outputs = []
    # One split, so that the gradient of q is put together once.
    for queries, (_, piece) in zip(q.split([size for size, _ in pieces], 1), pieces, strict=True):
        if piece is None:
            outputs.append(_nothing(queries))
            continue
        keys, values = (t[:, piece.key : piece.key_end] for t in (k, v))
        outputs.append(_attend_part(queries, keys, values, piece, config, packed))
    if len(outputs) == 1:
        o, lse = outputs[0]
    else:
        o, lse = torch.cat([o for o, _ in outputs], 1), torch.cat([lse for _, lse in outputs], 1)
    return o[..., :value_dim], lse


def _attend_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: _Part, config: NSAConfig, packed: bool
) -> Output:
    library = load()

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Output:
        if packed:
            return pack_batch(library, q, k, v, config.scale, part.window)
        return library.dense(q, k, v, config.scale, part.window)

    if part.phases == 1:
        return call(q, k, v)
    phases, heads, group = part.phases, config.num_kv_heads, config.group_size
    steps = q.shape[1] // phases
    by_phase = q.unflatten(1, (steps, phases))  # (B, T/d, d, HQ, D)
    if k.shape[1] <= steps * group:
        # Heads (d, H, G), a view of q and of o; each phase reads its own copy of the keys.
        k, v = (t.unsqueeze(2).expand(-1, -1, phases, -1, -1).flatten(2, 3) for t in (k, v))
        o, lse = call(by_phase.flatten(2, 3), k, v)
        return o.unflatten(2, (phases, -1)).flatten(1, 2), lse.unflatten(2, (phases, -1)).flatten(1, 2)
    # Few queries over many keys: heads (H, d, G), which moves q and o and leaves the keys alone.
    q = by_phase.unflatten(3, (heads, group)).transpose(2, 3).flatten(2, 4)
    o, lse = (t.unflatten(2, (heads, phases, group)).transpose(2, 3) for t in call(q, k, v))
    return o.flatten(3, 4).flatten(1, 2), lse.flatten(3, 4).flatten(1, 2)


def _over_prefixes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    window: Window,
    config: NSAConfig,
) -> Output:
    """Sequence b attends its first ``lengths[b]`` keys; ``lengths (B,)`` stays on the device.

    No key is moved: what lies between two prefixes is a sequence of its own, without queries.
    """
    value_dim = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    if keys == 0:
        o, lse = _nothing(q)
        return o[..., :value_dim], lse
    starts = torch.arange(batch + 1, device=q.device)
    cu_q = (starts * rows).repeat_interleave(2)[1:]
    cu_k = torch.stack([starts[:-1] * keys, starts[:-1] * keys + lengths], 1).flatten()
    cu_k = torch.cat([cu_k, starts[-1:] * keys])
    # At max_q = 1 FlashAttention takes every sequence to have one query; a bound of 2 keeps it from that.
    bounds = Bounds(cu_q.int(), cu_k.int(), max(2, rows), keys)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    o, lse = load().varlen(q, k, v, bounds, config.scale, window)
    return o.unflatten(0, (batch, rows))[..., :value_dim], lse.unflatten(0, (batch, rows))


def _one_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """One contiguous head dim, a multiple of 8, as FlashAttention wants; the zeros change no product."""
    width = -(-max(t.shape[-1] for t in tensors) // 8) * 8
    padded = [
        t if t.shape[-1] == width else torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in tensors
    ]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in padded]


def _nothing(q: torch.Tensor) -> Output:
    """Rows without a key: zeros that stay in the graph, with zero gradient even where q is not finite."""
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    lse = torch.full(q.shape[:3], -INF, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return q.masked_fill(everywhere, 0.0), lse


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.selected_attention`. Each (token, KV head) is a packed sequence of G queries.

    Its keys are the selected tokens up to the query itself, so the call is not causal: a causal one would
    hide keys from the group's first heads. Keys are packed in chunks of bounded memory, and again in the
    backward, without a loop over queries or a host synchronisation; their gradients add up in fp32.
    """
    value_dim = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    if min(k.shape[1], block_indices.numel()) == 0:
        o, lse = _nothing(q)
    else:
        o, lse = _Selected.apply(q, k, v, block_indices, config, q_start)
    return o[..., :value_dim], lse


class _Selected(torch.autograd.Function):
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
        rows, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2)
        o = torch.empty_like(rows, memory_format=torch.contiguous_format)
        lse = o.new_empty(o.shape[:2], dtype=torch.promote_types(o.dtype, torch.float32))
        for pack in _packs(block_indices, q, k, config, q_start):
            keys, values = pack.gather(flat_k), pack.gather(flat_v)
            o[pack.span], lse[pack.span] = _attend_pack(rows[pack.span], keys, values, pack, config)
        ctx.save_for_backward(q, k, v, block_indices)
        ctx.config, ctx.q_start = config, q_start
        lse = lse.view(q.shape[:3])
        ctx.mark_non_differentiable(lse)
        return o.view(q.shape), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, block_indices = ctx.saved_tensors
        rows, flat_k, flat_v, grad = q.flatten(0, 1), k.flatten(0, 2), v.flatten(0, 2), grad.flatten(0, 1)
        dq = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dtype = torch.promote_types(k.dtype, torch.float32)
        # One row more: places that hold no key send their gradient there.
        dk, dv = (flat_k.new_zeros(flat_k.shape[0] + 1, flat_k.shape[1], dtype=dtype) for _ in range(2))
        for pack in _packs(block_indices, q, k, ctx.config, ctx.q_start):
            leaves = [rows[pack.span].detach(), pack.gather(flat_k), pack.gather(flat_v)]
            queries, keys, values = (t.requires_grad_() for t in leaves)
            with torch.enable_grad():
                o, _ = _attend_pack(queries, keys, values, pack, ctx.config)
            dq[pack.span], d_keys, d_values = torch.autograd.grad(o, leaves, grad[pack.span])
            dk.index_add_(0, pack.source, d_keys.to(dtype))
            dv.index_add_(0, pack.source, d_values.to(dtype))
        dk, dv = (total[:-1].to(k.dtype).view(k.shape) for total in (dk, dv))
        return dq.view(q.shape), dk, dv, None, None, None


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


def _attend_pack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: _Pack, config: NSAConfig) -> Output:
    """``q (R,HQ,D)`` over its packed keys ``(P,D) -> o (R,HQ,D), lse (R,HQ)``."""
    group = config.group_size
    cu_q = torch.arange(pack.cu_k.numel(), dtype=torch.int32, device=q.device) * group
    bounds = Bounds(cu_q, pack.cu_k, group, pack.max_k)
    queries, k, v = (t.unsqueeze(1) for t in (q.flatten(0, 1), k, v))
    o, lse = load().varlen(queries, k, v, bounds, config.scale, FULL)
    return o.view(q.shape), lse.reshape(q.shape[:2])


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
