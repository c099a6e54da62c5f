"""Dense attention through torch's ``scaled_dot_product_attention``: what it picks by itself, and each of its
kernels with no other allowed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsabench.peers.dense import causal_sdpa, dense_attention
from nsabench.peers.dense_kernels import (
    HALVES,
    DenseKernel,
    Problem,
    changes_text,
    dtype_word,
    first_line,
    probe_tensors,
    torch_version,
)

# What torch adds to a reason: where in its sources, and which kernels were not asked for.
_ASIDE = re.compile(r"\s*\((Triggered internally|function) .*")
_NO_REASON = ("not used because", "runtime disabled", "disabled at runtime")


class Chosen(DenseKernel):
    """Whichever kernel torch picks."""

    name = "dense"

    def refusal(self, problem: Problem) -> str:
        return ""

    def probe(self, problem: Problem) -> str:
        return ""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return dense_attention(q, k, v)

    def provider(self, problem: Problem) -> str:
        repeated = problem.device.type != "cpu" and problem.dtype not in HALVES
        changes = changes_text(problem, repeated=repeated, width=max(problem.key_dim, problem.value_dim))
        return f"{torch_version()} scaled_dot_product_attention{changes}"


@dataclass(frozen=True)
class Forced(DenseKernel):
    """One of torch's kernels, the only one enabled. ``gpu_only``: there is none for a CPU; ``halves_only``:
    on a GPU it takes fp16 and bf16; ``grouped`` and ``one_width`` as in :func:`causal_sdpa`; ``can_use``:
    torch's own word on a GPU.
    """

    name: str
    backend: SDPBackend
    can_use: Callable[[SDPAParams, bool], bool] | None
    gpu_only: bool
    halves_only: bool
    grouped: bool
    one_width: bool

    @property
    def kind(self) -> str:
        """The part of the name after the colon."""
        return self.name.partition(":")[2]

    @property
    def families(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.kind,)

    def refusal(self, problem: Problem) -> str:
        device = problem.device.type
        if device == "cpu" and self.gpu_only:
            return f"torch's {self.kind} kernel runs on cuda, not on {device}"
        if device == "cuda" and self.halves_only and problem.dtype not in HALVES:
            return f"torch's {self.kind} kernel takes fp16 and bf16, not {dtype_word(problem.dtype)}"
        return ""

    def probe(self, problem: Problem) -> str:
        """As torch's own check says of the shape, and a little call."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                self(*probe_tensors(problem))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                why = _reason([str(one.message) for one in said]) or first_line(error)
                return f"torch's {self.kind} kernel does not run here: {why}"
        if self.can_use is not None and _on_gpu(problem):
            with sdpa_kernel(self.backend):
                if not self.can_use(self._parameters(problem), False):
                    return f"torch's {self.kind} kernel does not take this shape, torch says"
        return ""

    def _parameters(self, problem: Problem) -> SDPAParams:
        """The call of :func:`causal_sdpa` as torch's check wants it. The tensors have the sizes of the true
        ones and the memory of one row.
        """
        step = problem.queries == 1
        rows, q_heads = (problem.group, problem.kv_heads) if step else (problem.queries, problem.heads)
        heads = problem.kv_heads if self.grouped or step else problem.heads
        width = max(problem.key_dim, problem.value_dim) if self.one_width else 0

        def row(heads: int, tokens: int, dim: int) -> torch.Tensor:
            one = torch.empty(max(dim, width), dtype=problem.dtype, device=problem.device)
            return one.expand(problem.batch, heads, tokens, -1)

        q = row(q_heads, rows, problem.key_dim).requires_grad_(problem.gradients)
        k, v = (row(heads, problem.length, dim) for dim in (problem.key_dim, problem.value_dim))
        square = problem.queries == problem.length and not step
        return SDPAParams(q, k, v, None, 0.0, square, q_heads != heads)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(self.backend):
            return causal_sdpa(q, k, v, grouped=self.grouped, one_width=self.one_width)

    def provider(self, problem: Problem) -> str:
        width = max(problem.key_dim, problem.value_dim) if self.one_width else 0
        changes = changes_text(problem, repeated=not self.grouped, width=width)
        return f"{torch_version()} scaled_dot_product_attention, {self.kind} only{changes}"


def _on_gpu(problem: Problem) -> bool:
    return problem.device.type == "cuda"


def _reason(said: list[str]) -> str:
    """The reasons that torch gives in its warnings, less those that are none."""
    reasons = [_ASIDE.sub("", text).strip().rstrip(".") for text in said]
    return "; ".join(dict.fromkeys(r for r in reasons if r and not any(no in r for no in _NO_REASON)))


CHOSEN = Chosen()
FLASH = Forced(
    "dense:flash",
    SDPBackend.FLASH_ATTENTION,
    can_use_flash_attention,
    gpu_only=False,
    halves_only=True,
    grouped=True,
    one_width=True,
)
CUDNN = Forced(
    "dense:cudnn",
    SDPBackend.CUDNN_ATTENTION,
    can_use_cudnn_attention,
    gpu_only=True,
    halves_only=True,
    grouped=True,
    one_width=False,
)
EFFICIENT = Forced(
    "dense:efficient",
    SDPBackend.EFFICIENT_ATTENTION,
    can_use_efficient_attention,
    gpu_only=True,
    halves_only=False,
    grouped=False,
    one_width=False,
)
MATH = Forced(
    "dense:math", SDPBackend.MATH, None, gpu_only=False, halves_only=False, grouped=True, one_width=False
)
