"""What an implementation must offer to be measured: a layer, its attention, its cache, and what is right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

from nsabench.measure.stages import Hook
from nsabench.plan import BASELINES, PEERS, Cell, PlanError, nearest
from nsabench.run.check import Inputs, Verdict
from nsabench.run.steps import DTYPES, Span
from nsabench.run.work import Work, config_of

Fields = dict[str, Any]
"""Columns of a row."""


class Refused(Exception):
    """An arm that is not measured: its status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Cache(Protocol):
    """A KV cache of one layer, filled token by token."""

    length: int

    def checkpoint(self) -> Any: ...

    def rollback(self, state: Any) -> None: ...

    def reset(self) -> None: ...


class Layer(Protocol):
    """An attention layer: ``attention_inputs(x (B,T,dim), cache)`` are the arguments of its attention, and
    ``out`` takes its heads' values ``(B,T,HQ*DV)`` back to the stream.
    """

    out: Callable[[torch.Tensor], torch.Tensor]

    def attention_inputs(self, x: torch.Tensor, cache: Any = None) -> Inputs: ...


class Impl(ABC):
    """An implementation at the shape of a cell. It keeps no tensors but those of ``prepare``: all others are
    the workload's.

    ``leaves`` are the arguments of the attention that get gradients. ``route`` is text of the route table;
    an implementation without routes takes any.
    """

    leaves: tuple[str, ...]

    def __init__(self, cell: Cell) -> None:
        self.cell, self.config = cell, config_of(cell)
        self.device, self.dtype = torch.device(cell.device), DTYPES[cell.dtype]

    def prepare(self, spans: list[Span]) -> list[torch.Tensor]:
        """Make what calls for ``spans`` need besides tokens; the tensors that it keeps for that."""
        return []

    @abstractmethod
    def layer(self) -> Any:
        """A layer with random weights, from torch's global generator."""

    @abstractmethod
    def cache(self, *, keep_graph: bool = False) -> Any:
        """An empty cache for the cell's S tokens."""

    @abstractmethod
    def forward(self, layer: Any, x: torch.Tensor, cache: Any, route: str) -> torch.Tensor:
        """The layer's output for ``x``, which continues what the cache holds."""

    @abstractmethod
    def attend(self, inputs: Inputs, route: str) -> torch.Tensor:
        """The attention alone: ``(B,T,HQ,DV)``."""

    @abstractmethod
    def seen(self, whole: Inputs, span: Span, held: Inputs | None = None) -> Inputs:
        """The part of ``whole``, the arguments for a prompt, that the tokens of ``span`` see.

        Queries of ``whole`` may begin later than its keys: both end together. ``held`` are the same tokens'
        arguments from a cache, which may keep more of the past than needed.
        """

    @abstractmethod
    def settle(self, route: str, spans: list[Span]) -> Fields:
        """Columns that say what will run; Refused where nothing can."""

    @abstractmethod
    def work(self, route: str, parameters: int) -> Work:
        """What one step must do, in a layer of so many weights."""

    @abstractmethod
    def check(self, inputs: Inputs, span: Span, route: str, *, gradients: bool, elements: int) -> Verdict:
        """The attention of ``span`` against its specification."""

    def alone(self, route: str) -> dict[str, str]:
        """By branch, the route that does only that branch's work; empty without branches."""
        return {}

    def hook(self, layer: Any | None) -> Hook | None:
        """What shows the stages of a step of ``layer``, or of the attention alone; None without stages."""
        return None

    @abstractmethod
    def cache_bytes(self, cache: Any) -> dict[str, int]:
        """Bytes by branch, or by whatever the cache consists of."""


IMPLS = {
    "nsa": "nsabench.run.impl_nsa:Nsa",
    **dict.fromkeys(BASELINES, "nsabench.run.impl_dense:Dense"),
    **dict.fromkeys(PEERS, "nsabench.run.impl_peer:PeerNsa"),
}


def impl_for(cell: Cell) -> Impl:
    """The implementation a cell names, imported now; PlanError for an unknown one."""
    if cell.impl not in IMPLS:
        raise PlanError(f"impl is {cell.impl!r}; {nearest(cell.impl, IMPLS)}")
    module, name = IMPLS[cell.impl].split(":")
    made: Impl = getattr(import_module(module), name)(cell)
    return made
