"""Native Sparse Attention as something to measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from nsa import KVCache, NativeSparseAttention, Routing, UnsupportedRoute, nsa_attention, stage_hook
from nsa.blocks import num_compressed_blocks, window_start
from nsa.routes import BRANCHES, Route
from nsabench.measure.stages import Hook
from nsabench.plan import PlanError
from nsabench.run.check import ATTENDING, GRADIENTS, Inputs, Verdict, check_arm
from nsabench.run.impl import Fields, Impl, Refused
from nsabench.run.selection import attending, blocks_of
from nsabench.run.selection_file import unusable
from nsabench.run.steps import Span, route_at
from nsabench.run.work import Work, count_work


class Nsa(Impl):
    """The layer ``NativeSparseAttention`` and the function ``nsa_attention``, by any route."""

    leaves = GRADIENTS
    _blocks: Mapping[int, torch.Tensor] = MappingProxyType({})

    def prepare(self, spans: list[Span]) -> list[torch.Tensor]:
        """The blocks to attend, where the scores do not decide; Refused for a file that is none."""
        try:
            self._blocks = blocks_of(self.cell, spans)
        except PlanError as error:
            raise Refused("error", str(error)) from None
        return list(self._blocks.values())

    def layer(self) -> NativeSparseAttention:
        return NativeSparseAttention(self.config, self.cell.dim).to(device=self.device, dtype=self.dtype)

    def cache(self, *, keep_graph: bool = False) -> KVCache:
        cell = self.cell
        return KVCache(
            self.config, cell.B, cell.S, dtype=self.dtype, device=self.device, keep_graph=keep_graph
        )

    def forward(
        self, layer: NativeSparseAttention, x: torch.Tensor, cache: KVCache | None, route: str
    ) -> torch.Tensor:
        with attending(self._blocks):
            y: torch.Tensor = layer(x, cache, route)
        return y

    def attend(self, inputs: Inputs, route: str) -> torch.Tensor:
        with attending(self._blocks):
            return nsa_attention(**inputs, config=self.config, routing=route)

    def seen(self, whole: Inputs, span: Span, held: Inputs | None = None) -> Inputs:
        start, end = span
        first = whole["k_sel"].shape[1] - whole["q"].shape[1]
        window = window_start(start, self.config) if held is None else held["win_start"]
        blocks = num_compressed_blocks(end, self.config)
        bounds = {
            **dict.fromkeys(("q", "gates"), (start - first, end - first)),
            **dict.fromkeys(("k_cmp", "v_cmp"), (0, blocks)),
            **dict.fromkeys(("k_sel", "v_sel"), (0, end)),
            **dict.fromkeys(("k_win", "v_win"), (window, end)),
        }
        parts = {name: part_of(whole[name], a, b) for name, (a, b) in bounds.items()}
        return {**parts, "q_start": start, "win_start": window}

    def settle(self, route: str, spans: list[Span]) -> Fields:
        """What runs in each call of the step. Where that differs, a branch's backends are joined by ``+``."""
        try:
            routes = [self._route(route, span) for span in spans]
        except UnsupportedRoute as error:
            raise Refused("unsupported", str(error)) from None
        if why := unusable(self.cell):
            raise Refused("unsupported", why)
        fields: Fields = {}
        for branch in BRANCHES:
            fields[f"{branch}_backend"] = "+".join(dict.fromkeys(r.backend(branch) for r in routes))
        libraries = {r.provider(branch) for r in routes for branch in BRANCHES}
        provider = ", ".join(sorted(library for library in libraries if library))
        return fields | {"route_proof": "resolved", "provider": provider}

    def work(self, route: str, parameters: int) -> Work:
        routing = Routing.parse(route)
        active = tuple(branch for branch in ATTENDING if getattr(routing, branch) != "off")
        return count_work(self.cell, active, parameters)

    def check(self, inputs: Inputs, span: Span, route: str, *, gradients: bool, elements: int) -> Verdict:
        settled = self._route(route, span)
        found = check_arm(
            inputs,
            settled,
            route,
            self.config,
            gradients=gradients,
            elements=elements,
            blocks=self._blocks.get(span[0]),
        )
        if found.fell_back and not found.reason:
            raise Refused("invalid", found.fell_back)
        return found

    def alone(self, route: str) -> dict[str, str]:
        routing, found = Routing.parse(route), {}
        for branch in ATTENDING:
            if getattr(routing, branch) == "off":
                continue
            only = [f"{b}={getattr(routing, b) if b == branch else 'off'}" for b in ATTENDING]
            found[branch] = ",".join([*only, f"score={routing.score}"] if branch == "sel" else only)
        return found

    def hook(self, layer: object | None) -> Hook | None:
        return stage_hook

    def cache_bytes(self, cache: KVCache) -> dict[str, int]:
        return cache.bytes_per_branch()

    def _route(self, route: str, span: Span) -> Route:
        return route_at(replace(self.cell, route=route), span)


def part_of(t: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Tokens ``[start, end)``; the tensor itself where that is all: a slice costs a copy in a backward."""
    return t if (start, end) == (0, t.shape[1]) else t[:, start:end]
