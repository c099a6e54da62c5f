"""The thing to be timed: an implementation's layer or core at one shape, built once for all of its routes,
and steps that do the same work each time.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsabench.measure.stages import Hook
from nsabench.plan import Cell
from nsabench.run.check import Inputs, Verdict
from nsabench.run.impl import Fields, Impl, impl_for
from nsabench.run.steps import Span, Step, steps_of
from nsabench.run.work import ELEMENT_BYTES, Work

# Tokens that are drawn, and go into a cache, at once: building needs little more memory than what is built.
PART_TOKENS = 2048


@dataclass(frozen=True)
class Variant:
    """A step of an arm, ready to be called; ``name`` and ``weight`` as in :class:`Step`."""

    name: str
    weight: float
    step: Callable[[], torch.Tensor]


class Workload(ABC):
    """What arms and the gate see of the thing to be timed. The arms of one implementation share it, so that
    they differ in nothing but the route.
    """

    parameters: int
    """Weights that take part in a step."""
    hook: Hook | None
    """Shows the stages of its steps; None where they have none."""

    def __init__(self, impl: Impl) -> None:
        self.impl, self.cell, self.config = impl, impl.cell, impl.config
        self.device, self.dtype = impl.device, impl.dtype
        self.steps = steps_of(impl.cell)
        self._prepared = impl.prepare(self._spans())
        self._upstream: torch.Tensor | None = None
        self._copies: list[Workload] = []

    def settle(self, route: str) -> Fields:
        """Columns that say what will run in its calls; Refused where nothing can."""
        return self.impl.settle(route, self._spans())

    def _spans(self) -> list[Span]:
        return [span for step in self.steps for span in step.spans]

    def work(self, route: str) -> Work:
        """What one step must do."""
        return self.impl.work(route, self.parameters)

    def alone(self, route: str) -> dict[str, str]:
        """By branch, the route of a step with only that branch's work."""
        return self.impl.alone(route)

    def check(self, inputs: Inputs, span: Span, route: str, *, elements: int) -> Verdict:
        """The attention of a span against its specification, with gradients where steps have them."""
        gradients = self.cell.passes != "fwd"
        return self.impl.check(inputs, span, route, gradients=gradients, elements=elements)

    def variants(self, route: str) -> list[Variant]:
        """The steps of an arm, ready to be called."""
        return [self.variant(step, route) for step in self.steps]

    def variant(self, step: Step, route: str) -> Variant:
        """One of the steps, ready to be called."""
        if self.cell.passes == "fwd":
            return Variant(step.name, step.weight, self._forward_step(step, route))
        if self.cell.passes == "bwd":
            y = self.graph_step(route)()
            return Variant(step.name, step.weight, lambda: self._gradient(y, keep=True))
        return Variant(step.name, step.weight, self.training_step(route))

    def copies(self, count: int) -> list[Workload]:
        """This workload and ``count - 1`` more with equal tensors of their own, for all of its arms: steps
        that take turns on them never find their data in a cache. TypeError for what cannot be copied.
        """
        while len(self._copies) < count - 1:
            alone = copy.copy(self)
            alone._copies = []
            self._copies.append(copy.deepcopy(alone))
        return [self, *self._copies[: count - 1]]

    def forget_copies(self) -> None:
        """Give back what `copies` took."""
        self._copies.clear()

    def training_step(self, route: str) -> Callable[[], torch.Tensor]:
        """Forward and backward; returns the gradient of the first leaf."""
        forward = self.graph_step(route)
        return lambda: self._gradient(forward(), keep=False)

    def backward_step(self, route: str) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
        """The same in two: a forward, and the backward of the last forward."""
        forward = self.graph_step(route)
        made: list[torch.Tensor] = []
        return lambda: made.append(forward()), lambda: self._gradient(made.pop(), keep=False)

    def _gradient(self, y: torch.Tensor, *, keep: bool) -> torch.Tensor:
        """Gradients of every leaf; the first one's is returned."""
        if self._upstream is None:
            generator = torch.Generator().manual_seed(self.cell.seed + 1)
            self._upstream = torch.randn(y.shape, generator=generator).to(y)
        leaves = self._leaves()
        return torch.autograd.grad(y, leaves, self._upstream, retain_graph=keep, allow_unused=True)[0]

    @abstractmethod
    def _forward_step(self, step: Step, route: str) -> Callable[[], torch.Tensor]: ...

    @abstractmethod
    def _leaves(self) -> list[torch.Tensor]: ...

    @abstractmethod
    def graph_step(self, route: str) -> Callable[[], torch.Tensor]:
        """A forward that keeps what its backward needs."""

    @abstractmethod
    def inputs(self, step: Step, wanted: Collection[Span]) -> Iterator[tuple[Span, Inputs]]:
        """What the attention gets for the ``wanted`` spans of a step: good until the next ones are asked
        for.
        """

    @abstractmethod
    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """What a step makes of its attention's output ``(B,T,HQ,DV)``."""

    @property
    def has_cache(self) -> bool:
        """Whether what the attention gets comes out of a cache."""
        return False

    def inputs_without_cache(self, tokens: int | None = None, *, dtype: torch.dtype | None = None) -> Inputs:
        """What the attention gets for the first ``tokens`` of the prompt at once, computed in ``dtype``: what
        caches are held against. Only where ``has_cache``.
        """
        raise NotImplementedError

    def held_bytes(self) -> dict[str, int]:
        """Bytes that it holds between steps: ``weights``, ``inputs``, ``tables``, ``selection``."""
        held = {**self._held(), "selection": self._prepared}
        return {name: sum(_storage_bytes(t) for t in tensors) for name, tensors in held.items()}

    @abstractmethod
    def _held(self) -> dict[str, Sequence[torch.Tensor]]: ...

    def cache_bytes(self) -> dict[str, int]:
        """Bytes of the KV cache by its parts; empty for a step that keeps none."""
        return {}


class LayerWorkload(Workload):
    """The whole layer on a stream of tokens, with its cache."""

    def __init__(self, impl: Impl) -> None:
        """Build layer, inputs and cache; OutOfMemory and the like are the caller's to record."""
        super().__init__(impl)
        cell = impl.cell
        self.layer = _layer(impl)
        self._x = None if cell.phase == "decode" else prompt(impl)
        self.parameters = sum(p.numel() for p in self.layer.parameters())
        self.hook = impl.hook(self.layer)
        self._frozen: dict[int, tuple[Any, Any]] = {}
        self.cache = None
        if cell.passes == "fwd":
            self.cache = self._filled(cell.S - 1) if cell.phase == "decode" else impl.cache()

    @property
    def x(self) -> torch.Tensor:
        """The prompt ``(B,S,dim)``; decode keeps only the tokens of its steps and makes it anew."""
        return prompt(self.impl) if self._x is None else self._x

    def _tokens(self, start: int, end: int) -> torch.Tensor:
        return prompt(self.impl, start, end) if self._x is None else self._x[:, start:end]

    def _filled(self, length: int) -> Any:
        """A cache at ``length`` tokens, shared by the arms: keys and values do not depend on the route."""
        if length not in self._frozen:
            cache = self.impl.cache()
            with torch.no_grad():
                for start in range(0, length, PART_TOKENS):
                    part = self._tokens(start, min(start + PART_TOKENS, length))
                    self.layer.attention_inputs(part, cache)
            self._frozen[length] = cache, cache.checkpoint()
        cache, state = self._frozen[length]
        cache.rollback(state)
        return cache

    def _forward_step(self, step: Step, route: str) -> Callable[[], torch.Tensor]:
        if self.cell.phase == "decode":
            return self._decode_step(route, step.spans[0][1])
        cache = self.cache
        assert cache is not None

        def forward() -> torch.Tensor:
            cache.reset()
            with torch.inference_mode():
                return self._feed(self.x, cache, route, step.spans)

        return forward

    def _decode_step(self, route: str, length: int) -> Callable[[], torch.Tensor]:
        cache = self._filled(length - 1)
        before = cache.checkpoint()
        token = self._tokens(length - 1, length)

        def step() -> torch.Tensor:
            cache.rollback(before)
            with torch.inference_mode():
                return self.impl.forward(self.layer, token, cache, route)

        return step

    def graph_step(self, route: str) -> Callable[[], torch.Tensor]:
        x, (step,) = self.x.requires_grad_(), self.steps
        return lambda: self._feed(x, self._graph_cache(), route, step.spans)

    def _graph_cache(self) -> Any:
        return None if self.cell.mode == "batched" else self.impl.cache(keep_graph=True)

    def _feed(self, x: torch.Tensor, cache: Any, route: str, spans: tuple[Span, ...]) -> torch.Tensor:
        return _joined([self.impl.forward(self.layer, x[:, a:b], cache, route) for a, b in spans])

    def _leaves(self) -> list[torch.Tensor]:
        return [self.x, *self.layer.parameters()]

    def inputs(self, step: Step, wanted: Collection[Span]) -> Iterator[tuple[Span, Inputs]]:
        """They are views of the cache that the step uses."""
        cache = self._cache_before(step.spans[0][0])
        for start, end in step.spans:
            with torch.no_grad():
                found = self.layer.attention_inputs(self._tokens(start, end), cache)
            if (start, end) in wanted:
                yield (start, end), found

    @property
    def has_cache(self) -> bool:
        return self.cache is not None or self.cell.mode != "batched"

    def inputs_without_cache(self, tokens: int | None = None, *, dtype: torch.dtype | None = None) -> Inputs:
        layer, x = self.layer, self._tokens(0, min(tokens or self.cell.S, self.cell.S))
        if dtype not in (None, self.dtype):
            layer, x = copy.deepcopy(layer).to(dtype), x.to(dtype)
        with torch.no_grad():
            found: Inputs = layer.attention_inputs(x)
        return found

    def _cache_before(self, start: int) -> Any:
        if self.cell.phase == "decode":
            return self._filled(start)
        if self.cache is None:
            return self._graph_cache()
        self.cache.reset()
        return self.cache

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y: torch.Tensor = self.layer.out(attended.flatten(2))
        return y

    def _held(self) -> dict[str, Sequence[torch.Tensor]]:
        return {
            "weights": list(self.layer.parameters()),
            "tables": list(self.layer.buffers()),
            "inputs": [] if self._x is None else [self._x],
        }

    def cache_bytes(self) -> dict[str, int]:
        return {} if self.cache is None else self.impl.cache_bytes(self.cache)


class CoreWorkload(Workload):
    """The attention alone, on the tensors that a layer of the same cell gives it: those are made, and copied
    into tensors of their own, before any step.
    """

    parameters = 0

    def __init__(self, impl: Impl) -> None:
        """Build the inputs; OutOfMemory and the like are the caller's to record."""
        super().__init__(impl)
        self.hook = impl.hook(None)
        with torch.no_grad():
            whole: Inputs = _layer(impl).attention_inputs(prompt(impl))
        first = self.steps[0].spans[0][0]
        whole = impl.seen(whole, (first, impl.cell.S))
        self.given = {name: _own(value) for name, value in whole.items()}

    def _forward_step(self, step: Step, route: str) -> Callable[[], torch.Tensor]:
        parts = [self._part(span) for span in step.spans]

        def forward() -> torch.Tensor:
            with torch.inference_mode():
                return _joined([self.impl.attend(part, route) for part in parts])

        return forward

    def graph_step(self, route: str) -> Callable[[], torch.Tensor]:
        for leaf in self._leaves():
            leaf.requires_grad_()
        (step,) = self.steps
        return lambda: _joined([self.impl.attend(self._part(span), route) for span in step.spans])

    def _part(self, span: Span) -> Inputs:
        whole = self.steps[0].spans
        return self.given if len(whole) == 1 else self.impl.seen(self.given, span)

    def _leaves(self) -> list[torch.Tensor]:
        return [self.given[name] for name in self.impl.leaves]

    def inputs(self, step: Step, wanted: Collection[Span]) -> Iterator[tuple[Span, Inputs]]:
        for span in step.spans:
            if span in wanted:
                with torch.no_grad():
                    found = self._part(span)
                yield span, found

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        return attended

    def _held(self) -> dict[str, Sequence[torch.Tensor]]:
        return {"inputs": [t for t in self.given.values() if isinstance(t, torch.Tensor)]}


SCOPES: dict[str, type[LayerWorkload] | type[CoreWorkload]] = {"module": LayerWorkload, "core": CoreWorkload}


def workload_for(cell: Cell) -> Workload:
    """The workload of a cell's impl and scope, built now, for every route of its group; OutOfMemory and the
    like are the caller's to record.
    """
    return SCOPES[cell.scope](impl_for(cell))


def _layer(impl: Impl) -> Any:
    """The layer that the cell's seed makes; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(impl.cell.seed)
        return impl.layer()


def prompt(impl: Impl, start: int = 0, end: int | None = None) -> torch.Tensor:
    """Tokens ``[start, end)`` of ``x (B,S,dim)``: drawn in parts, the same each time by the cell's seed."""
    cell = impl.cell
    end, size = cell.S if end is None else end, min(PART_TOKENS, cell.S)
    x = torch.empty(cell.B, end - start, cell.dim, device=impl.device, dtype=impl.dtype)
    for number in range(start // size, -(-end // size)):
        # A CPU's generator takes 32 bits of a seed: a part's number has to change those.
        generator = torch.Generator().manual_seed((cell.seed + number * 0x9E3779B1) % 2**63)
        part = torch.randn(cell.B, size, cell.dim, generator=generator)
        first = number * size
        a, b = max(start, first), min(end, first + size)
        x[:, a - start : b - start] = part[:, a - first : b - first]
    return x


def _own(value: Any) -> Any:
    """A tensor in memory of its own, no larger than itself."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value.detach())


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _storage_bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def least_bytes(cell: Cell) -> int:
    """Bytes that a cell needs at the very least: the projections of its prompt, which decode makes too, to
    check its cache, and the scores of `dense:math`, which holds them all. For refusing the hopeless early.
    """
    keys = cell.groups * (cell.dk + cell.dv)
    projected = cell.heads * cell.dk + (3 * keys if cell.computes_nsa else keys)
    pairs = max((b - a) * b for step in steps_of(cell) for a, b in step.spans)
    scores = cell.heads * pairs if cell.impl == "dense:math" else 0
    return math.ceil(cell.B * (cell.S * projected + scores) * ELEMENT_BYTES[cell.dtype])
