"""Which row of the route table computed each branch of each layer; which were passed over, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nsa import NSAConfig, Routing, routes
from nsa.routes import BRANCHES, Request, refusal, resolve

Taken = tuple[str, str]
"""Branch and backend."""

Passed = tuple[str, str, str]
"""Branch, backend and the reason."""

Settled = tuple[tuple[Taken, ...], tuple[Passed, ...]]

COLUMNS = ("layer", "branch", "backend", "calls", "refused", "reason")


def settled(routing: Routing, request: Request) -> Settled:
    """What a routing settles on for a request, and the rows asked before with their reasons.

    The attention asks the same of the same table: its answer depends on nothing else.
    """
    route = resolve(routing, request)
    taken = tuple((branch, route.backend(branch)) for branch in BRANCHES)
    passed = []
    for branch in BRANCHES:
        chosen, name = route.rows[branch], getattr(routing, branch)
        for row in routes.TABLE if chosen is not None and name == "auto" else ():
            if row is chosen:
                break
            if row.branch == branch:
                passed.append((branch, row.backend, refusal(row, request) or row.avoid(request) or ""))
    return taken, tuple(passed)


class RoutesSeen:
    """Counts, by layer, the calls that each row computed and those in which ``auto`` passed over a row.

    Each call counts where it happens, in forward hooks, from the tensors that it projects: the request that
    the attention itself resolves. A forward that is computed again for the backward counts again.

    Args:
        grad: count each call as one with gradients, for forwards without any that stand for others.
    """

    def __init__(self, *, grad: bool = False) -> None:
        self.counting, self._grad = True, grad
        self._settled: dict[tuple[Routing, Request], Settled] = {}
        self._taken: Counter[tuple[int, str, str]] = Counter()
        self._passed: Counter[tuple[int, str, str, str]] = Counter()
        self._reasons: dict[tuple[int, str, str, str], str] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Count the calls of this model's layers while this is open."""
        layers: Any = model.layers
        hooks = []
        for number, layer in enumerate(layers):
            seen = _Call(self, number, layer.attention)
            hooks.append(layer.attention.register_forward_pre_hook(seen.called, with_kwargs=True))
            hooks.append(layer.attention.proj.register_forward_hook(seen.projected))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def count(self, layer: int, routing: Routing, request: Request) -> None:
        """One call of a layer."""
        request = replace(request, needs_grad=True) if self._grad else request
        found = self._settled.get((routing, request))
        if found is None:
            found = self._settled[routing, request] = settled(routing, request)
        taken, passed = found
        for branch, backend in taken:
            self._taken[layer, branch, backend] += 1
        for branch, backend, reason in passed:
            # A reason that names a length is the same reason at another length.
            key = (layer, branch, backend, re.sub(r"got \d+$", "got", reason))
            self._reasons.setdefault(key, reason)
            self._passed[key] += 1

    def rows(self) -> list[dict[str, Any]]:
        """The counts, by the names of their columns: a row for each that ran, then those passed over."""
        found = [
            (layer, branch, backend, calls, 0, "") for (layer, branch, backend), calls in self._taken.items()
        ]
        found += [(*key[:3], 0, count, self._reasons[key]) for key, count in self._passed.items()]
        found.sort(key=lambda row: (row[0], BRANCHES.index(row[1]), row[4] > 0))
        return [dict(zip(COLUMNS, row, strict=True)) for row in found]

    def state(self) -> list[list[Any]]:
        """The counts as plain values."""
        return [[row[name] for name in COLUMNS] for row in self.rows()]

    def restore(self, state: list[list[Any]]) -> None:
        """Count on from what `state` gave."""
        for layer, branch, backend, calls, refused, reason in state:
            if calls:
                self._taken[layer, branch, backend] += calls
            if refused:
                key = (layer, branch, backend, re.sub(r"got \d+$", "got", reason))
                self._reasons.setdefault(key, reason)
                self._passed[key] += refused


class _Call:
    """A layer's calls: what `called` is told of one, `projected` needs for its request."""

    def __init__(self, seen: RoutesSeen, layer: int, attention: nn.Module) -> None:
        self._seen, self._layer = seen, layer
        self._attention: Any = attention
        self._routing, self._before = Routing(), 0

    def called(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        cache, routing = (*inputs[1:], *(None, None))[:2]
        cache, routing = named.get("cache", cache), named.get("routing", routing)
        self._routing = routing if isinstance(routing, Routing) else Routing.parse(routing or "auto")
        self._before = 0 if cache is None else cache.length

    def projected(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if not self._seen.counting:
            return
        self._seen.count(self._layer, self._routing, request_of(self._attention, output, self._before))


def request_of(attention: Any, projected: torch.Tensor, before: int) -> Request:
    """What a layer asks the table, from its projection ``(B,T,channels)`` after ``before`` cached tokens."""
    learned = (attention.compress_k, attention.compress_v)
    grad = torch.is_grad_enabled() and (
        projected.requires_grad or any(p.requires_grad for one in learned for p in one.parameters())
    )
    config: NSAConfig = attention.config
    queries = projected.shape[1]
    return Request(projected.device.type, projected.dtype, queries, before + queries, grad, config)
