"""What is asked and who answers: a :class:`Case` is one question, the same for everyone; a :class:`Subject`
answers it with tensors, or refuses it with a reason. What is right is for the rules to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nsa import (
    NSAConfig,
)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

LAYER_DIM = 24
"""Width of the token stream of the layers that are verified."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """One question to a branch.

    Args:
        name: in a few words, e.g. ``S=65 G=3 dk=64 dv=32``.
        branch: ``cmp``, ``score``, ``sel``, ``win`` or ``layer``.
        config: heads and block geometry.
        dtype: ``fp64``, ``fp32``, ``fp16`` or ``bf16``.
        tensors: arguments of the branch's function in :mod:`nsa.reference` by name, on the CPU and in
            ``dtype`` (``block_indices`` are integers). A layer's are ``x (B,T,dim)``, or those of
            :func:`nsa.nsa_attention`.
        q_start: position of ``q[:, 0]``: an int, or ``(B,)``.
        kv_len: tokens that exist, for ``score``; ``max(q_start) + T`` when None.
        gradients: whether gradients of the floating tensors are asked for, and of a layer's parameters.
        upstream: gradient of the output, on the CPU and of its shape; None for a fixed normal one.
        layout: how the tensors lie in memory: ``""`` contiguous, else a name of ``LAYOUTS``.
    """

    name: str
    branch: str
    config: NSAConfig
    dtype: str
    tensors: Mapping[str, torch.Tensor]
    q_start: int | torch.Tensor = 0
    kv_len: int | None = None
    gradients: bool = False
    upstream: torch.Tensor | None = None
    layout: str = ""


@dataclass(frozen=True, eq=False)
class LayerCase(Case):
    """One question to a whole layer.

    Args:
        mode: ``attention`` (the tensors are those of :func:`nsa.nsa_attention`, gates included; no layer is
            built), ``batched`` (``x`` at once), ``chunked`` (``x`` in ``chunks`` through a cache; ones are
            token by token) or ``packed`` (``x`` holds sequences of ``chunks`` tokens).
        chunks: tokens of each chunk or packed sequence, in order.
        options: keyword arguments of :class:`nsa.NativeSparseAttention`.
        trained: whether its parameters are away from their special starting values.
        only: the one branch whose gate is open, ``cmp``, ``sel`` or ``win``; empty for gates as they are.
        blocks: attended in place of what the scores choose, ``(B,T,H,n)`` int32; None lets them choose.
    """

    mode: str = "batched"
    chunks: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True
    only: str = ""
    blocks: torch.Tensor | None = None


class Subject(Protocol):
    """Something to be verified. It raises whatever it raises: that is a failed case, never an abort."""

    @property
    def name(self) -> str:
        """Its column: ``sel:gather``, ``layer:auto``, ``fla-core 0.6.0 sel``."""

    @property
    def branch(self) -> str:
        """``cmp``, ``score``, ``sel``, ``win`` or ``layer``: the cases it is asked."""

    @property
    def backend(self) -> str:
        """As in the route table; a peer's short name."""

    @property
    def device(self) -> str:
        """Where it runs: ``cpu``, ``cuda``."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of ``DTYPES`` to ask it in; what it takes of them :meth:`refusal` says."""

    @property
    def ours(self) -> bool:
        """Whether a failure is ours: False for a peer."""

    def refusal(self, case: Case) -> str:
        """Why it cannot run the case, in words; empty where it can. Nothing runs."""

    def differs(self, rule: str) -> str:
        """How its semantics differ by declaration from the rule of that name; empty where it does not."""

    def run(self, case: Case) -> Tensors:
        """The answer, on any device.

        ``o (B,T,HQ,DV)`` (a layer's ``(B,T,dim)``) and, where it has one, ``lse (B,T,HQ)``; for ``score``
        ``blocks (B,T,H,n)`` in place of both. With ``case.gradients`` also ``d_<name>`` for each floating
        tensor. What is left out is not checked.
        """


def heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each head's tokens together in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a slice out of rows twice as long."""
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def channels_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the last axis outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, two sequences 2^31 elements apart in one buffer."""
    far = 2**31
    buffer = torch.empty(far + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, (far, *tensor[0].contiguous().stride())).copy_(tensor)


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first sequence in place of every one, without a copy."""
    return tensor[:1].expand_as(tensor)


LAYOUTS = {
    "heads first": heads_first,
    "sliced": sliced,
    "channels first": channels_first,
    "expanded": expanded,
    "2^31 apart": far_apart,
}


def placed(case: Case, device: str, dtype: torch.dtype | None = None) -> Tensors:
    """The case's tensors on ``device``, as they shall lie there; leaves of a graph where gradients are asked.

    ``dtype`` replaces that of the floating ones.
    """
    given: Tensors = {}
    for name, tensor in case.tensors.items():
        floating = tensor.is_floating_point()
        moved = tensor.detach().to(device=device, dtype=dtype if floating else None)
        if case.layout == "2^31 apart" and not name.startswith(("k", "v")):
            pass
        elif case.layout:
            moved = LAYOUTS[case.layout](moved)
        given[name] = moved.detach().requires_grad_(case.gradients and floating)
    return given


def start_on(case: Case, device: str) -> int | torch.Tensor:
    """``q_start`` on ``device``."""
    return case.q_start.to(device) if isinstance(case.q_start, torch.Tensor) else case.q_start


def upstream_of(case: Case, o: torch.Tensor) -> torch.Tensor:
    """The gradient of the output ``o``: the same numbers for everyone, rounded to the case's dtype."""
    given = case.upstream
    if given is None:
        given = torch.randn(o.shape, generator=torch.Generator().manual_seed(0))
    return given.to(DTYPES[case.dtype]).to(o)


def answer(case: Case, given: Mapping[str, torch.Tensor], o: torch.Tensor, **more: torch.Tensor) -> Tensors:
    """What :meth:`Subject.run` returns for the output ``o`` of the leaves ``given``: runs the backward.

    A leaf that takes no part has gradient 0.
    """
    found = {"o": o.detach(), **{name: tensor.detach() for name, tensor in more.items()}}
    if case.gradients:
        leaves = {name: leaf for name, leaf in given.items() if leaf.is_floating_point()}
        upstream = upstream_of(case, o)
        grads = torch.autograd.grad(o, list(leaves.values()), upstream, allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            found[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found
