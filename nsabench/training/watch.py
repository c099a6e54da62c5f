"""What a training's attention does: gates, routes and selected blocks of each layer, into its tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nsa import NSAConfig, Routing, selection_hook
from nsabench.run.selection import SEQUENCES, Sharing, sharing
from nsabench.store import TableRun
from nsabench.store.training import GATES_FILE, OVERLAP_FILE, ROUTES_FILE
from nsabench.training.gates import GATED, gate_health, gate_sums
from nsabench.training.observe import Observer, StepStats
from nsabench.training.routes_seen import RoutesSeen

STATS_EVERY = 50
"""Steps between those that are looked at; the first is."""

Probe = Callable[[torch.Tensor], object]
"""A forward of the bare model on tokens ``(B,S+1)``, as a step of the training does it."""


class Watch(Observer):
    """Looks at the gates and the selected blocks of every ``every``-th step, and counts routes in all steps.

    Its hooks keep what the first micro-batch's forward computes anyway; figures are made of it after the
    step. A step that is not looked at pays for the counting of routes, some microseconds a layer.

    Args:
        run: where gates.csv, overlap.csv and routes.csv are; the last is brought up to date with the others
            and at the end.
        routing: what the layers are called with.
        probe: for a model whose own steps cannot be looked into, because they are compiled. Then each step
            looked at is preceded by such a forward, and routes are counted in these only, as with gradients.
    """

    def __init__(
        self, run: TableRun, routing: str, *, every: int = STATS_EVERY, probe: Probe | None = None
    ) -> None:
        self._run, self._every, self._probe = run, every, probe
        routes = Routing.parse(routing)
        self._on = [getattr(routes, branch) != "off" for branch in GATED]
        self._routes = RoutesSeen(grad=probe is not None)
        self._model: Any = None
        self._counting, self._looking = ExitStack(), ExitStack()
        self._tokens: torch.Tensor | None = None
        self._seen: Seen | None = None

    def begin(self, model: nn.Module, first_step: int) -> None:
        self._model = model
        if self._probe is None:
            self._counting.enter_context(self._routes.on(model))

    def batch(self, step: int, micro: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        looked_at = micro == 0 and (step == 1 or step % self._every == 0)
        if looked_at:
            self._seen = Seen(self._model, self._on)
        self._tokens = tokens if looked_at else None

    def stage(self, name: str) -> None:
        self._routes.counting = name != "eval"
        self._looking.close()
        if name != "forward" or self._tokens is None or self._seen is None:
            return
        if self._probe is None:
            self._looking.enter_context(self._seen.looking())
        else:
            with self._routes.on(self._model), self._seen.looking():
                self._probe(self._tokens)

    def after_step(self, step: int, loss: float, stats: StepStats) -> None:
        seen, self._seen, self._tokens = self._seen, None, None
        if seen is None:
            return
        self._run.append(GATES_FILE, *({"step": step, **row} for row in seen.gates()))
        self._run.append(OVERLAP_FILE, *({"step": step, **row} for row in seen.overlap()))
        self._store_routes()

    def failed(self, step: int, error: Exception) -> None:
        # A step that is done again, to find what was wrong with it, is none of the training.
        self._looking.close()
        self._counting.close()

    def state(self) -> dict[str, Any]:
        return {"routes": self._routes.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._routes.restore(state["routes"])

    def finish(self) -> None:
        self._looking.close()
        self._counting.close()
        self._store_routes()

    def _store_routes(self) -> None:
        self._run.keep(ROUTES_FILE, 0)
        self._run.append(ROUTES_FILE, *self._routes.rows())


class Seen:
    """What the layers of a model computed while `looking`: their gates, and the blocks they selected."""

    def __init__(self, model: Any, on: Sequence[bool] = (True, True, True)) -> None:
        """``on`` says which of the branches run."""
        self._attention = [layer.attention for layer in model.layers]
        self._on, self._layer = on, 0
        self._sums: dict[int, torch.Tensor] = {}
        self.blocks: dict[int, list[tuple[torch.Tensor, int]]] = defaultdict(list)
        """By layer, the calls' selected blocks ``(B,T,H,n)`` of SEQUENCES at most, and their first query."""

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at all forwards while this is open."""
        hooks = []
        for number, attention in enumerate(self._attention):
            hooks.append(attention.register_forward_pre_hook(self._entering(number)))
            hooks.append(attention.gate_out.register_forward_hook(self._gating(number, attention)))
        try:
            with selection_hook(self._selecting):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, number: int) -> Any:
        def entering(module: nn.Module, inputs: Any) -> None:
            self._layer = number

        return entering

    def _gating(self, number: int, attention: Any) -> Any:
        def gating(module: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
            sums = gate_sums(gates_of(attention, logits.detach()), self._on)
            self._sums[number] = sums + self._sums.get(number, 0)

        return gating

    def _selecting(self, chosen: torch.Tensor, q_start: int | torch.Tensor) -> torch.Tensor:
        self.blocks[self._layer].append((chosen[:SEQUENCES], int(q_start)))
        return chosen

    def gates(self) -> list[dict[str, Any]]:
        """A row of gates.csv for each layer."""
        return [
            {"layer": layer, **gate_health(sums, self._on).row()}
            for layer, sums in sorted(self._sums.items())
        ]

    def overlap(self) -> list[dict[str, Any]]:
        """A row of overlap.csv for each layer that selected."""
        rows = []
        for layer in sorted(self.blocks):
            found = shared(self.blocks[layer], self._attention[layer].config)
            figures = {"neighbour_overlap": found.neighbour_overlap, "union_blocks": found.union_blocks}
            rows.append({"layer": layer, **figures})
        return rows


def gates_of(attention: Any, logits: torch.Tensor) -> torch.Tensor:
    """The gates ``(B,T,HQ,3)`` that a layer makes of what its `gate_out` gives."""
    gates = logits.unflatten(-1, (attention.config.num_heads, len(GATED)))
    return gates.sigmoid() if attention.gate == "sigmoid" else gates.softmax(-1)


def shared(calls: Sequence[tuple[torch.Tensor, int]], config: NSAConfig) -> Sharing:
    """How far neighbouring queries agree, in calls of a layer: those that continue each other are one."""
    found, at = Sharing(), 0
    while at < len(calls):
        parts, start = [calls[at][0]], calls[at][1]
        end = start + parts[0].shape[1]
        while (at := at + 1) < len(calls) and calls[at][1] == end:
            parts.append(calls[at][0])
            end += parts[-1].shape[1]
        found += sharing(torch.cat(parts, 1), start, config)
    return found
