"""A layer of dense causal attention, its preallocated KV cache, and torch's ``scaled_dot_product_attention``
as one would call it today.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

KV = tuple[torch.Tensor, torch.Tensor]

_NO_STAGE: AbstractContextManager[None] = nullcontext()


class Attend(Protocol):
    """Causal attention of the last ``T`` of ``S`` tokens: ``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV) -> o
    (B,T,HQ,DV)``. ``H`` divides ``HQ``; ``T`` is from 1 to ``S``; the scale is ``1/sqrt(D)``.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """:class:`Attend` through whichever kernel torch picks."""
    # Fused kernels want one head dim; without one of them the whole score matrix would be in memory.
    return causal_sdpa(q, k, v, grouped=_takes_groups(q), one_width=True)


def causal_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, grouped: bool, one_width: bool
) -> torch.Tensor:
    """:class:`Attend` through torch's SDPA. ``grouped``: H heads go in as they are, else each is repeated for
    its group; ``one_width``: D and DV are padded with zeros to the larger.
    """
    tokens, length, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    scale = key_dim**-0.5
    if one_width:
        q, k, v = (widened(t, max(key_dim, value_dim)) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if tokens == 1:
        # A group's heads as rows of one product: `enable_gqa` would copy K and V for every head on a CPU.
        rows = q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])
        o = scaled_dot_product_attention(rows, k, v, scale=scale).reshape(*q.shape[:-1], v.shape[-1])
    else:
        if not grouped:
            group = q.shape[1] // kv_heads
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        fewer = k.shape[1] != q.shape[1]
        if tokens == length:
            o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=fewer)
        else:
            mask = causal_lower_right(tokens, length)
            o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=fewer)
    return o.transpose(1, 2)[..., :value_dim]


def widened(t: torch.Tensor, width: int) -> torch.Tensor:
    """``t`` with zeros up to ``width`` channels."""
    return t if t.shape[-1] == width else pad(t, (0, width - t.shape[-1]))


def _takes_groups(q: torch.Tensor) -> bool:
    """Whether a fused kernel takes fewer KV heads than query heads: torch's for fp32 on a GPU does not."""
    return q.device.type == "cpu" or q.dtype in (torch.float16, torch.bfloat16)


class DenseCache:
    """Keys and values of every token, in memory taken once: head by head, ``(B,H,max_seq_len,D or DV)``, or
    with ``tokens_first`` token by token, ``(B,max_seq_len,H,D or DV)``.

    ``keep_graph``: let gradients flow through it; rows are then concatenated at each append.
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep_graph: bool = False,
        tokens_first: bool = False,
    ) -> None:
        self.max_seq_len, self.keep_graph, self.length = max_seq_len, keep_graph, 0
        self._axis = 1 if tokens_first else 2
        rows = 0 if keep_graph else max_seq_len
        sizes = (rows, kv_heads) if tokens_first else (kv_heads, rows)
        self._data = [
            torch.zeros(batch_size, *sizes, dim, dtype=dtype, device=device) for dim in (key_dim, value_dim)
        ]

    def append(self, k: torch.Tensor, v: torch.Tensor) -> KV:
        """Add ``k (B,T,H,D), v (B,T,H,DV)``; return all up to them, ``(B,S,H,D)`` and ``(B,S,H,DV)``.

        ValueError, and nothing changed, where they do not fit.
        """
        end = self.length + k.shape[1]
        if end > self.max_seq_len:
            raise ValueError(
                f"the cache is full: {self.length} + {k.shape[1]} tokens, max_seq_len is {self.max_seq_len}"
            )
        for i, new in enumerate((k, v)):
            rows, before = self._by_token(new), self._data[i].narrow(self._axis, 0, self.length)
            if self.keep_graph:
                self._data[i] = torch.cat([before, rows], self._axis)
            else:
                self._data[i].narrow(self._axis, self.length, k.shape[1]).copy_(rows)
        self.length = end
        keys, values = (self._by_token(t.narrow(self._axis, 0, end)) for t in self._data)
        return keys, values

    def _by_token(self, t: torch.Tensor) -> torch.Tensor:
        """Between ``(B,T,H,D)`` and the order of the cache."""
        return t if self._axis == 1 else t.transpose(1, 2)

    def checkpoint(self) -> int:
        """The present state, for :meth:`rollback`."""
        return self.length

    def rollback(self, state: int) -> None:
        """Forget the tokens appended since ``state`` was taken; ValueError where it is ahead."""
        if state > self.length:
            raise ValueError(f"cannot roll back from {self.length} tokens forward to {state}")
        self.length = state

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.length = 0

    def bytes(self) -> int:
        """Allocated bytes, over the whole batch."""
        return sum(t.numel() * t.element_size() for t in self._data)


class DenseAttention(nn.Module):
    """One layer of dense causal attention: q, k, v and output projections, rotary positions (half-split
    pairs, ``key_dim`` even), grouped KV heads.

    ``attend`` computes the attention. ``stage`` is called with ``proj`` around projections and rotation and
    returns a context; what is outside it is the attention and its cache.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        max_seq_len: int,
        attend: Attend = dense_attention,
        rope: float = 10000.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
        if key_dim % 2:
            raise ValueError(f"rotary positions need an even key_dim, got {key_dim}")
        self.kv_heads, self.key_dim, self.value_dim = kv_heads, key_dim, value_dim
        self.attend = attend
        self._sizes = [(heads + kv_heads) * key_dim, kv_heads * value_dim]
        self.qkv = nn.Linear(dim, sum(self._sizes), bias=False)
        self.out = nn.Linear(heads * value_dim, dim, bias=False)
        self.to(dtype=dtype, device=device)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        tables = torch.empty(2, max_seq_len, 1, key_dim, dtype=dtype, device=device)
        _rotation(tables, rope)
        self.register_buffer("cos", tables[0], persistent=False)
        self.register_buffer("sin", tables[1], persistent=False)
        self.stage: Callable[[str], AbstractContextManager[object]] = lambda name: _NO_STAGE

    def forward(self, x: torch.Tensor, cache: DenseCache | None = None) -> torch.Tensor:
        """``x (B,T,dim) -> y (B,T,dim)``; with a cache, ``x`` continues the tokens that it holds."""
        o = self.attend(**self.attention_inputs(x, cache))
        with self.stage("proj"):
            y: torch.Tensor = self.out(o.flatten(2))
        return y

    def attention_inputs(self, x: torch.Tensor, cache: DenseCache | None = None) -> dict[str, torch.Tensor]:
        """q, k and v of :class:`Attend` for ``x``; a cache grows by T."""
        start = 0 if cache is None else cache.length
        with self.stage("proj"):
            rotated, values = self.qkv(x).split(self._sizes, -1)
            rotated = self._rotate(rotated.unflatten(-1, (-1, self.key_dim)), start)
            k = rotated[:, :, -self.kv_heads :]
            q = rotated[:, :, : -self.kv_heads]
            v = values.unflatten(-1, (-1, self.value_dim))
        if cache is not None:
            k, v = cache.append(k, v)
        return {"q": q, "k": k, "v": v}

    def _rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        span = slice(start, start + x.shape[1])
        return (x * self.cos[span]).add_(x.roll(x.shape[-1] // 2, -1) * self.sin[span])


def _rotation(tables: torch.Tensor, base: float) -> None:
    """Fill in cos and signed sin ``(2, length, 1, dim)``, from fp64, some positions at a time."""
    length, dim = tables.shape[1], tables.shape[-1]
    exponent = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    for start in range(0, length, 2048):
        position = torch.arange(start, min(start + 2048, length), dtype=torch.float64)
        angle = torch.outer(position, base**-exponent).unsqueeze(1)
        cos, sin = angle.cos(), angle.sin()
        rows = tables[:, start : start + 2048]
        rows[0], rows[1] = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
