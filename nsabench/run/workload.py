"""The thing to be timed: one layer, its inputs, its cache, and a step that does the same work at every call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa import KVCache, NativeSparseAttention
from nsabench.plan import Cell
from nsabench.run.work import ELEMENT_BYTES, config_of

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A step and its weight in the cell's total. Decode has two: a step that completes a compressed block (``emit``) and
    one that does not (``plain``), weighted by how often each happens; other phases have one, named ``""``."""

    name: str
    weight: float
    step: Callable[[], torch.Tensor]


class Workload:
    """The layer of one shape, shared by its arms, so that routes differ in nothing but the route."""

    def __init__(self, cell: Cell) -> None:
        """Build layer, inputs and cache; OutOfMemory and the like are the caller's to record."""
        self.cell, self.config = cell, config_of(cell)
        self.device, self.dtype = torch.device(cell.device), DTYPES[cell.dtype]
        generator = torch.Generator().manual_seed(cell.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            layer = NativeSparseAttention(self.config, cell.dim)
        self.layer = layer.to(device=self.device, dtype=self.dtype)
        self.parameters = sum(p.numel() for p in layer.parameters())
        x = torch.randn(cell.B, cell.S, cell.dim, generator=generator)
        self.x = x.to(device=self.device, dtype=self.dtype)
        self._frozen: dict[int, tuple[KVCache, Any]] = {}
        self._upstream: torch.Tensor | None = None
        self.cache = None
        if cell.passes == "fwd":
            self.cache = self._filled(cell.S - 1) if cell.phase == "decode" else self._new_cache()

    def _new_cache(self, *, keep_graph: bool = False) -> KVCache:
        cell = self.cell
        return KVCache(
            self.config, cell.B, cell.S, dtype=self.dtype, device=self.device, keep_graph=keep_graph
        )

    def variants(self, route: str) -> list[Variant]:
        """The steps of an arm. Decode: each replays one step at a frozen length; its cache is filled here."""
        if self.cell.phase == "decode":
            return self._decode_variants(route)
        return [Variant("", 1.0, self._prefill_step(route))]

    def _decode_variants(self, route: str) -> list[Variant]:
        block, stride = self.config.compression_block_size, self.config.compression_stride
        last = self.cell.S
        emit = last - (last - block) % stride if last >= block else None
        plain = last if emit != last else last - 1
        if stride == 1 and emit is not None:
            plain = 0
        weight = 0.0 if emit is None else 1.0 / stride
        found = []
        for name, length, part in (("emit", emit, weight), ("plain", plain, 1.0 - weight)):
            if length and part:
                found.append(Variant(name, part, self._decode_step(route, length)))
        return found

    def _decode_step(self, route: str, length: int) -> Callable[[], torch.Tensor]:
        cache = self._filled(length - 1)
        before = cache.checkpoint()
        token = self.x[:, length - 1 : length]

        def step() -> torch.Tensor:
            cache.rollback(before)
            with torch.inference_mode():
                return self.layer(token, cache, route)  # type: ignore[no-any-return]

        return step

    def _filled(self, length: int) -> KVCache:
        """A cache at ``length`` tokens, shared by the arms: keys and values do not depend on the route."""
        if length not in self._frozen:
            cache = self._new_cache()
            if length:
                with torch.inference_mode():
                    self.layer.attention_inputs(self.x[:, :length], cache)
            self._frozen[length] = cache, cache.checkpoint()
        cache, state = self._frozen[length]
        cache.rollback(state)
        return cache

    def _prefill_step(self, route: str) -> Callable[[], torch.Tensor]:
        cell, cache = self.cell, self.cache
        if cache is not None:

            def forward() -> torch.Tensor:
                cache.reset()
                with torch.inference_mode():
                    return self._feed(self.x, cache, route)

            return forward

        if cell.passes == "bwd":
            y = self.graph_step(route)()
            return lambda: self._gradient(y, keep=True)
        return self.training_step(route)

    def graph_step(self, route: str) -> Callable[[], torch.Tensor]:
        """A forward that keeps what its backward needs."""
        x = self.x.requires_grad_()

        def forward() -> torch.Tensor:
            return self._feed(
                x, None if self.cell.mode == "batched" else self._new_cache(keep_graph=True), route
            )

        return forward

    def training_step(self, route: str) -> Callable[[], torch.Tensor]:
        """Forward and backward; returns the gradient of the input."""
        forward = self.graph_step(route)
        return lambda: self._gradient(forward(), keep=False)

    def _gradient(self, y: torch.Tensor, *, keep: bool) -> torch.Tensor:
        """Gradients of the input and every weight; the input's is returned."""
        if self._upstream is None:
            generator = torch.Generator().manual_seed(self.cell.seed + 1)
            self._upstream = torch.randn(y.shape, generator=generator).to(y)
        leaves = [self.x, *self.layer.parameters()]
        return torch.autograd.grad(y, leaves, self._upstream, retain_graph=keep, allow_unused=True)[0]

    def _feed(self, x: torch.Tensor, cache: KVCache | None, route: str) -> torch.Tensor:
        """The whole prompt at once, in chunks of N, or token by token (``batched``, ``chunked=N``, ``stepwise``)."""
        mode = self.cell.mode
        if mode == "batched":
            return self.layer(x, cache, route)  # type: ignore[no-any-return]
        size = 1 if mode == "stepwise" else int(mode.partition("=")[2])
        return torch.cat([self.layer(part, cache, route) for part in x.split(size, dim=1)], 1)

    def attention_inputs(self) -> dict[str, object]:
        """Inputs of the attention at the measured step: the last token over the cache, or the whole prompt."""
        with torch.inference_mode():
            if self.cell.phase == "decode":
                return self.layer.attention_inputs(self.x[:, -1:], self._filled(self.cell.S - 1))
            return self.layer.attention_inputs(self.x)

    def cache_bytes(self) -> dict[str, int]:
        """Bytes of the KV cache by branch; empty for a pass that keeps none."""
        return {} if self.cache is None else self.cache.bytes_per_branch()


def least_bytes(cell: Cell) -> int:
    """Bytes that a cell needs at the very least: tokens, projections, keys and values. For refusing the hopeless early."""
    width = cell.dim * 2 + (cell.heads + 3 * cell.groups) * cell.dk + (cell.heads + 3 * cell.groups) * cell.dv
    tokens = cell.B * cell.S
    held = tokens * (cell.dim + cell.groups * (cell.dk + cell.dv))
    moving = 0 if cell.phase == "decode" else tokens * width
    return math.ceil((held + moving) * ELEMENT_BYTES[cell.dtype])
