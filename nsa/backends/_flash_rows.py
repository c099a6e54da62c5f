"""Sliding and compressed attention as plain calls of FlashAttention, whichever generation it is.

Causality and windows of FlashAttention are aligned to the bottom right, so either branch is a plain call once
its rows and keys are arranged; neither needs a mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa.backends._flash_library import CAUSAL, FULL, INF, Bounds, Library, Output, Window, pack_batch
from nsa.blocks import num_compressed_blocks, visible_compressed_blocks
from nsa.config import NSAConfig


def sliding(
    library: Library,
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
        return _over_prefixes(library, q, k, v, lengths, (width - 1, 0), config)
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
    return _attend_parts(library, q, k, v, parts, config, packed)


def compressed(
    library: Library,
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
        return _attend_parts(library, q, k, v, parts, config, packed)
    if q.shape[1] == 1:
        visible = visible_compressed_blocks(q_start.to(q.device).expand(q.shape[0]), config)
        return _over_prefixes(library, q, k, v, visible.clamp(max=k.shape[1]), FULL, config)
    outputs = [
        compressed(library, q[b : b + 1], k[b : b + 1], v[b : b + 1], config, start, packed=packed)
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
    library: Library,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    parts: Sequence[_Part],
    config: NSAConfig,
    packed: bool,
) -> Output:
    """Ascending, disjoint parts; rows in none are empty: output 0, lse -inf, zero gradient."""
    value_dim = v.shape[-1]
    q, k, v = widened(library, q, k, v)
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
            outputs.append(nothing(queries, v.shape[-1]))
            continue
        keys, values = (t[:, piece.key : piece.key_end] for t in (k, v))
        outputs.append(_attend_part(library, queries, keys, values, piece, config, packed))
    if len(outputs) == 1:
        o, lse = outputs[0]
    else:
        o, lse = torch.cat([o for o, _ in outputs], 1), torch.cat([lse for _, lse in outputs], 1)
    return o[..., :value_dim], lse


def _attend_part(
    library: Library,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    part: _Part,
    config: NSAConfig,
    packed: bool,
) -> Output:
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
    library: Library,
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
    q, k, v = widened(library, q, k, v)
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    if keys == 0:
        return nothing(q, value_dim)
    starts = torch.arange(batch + 1, device=q.device)
    cu_q = (starts * rows).repeat_interleave(2)[1:]
    cu_k = torch.stack([starts[:-1] * keys, starts[:-1] * keys + lengths], 1).flatten()
    cu_k = torch.cat([cu_k, starts[-1:] * keys])
    # At max_q = 1 FlashAttention takes every sequence to have one query; a bound of 2 keeps it from that.
    bounds = Bounds(cu_q.int(), cu_k.int(), max(2, rows), keys)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    o, lse = library.varlen(q, k, v, bounds, config.scale, window)
    return o.unflatten(0, (batch, rows))[..., :value_dim], lse.unflatten(0, (batch, rows))


def widened(
    library: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous head dims of the widths the library wants; the zeros change no product."""
    width, value_width = library.widths(q.shape[-1], v.shape[-1])
    return _padded(q, width), _padded(k, width), _padded(v, value_width)


def _padded(t: torch.Tensor, width: int) -> torch.Tensor:
    if t.shape[-1] != width:
        t = torch.nn.functional.pad(t, (0, width - t.shape[-1]))
    return t if t.stride(-1) == 1 else t.contiguous()


def nothing(q: torch.Tensor, width: int) -> Output:
    """Rows without a key: zeros that stay in the graph, with zero gradient even where q is not finite.
    ``width`` is at most q's own.
    """
    everywhere = torch.ones((), dtype=torch.bool, device=q.device)
    lse = torch.full(q.shape[:3], -INF, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return q.masked_fill(everywhere, 0.0)[..., :width], lse
