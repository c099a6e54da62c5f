"""Our own subjects: each row of the route table, and the whole layer by each route."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nsa import (
    KVCache,
    NativeSparseAttention,
    Routing,
    UnsupportedRoute,
    nsa_attention,
    routes,
    selection_hook,
)
from nsa.routes import Request, Row
from nsabench.plan.checks import BRANCHES, Choice
from nsabench.verify.subjects import (
    DTYPES,
    LAYER_DIM,
    Case,
    LayerCase,
    Subject,
    Tensors,
    answer,
    placed,
    start_on,
)


@dataclass(frozen=True)
class RouteSubject:
    """A row of the route table."""

    row: Row
    device: str
    ours: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)

    @property
    def name(self) -> str:
        return f"{self.row.branch}:{self.row.backend}"

    @property
    def branch(self) -> str:
        return self.row.branch

    @property
    def backend(self) -> str:
        return self.row.backend

    def refusal(self, case: Case) -> str:
        """The table's own reason."""
        asked = Request(
            device=torch.device(self.device).type,
            dtype=DTYPES[case.dtype],
            num_queries=case.tensors["q"].shape[1],
            kv_len=_tokens(case),
            needs_grad=case.gradients,
            config=case.config,
        )
        return routes.refusal(self.row, asked) or ""

    def differs(self, rule: str) -> str:
        """Nowhere."""
        return ""

    def run(self, case: Case) -> Tensors:
        return run_function(self.row.load(), case, self.device)


def run_function(function: Any, case: Case, device: str, dtype: torch.dtype | None = None) -> Tensors:
    """The answer of a function with the signature that the branch has in :mod:`nsa.reference`."""
    given = placed(case, device, dtype)
    where: dict[str, Any] = {"config": case.config, "q_start": start_on(case, device)}
    if case.branch == "score":
        return {"blocks": function(**given, **where, kv_len=case.kv_len)}
    with nullcontext() if case.gradients else torch.no_grad():
        o, lse = function(**given, **where)
    return answer(case, given, o, lse=lse)


def _tokens(case: Case) -> int:
    """Tokens that exist: the keys given, or those that the compressed blocks cover."""
    if "k" in case.tensors:
        return case.tensors["k"].shape[1]
    if case.kv_len is not None:
        return case.kv_len
    last = int(torch.as_tensor(case.q_start).max())
    return last + case.tensors["q"].shape[1]


@dataclass(frozen=True)
class LayerSubject:
    """The whole layer by one route: ``auto``, or a backend for every branch it has a row for."""

    backend: str
    device: str
    ours: bool = True
    branch: str = "layer"
    dtypes: tuple[str, ...] = tuple(DTYPES)

    @property
    def name(self) -> str:
        return f"layer:{self.backend}"

    def refusal(self, case: Case) -> str:
        """The table's own reasons, one a branch."""
        first = case.tensors["x"] if "x" in case.tensors else case.tensors["q"]
        asked = Request(
            device=torch.device(self.device).type,
            dtype=DTYPES[case.dtype],
            num_queries=first.shape[1],
            kv_len=first.shape[1],
            needs_grad=case.gradients,
            config=case.config,
        )
        try:
            routes.resolve(self.backend, asked)
        except UnsupportedRoute as refused:
            return str(refused)
        return ""

    def differs(self, rule: str) -> str:
        """Nowhere."""
        return ""

    def run(self, case: Case) -> Tensors:
        assert isinstance(case, LayerCase)
        return run_layer(case, self.device, self.backend)


def build_layer(case: LayerCase, device: str, dtype: torch.dtype | None = None) -> NativeSparseAttention:
    """The case's layer: always the same weights, rounded to the case's dtype and then kept in ``dtype``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = NativeSparseAttention(case.config, LAYER_DIM, **case.options)
        with torch.no_grad():
            for parameter in layer.parameters() if case.trained else ():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if case.only:
        with torch.no_grad():
            layer.gate_out.weight.zero_()
            closed = [1e4 if branch == case.only else -1e4 for branch in ("cmp", "sel", "win")]
            layer.gate_out.bias.view(-1, 3).copy_(torch.tensor(closed))
    rounded = layer.to(DTYPES[case.dtype])
    return rounded.to(device=device, dtype=dtype)


def run_layer(
    case: LayerCase, device: str, routing: str | Routing, dtype: torch.dtype | None = None
) -> Tensors:
    """What a layer gives by ``routing``. ``blocks`` of the answer are those that it attended."""
    given: dict[str, Any] = placed(case, device, dtype)
    seen: list[torch.Tensor] = []

    def keep(chosen: torch.Tensor, q_start: int | torch.Tensor) -> torch.Tensor:
        seen.append(chosen.detach())
        return chosen

    blocks = None if case.blocks is None else case.blocks.to(device)
    with selection_hook(keep), nullcontext() if case.gradients else torch.no_grad():
        if case.mode == "attention":
            start = start_on(case, device)
            where: dict[str, Any] = {"config": case.config, "q_start": start, "block_indices": blocks}
            o = nsa_attention(**given, **where, routing=routing)
        else:
            layer = build_layer(case, device, dtype)
            o = _layer_output(layer, case, given["x"], routing, blocks)
            given |= dict(layer.named_parameters())
    return answer(case, given, o, **({"blocks": torch.cat(seen, 1)} if seen else {}))


def _layer_output(
    layer: NativeSparseAttention,
    case: LayerCase,
    x: torch.Tensor,
    routing: str | Routing,
    blocks: torch.Tensor | None,
) -> torch.Tensor:
    if case.mode == "batched":
        return layer(x, routing=routing, block_indices=blocks)
    if case.mode == "packed":
        ends = torch.tensor([0, *case.chunks]).cumsum(0)
        return layer(x, routing=routing, cu_seqlens=ends, block_indices=blocks)
    cache = KVCache(
        case.config, x.shape[0], x.shape[1], dtype=x.dtype, device=x.device,
        shared_kv=layer.shared_kv, keep_graph=case.gradients,
    )  # fmt: skip
    given = [None] * len(case.chunks) if blocks is None else list(blocks.split(list(case.chunks), 1))
    parts = zip(x.split(list(case.chunks), 1), given, strict=True)
    return torch.cat([layer(part, cache, routing, block_indices=some) for part, some in parts], 1)


def our_subjects(device: str) -> list[Subject]:
    """A subject for each row of the route table, in its order within each branch, then the layers."""
    rows: list[Subject] = [
        RouteSubject(row, device) for branch in BRANCHES for row in routes.TABLE if row.branch == branch
    ]
    return [*rows, *(LayerSubject(backend, device) for backend in ("auto", *routes.backends()))]


def subjects_for(choice: Choice, peers: Sequence[Subject] = ()) -> list[Subject]:
    """The subjects that a choice asks for: all, or those it names by name, branch or backend.

    PlanError for a name that fits none.
    """
    found = [*our_subjects(choice.device), *peers]
    return [found[i] for i in choice.pick([(s.name, s.branch, s.backend) for s in found])]
