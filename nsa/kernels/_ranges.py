"""Attention where each query sees one contiguous range of keys: the kernel of compressed and of sliding.

Query ``t`` sees keys ``[first(t), end(t))`` with ``end(t) = max(0, (t + 1 + stride - block) // stride)``, the
number of blocks complete at ``t`` (``block = stride = 1``: of tokens up to ``t``), and ``first(t) = max(0, t
- window + 1)``. Both rise with ``t``, so a tile of rows walks from the first key of its first row to the last
of its last, and only the key tiles at both ends need a mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.config import NSAConfig
from nsa.kernels._installed import interpreted
from nsa.kernels._tiles import (
    LOG2E,
    ONE_LENGTH,
    Launch,
    Layout,
    Output,
    capability,
    dims,
    dot,
    empty_outputs,
    finish,
    first_position,
    load_queries,
    on_its_device,
    online_softmax,
    padded,
    rows_of,
    split,
    starts,
    unit_stride,
)
from nsa.kernels.work import Call, Launched

# Begins before every key, and an int32 still holds what is subtracted from it.
NO_WINDOW = 2**30
Launches = tuple[tuple[int, Launch], ...]

# Launches by the widest dim they take. Registers, spills and shared memory are what ptxas says for bf16.
# That they are fast is predicted, not measured: a row does 1 FLOP per byte of 16-bit keys and values, so 128
# rows that share a tile of keys do 700 TFLOP/s at the 5.5 TB/s that L2 gives, and 64 rows half of it.
_HOPPER: Launches = (
    (64, Launch(128, 64, 8, 3, "152 registers, 64 KiB; 128 keys a tile waste an eighth more of a window")),
    (128, Launch(128, 64, 8, 3, "221 registers, 128 KiB; 128 keys a tile spill")),
    (192, Launch(128, 64, 8, 2, "234 registers, 128 KiB; a third stage leaves L1 too little")),
    (256, Launch(64, 32, 8, 2, "184 registers, 100 KiB; 128 rows spill")),
)
# Of sm_80 and sm_120: room for both.
_AMPERE: Launches = (
    (64, Launch(128, 64, 8, 3, "194 to 198 registers, 48 KiB")),
    (128, Launch(128, 32, 8, 3, "192 to 254 registers, 64 KiB; 64 keys a tile spill")),
    (192, Launch(64, 64, 8, 2, "186 registers, 72 KiB; 128 rows leave hardly any register free")),
    (256, Launch(64, 32, 8, 2, "187 registers, 68 KiB; 4 warps spill")),
)
# A decode step: bound by reading keys, not by the product.
_FEW_ROWS: Launches = (
    (128, Launch(16, 64, 4, 3, "the least rows of a product; three stages keep reads in flight")),
    (256, Launch(16, 32, 4, 2, "as narrower ones, in 41 KiB")),
)
# No tensor cores, which would round to TF32; a product holds whole rows in registers.
_FP32: Launches = (
    (128, Launch(32, 16, 4, 2, "212 registers; 32 keys a tile spill")),
    (256, Launch(32, 16, 8, 1, "128 registers, 51 KiB")),
)
_WIDEST = Launch(16, 16, 4, 1, "the least tile: 512 elements a row are 64 registers of sums")
_INTERPRETED = Launch(128, 64, 8, 1, "the interpreter's time goes by operations, whatever their size")


@triton.jit
def _load(base, rows, dims, stride, num_rows, DIM: tl.constexpr, PADDED: tl.constexpr):
    """``base[rows, dims]`` by broadcasting; zeros beyond ``num_rows``, and beyond ``DIM`` if PADDED."""
    mask = rows < num_rows
    if PADDED:
        mask = mask & (dims < DIM)
    return tl.load(base + rows.to(tl.int64) * stride + dims, mask=mask, other=0.0)


@triton.jit
def _end(position, num_keys, block, stride):
    # Not below 0 before the division, so that it rounds down wherever it is evaluated.
    return tl.minimum(tl.maximum(position + 1 + stride - block, 0) // stride, num_keys)


_LENGTHS = ["q_start", "num_queries", "num_keys", "kv_heads", "block", "stride", "window"]
_STRIDES = ("qb", "qt", "qh", "kb", "ks", "kh", "vb", "vs", "vh")


@triton.jit(do_not_specialize=_LENGTHS)
def _attention_kernel(
    q,
    k,
    v,
    o,
    lse,
    q_bounds,
    k_bounds,
    starts,
    q_start,
    num_queries,
    num_keys,
    kv_heads,
    block,
    stride,
    window,
    scale_log2,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    G: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows of one KV head of one sequence. A head's tiles are neighbours in the grid, so that its
    keys stay in L2; those of its last tokens, which without a window see the most, come first.
    """
    tiles = tl.cdiv(num_queries * G, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % kv_heads
    sequence = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    first_row, _ = rows_of(q_bounds, sequence, num_queries, num_queries, 1)
    q_at, num_queries = rows_of(q_bounds, sequence, num_queries, stride_qb, stride_qt)
    v_at, _ = rows_of(k_bounds, sequence, num_keys, stride_vb, stride_vs)
    k_at, num_keys = rows_of(k_bounds, sequence, num_keys, stride_kb, stride_ks)
    if q_bounds is not None and tile * BLOCK_M >= num_queries * G:  # of a shorter sequence
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < num_queries * G
    token = tl.minimum(row // G, num_queries - 1)
    start = first_position(starts, q_start, sequence).to(tl.int32)
    first = tl.maximum(start + token - window + 1, 0)
    end = _end(start + token, num_keys, block, stride)

    q_head = head * G + row % G
    q_row = q + q_at + token.to(tl.int64) * stride_qt + q_head.to(tl.int64) * stride_qh
    q0, q1 = load_queries(q_row, exists, D, D0, D1)
    d0 = tl.arange(0, D0)
    k_head = k + k_at + tl.cast(head, tl.int64) * stride_kh
    v_head = v + v_at + tl.cast(head, tl.int64) * stride_vh

    earliest = start + tile * BLOCK_M // G
    latest = start + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G, num_queries - 1)
    begin = tl.maximum(earliest - window + 1, 0)
    stop = _end(latest, num_keys, block, stride)
    # Every row sees every key of a tile that begins at or after `whole` and ends at or before `partial`.
    whole = tl.maximum(latest - window + 1, 0)
    partial = _end(earliest, num_keys, block, stride)

    acc = tl.zeros((BLOCK_M, DV_PADDED), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    column = tl.arange(0, BLOCK_N)
    dv = tl.arange(0, DV_PADDED)
    # One loop, although only its ends need a mask: a second one would fill the pipeline anew.
    for at in range(begin, stop, BLOCK_N):
        left = stop - at  # of the keys that any row here sees
        k_tile = k_head + tl.cast(at, tl.int64) * stride_ks
        v_tile = v_head + tl.cast(at, tl.int64) * stride_vs
        keys = _load(k_tile, column[None, :], d0[:, None], stride_ks, left, D, D1 == 0 and D0 != D)
        logits = dot(q0, keys, None)
        if D1 > 0:
            d1 = D0 + tl.arange(0, D1)
            keys = _load(k_tile, column[None, :], d1[:, None], stride_ks, left, D, D0 + D1 != D)
            logits = dot(q1, keys, logits)
        if at < whole or at + BLOCK_N > partial:
            key = (at + column)[None, :]
            logits = tl.where((key >= first[:, None]) & (key < end[:, None]), logits, float("-inf"))
        p, shrink, m, l = online_softmax(logits, m, l, scale_log2)
        values = _load(v_tile, column[:, None], dv[None, :], stride_vs, left, DV, DV_PADDED != DV)
        acc = dot(p.to(values.dtype), values, acc * shrink[:, None])
    out, log_sum = finish(acc, m, l)

    # (B,T,HQ): a token's heads are neighbours.
    at = (first_row + token) * (kv_heads * G) + q_head
    tl.store(lse + at, log_sum, mask=exists)
    mask = exists[:, None] & (dv < DV)[None, :]
    tl.store(o + at[:, None] * DV + dv[None, :], out.to(o.dtype.element_ty), mask=mask)


@on_its_device
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    layout: Layout,
    *,
    block: int = 1,
    stride: int = 1,
    window: int = NO_WINDOW,
) -> Output:
    """``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV) -> o (B,T,HQ,DV), lse (B,T,HQ)`` over the range of each
    query; ``B = 1`` where ``layout`` is of packed sequences.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    o, lse = empty_outputs(q, v, config)
    if not o.numel():
        return o, lse
    rows = layout.num_queries * config.group_size
    # fp16 and bf16 take a GPU's tiles in the interpreter, too; those of fp32 would take it minutes.
    if interpreted() and q.dtype == torch.float32:
        launch = _INTERPRETED
    else:
        launch = choose(rows, config.head_dim, config.v_dim, q.dtype, capability(q.device))
    grid = (triton.cdiv(rows, launch.block_m) * config.num_kv_heads * layout.sequences,)
    _attention_kernel[grid](
        q,
        k,
        v,
        o,
        lse,
        layout.q_bounds,
        layout.k_bounds,
        *starts(q_start, q),
        layout.num_queries,
        layout.num_keys,
        config.num_kv_heads,
        block,
        stride,
        window,
        config.scale * LOG2E,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        **constexprs(config.group_size, config.head_dim, config.v_dim, launch),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return o, lse


def constexprs(group: int, head_dim: int, value_dim: int, launch: Launch) -> dict[str, Any]:
    """What the kernel is compiled for, by its arguments' names."""
    return {
        "G": group,
        **dims(head_dim, value_dim),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
    }


def launched(
    call: Call,
    arch: tuple[int, int],
    num_keys: int,
    *,
    block: int = 1,
    stride: int = 1,
    window: int = NO_WINDOW,
) -> Launched:
    """What :func:`attend` launches on a GPU for ``call``, for :mod:`nsa.kernels.work`."""
    config = call.config
    group, head_dim, value_dim = config.group_size, config.head_dim, config.v_dim
    launch = choose(call.num_queries * group, head_dim, value_dim, call.dtype, arch)
    ends = {"num_keys": num_keys, "block": block, "stride": stride, "window": window}
    return {"_attention_kernel": constexprs(group, head_dim, value_dim, launch) | ends}


def choose(rows: int, head_dim: int, value_dim: int, dtype: torch.dtype, arch: tuple[int, int]) -> Launch:
    """The launch for ``rows = T * G`` rows a KV head on compute capability ``arch``."""
    width = max(sum(split(head_dim)), padded(value_dim))
    if dtype == torch.float32:
        table = _FP32
    elif rows <= 16:
        table = _FEW_ROWS
    else:
        table = _HOPPER if arch[0] in (9, 10) else _AMPERE
    return next((launch for widest, launch in table if width <= widest), _WIDEST)


def static(branch: str) -> tuple[dict[str, Any], ...]:
    """What ``nsabench profile --static`` compiles: bf16 prefill at G = 16. A name ends with the architectures
    the launch is for, where sm_90's is another.
    """
    pointers = dict.fromkeys(("q", "k", "v", "o"), "*bf16:16") | {"lse": "*fp32:16"}
    strides = dict.fromkeys((f"stride_{axis}" for axis in _STRIDES), "i32:16")
    signature = pointers | dict.fromkeys(_LENGTHS, "i32") | {"scale_log2": "fp32"} | strides
    offered = []
    for head_dim, value_dim in ((64, 64), (128, 128), (192, 128)):
        archs: dict[Launch, list[str]] = {}
        for major in (9, 8, 10, 12):
            launch = choose(2**16, head_dim, value_dim, torch.bfloat16, (major, 0))
            archs.setdefault(replace(launch, reason=""), []).append(f"sm_{major}0")
        for launch, names in archs.items():
            others = () if "sm_90" in names else names
            offered.append(
                {
                    "kernel": _attention_kernel,
                    "name": "_".join([branch, f"d{head_dim}_{value_dim}", *others]),
                    "signature": signature,
                    "constexprs": {**ONE_LENGTH, **constexprs(16, head_dim, value_dim, launch)},
                    "num_warps": launch.num_warps,
                    "num_stages": launch.num_stages,
                }
            )
    return tuple(offered)
