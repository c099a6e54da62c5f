"""Dense causal attention as something to measure NSA beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from nsa import reference
from nsabench.measure.profiling import operators, profile
from nsabench.measure.stages import Hook
from nsabench.peers.dense import DenseAttention, DenseCache, dense_attention
from nsabench.run.check import Inputs, Segment, Verdict, compare, segments_of
from nsabench.run.impl import Fields, Impl
from nsabench.run.impl_nsa import part_of
from nsabench.run.steps import Span
from nsabench.run.work import Work, count_dense_work

_ATTENTION = "attention"


class Dense(Impl):
    """A layer of dense attention of the cell's heads and dims, and its call of torch's SDPA.

    Of its stages only ``proj`` has a name; attention and cache are ``other``. The specification is sliding
    attention whose window holds every token.
    """

    leaves = ("q", "k", "v")

    def layer(self) -> DenseAttention:
        cell = self.cell
        return DenseAttention(
            cell.dim,
            cell.heads,
            cell.groups,
            cell.dk,
            cell.dv,
            max_seq_len=cell.S,
            dtype=self.dtype,
            device=self.device,
        )

    def cache(self, *, keep_graph: bool = False) -> DenseCache:
        cell = self.cell
        return DenseCache(
            cell.B,
            cell.S,
            cell.groups,
            cell.dk,
            cell.dv,
            dtype=self.dtype,
            device=self.device,
            keep_graph=keep_graph,
        )

    def forward(
        self, layer: DenseAttention, x: torch.Tensor, cache: DenseCache | None, route: str
    ) -> torch.Tensor:
        y: torch.Tensor = layer(x, cache)
        return y

    def attend(self, inputs: Inputs, route: str) -> torch.Tensor:
        return dense_attention(**inputs)

    def seen(self, whole: Inputs, span: Span, held: Inputs | None = None) -> Inputs:
        start, end = span
        first = whole["k"].shape[1] - whole["q"].shape[1]
        bounds = {"q": (start - first, end - first), "k": (0, end), "v": (0, end)}
        return {name: part_of(whole[name], a, b) for name, (a, b) in bounds.items()}

    def settle(self, route: str, spans: list[Span]) -> Fields:
        return {"provider": f"torch {torch.__version__} scaled_dot_product_attention"}

    def work(self, route: str, parameters: int) -> Work:
        return count_dense_work(self.cell, parameters)

    def check(self, inputs: Inputs, span: Span, route: str, *, gradients: bool, elements: int) -> Verdict:
        (batch, rows, heads), length = inputs["q"].shape[:3], inputs["k"].shape[1]
        segments = segments_of(rows, elements // (batch * heads * length), {0, rows // 2, rows})
        everything = replace(self.config, window_size=length)
        ran: list[str] = []

        def attend(given: Inputs) -> torch.Tensor:
            with profile() as profiler:
                out = dense_attention(**given)
            ran.extend(name for name in operators(profiler) if _ATTENTION in name)
            return out

        def specify(given: Inputs, segment: Segment) -> torch.Tensor:
            a, b = segment
            q, start = given["q"][:, a:b], length - rows + a
            return reference.sliding_attention(q, given["k"], given["v"], everything, q_start=start)[0]

        found = compare(inputs, segments, attend, specify, self.leaves if gradients else ())
        # What SDPA dispatched to stands behind the operator that everybody calls.
        seen = [name for name in dict.fromkeys(ran) if name != "scaled_dot_product_attention"]
        return replace(found, proof="operators: " + ", ".join(seen) if seen else "")

    def hook(self, layer: DenseAttention | None) -> Hook | None:
        if layer is None:
            return None

        @contextmanager
        def staged(factory: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
            before, layer.stage = layer.stage, factory
            try:
                yield
            finally:
                layer.stage = before

        return staged

    def cache_bytes(self, cache: DenseCache) -> dict[str, int]:
        return {"kv": cache.bytes()}
