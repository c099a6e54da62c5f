"""The implementations of dense causal attention, by name, and what each of them offers.

A file is imported when its name is asked for; nothing is tried in the place of anything else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Self

import torch

KERNELS = {
    "dense": "dense_sdpa:CHOSEN",
    "dense:flash": "dense_sdpa:FLASH",
    "dense:cudnn": "dense_sdpa:CUDNN",
    "dense:efficient": "dense_sdpa:EFFICIENT",
    "dense:math": "dense_sdpa:MATH",
    "dense:flex": "dense_flex:FLEX",
    "dense:fa2": "dense_flash:FA2",
    "dense:fa3": "dense_flash:FA3",
    "dense:fa4": "dense_flash:FA4",
}
"""By name, the file of this folder and its object there."""

HALVES = (torch.float16, torch.bfloat16)
PROBE_KEYS = 16
"""Tokens of the little call that shows whether a kernel runs."""

_FAMILIES = {
    "efficient": ("efficient_attention",),
    "cudnn": ("cudnn_attention",),
    "math": ("attention_math",),
    "flex": ("flex_attention", "FlexAttention"),
    "fa3": ("flash_attn_3",),
    "flash": ("flash_attention", "flash_attn", "_varlen_attn"),
}
"""Parts of the names of operators by which they are known, the more telling ones first."""


@dataclass(frozen=True)
class Problem:
    """What is to be attended: ``queries`` of the last of ``length`` tokens, sizes as in the paper."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    queries: int
    length: int
    gradients: bool

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


class DenseKernel(ABC):
    """One way to compute dense causal attention; called as :class:`nsabench.peers.dense.Attend`."""

    name: str
    families: tuple[str, ...] = ()
    """What may be seen to run; nothing else may. Empty where torch picks."""
    shows: bool = True
    """Whether an operator of these families must be seen: not every library has one."""
    tokens_first: bool = False
    """The order of a KV cache that it reads without a copy."""

    @abstractmethod
    def refusal(self, problem: Problem) -> str:
        """Why it cannot run, from the device's kind, dtype, sizes and what is installed; else empty.

        Neither a device nor a library is touched.
        """

    @abstractmethod
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def provider(self, problem: Problem) -> str:
        """Library and version, and what is done to the tensors that the kernel would not take."""

    def __deepcopy__(self, memo: object) -> Self:
        """A copied layer calls the same kernel: there are no tensors in it."""
        return self

    def probe(self, problem: Problem) -> str:
        """Why it does not run on this very device, asked there with a little call; else empty."""
        try:
            self(*probe_tensors(problem))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a library says no with
            return f"{self.name} does not run here: {first_line(error)}"
        return ""

    def fell_back(self, ran: Sequence[str]) -> str:
        """What ran instead, of the attention operators seen; empty where only this kernel did."""
        if not self.families:
            return ""
        others = [name for name in ran if (found := family_of(name)) and found not in self.families]
        if others or not self.shows or any(family_of(name) in self.families for name in ran):
            return ", ".join(others)
        return "no operator that is known for it"


def kernel_for(name: str) -> DenseKernel:
    """The implementation of that name, imported now."""
    module, attribute = KERNELS[name].split(":")
    made: DenseKernel = getattr(import_module(f"nsabench.peers.{module}"), attribute)
    return made


def family_of(operator: str) -> str:
    """The kind of attention kernel that an operator's name stands for; empty for other operators."""
    return next((name for name, parts in _FAMILIES.items() if any(p in operator for p in parts)), "")


def probe_tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of the problem's dtype, heads and dims, but few tokens of one sequence."""
    keys = min(problem.length, PROBE_KEYS)
    queries = keys if problem.queries == problem.length else 1 if problem.queries == 1 else keys // 2
    options: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
    q = torch.zeros(1, max(1, queries), problem.heads, problem.key_dim, **options)
    k = torch.zeros(1, keys, problem.kv_heads, problem.key_dim, **options)
    v = torch.zeros(1, keys, problem.kv_heads, problem.value_dim, **options)
    return q, k, v


def changes_text(problem: Problem, *, repeated: bool = False, width: int = 0) -> str:
    """What is done to the tensors, to follow the library's name: KV heads repeated for each query head, dims
    padded to ``width``.
    """
    found = []
    if repeated and problem.group > 1 and problem.queries > 1:
        found.append(f"KV heads repeated {problem.group} times")
    for what, dim in (("keys", problem.key_dim), ("values", problem.value_dim)):
        if dim < width:
            found.append(f"{what} padded from {dim} to {width} channels")
    return "".join(f"; {text}" for text in found)


def torch_version() -> str:
    """``torch 2.13.0``."""
    return f"torch {torch.__version__}"


def dtype_word(dtype: torch.dtype) -> str:
    """``fp32`` and the like."""
    return {torch.float64: "fp64", torch.float32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
