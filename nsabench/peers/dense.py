"""Dense causal attention as one would run it today: torch's ``scaled_dot_product_attention`` over grouped KV
heads, with a preallocated KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

KV = tuple[torch.Tensor, torch.Tensor]

_NO_STAGE: AbstractContextManager[None] = nullcontext()


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last ``T`` of ``S`` tokens: ``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV) -> o
    (B,T,HQ,DV)``.

    ``H`` divides ``HQ``; ``T`` is from 1 to ``S``. The scale is ``1/sqrt(D)``.
    """
    tokens, length, kv_heads = q.shape[1], k.shape[1], k.shape[2]
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    # Fused kernels want one head dim; without one of them the whole score matrix would be in memory.
    width, scale = max(key_dim, value_dim), key_dim**-0.5
    q, k, v = (_widened(t, width).transpose(1, 2) for t in (q, k, v))
    if tokens == 1:
        # A group's heads as rows of one product: `enable_gqa` would copy K and V for every head on a CPU.
        rows = q.reshape(q.shape[0], kv_heads, -1, width)
        o = scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
    else:
        if not _takes_groups(q):
            group = q.shape[1] // kv_heads
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        grouped = k.shape[1] != q.shape[1]
        if tokens == length:
            o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        else:
            mask = causal_lower_right(tokens, length)
            o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)[..., :value_dim]


def _widened(t: torch.Tensor, width: int) -> torch.Tensor:
    return t if t.shape[-1] == width else pad(t, (0, width - t.shape[-1]))


def _takes_groups(q: torch.Tensor) -> bool:
    """Whether a fused kernel takes fewer KV heads than query heads: torch's for fp32 on a GPU does not."""
    return q.device.type == "cpu" or q.dtype in (torch.float16, torch.bfloat16)


class DenseCache:
    """Keys and values of every token, head by head: ``(B,H,max_seq_len,D or DV)``, in memory taken once.

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
    ) -> None:
        self.max_seq_len, self.keep_graph, self.length = max_seq_len, keep_graph, 0
        rows = 0 if keep_graph else max_seq_len
        self._data = [
            torch.zeros(batch_size, kv_heads, rows, dim, dtype=dtype, device=device)
            for dim in (key_dim, value_dim)
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
            rows = new.transpose(1, 2)
            if self.keep_graph:
                self._data[i] = torch.cat([self._data[i][:, :, : self.length], rows], 2)
            else:
                self._data[i][:, :, self.length : end] = rows
        self.length = end
        return self._data[0][:, :, :end].transpose(1, 2), self._data[1][:, :, :end].transpose(1, 2)

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

    ``stage`` is called with ``proj`` around projections and rotation and returns a context; what is outside
    it is the attention and its cache.
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
        o = dense_attention(**self.attention_inputs(x, cache))
        with self.stage("proj"):
            y: torch.Tensor = self.out(o.flatten(2))
        return y

    def attention_inputs(self, x: torch.Tensor, cache: DenseCache | None = None) -> dict[str, torch.Tensor]:
        """q, k and v of :func:`dense_attention` for ``x``; a cache grows by T."""
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
