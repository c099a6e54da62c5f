"""What the kernels share: rows packed into tiles, one step of an online softmax, launch settings.

A tile holds ``BLOCK_M`` rows of one KV head, a row being one (token, query head) of its group: the ``T * G``
rows of a (sequence, KV head) are numbered token by token, so a tile re-uses each key for every head that
reads it, and any ``G`` fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

from nsa.config import NSAConfig
from nsa.kernels._installed import interpreted
from nsa.packing import Packed

P = ParamSpec("P")
R = TypeVar("R")

Output = tuple[torch.Tensor, torch.Tensor]
"""``o`` and ``lse`` of a branch."""

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(interpreted())

KIB = 1024
# Shared memory of an SM by compute capability, of which each block leaves SYSTEM_KIB to the system (CUDA C++
# Programming Guide, technical specifications).
_SHARED_KIB = {(8, 0): 164, (8, 7): 164, (9, 0): 228, (10, 0): 228, (10, 3): 228}
_SHARED_KIB_LEAST = 100
SYSTEM_KIB = 1

# Dims below are filled up with zeros: the shortest side of a matrix product.
LEAST_DIM = 16


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: rows and keys of a tile, warps of a block, pipeline stages, and why."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reason: str


def padded(dim: int) -> int:
    """The next power of two, at least ``LEAST_DIM``: what ``tl.arange`` takes."""
    return max(LEAST_DIM, 1 << (dim - 1).bit_length())


def split(dim: int) -> tuple[int, int]:
    """``dim`` as two powers of two, the second 0 where one does: 192 is 128 + 64, 96 is 64 + 32.

    Their sum is at least ``dim`` and never more than ``padded(dim)``.
    """
    first = padded(dim)
    if first in (dim, LEAST_DIM):
        return first, 0
    rest = padded(dim - first // 2)
    return (first // 2, rest) if rest < first // 2 else (first, 0)


def dims(head_dim: int, value_dim: int) -> dict[str, int]:
    """The kernels' constants of the head's dims."""
    first, rest = split(head_dim)
    return {"D": head_dim, "D0": first, "D1": rest, "DV": value_dim, "DV_PADDED": padded(value_dim)}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (9, 0), the one launches are chosen for first, of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def on_its_device(
    function: Callable[Concatenate[torch.Tensor, P], R],
) -> Callable[Concatenate[torch.Tensor, P], R]:
    """``function`` with its kernels on the GPU of its first argument: Triton launches on the current one,
    whichever it is.
    """

    @wraps(function)
    def there(q: torch.Tensor, *args: P.args, **named: P.kwargs) -> R:
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            return function(q, *args, **named)

    return there


def shared_kib(arch: tuple[int, int]) -> int:
    """Shared memory of an SM of compute capability ``arch``, KiB."""
    return _SHARED_KIB.get(arch, _SHARED_KIB_LEAST)


# Of a kernel's arguments, those that are None where all sequences have one length and start at an int.
ONE_LENGTH: dict[str, Any] = dict.fromkeys(("q_bounds", "k_bounds", "starts"))


class Layout(NamedTuple):
    """How many sequences there are, queries and keys of the longest, and, of packed ones, their bounds."""

    sequences: int
    num_queries: int
    num_keys: int
    q_bounds: torch.Tensor | None
    k_bounds: torch.Tensor | None


def layout_of(q: torch.Tensor, k: torch.Tensor, packed: Packed | None, *, by_blocks: bool = False) -> Layout:
    """Of ``q (B,T,...)`` and ``k (B,S,...)``; where packed, ``(1,T,...)`` and ``(1,S,...)``, keys being
    compressed blocks if ``by_blocks``, else tokens.
    """
    if packed is None:
        return Layout(q.shape[0], q.shape[1], k.shape[1], None, None)
    each, bounds = (packed.blocks_each, packed.blocks) if by_blocks else (packed.lengths, packed.tokens)
    return Layout(len(packed.lengths), packed.longest, max(each), packed.tokens, bounds)


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself where its last dim is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def starts(q_start: int | torch.Tensor, of: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """``q_start`` as a kernel takes it: int64 for each sequence of ``of (B,...)``, on its device, or None and
    an int. No host waits.
    """
    if isinstance(q_start, torch.Tensor):
        return q_start.to(device=of.device, dtype=torch.int64).reshape(-1).expand(of.shape[0]).contiguous(), 0
    return None, q_start


def empty_outputs(q: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised ``o (B,T,HQ,DV)`` in q's dtype and ``lse (B,T,HQ)`` fp32, contiguous."""
    o = torch.empty((*q.shape[:3], config.v_dim), dtype=q.dtype, device=q.device)
    return o, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@triton.jit
def first_position(starts, q_start, sequence):
    """Absolute position of a sequence's first query, int64: ``starts[sequence]``, or ``q_start`` if None."""
    if starts is None:
        return tl.cast(q_start, tl.int64)
    else:
        return tl.load(starts + sequence).to(tl.int64)


@triton.jit
def rows_of(bounds, sequence, num_rows, stride_batch, stride_row):
    """Where a sequence's rows begin, in elements, and how many it has: ``num_rows``, or where sequences are
    packed, what is between its ``bounds``.
    """
    if bounds is None:
        return sequence * stride_batch, num_rows
    else:
        begin = tl.load(bounds + sequence)
        return begin.to(tl.int64) * stride_row, tl.load(bounds + sequence + 1) - begin


@triton.jit
def load_queries(q_row, exists, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both parts of the queries at ``q_row (M,)``; the second is the first again where there is none."""
    d0 = tl.arange(0, D0)
    q0 = tl.load(q_row[:, None] + d0[None, :], mask=exists[:, None] & (d0 < D)[None, :], other=0.0)
    q1 = q0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_row[:, None] + d1[None, :], mask=exists[:, None] & (d1 < D)[None, :], other=0.0)
    return q0, q1


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` with fp32 sums and without TF32; ``acc`` may be None."""
    if INTERPRETED:
        # The interpreter multiplies the bit patterns of bf16; fp32 holds every bf16 and fp16 exactly.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def online_softmax(logits, m, l, scale_log2):
    """One tile of an online softmax over rows, in base 2.

    ``logits (M,N)`` fp32 unscaled, -inf where a key is hidden; ``m (M,)`` largest logit so far times
    ``scale_log2 = scale * log2(e)``, -inf before the first; ``l (M,)`` the sum so far, 0 before the first.
    Returns ``p (M,N)`` fp32, the factor ``(M,)`` by which sums so far shrink, the new ``m`` and ``l``. A row
    that has seen no key yet stays at ``m = -inf, l = 0`` with ``p = 0``, never NaN.
    """
    m_new = tl.maximum(m, tl.max(logits, 1) * scale_log2)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(logits * scale_log2 - shift[:, None])
    shrink = tl.exp2(m - shift)
    return p, shrink, m_new, l * shrink + tl.sum(p, 1)


@triton.jit
def finish(acc, m, l):
    """Output ``(M,DV)`` fp32 and natural lse ``(M,)`` after the last tile; an empty row gives 0 and -inf."""
    empty = l == 0.0
    total = tl.where(empty, 1.0, l)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2)
    return acc / total[:, None], lse
