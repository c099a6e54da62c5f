"""Dense causal attention, in any of its implementations, as something to measure NSA beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from nsa import reference
from nsabench.measure.profiling import profile, recorded
from nsabench.measure.stages import Hook
from nsabench.peers.dense import DenseAttention, DenseCache
from nsabench.peers.dense_kernels import Problem, family_of, kernel_for
from nsabench.plan import Cell
from nsabench.run.check import Inputs, Segment, Verdict, compare, segments_of
from nsabench.run.impl import Fields, Impl, Refused
from nsabench.run.impl_nsa import part_of
from nsabench.run.steps import Span
from nsabench.run.work import Work, count_dense_work

# Operators that everybody calls; what stands behind them is what was dispatched to.
_FRONTS = ("scaled_dot_product_attention",)


class Dense(Impl):
    """A layer of dense attention of the cell's heads and dims, through the kernel that the cell names.

    Of its stages only ``proj`` has a name; attention and cache are ``other``. The specification is sliding
    attention whose window holds every token.
    """

    leaves = ("q", "k", "v")

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.kernel = kernel_for(cell.impl)

    def prepare(self, spans: list[Span]) -> list[torch.Tensor]:
        """Nothing; Refused where the kernel cannot run, now also as the device itself says."""
        problem = self._problem(spans[-1])
        self._refuse(self.kernel.refusal(problem) or self.kernel.probe(problem))
        return []

    def layer(self) -> DenseAttention:
        cell = self.cell
        return DenseAttention(
            cell.dim,
            cell.heads,
            cell.groups,
            cell.dk,
            cell.dv,
            max_seq_len=cell.S,
            attend=self.kernel,
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
            tokens_first=self.kernel.tokens_first,
        )

    def forward(
        self, layer: DenseAttention, x: torch.Tensor, cache: DenseCache | None, route: str
    ) -> torch.Tensor:
        y: torch.Tensor = layer(x, cache)
        return y

    def attend(self, inputs: Inputs, route: str) -> torch.Tensor:
        return self.kernel(**inputs)

    def seen(self, whole: Inputs, span: Span, held: Inputs | None = None) -> Inputs:
        start, end = span
        first = whole["k"].shape[1] - whole["q"].shape[1]
        bounds = {"q": (start - first, end - first), "k": (0, end), "v": (0, end)}
        return {name: part_of(whole[name], a, b) for name, (a, b) in bounds.items()}

    def settle(self, route: str, spans: list[Span]) -> Fields:
        problem = self._problem(spans[-1])
        self._refuse(self.kernel.refusal(problem))
        return {"provider": self.kernel.provider(problem)}

    def _problem(self, span: Span) -> Problem:
        start, end = span
        cell = self.cell
        sizes = (cell.B, cell.heads, cell.groups, cell.dk, cell.dv, end - start, end)
        return Problem(self.device, self.dtype, *sizes, gradients=cell.passes != "fwd")

    @staticmethod
    def _refuse(why: str) -> None:
        if why:
            raise Refused("unsupported", why)

    def work(self, route: str, parameters: int) -> Work:
        return count_dense_work(self.cell, parameters)

    def check(self, inputs: Inputs, span: Span, route: str, *, gradients: bool, elements: int) -> Verdict:
        (batch, rows, heads), length = inputs["q"].shape[:3], inputs["k"].shape[1]
        segments = segments_of(rows, elements // (batch * heads * length), {0, rows // 2, rows})
        everything = replace(self.config, window_size=length)
        ran: list[str] = []

        def attend(given: Inputs) -> torch.Tensor:
            with profile() as profiler:
                out = self.kernel(**given)
            ran.extend(event.name().removeprefix("aten::") for event in recorded(profiler).events())
            return out

        def specify(given: Inputs, segment: Segment) -> torch.Tensor:
            a, b = segment
            q, start = given["q"][:, a:b], length - rows + a
            return reference.sliding_attention(q, given["k"], given["v"], everything, q_start=start)[0]

        found = compare(inputs, segments, attend, specify, self.leaves if gradients else ())
        seen = [name for name in dict.fromkeys(ran) if _attends(name)]
        other = self.kernel.fell_back(seen)
        if other:
            raise Refused("invalid", f"fell back: requested {self.cell.impl}, ran {other}")
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


def _attends(operator: str) -> bool:
    return operator not in _FRONTS and ("attention" in operator or bool(family_of(operator)))
