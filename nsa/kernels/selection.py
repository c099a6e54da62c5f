"""Selection of blocks (eq. 8 to 12, rules 4 to 6): lse of the compressed logits, block scores, top-n.

The lse is one pass over the compressed keys, the scores a second. They pass through scratch of bounded size,
with a launch of :mod:`nsa.kernels._block_scores` and one of :mod:`nsa.kernels._topn` for as many tokens as it
holds; nothing of size ``T x C`` is ever stored, and no host waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.blocks import num_compressed_blocks, num_selection_blocks, overlap_weights
from nsa.config import NSAConfig
from nsa.kernels._block_scores import (
    LENGTHS,
    block_scores,
    dims,
    load_dims,
    load_queries,
    signature,
    sliced_product,
    tokens_of_item,
    visible_blocks,
)
from nsa.kernels._block_scores import constexprs as scores_constexprs
from nsa.kernels._block_scores import static as static_scores
from nsa.kernels._installed import interpreted
from nsa.kernels._tiles import (
    KIB,
    LOG2E,
    ONE_LENGTH,
    SYSTEM_KIB,
    Launch,
    Layout,
    capability,
    dot,
    first_position,
    layout_of,
    on_its_device,
    online_softmax,
    rows_of,
    shared_kib,
    split,
    starts,
    unit_stride,
)
from nsa.kernels._topn import constexprs as top_n_constexprs
from nsa.kernels._topn import static as static_top_n
from nsa.kernels._topn import top_n
from nsa.kernels.work import Call, Launched
from nsa.packing import Packed

# Predicted: at 64k tokens each launch is some ten waves of blocks of an H200. With the lse of 64 heads, 16
# MiB there, far from the 256 MiB that may be had.
SCRATCH_BYTES = 128 * 2**20


@triton.jit
def _lse_walk(
    m, l, query, k_head, stride_kc, begin, stop, num_keys, end, scale_log2, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, SLICE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The key tiles at ``begin, begin + BLOCK_N, ... < stop``; rows see keys before ``end`` where MASKED."""
    for first in range(begin, stop, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        at = k_head + key.to(tl.int64) * stride_kc
        exists = key < num_keys if MASKED else key >= 0
        if SLICE > 0:
            logits = sliced_product(query[0], query[1], at, exists, D, SLICE)
        else:
            logits = dot(query[0], load_dims(at, D, 0, D0, exists, True), None)
            if D1 > 0:
                logits = dot(query[1], load_dims(at, D, D0, D1, exists, True), logits)
        if MASKED:
            logits = tl.where(key[None, :] < end[:, None], logits, float("-inf"))
        _, _, m, l = online_softmax(logits, m, l, scale_log2)
    return m, l


@triton.jit(do_not_specialize=LENGTHS)
def _lse_kernel(
    q, k, lse, q_bounds, k_bounds, starts,
    q_start, num_queries, num_keys, kv_heads, block, stride, scale_log2,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kc, stride_kh,
    G: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The base-2 lse of ``BLOCK_M`` rows, each a (token, query head) of one KV head; -inf for empty rows."""
    tiles = tl.cdiv(num_queries * G, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    sequence = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    first_row, _ = rows_of(q_bounds, sequence, num_queries, num_queries, 1)
    q_at, num_queries = rows_of(q_bounds, sequence, num_queries, stride_qb, stride_qt)
    k_at, num_keys = rows_of(k_bounds, sequence, num_keys, stride_kb, stride_kc)
    if q_bounds is not None and tile * BLOCK_M >= num_queries * G:  # of a shorter sequence
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < num_queries * G
    token = tl.minimum(row // G, num_queries - 1)
    start = first_position(starts, q_start, sequence).to(tl.int32)
    end = visible_blocks(start + token, num_keys, block, stride)
    q_head = head * G + row % G
    q_row = q + q_at + token.to(tl.int64) * stride_qt + q_head * stride_qh
    k_head = k + k_at + head * stride_kh
    query = load_queries(q_row, row >= 0, D, D0, D1, SLICE, False)

    seen_by_all = visible_blocks(start + tile * BLOCK_M // G, num_keys, block, stride) // BLOCK_N * BLOCK_N
    latest = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G, num_queries - 1)
    stop = visible_blocks(start + latest, num_keys, block, stride)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m, l = _lse_walk(
        m, l, query, k_head, stride_kc, 0, seen_by_all, num_keys, end, scale_log2,
        D, D0, D1, SLICE, BLOCK_N, False,
    )  # fmt: skip
    m, l = _lse_walk(
        m, l, query, k_head, stride_kc, seen_by_all, stop, num_keys, end, scale_log2,
        D, D0, D1, SLICE, BLOCK_N, True,
    )  # fmt: skip
    at = (first_row + token) * (kv_heads * G) + q_head
    empty = l == 0.0
    total = m + tl.log2(tl.where(empty, 1.0, l))
    tl.store(lse + at, tl.where(empty, float("-inf"), total), mask=exists)


@dataclass(frozen=True)
class Settings:
    """Launches of the lse kernel (``block_m`` rows, ``block_n`` keys) and of the scores kernel (``block_m``
    compressed blocks, ``block_n`` queries).
    """

    lse: Launch
    scores: Launch


# In the order of preference: the first of which two blocks share an SM, else the last.
_LSE = (
    Launch(128, 128, 8, 2, "predicted: 128 keys keep wgmma off the shared memory's limit"),
    Launch(128, 64, 4, 2, "predicted: the same rows for head_dim 192, or 128 in less shared memory"),
    Launch(64, 64, 4, 2, "predicted: head_dim 256, and all that 99 KB of shared memory hold"),
)
_SCORES = (
    Launch(64, 128, 4, 2, "predicted: 64 registers of logits a thread; three blocks an SM hide the fold"),
    Launch(64, 64, 4, 2, "predicted: head_dim 256, and all that 99 KB of shared memory hold"),
)
_SLICED = Launch(64, 64, 8, 1, "predicted: fp32 without tensor cores; 16 sums a thread, 32 dims at a time")
_INTERPRETED = Settings(Launch(1024, 64, 1, 1, "time goes by programs"), Launch(64, 1024, 1, 1, "the same"))

_SUMS_KIB = 1  # what a reduction takes besides
_NO_LIMIT = 2**30


def settings(config: NSAConfig, dtype: torch.dtype, arch: tuple[int, int]) -> Settings:
    """The launches for ``config``'s heads in ``dtype`` on compute capability ``arch``."""
    if interpreted():
        return _INTERPRETED
    if dtype == torch.float32:
        return Settings(_SLICED, _SLICED)
    room = (shared_kib(arch) - 2 * (SYSTEM_KIB + _SUMS_KIB)) * KIB
    heads = triton.next_power_of_2(config.group_size)

    def best(launches: tuple[Launch, ...], vectors: Callable[[Launch], int]) -> Launch:
        bytes_of = sum(split(config.head_dim)) * dtype.itemsize
        return next((one for one in launches if 2 * vectors(one) * bytes_of <= room), launches[-1])

    return Settings(
        best(_LSE, lambda one: one.block_m + one.num_stages * one.block_n),
        best(_SCORES, lambda one: max(heads, one.block_n) + one.num_stages * one.block_m),
    )


@on_its_device
@torch.no_grad()
def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
    packed: Packed | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`nsa.reference.select_blocks`; fp32, fp16 or bf16.

    With ``lse (B,T,HQ)``, fp32, natural, of compressed attention it is half the work. ``kv_len`` is not asked
    where sequences are packed.
    """
    q, k_cmp = unit_stride(q), unit_stride(k_cmp)
    layout = layout_of(q, k_cmp, packed, by_blocks=True)
    if lse is not None:
        return _select(q, k_cmp, lse.contiguous(), LOG2E, config, q_start, kv_len, layout)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() and k_cmp.shape[1]:
        _lse(q, k_cmp, lse, config, q_start, layout)
    return _select(q, k_cmp, lse, 1.0, config, q_start, kv_len, layout)


def _lse(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    layout: Layout,
) -> None:
    """Fill ``lse (B,T,HQ)`` with base-2 sums over the visible compressed blocks."""
    launch = settings(config, q.dtype, capability(q.device)).lse
    programs = triton.cdiv(layout.num_queries * config.group_size, launch.block_m)
    _lse_kernel[(programs * layout.sequences * config.num_kv_heads,)](
        q,
        k,
        lse,
        layout.q_bounds,
        layout.k_bounds,
        *starts(q_start, q),
        layout.num_queries,
        layout.num_keys,
        config.num_kv_heads,
        config.compression_block_size,
        config.compression_stride,
        config.scale * LOG2E,
        *q.stride()[:3],
        *k.stride()[:3],
        **_constexprs(config, q.dtype, launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _select(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    lse_scale: float,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    kv_len: int | None,
    layout: Layout,
) -> torch.Tensor:
    """``(B,T,H,n)`` from ``lse (B,T,HQ)``, contiguous, which times ``lse_scale`` is base 2."""
    rows, kv_heads = layout.num_queries, config.num_kv_heads
    shape = *q.shape[:2], kv_heads, config.num_selected_blocks
    chosen = torch.empty(shape, dtype=torch.int32, device=q.device)
    launch = settings(config, q.dtype, capability(q.device)).scores
    tokens = tokens_of_item(config, launch)
    items = triton.cdiv(rows, tokens) * layout.sequences * kv_heads
    kv_len = kv_len if layout.q_bounds is None else rows
    width, num_blocks = _extent(layout.num_keys, rows, q_start, kv_len, config)
    held = max(1, min(items, SCRATCH_BYTES // (4 * tokens * max(1, width))))
    scores = torch.empty((held, width, tokens), dtype=torch.float32, device=q.device)
    begin = starts(q_start, q)
    for first in range(0, items, held):
        part = {"first_item": first, "num_items": min(held, items - first)}
        if width:
            block_scores(scores, q, k, lse, lse_scale, begin, layout, config, launch, **part)
        top_n(chosen, scores, begin, layout, config, num_blocks=num_blocks, **part)
    return chosen


def _extent(
    num_keys: int, rows: int, q_start: int | torch.Tensor, kv_len: int | None, config: NSAConfig
) -> tuple[int, int]:
    """How many selection blocks may score above 0, and how many exist as far as the host knows."""
    first, _ = overlap_weights(config)
    per_block = config.selection_block_size // config.compression_stride
    width = triton.cdiv(num_keys - first, per_block) if num_keys else 0
    num_blocks = _NO_LIMIT if kv_len is None else num_selection_blocks(kv_len, config)
    if not isinstance(q_start, torch.Tensor):
        num_blocks = min(num_blocks, num_selection_blocks(q_start + rows, config))
    return min(width, num_blocks), num_blocks


def launched(call: Call, arch: tuple[int, int]) -> Launched:
    """What :func:`select_blocks` launches for ``call``, for :mod:`nsa.kernels.work`."""
    config, launches = call.config, settings(call.config, call.dtype, arch)
    num_keys = num_compressed_blocks(call.kv_len, config)
    width, num_blocks = _extent(num_keys, call.num_queries, call.q_start, call.kv_len, config)
    ends = {"width": width, "num_blocks": num_blocks}
    scores = scores_constexprs(config, call.dtype, launches.scores)
    return {
        **({} if call.lse_given else {"_lse_kernel": _constexprs(config, call.dtype, launches.lse)}),
        "_scores_kernel": scores | ends,
        "_top_n_kernel": top_n_constexprs(config, scores["TOKENS"]) | ends,
    }


def _constexprs(config: NSAConfig, dtype: torch.dtype, launch: Launch) -> dict[str, int]:
    """What the lse kernel is compiled for, by its arguments' names."""
    tile = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    return {"G": config.group_size, **dims(config.head_dim, dtype), **tile}


def _static_lse(config: NSAConfig, launch: Launch) -> dict[str, Any]:
    return {
        "kernel": _lse_kernel,
        "name": f"lse_d{config.head_dim}",
        "signature": signature(LENGTHS),
        "constexprs": {**ONE_LENGTH, **_constexprs(config, torch.bfloat16, launch)},
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def _static() -> tuple[dict[str, Any], ...]:
    """What a compiler is given to judge the kernels by: the default launches for bf16 at G = 16."""
    layers = [NSAConfig(64, 4, head_dim) for head_dim in (64, 128, 192)]
    launches = [settings(layer, torch.bfloat16, (9, 0)) for layer in layers]
    return (
        *(_static_lse(layer, launch.lse) for layer, launch in zip(layers, launches, strict=True)),
        *(static_scores(layer, launch.scores) for layer, launch in zip(layers, launches, strict=True)),
        static_top_n(layers[0], tokens_of_item(layers[0], launches[0].scores)),
    )


STATIC = _static()
