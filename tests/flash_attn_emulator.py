"""FlashAttention 2 in eager torch: what ``flash_attn`` 2.x and torch's varlen attention document.

Any device, fp32 and fp64 besides fp16 and bf16. What the kernels refuse is refused here, and what they leave
unwritten is NaN here: code that gives the right numbers on this hands the kernels valid work.

- causality and windows are aligned to the bottom right; query i of a sequence sees the keys
  ``[i + S - T - left, i + S - T + right]``, -1 meaning all, and a bound that reaches past the longest
  sequence means all;
- a row without a key gives 0 and lse +inf; sequences may lack queries or keys;
- lse is ``(B, HQ, T)`` dense and ``(HQ, T)`` packed, natural logarithm, and passes no gradient;
- with a longest query of 1, grouped heads and no window, every packed sequence is taken to have one query;
- one head dim for q, k, v: a multiple of 8, at most 256, contiguous; int32 bounds; at most 65535 sequences.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

Window = tuple[int, int]


class Refused(RuntimeError):
    """The kernels take no such call."""


def _need(*conditions: Any) -> None:
    if not all(conditions):
        raise Refused("FlashAttention 2 takes no such call")


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``q (B,T,HQ,D), k v (B,S,H,D)``; ``return_attn_probs`` adds lse ``(B,HQ,T)`` and an empty tensor."""
    _need(dropout_p == softcap == 0, alibi_slopes is None, q.dim() == k.dim() == v.dim() == 4, len(q) > 0)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    _check_heads(q, k, v)
    window = normalised(window_size, causal, k.shape[1])
    parts = [_attend(*one, _scale(q, softmax_scale), window) for one in zip(q, k, v, strict=True)]
    o = torch.stack([o for o, _ in parts])
    lse = torch.stack([lse for _, lse in parts])
    return (o, lse, torch.empty(0, dtype=q.dtype)) if return_attn_probs else o


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """``q (sum T,HQ,D), k v (sum S,H,D)``; ``return_attn_probs`` adds lse ``(HQ, sum T)`` and a blank."""
    _need(dropout_p == softcap == 0, alibi_slopes is None, block_table is None)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    o, lse = _packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    )
    return (o, lse, torch.empty(0, dtype=q.dtype)) if return_attn_probs else o


class AuxRequest(NamedTuple):
    """torch's request for the second result."""

    lse: bool = False


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
) -> Any:
    """torch 2.12 and later: fewer KV heads only with ``enable_gqa``; the last dim must be contiguous."""
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(f"{query.shape[1]} query heads over {key.shape[1]} KV heads need enable_gqa=True")
    return varlen_attn_211(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        return_aux=return_aux,
        scale=scale,
        window_size=window_size,
    )


def varlen_attn_211(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
) -> Any:
    """torch 2.11: without ``enable_gqa``. Causal is ``window_size=(-1, 0)``; lse is ``(HQ, sum T)``."""
    causal = window_size == (-1, 0)
    o, lse = _packed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal, window_size)
    return (o, lse) if return_aux is not None and return_aux.lse else o


PACKAGE = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
TORCH = SimpleNamespace(varlen_attn=varlen_attn, AuxRequest=AuxRequest)
TORCH_211 = SimpleNamespace(varlen_attn=varlen_attn_211, AuxRequest=AuxRequest)


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    causal: bool,
    window_size: Window,
) -> tuple[torch.Tensor, torch.Tensor]:
    _need(q.dim() == k.dim() == v.dim() == 3)
    _check_heads(q, k, v)
    _check_bounds(cu_q, len(q), max_q)
    _check_bounds(cu_k, len(k), max_k)
    _need(len(cu_q) == len(cu_k), 0 < len(cu_q) - 1 <= 65535)
    window = normalised(window_size, causal, max_k)
    if max_q == 1 and q.shape[1] > k.shape[1] and max(window_size) < 0:
        _need(len(q) == len(cu_q) - 1)  # q is reshaped to one query a sequence
    k, v = _Covered.apply(k, cu_k), _Covered.apply(v, cu_k)
    o = q.new_full(q.shape, float("nan"))
    lse = torch.full(
        q.shape[1::-1], float("nan"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    outputs = []
    for (q0, q1), (k0, k1) in zip(_pairs(cu_q), _pairs(cu_k), strict=True):
        part, lse[:, q0:q1] = _attend(q[q0:q1], k[k0:k1], v[k0:k1], _scale(q, scale), window)
        outputs.append(part)
    o = torch.cat([*outputs, o[int(cu_q[-1]) :]])
    return o, lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, rounded once at the end: ``q (T,HQ,D), k v (S,H,D) -> o (T,HQ,D), lse (HQ,T)``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    wide = [t.to(dtype) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
    allowed = mask(q.shape[0], k.shape[0], window).to(q.device)
    some = allowed.any(-1, keepdim=True)
    logits = torch.einsum("qhd,khd->hqk", wide[0], wide[1]) * scale
    logits = logits.masked_fill(~allowed, float("-inf")).masked_fill(~some, 0.0)
    lse = logits.detach().logsumexp(-1).masked_fill(~some.squeeze(-1), float("inf"))
    o = torch.einsum("hqk,khd->qhd", logits.softmax(-1) * some, wide[2])
    return o.to(q.dtype), lse


def mask(rows: int, keys: int, window: Window) -> torch.Tensor:
    """Which of ``keys`` each of ``rows`` sees, bottom-right aligned."""
    diagonal = torch.arange(rows).unsqueeze(1) + keys - rows
    key = torch.arange(keys)
    left, right = window
    allowed = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        allowed &= key >= diagonal - left
    if right >= 0:
        allowed &= key <= diagonal + right
    return allowed


def normalised(window: Window, causal: bool, max_k: int) -> Window:
    """As the launchers do: a bound past every key is dropped; the longest sequence joins a lone one."""
    left, right = (-1 if bound >= max_k else bound for bound in window)
    if causal:
        right = 0
    if left < 0 <= right:
        left = max_k
    if right < 0 <= left:
        right = max_k
    return left, right


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _pairs(bounds: torch.Tensor) -> list[tuple[int, int]]:
    return list(pairwise(bounds.tolist()))


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    dim = q.shape[-1]
    _need(k.shape == v.shape, k.shape[-1] == dim, dim % 8 == 0, 0 < dim <= 256)
    _need(q.dtype == k.dtype == v.dtype, q.shape[-2] % k.shape[-2] == 0)
    _need(*(t.stride(-1) == 1 for t in (q, k, v)))


def _check_bounds(bounds: torch.Tensor, total: int, longest: int) -> None:
    lengths = bounds.diff()
    _need(bounds.dtype == torch.int32, bounds.is_contiguous(), bounds[0] == 0, bounds[-1] <= total)
    _need((lengths >= 0).all(), lengths.max() <= longest)


class _Covered(torch.autograd.Function):
    """Identity; rows of the gradient past the last sequence, which no kernel writes, are NaN."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        ctx.end = int(bounds[-1])
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone()
        grad[ctx.end :] = float("nan")
        return grad, None
