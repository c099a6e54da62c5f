"""Compressed, selected and sliding attention through FlashAttention 2.

The kernels come from the package ``flash_attn`` where it is installed, else from torch, which carries them as
``torch.nn.attention.varlen``: see :func:`provider`. Both align causality to the bottom right, so every branch is a
plain call once its rows and keys are arranged; no branch needs a mask of its own. fp16 and bf16, CUDA.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from nsa.blocks import num_compressed_blocks, query_positions, visible_compressed_blocks
from nsa.config import NSAConfig

Output = tuple[torch.Tensor, torch.Tensor]
Window = tuple[int, int]

# Keys left and right of the diagonal a query sees; -1 is all of them.
FULL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)
INF = float("inf")
# Bytes of packed K and V of one chunk of selected attention, and the sequences one launch takes (CUDA's grid.y).
PACKED_BYTES = 2**28
MAX_SEQUENCES = 65535


class Provider(Protocol):
    """FlashAttention 2 as one library offers it: bottom-right aligned, GQA native, autograd through ``o``.

    ``dense``: ``q (B,T,HQ,D), k v (B,S,H,D) -> o (B,T,HQ,D), lse (B,T,HQ)``. ``varlen``: the same for sequences packed
    along one dim, whose bounds are ``cu_q, cu_k`` (int32) and whose longest are at most ``max_q, max_k``. A row without
    a key gives 0 and lse -inf.
    """

    name: str

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output: ...

    def varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        window: Window,
    ) -> Output: ...


@dataclass(frozen=True)
class FlashAttn:
    """The package ``flash_attn``, 2.7 or later."""

    library: Any
    name: str

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output:
        o, lse, _ = self.library.flash_attn_func(
            q, k, v, softmax_scale=scale, causal=window[1] == 0, window_size=window, return_attn_probs=True
        )
        return o, _rows_first(lse.transpose(1, 2))

    def varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        window: Window,
    ) -> Output:
        o, lse, _ = self.library.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max_q,
            max_k,
            softmax_scale=scale,
            causal=window[1] == 0,
            window_size=window,
            return_attn_probs=True,
        )
        return o, _rows_first(lse.t())


@dataclass(frozen=True)
class TorchVarlen:
    """``torch.nn.attention.varlen`` of torch 2.11 or later: the same kernels, packed sequences only."""

    library: Any
    name: str

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output:
        return _as_varlen(self, q, k, v, scale, window)

    def varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        window: Window,
    ) -> Output:
        # torch 2.11 takes fewer KV heads as they come; later versions want to be told.
        known = inspect.signature(self.library.varlen_attn).parameters
        told = {"enable_gqa": True} if "enable_gqa" in known else {}
        lse_too = self.library.AuxRequest(lse=True)
        o, lse = self.library.varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, return_aux=lse_too, scale=scale, window_size=window, **told
        )
        return o, _rows_first(lse.t())  # (HQ, T) whatever its docstring says


def _rows_first(lse: torch.Tensor) -> torch.Tensor:
    """FlashAttention marks a row without a key by lse +inf; here it is -inf, and lse carries no gradient."""
    lse = lse.detach()
    return lse.masked_fill(lse == INF, -INF)


@lru_cache(maxsize=None)
def provider() -> str | None:
    """The library these functions run, with its version: ``flash_attn 2.8.3`` or ``torch 2.13.0 varlen``; None without one.

    Decided from what is installed; nothing is imported and no kernel is tried.
    """
    if find_spec("flash_attn_2_cuda") is not None:  # flash_attn 4 installs under the same package name
        for version in (found.version for found in metadata.distributions(name="flash-attn")):
            if (2, 7) <= tuple(int(part) for part in version.split(".")[:2]) < (3, 0):
                return f"flash_attn {version}"
    if torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__.split('+')[0]} varlen"
    return None


@lru_cache(maxsize=None)
def _provider() -> Provider:
    name = provider()
    if name is None:
        raise RuntimeError("no FlashAttention 2 is installed: pip install 'nsabench[flash-attn]'")
    if name.startswith("flash_attn"):
        return FlashAttn(import_module("flash_attn"), name)
    return TorchVarlen(import_module("torch.nn.attention.varlen"), name)


def sliding_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: int | torch.Tensor = 0
) -> Output:
    """See :func:`nsa.reference.sliding_attention`. One call: ``w - 1`` keys to the left and the query's own.

    A ``q_start`` tensor runs as packed sequences without a host synchronisation; every query's own key must then exist
    (``q_start + T <= S``), else the device asserts.
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
        lengths = q_start.to(q.device) + rows
        torch._assert_async((lengths <= length).all(), f"q_start + {rows} queries is more than {length} keys")
        return _over_prefixes(q, k, v, lengths, (width - 1, 0), config)
    # Keys end with the last query's own, so that bottom right is where the diagonal belongs.
    inside = min(max(length - q_start, 0), rows)
    parts = []
    if inside:
        key = max(0, q_start - width + 1)
        window = (
            FULL if inside == 1 else (width - 1, 0)
        )  # cut to size; the kernel has a faster path without a window
        parts.append(_Part(0, inside, key, q_start + inside, window))
    # Queries whose own key is missing see the rest of their window. NSA has none; they run one by one.
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

    ``d`` consecutive queries see the same number of blocks. One packed sequence for each such bucket would be exact, but
    it fills ``d`` rows of a 64 or 128 row tile and needs every prefix of the keys packed: C^2 / 2 of them. Taken the
    other way, every ``d``-th query sees exactly one block more than the one before it: each of the ``d`` phases is plain
    causal attention of T/d queries over the same C keys. Phases run as heads of one call, which costs no copy of the
    queries and at most ``d`` copies of the keys (``d C`` is about T). What does not fill whole buckets at either end sees
    one number of blocks, and is a call without a mask.

    A ``q_start`` tensor with one query a sequence (decode) runs without a host synchronisation; with more it is read on
    the host, once a call.
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
    if isinstance(q_start, torch.Tensor):
        if q.shape[1] == 1:
            visible = visible_compressed_blocks(q_start.to(q.device), config).clamp(max=k.shape[1])
            return _over_prefixes(q, k, v, visible, FULL, config)
        outputs = [
            _compressed(q[b : b + 1], k[b : b + 1], v[b : b + 1], config, start, packed=packed)
            for b, start in enumerate(q_start.tolist())
        ]
        return torch.cat([o for o, _ in outputs]), torch.cat([lse for _, lse in outputs])
    return _attend_parts(q, k, v, _staircase(q.shape[1], k.shape[1], q_start, config), config, packed)


def _staircase(rows: int, blocks: int, q_start: int, config: NSAConfig) -> list[_Part]:
    """The visible blocks of queries ``q_start ..``: a rectangle, whole buckets by phase, a rectangle; any may lack."""

    def seen(row: int) -> int:
        return min(num_compressed_blocks(q_start + row + 1, config), blocks)

    stride, past = config.compression_stride, q_start - (config.compression_block_size - 1)
    first = min(rows, max(0, -past))
    if blocks == 0 or first == rows:
        return []
    aligned = min(rows, first + -(past + first) % stride)  # the first row of a bucket
    steps_end = min(rows, blocks * stride - past)  # from there on every row sees every block
    steps = max(0, steps_end - aligned) // stride
    tail = aligned + steps * stride
    bounds = [(first, aligned), *([(aligned, tail)] if steps == 1 else []), (tail, rows)]
    parts = [_Part(row, end, 0, seen(row), FULL) for row, end in bounds if row < end]
    if steps > 1:
        parts.append(_Part(aligned, tail, 0, seen(tail - 1), CAUSAL, phases=stride))
    return sorted(parts, key=lambda part: part.row)


@dataclass(frozen=True)
class _Part:
    """Queries ``[row, row_end)`` attend keys ``[key, key_end)`` under ``window``, aligned to the bottom right.

    With ``phases`` p every p-th query makes up one such attention over the same keys.
    """

    row: int
    row_end: int
    key: int
    key_end: int
    window: Window
    phases: int = 1


def _attend_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: Sequence[_Part], config: NSAConfig, packed: bool
) -> Output:
    """Ascending, disjoint parts; rows in none are empty: output 0, lse -inf, zero gradient."""
    library, value_dim = _provider(), v.shape[-1]
    q, k, v = _one_width(q, k, v)
    pieces: list[tuple[int, _Part | None]] = []
    row = 0
    for part in parts:
        pieces += [(part.row - row, None), (part.row_end - part.row, part)]
        row = part.row_end
    pieces = [piece for piece in [*pieces, (q.shape[1] - row, None)] if piece[0]]
    if not parts:
        o, lse = _nothing(q)
        return o[..., :value_dim], lse
    outputs = []
    # One split, so that the gradient of q is put together once.
    for queries, (_, piece) in zip(q.split([size for size, _ in pieces], 1), pieces, strict=True):
        if piece is None:
            outputs.append(_nothing(queries))
            continue
        keys, values = k[:, piece.key : piece.key_end], v[:, piece.key : piece.key_end]
        outputs.append(_attend_part(library, queries, keys, values, piece, config, packed))
    if len(outputs) == 1:
        o, lse = outputs[0]
    else:
        o, lse = torch.cat([o for o, _ in outputs], 1), torch.cat([lse for _, lse in outputs], 1)
    return o[..., :value_dim], lse


def _attend_part(
    library: Provider,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    part: _Part,
    config: NSAConfig,
    packed: bool,
) -> Output:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Output:
        if packed:
            return _as_varlen(library, q, k, v, config.scale, part.window)
        return library.dense(q, k, v, config.scale, part.window)

    if part.phases == 1:
        return call(q, k, v)
    phases, heads, group = part.phases, config.num_kv_heads, config.group_size
    steps = q.shape[1] // phases
    by_phase = q.unflatten(1, (steps, phases))  # (B, T/d, d, HQ, D)
    if k.shape[1] <= steps * group:
        # Heads (phase, HQ): a view of q and of o; each phase reads its own copy of the keys.
        k, v = (t.unsqueeze(2).expand(-1, -1, phases, -1, -1).flatten(2, 3) for t in (k, v))
        o, lse = call(by_phase.flatten(2, 3), k, v)
        return o.unflatten(2, (phases, -1)).flatten(1, 2), lse.unflatten(2, (phases, -1)).flatten(1, 2)
    # Few queries over many keys: heads (H, phase, G) instead, which moves q and o and leaves the keys alone.
    q = by_phase.unflatten(3, (heads, group)).transpose(2, 3).flatten(2, 4)
    o, lse = (t.unflatten(2, (heads, phases, group)).transpose(2, 3) for t in call(q, k, v))
    return o.flatten(3, 4).flatten(1, 2), lse.flatten(3, 4).flatten(1, 2)


def _as_varlen(
    library: Provider, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
) -> Output:
    """A batch of equal lengths through the kernel for packed sequences."""
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    packed = (t.flatten(0, 1) for t in (q, k, v))
    o, lse = library.varlen(*packed, steps * rows, steps * keys, rows, keys, scale, window)
    return o.unflatten(0, (batch, rows)), lse.unflatten(0, (batch, rows))


def _over_prefixes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    window: Window,
    config: NSAConfig,
) -> Output:
    """Sequence b attends its first ``lengths[b]`` keys, ``lengths (B,)`` on the device.

    The keys are not moved: what lies between two prefixes is a sequence without queries.
    """
    value_dim = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    if keys == 0:
        o, lse = _nothing(q)
        return o[..., :value_dim], lse
    start = torch.arange(batch + 1, device=q.device)
    cu_q = (start * rows).repeat_interleave(2)[1:]
    cu_k = torch.stack([start[:-1] * keys, start[:-1] * keys + lengths], 1).flatten()
    cu_k = torch.cat([cu_k, start[-1:] * keys])
    packed = (t.flatten(0, 1) for t in (q, k, v))
    # At max_q = 1 FlashAttention takes every sequence to have one query; a bound of 2 keeps it from that.
    max_q = max(2, rows)
    o, lse = _provider().varlen(*packed, cu_q.int(), cu_k.int(), max_q, keys, config.scale, window)
    return o.unflatten(0, (batch, rows))[..., :value_dim], lse.unflatten(0, (batch, rows))


def _one_width(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """FlashAttention wants one head dim, a multiple of 8, contiguous: zeros fill the rest and change no product."""
    width = -(-max(t.shape[-1] for t in tensors) // 8) * 8
    padded = (
        torch.nn.functional.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors
    )
    return [t if t.stride(-1) == 1 else t.contiguous() for t in padded]


def _nothing(q: torch.Tensor) -> Output:
    """The output of rows without a key: zeros, in the graph, with zero gradient even where q is not finite."""
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

    Its keys are the selected tokens up to the query itself, so the call is not causal: a causal one would hide keys from
    the group's first heads. Packing runs in chunks of bounded memory, again in the backward, without a loop over queries
    or a host synchronisation; gradients of keys add up in fp32.
    """
    value_dim = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    if min(k.shape[1], block_indices.numel()) == 0:
        o, lse = _nothing(q)
    else:
        o, lse = _Selected.apply(q, k, v, block_indices, config, q_start)  # type: ignore[no-untyped-call]
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
        rows, keys = q.flatten(0, 1), (k.flatten(0, 2), v.flatten(0, 2))
        o = torch.empty_like(rows, memory_format=torch.contiguous_format)
        lse = torch.empty(rows.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for pack in _packs(block_indices, q, k, config, q_start):
            packed = (pack.gather(t) for t in keys)
            o[pack.span], lse[pack.span] = _attend_pack(rows[pack.span], *packed, pack, config)
        ctx.save_for_backward(q, k, v, block_indices)
        ctx.config, ctx.q_start = config, q_start
        lse = lse.view(q.shape[:3])
        ctx.mark_non_differentiable(lse)
        return o.view(q.shape), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, block_indices = ctx.saved_tensors
        rows, keys, grad = q.flatten(0, 1), (k.flatten(0, 2), v.flatten(0, 2)), grad.flatten(0, 1)
        dq = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dtype = torch.promote_types(k.dtype, torch.float32)
        # One row more: packed places that hold no key send theirs there.
        totals = [torch.zeros(t.shape[0] + 1, t.shape[1], dtype=dtype, device=k.device) for t in keys]
        for pack in _packs(block_indices, q, k, ctx.config, ctx.q_start):
            leaves = [rows[pack.span].detach(), *(pack.gather(t) for t in keys)]
            leaves = [t.requires_grad_() for t in leaves]
            with torch.enable_grad():
                o, _ = _attend_pack(*leaves, pack, ctx.config)
            dq[pack.span], *parts = torch.autograd.grad(o, leaves, grad[pack.span])
            for total, part in zip(totals, parts, strict=True):
                total.index_add_(0, pack.source, part.to(dtype))
        dk, dv = (total[:-1].to(k.dtype).view(k.shape) for total in totals)
        return dq.view(q.shape), dk, dv, None, None, None


@dataclass(frozen=True)
class _Pack:
    """Queries ``span`` of the flattened batch; where each packed key comes from; the bounds of each sequence's keys."""

    span: slice
    source: torch.Tensor  # rows of K flattened to (B*S*H, D); B*S*H marks a place that holds no key
    cu_k: torch.Tensor
    max_k: int

    def gather(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.index_select(0, self.source.clamp(max=keys.shape[0] - 1))


def _attend_pack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: _Pack, config: NSAConfig) -> Output:
    """``q (R,HQ,D)`` and its packed keys ``(P,D) -> o (R,HQ,D), lse (R,HQ)``."""
    group = config.group_size
    cu_q = torch.arange(len(pack.cu_k), dtype=torch.int32, device=q.device) * group
    queries, k, v = (t.unsqueeze(1) for t in (q.flatten(0, 1), k, v))
    o, lse = _provider().varlen(queries, k, v, cu_q, pack.cu_k, group, pack.max_k, config.scale, FULL)
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
        sequence = torch.arange(span.start, span.stop, device=q.device) // rows
        # How many keys fit is bounded on the host; how many there are is known on the device alone.
        reach = torch.full((span.stop - span.start,), most)
        if not isinstance(q_start, torch.Tensor):
            reach = (torch.arange(span.start, span.stop) % rows + q_start + 1).clamp(max=most)
        places = torch.arange(heads * int(reach.sum()), device=q.device)
        source, cu_k = _sources(chosen[span], position[span], sequence, places, length, config)
        source = source.where(places < cu_k[-1], batch * length * heads)
        yield _Pack(span, source, cu_k, most)


def _sources(
    chosen: torch.Tensor,
    position: torch.Tensor,
    sequence: torch.Tensor,
    places: torch.Tensor,
    length: int,
    config: NSAConfig,
) -> Output:
    """Which row of the flattened K fills each of ``places``, and the bounds (int32) of each (query, head)'s keys.

    ``chosen (R,H,N)``, ``position, sequence (R,)``. Blocks count up to the query and the last key; empty and repeated
    ones count nothing. Places from the last bound on hold anything.
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
