"""The thing to be timed: one layer, its inputs, its cache, and a step that does the same work each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nsa import KVCache, NativeSparseAttention
from nsabench.plan import Cell
from nsabench.run.steps import DTYPES, Span, Step, steps_of
from nsabench.run.work import ELEMENT_BYTES, config_of

Inputs = dict[str, Any]
"""Arguments of the attention, by name."""


@dataclass(frozen=True)
class Variant:
    """A step of an arm, ready to be called; ``name`` and ``weight`` as in :class:`Step`."""

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
        return [Variant(step.name, step.weight, self._callable(step, route)) for step in steps_of(self.cell)]

    def _callable(self, step: Step, route: str) -> Callable[[], torch.Tensor]:
        if self.cell.phase == "decode":
            return self._decode_step(route, step.spans[0][1])
        return self._prefill_step(route, step.spans)

    def _decode_step(self, route: str, length: int) -> Callable[[], torch.Tensor]:
        cache = self._filled(length - 1)
        before = cache.checkpoint()
        token = self.x[:, length - 1 : length]

        def step() -> torch.Tensor:
            cache.rollback(before)
            with torch.inference_mode():
                y: torch.Tensor = self.layer(token, cache, route)
            return y

        return step

    def _filled(self, length: int) -> KVCache:
        """A cache at ``length`` tokens, shared by the arms: keys and values do not depend on the route."""
        if length not in self._frozen:
            cache = self._new_cache()
            if length:
                with torch.no_grad():
                    self.layer.attention_inputs(self.x[:, :length], cache)
            self._frozen[length] = cache, cache.checkpoint()
        cache, state = self._frozen[length]
        cache.rollback(state)
        return cache

    def _prefill_step(self, route: str, spans: tuple[Span, ...]) -> Callable[[], torch.Tensor]:
        cell, cache = self.cell, self.cache
        if cache is not None:

            def forward() -> torch.Tensor:
                cache.reset()
                with torch.inference_mode():
                    return self._feed(self.x, cache, route, spans)

            return forward

        if cell.passes == "bwd":
            y = self.graph_step(route)()
            return lambda: self._gradient(y, keep=True)
        return self.training_step(route)

    def graph_step(self, route: str) -> Callable[[], torch.Tensor]:
        """A forward that keeps what its backward needs."""
        x, (step,) = self.x.requires_grad_(), steps_of(self.cell)
        return lambda: self._feed(x, self._graph_cache(), route, step.spans)

    def _graph_cache(self) -> KVCache | None:
        return None if self.cell.mode == "batched" else self._new_cache(keep_graph=True)

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

    def _feed(
        self, x: torch.Tensor, cache: KVCache | None, route: str, spans: tuple[Span, ...]
    ) -> torch.Tensor:
        parts = [self.layer(x[:, start:end], cache, route) for start, end in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def inputs(self, step: Step, wanted: Collection[Span]) -> Iterator[tuple[Span, Inputs]]:
        """What the attention gets for the ``wanted`` spans of a step, out of the cache that the step uses.

        They are views of that cache: good until the next ones are asked for.
        """
        cache = self._cache_before(step.spans[0][0])
        for start, end in step.spans:
            with torch.no_grad():
                found = self.layer.attention_inputs(self.x[:, start:end], cache)
            if (start, end) in wanted:
                yield (start, end), found

    def inputs_without_cache(self) -> Inputs:
        """What the attention gets for the whole prompt at once: what caches are held against."""
        with torch.no_grad():
            return self.layer.attention_inputs(self.x)

    def _cache_before(self, start: int) -> KVCache | None:
        if self.cell.phase == "decode":
            return self._filled(start)
        if self.cache is None:
            return self._graph_cache()
        self.cache.reset()
        return self.cache

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """What the layer makes of its attention's output ``(B,T,HQ,DV)``."""
        with torch.no_grad():
            y: torch.Tensor = self.layer.out(attended.flatten(2))
        return y

    def cache_bytes(self) -> dict[str, int]:
        """Bytes of the KV cache by branch; empty for a pass that keeps none."""
        return {} if self.cache is None else self.cache.bytes_per_branch()


def least_bytes(cell: Cell) -> int:
    """Bytes that a cell needs at the very least: the prompt and its projections, which decode makes too, to
    fill its cache. For refusing the hopeless early.
    """
    heads = cell.heads + 3 * cell.groups
    projected = heads * cell.dk + 3 * cell.groups * cell.dv
    tokens = cell.B * cell.S
    return math.ceil(tokens * (cell.dim + projected) * ELEMENT_BYTES[cell.dtype])
