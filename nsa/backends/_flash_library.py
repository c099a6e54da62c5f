"""FlashAttention as a library, one way to call every generation of it: 2, 3 and 4."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Output = tuple[torch.Tensor, torch.Tensor]
Window = tuple[int, int]

# Keys left and right of the diagonal a query sees; -1 is all of them.
FULL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)
INF = float("inf")


@dataclass(frozen=True)
class Bounds:
    """Where each packed sequence begins and ends, int32 ``(N+1,)``, and upper bounds of the longest."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


class Library(Protocol):
    """FlashAttention: windows aligned to the bottom right, H divides HQ, autograd through ``o``.

    ``dense``: ``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV) -> o (B,T,HQ,DV), lse (B,T,HQ)``; ``varlen``: without
    ``B``, the sequences one after another. A row without a key gives 0 and lse -inf; lse carries no gradient.
    ``widths``: the head dims it wants for q and k, and for v, at least the ones given.
    """

    @property
    def name(self) -> str: ...

    def widths(self, dim: int, value_dim: int) -> tuple[int, int]: ...

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output: ...

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scale: float, window: Window
    ) -> Output: ...


class _OneWidth:
    """One head dim for q, k and v, a multiple of 8."""

    def widths(self, dim: int, value_dim: int) -> tuple[int, int]:
        width = -(-max(dim, value_dim) // 8) * 8
        return width, width


@dataclass(frozen=True)
class FlashAttn(_OneWidth):
    """The package ``flash_attn``, from 2.7 on; ``module`` is the package."""

    module: Any
    name: str

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output:
        options = self._options(scale, window)
        o, lse, _ = self.module.flash_attn_func(q, k, v, **options)
        return o, _rows_first(lse.transpose(1, 2))

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scale: float, window: Window
    ) -> Output:
        longest = bounds.max_q, bounds.max_k
        options = self._options(scale, window)
        o, lse, _ = self.module.flash_attn_varlen_func(q, k, v, bounds.cu_q, bounds.cu_k, *longest, **options)
        return o, _rows_first(lse.t())

    def _options(self, scale: float, window: Window) -> dict[str, Any]:
        return {
            "softmax_scale": scale,
            "causal": window[1] == 0,
            "window_size": window,
            "return_attn_probs": True,
        }


@dataclass(frozen=True)
class TorchVarlen(_OneWidth):
    """``torch.nn.attention.varlen``, from torch 2.11 on: packed sequences only; ``module`` is that module."""

    module: Any
    name: str

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output:
        return pack_batch(self, q, k, v, scale, window)

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scale: float, window: Window
    ) -> Output:
        options: dict[str, Any] = {"scale": scale, "window_size": window}
        # torch 2.11 takes fewer KV heads as they come; later versions want to be told.
        if "enable_gqa" in inspect.signature(self.module.varlen_attn).parameters:
            options["enable_gqa"] = True
        o, lse = self.module.varlen_attn(
            *(q, k, v, bounds.cu_q, bounds.cu_k, bounds.max_q, bounds.max_k),
            return_aux=self.module.AuxRequest(lse=True),
            **options,
        )
        return o, _rows_first(lse.t())  # (HQ, T), whatever its docstring says


@dataclass(frozen=True)
class FlashAttn3(_OneWidth):
    """FlashAttention 3, built from ``hopper/``; ``module`` is ``flash_attn_interface``."""

    module: Any
    name: str

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output:
        fn = self.module.flash_attn_func
        o, lse = fn(q, k, v, **self._options(fn, scale, window))[:2]
        return o, _rows_first(lse.transpose(1, 2))

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scale: float, window: Window
    ) -> Output:
        fn = self.module.flash_attn_varlen_func
        bounded = bounds.cu_q, bounds.cu_k, bounds.max_q, bounds.max_k
        o, lse = fn(q, k, v, *bounded, **self._options(fn, scale, window))[:2]
        return o, _rows_first(lse.t())

    def _options(self, fn: Any, scale: float, window: Window) -> dict[str, Any]:
        options = {"softmax_scale": scale, "causal": window[1] == 0, "window_size": window}
        # The first releases always return lse; later ones want to be asked.
        asked = "return_attn_probs" in inspect.signature(fn).parameters
        return options | ({"return_attn_probs": True} if asked else {})


@dataclass(frozen=True)
class FlashAttn4:
    """FlashAttention 4, package ``flash-attn-4``; ``module`` is ``flash_attn.cute``, ``major`` the GPU's
    compute capability.
    """

    module: Any
    name: str
    major: int

    def widths(self, dim: int, value_dim: int) -> tuple[int, int]:
        """One width; Blackwell has none above 128 but (192, 128), Hopper's backward none that differ."""
        if self.major >= 10 and max(dim, value_dim) > 128:
            return 192, 128
        width = -(-max(dim, value_dim) // 8) * 8
        return width, width

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output:
        o, lse = self.module.flash_attn_func(q, k, v, **self._options(scale, window))
        return o, _rows_first(lse.transpose(1, 2))

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scale: float, window: Window
    ) -> Output:
        o, lse = self.module.flash_attn_varlen_func(
            *(q, k, v),
            cu_seqlens_q=bounds.cu_q,
            cu_seqlens_k=bounds.cu_k,
            max_seqlen_q=bounds.max_q,
            max_seqlen_k=bounds.max_k,
            **self._options(scale, window),
        )
        return o, _rows_first(lse.t())

    def _options(self, scale: float, window: Window) -> dict[str, Any]:
        # Here None is all keys: -1 beside a bound of 0 has meant both "no window" and "one key less".
        left, right = (None if bound < 0 else bound for bound in window)
        causal = window == CAUSAL
        return {
            "softmax_scale": scale,
            "causal": causal,
            "window_size": (None, None) if causal else (left, right),
            "return_lse": True,
        }


def pack_batch(
    library: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
) -> Output:
    """``dense`` through the kernel for packed sequences."""
    batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
    steps = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    bounds = Bounds(steps * rows, steps * keys, rows, keys)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    o, lse = library.varlen(q, k, v, bounds, scale, window)
    return o.unflatten(0, (batch, rows)), lse.unflatten(0, (batch, rows))


def _rows_first(lse: torch.Tensor) -> torch.Tensor:
    """Some of FlashAttention marks a row without a key by lse +inf."""
    lse = lse.detach()
    return lse.masked_fill(lse == INF, -INF)
