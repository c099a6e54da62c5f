"""FlashAttention 2 as a library: which one is installed, and one way to call it.

The package ``flash_attn`` where it is installed, else torch, which carries the same kernels as
``torch.nn.attention.varlen``. Nothing is imported and no kernel is tried to decide.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
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
    """FlashAttention 2: windows aligned to the bottom right, H divides HQ, autograd through ``o``.

    ``dense``: ``q (B,T,HQ,D), k v (B,S,H,D) -> o (B,T,HQ,D), lse (B,T,HQ)``; ``varlen``: without ``B``, the
    sequences one after another. A row without a key gives 0 and lse -inf; lse carries no gradient.
    """

    @property
    def name(self) -> str: ...

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: Window
    ) -> Output: ...

    def varlen(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Bounds, scale: float, window: Window
    ) -> Output: ...


@dataclass(frozen=True)
class FlashAttn:
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
class TorchVarlen:
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
    """FlashAttention marks a row without a key by lse +inf."""
    lse = lse.detach()
    return lse.masked_fill(lse == INF, -INF)


@cache
def provider() -> str | None:
    """Library and version, ``flash_attn 2.8.3`` or ``torch 2.13.0 varlen``; None without one."""
    if find_spec("flash_attn_2_cuda") is not None:  # flash_attn 4 installs under the same package name
        for version in (found.version for found in metadata.distributions(name="flash-attn")):
            if (2, 7) <= tuple(int(part) for part in version.split(".")[:2]) < (3, 0):
                return f"flash_attn {version}"
    if torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__.split('+')[0]} varlen"
    return None


@cache
def load() -> Library:
    """The library :func:`provider` names, imported now; RuntimeError without one."""
    name = provider()
    if name is None:
        raise RuntimeError("no FlashAttention 2 is installed: pip install 'nsabench[flash-attn]'")
    if name.startswith("flash_attn"):
        return FlashAttn(import_module("flash_attn"), name)
    return TorchVarlen(import_module("torch.nn.attention.varlen"), name)
