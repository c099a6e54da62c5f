"""Another implementation of NSA as something to measure beside ours: the same inputs, the same check."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from nsa.routes import Request, Routing
from nsabench.measure.stages import Hook
from nsabench.measure.trace import observe, short_name
from nsabench.peers.core import attend
from nsabench.peers.registry import timed
from nsabench.plan import Cell
from nsabench.run.check import ATTENDING, Inputs, Verdict, check_branches
from nsabench.run.impl import Fields, Refused
from nsabench.run.impl_nsa import Nsa
from nsabench.run.selection_file import unusable
from nsabench.run.steps import Span

ONLY = {"phase": "prefill", "passes": "fwd", "scope": "core", "mode": "batched"}
"""What of a cell a peer is timed in."""

_TORCH = r"aten::|at::|cuda|Mem(cpy|set)|^detach_?$"

Stage = Callable[[str], AbstractContextManager[object]]


class PeerNsa(Nsa):
    """The core of a peer. Inputs, selection and work are those of :class:`Nsa`; a route says which branches
    are off. What it computes is held against the same specification, its choice of blocks too.
    """

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.peer = timed()[cell.impl]
        self.core = self.peer.core(cell.impl)
        self._stage: Stage = _no_stage
        self._lists: dict[int, torch.Tensor] = {}

    def prepare(self, spans: list[Span]) -> list[torch.Tensor]:
        """Blocks to attend in the peer's form too; Refused where the cell is none for peers."""
        self._refuse_cell()
        own = super().prepare(spans)
        self._lists = {at: self.core.lists_of(blocks, self.config) for at, blocks in self._blocks.items()}
        return [*own, *self._lists.values()]

    def forward(self, layer: Any, x: torch.Tensor, cache: Any, route: str) -> torch.Tensor:
        raise NotImplementedError("a peer's layer is not measured, only its core")

    def attend(self, inputs: Inputs, route: str) -> torch.Tensor:
        return self._attend(inputs, route)[0]

    def settle(self, route: str, spans: list[Span]) -> Fields:
        """Its version, and the peer's name as the backend of each branch that runs."""
        self._refuse_cell()
        branches = _branches(route)
        asked = [*branches, "score"] if "sel" in branches else branches
        why = self.core.refuse(self._request(spans[-1]), asked)
        if not why and not self._does_no_more(branches):
            why = "chooses blocks only with its compressed branch, which would be timed too; leave cmp on"
        if why:
            raise Refused("unsupported", f"{self._name}: {why}")
        fields: Fields = {f"{b}_backend": self._name if b in asked else "off" for b in (*ATTENDING, "score")}
        return fields | {"route_proof": "resolved", "provider": f"{self._name} {self.peer.version()}"}

    def check(self, inputs: Inputs, span: Span, route: str, *, gradients: bool, elements: int) -> Verdict:
        with torch.no_grad():
            lists = self._attend(inputs, route)[1]
        batch = inputs["q"].shape[0]
        chosen = None if lists is None else self.core.blocks_of(lists, batch, self.config)
        seen: dict[str, tuple[str, ...]] = {}

        def observed(given: Inputs) -> torch.Tensor:
            out, names = observe(lambda: self.attend(given, route), self._staged, self.device)
            seen.update(names or {})
            return out

        found = check_branches(
            inputs,
            observed,
            _branches(route),
            chosen,
            self.config,
            elements=elements,
            blocks=self._blocks.get(span[0]),
        )
        return replace(found, proof=_proof(seen))

    def alone(self, route: str) -> dict[str, str]:
        return {
            branch: ",".join(f"{other}=off" for other in ATTENDING if other != branch)
            for branch in _branches(route)
            if self._does_no_more([branch])
        }

    def hook(self, layer: object | None) -> Hook | None:
        return self._staged

    @contextmanager
    def _staged(self, factory: Stage) -> Iterator[None]:
        before, self._stage = self._stage, factory
        try:
            yield
        finally:
            self._stage = before

    @property
    def _name(self) -> str:
        return self.cell.impl.partition(":")[2]

    def _does_no_more(self, branches: Collection[str]) -> bool:
        """Whether it computes these branches and nothing of another."""
        return self.core.chooses_alone or "sel" not in branches or "cmp" in branches

    def _attend(self, inputs: Inputs, route: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        lists = self._lists.get(int(inputs["q_start"]))
        return attend(self.core, _branches(route), inputs, self.config, lists=lists, stage=self._stage)

    def _request(self, span: Span) -> Request:
        start, end = span
        sizes = {"num_queries": end - start, "kv_len": end}
        return Request(self.device.type, self.dtype, **sizes, needs_grad=False, config=self.config)

    def _refuse_cell(self) -> None:
        for field, only in ONLY.items():
            got = getattr(self.cell, field)
            if got != only:
                asked = " ".join(ONLY[name] for name in ("mode", "phase", "passes", "scope"))
                raise Refused("unsupported", f"a peer is timed in {asked} only: {field} is {got}")
        if self.peer.version() is None:
            raise Refused("unsupported", f"{self.peer.name} is not installed: {self.peer.get}")
        if why := unusable(self.cell):
            raise Refused("unsupported", why)


def _no_stage(name: str) -> AbstractContextManager[object]:
    return nullcontext()


def _branches(route: str) -> list[str]:
    """What a route leaves on, of cmp, sel and win."""
    routing = Routing.parse(route)
    return [branch for branch in ATTENDING if getattr(routing, branch) != "off"]


def _proof(seen: dict[str, tuple[str, ...]]) -> str:
    """What ran in each branch besides torch's own operators and kernels; empty where nothing did."""
    told = []
    for branch in ("cmp", "score", "sel", "win"):
        names = [name for name in seen.get(branch, ()) if not re.search(_TORCH, name)]
        if names:
            shown = list(dict.fromkeys(short_name(name) for name in names))
            told.append(f"{branch}: {', '.join(shown[:4])}")
    return "; ".join(told)
