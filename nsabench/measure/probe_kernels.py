"""Triton kernels that only move memory: what a device can read, and copy, measured without a library.

They take CUDA tensors; under TRITON_INTERPRET=1 tensors on a CPU, too.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from nsabench.measure.device import MeasureError

BLOCK = 4096
WARPS = 8
_PROGRAMS_PER_SM = 8
_INTERPRETED_PROGRAMS = 4


@triton.jit
def _read_kernel(source, total, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds up int32 words, each program its share of the blocks; sums wrap."""
    mine = tl.zeros((BLOCK,), tl.int32)
    lanes = tl.arange(0, BLOCK)
    for block in range(tl.program_id(0), tl.cdiv(words, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + lanes
        mine += tl.load(source + at, mask=at < words, other=0)
    tl.atomic_add(total, tl.sum(mine, 0))


@triton.jit
def _copy_kernel(source, target, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies int32 words, a block a program."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)


_WORDS = {"words": "i32", "source": "*i32:16"}
STATIC = (
    {
        "kernel": _read_kernel,
        "signature": {**_WORDS, "total": "*i32:16"},
        "constexprs": {"BLOCK": BLOCK},
        "num_warps": WARPS,
    },
    {
        "kernel": _copy_kernel,
        "signature": {**_WORDS, "target": "*i32:16"},
        "constexprs": {"BLOCK": BLOCK},
        "num_warps": WARPS,
    },
)
"""What `nsabench profile --static` compiles: see `nsabench.measure.static`."""


def read_sum(source: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Read all of `source` (int32, contiguous) once and add its sum, which wraps, to `total` (int32, one
    element), which is returned. MeasureError for other tensors.
    """
    _check(source, total)
    if source.is_cuda:
        programs = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(source.device).multi_processor_count
    else:
        programs = _INTERPRETED_PROGRAMS
    grid = (max(1, min(programs, triton.cdiv(source.numel(), BLOCK))),)
    _read_kernel[grid](source, total, source.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return total


def copy(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Copy `source` (int32, contiguous) into `target`, which is returned. MeasureError for other tensors."""
    _check(source, target)
    if source.numel() != target.numel():
        raise MeasureError(f"a copy of {source.numel()} words into {target.numel()}")
    if source.numel():
        grid = (triton.cdiv(source.numel(), BLOCK),)
        _copy_kernel[grid](source, target, source.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return target


def _check(*tensors: torch.Tensor) -> None:
    for one in tensors:
        if one.dtype != torch.int32 or not one.is_contiguous() or one.numel() >= 2**31 - BLOCK:
            raise MeasureError("probe kernels take contiguous int32 tensors of less than 2**31 words")
        if not one.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise MeasureError(
                f"probe kernels run on a GPU, not on {one.device}; TRITON_INTERPRET=1 interprets"
            )
