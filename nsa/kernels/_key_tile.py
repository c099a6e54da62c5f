"""What the selected kernels share: one tile of keys attended by a tile of rows, and how much fits.

A row is one (token, query head) of a KV head, heads of a token being neighbours. Dims are split or filled up
as :func:`nsa.kernels._tiles.split` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from nsa.config import NSAConfig
from nsa.kernels._tiles import (
    KIB,
    ONE_LENGTH,
    SYSTEM_KIB,
    Launch,
    dot,
    finish,
    online_softmax,
    padded,
    shared_kib,
    split,
)

LEAST_KEYS = 16


@triton.jit
def _load_keys(head, start, column, left, stride, DIM: tl.constexpr, FIRST: tl.constexpr, DIMS: tl.constexpr):
    """``(N, DIMS)``: dims ``FIRST ..`` of the keys ``start + column``, zeros from ``left`` columns on."""
    dims = FIRST + tl.arange(0, DIMS)
    at = head + tl.cast(start, tl.int64) * stride + column.to(tl.int64)[:, None] * stride + dims[None, :]
    mask = (column < left)[:, None]
    if FIRST + DIMS > DIM:
        mask = mask & (dims < DIM)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def attend_keys(
    acc, m, l, q0, q1, k_head, v_head, stride_ks, stride_vs, start, column, left, seen, scale_log2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys ``start + column``, of which ``left`` exist, where ``seen``
    ``(M,N)``.

    A row that sees none of them keeps ``acc``, ``m`` and ``l`` to the bit.
    """
    keys = _load_keys(k_head, start, column, left, stride_ks, D, 0, D0)
    logits = dot(q0, tl.trans(keys), None)
    if D1 > 0:
        keys = _load_keys(k_head, start, column, left, stride_ks, D, D0, D1)
        logits = dot(q1, tl.trans(keys), logits)
    logits = tl.where(seen, logits, float("-inf"))
    p, shrink, m, l = online_softmax(logits, m, l, scale_log2)
    values = _load_keys(v_head, start, column, left, stride_vs, DV, 0, DV_PADDED)
    return dot(p.to(values.dtype), values, acc * shrink[:, None]), m, l


@triton.jit
def store_rows(o, lse, at, exists, acc, m, l, DV: tl.constexpr, DV_PADDED: tl.constexpr):
    """Ends the online softmax of rows, and stores them as rows ``at (M,)`` of ``o`` and ``lse``."""
    out, log_sum = finish(acc, m, l)
    tl.store(lse + at, log_sum, mask=exists)
    dv = tl.arange(0, DV_PADDED)
    mask = exists[:, None] & (dv < DV)[None, :]
    tl.store(o + at[:, None] * DV + dv[None, :], out.to(o.dtype.element_ty), mask=mask)


def keys_of_tile(tokens: int) -> int:
    """Keys of one tile that is to hold ``tokens`` neighbours: a power of two."""
    return max(LEAST_KEYS, 1 << (tokens - 1).bit_length())


def shared_bytes(launch: Launch, head_dim: int, value_dim: int, itemsize: int) -> int:
    """Shared memory that a launch is predicted to need: queries, keys and values of each stage, and, in fp32,
    whose products read both sides from there, the probabilities.
    """
    width = sum(split(head_dim))
    tiles = launch.block_m * width + launch.num_stages * launch.block_n * (width + padded(value_dim))
    if itemsize == 4:
        tiles += launch.block_m * launch.block_n
    return tiles * itemsize


def fitting(wanted: Sequence[Launch], config: NSAConfig, dtype: torch.dtype, arch: tuple[int, int]) -> Launch:
    """The first of ``wanted`` of which compute capability ``arch`` holds two blocks an SM, one's softmax
    beside the other's products; else one block; else the last, with fewer keys.
    """
    room = shared_kib(arch) * KIB

    def need(launch: Launch) -> int:
        # The list's entries of each stage lie there, too.
        return shared_bytes(launch, config.head_dim, config.v_dim, dtype.itemsize) + SYSTEM_KIB * KIB + 64

    for blocks in (2, 1):
        for launch in wanted:
            if blocks * need(launch) <= room:
                return launch
    launch = wanted[-1]
    while launch.block_n > LEAST_KEYS and need(launch) > room:
        launch = replace(launch, block_n=launch.block_n // 2)
    return launch


STRIDES = tuple(f"stride_{name}" for name in ("qb", "qt", "qh", "kb", "ks", "kh", "vb", "vs", "vh"))
INDEX_TYPES = dict.fromkeys((f"stride_{name}" for name in ("ib", "it", "ih", "in")), "i32:16")
STATIC_SHAPES = ((64, 64), (128, 128), (192, 128))


def signature(strides: Iterable[str], lengths: Iterable[str], others: dict[str, str]) -> dict[str, str]:
    """Types of a kernel's arguments for bf16, as a compiler is told them."""
    known = dict.fromkeys(("q", "k", "v"), "*bf16:16") | {"scale_log2": "fp32"}
    return known | dict.fromkeys(strides, "i32:16") | dict.fromkeys(lengths, "i32") | others


def launches(
    choose: Callable[[NSAConfig, torch.dtype, tuple[int, int]], Launch], config: NSAConfig
) -> Iterator[tuple[str, Launch]]:
    """The launches for bf16 of all architectures, each once, by those it is for; no name where sm_90 is."""
    names: dict[Launch, str] = {}
    for name, arch in (("sm_90", (9, 0)), ("sm_80", (8, 0)), ("sm_100", (10, 0)), ("sm_120", (12, 0))):
        launch = choose(config, torch.bfloat16, arch)
        names[launch] = f"{names[launch]}_{name}" if launch in names else name
    for launch, name in names.items():
        yield "" if name.startswith("sm_90") else f"_{name}", launch


def offered(
    kernel: Any, name: str, arch: str, launch: Launch, constants: dict[str, int], types: dict[str, str]
) -> dict[str, Any]:
    """One kernel as a compiler is given it, at an integer ``q_start``."""
    return {
        "kernel": kernel,
        "name": f"{name}_d{constants['D']}_{constants['DV']}{arch}",
        "signature": types,
        "constexprs": {**ONE_LENGTH, **constants},
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
