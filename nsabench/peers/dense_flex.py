"""Dense attention through torch's FlexAttention, compiled where this machine can compile it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nsabench.peers.dense_kernels import DenseKernel, Problem, torch_version

BLOCK = 128
COMPILED_ON_CPU = (torch.float32, torch.bfloat16, torch.float16)


class Flex(DenseKernel):
    """FlexAttention under a block mask made once for each shape, as a model's layers share it; a single query
    sees every key and has none. It takes grouped KV heads, and values of another dim than keys.

    ``compiler`` turns the function into the compiled one.
    """

    name = "dense:flex"
    families = ("flex",)
    # As code of its own, or in pieces that have no name of their own, it need not show.
    shows = False

    def __init__(self, compiler: Callable[..., Any] = torch.compile) -> None:
        self._compiler = compiler
        self._functions: dict[tuple[str, torch.dtype], Callable[..., Any]] = {}

    def refusal(self, problem: Problem) -> str:
        if problem.gradients and problem.device.type == "cpu":
            return "torch's FlexAttention has no backward on cpu"
        return ""

    def probe(self, problem: Problem) -> str:
        # What an earlier shape left behind counts against the number of versions that torch compiles.
        torch.compiler.reset()
        self._functions.clear()
        return super().probe(problem) if problem.device.type == "cuda" else ""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens, length = q.shape[1], k.shape[1]
        mask = None if tokens == 1 else causal_mask(tokens, length, str(q.device))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        run = self._function(q)
        o: torch.Tensor = run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2)

    def _function(self, q: torch.Tensor) -> Callable[..., Any]:
        """Settled once: a step must not look for a compiler."""
        kind = q.device.type, q.dtype
        if kind not in self._functions:
            eager = why_not_compiled(*kind)
            compiled = None if eager else self._compiler(flex_attention, fullgraph=True)
            self._functions[kind] = _eager if compiled is None else _quiet_at_first(compiled)
        return self._functions[kind]

    def provider(self, problem: Problem) -> str:
        why = why_not_compiled(problem.device.type, problem.dtype)
        how = f"not compiled, with every score in memory: {why}" if why else "compiled"
        return f"{torch_version()} flex_attention, {how}"


def why_not_compiled(device: str, dtype: torch.dtype) -> str:
    """Why FlexAttention runs uncompiled for such tensors on this machine; empty where it is compiled."""
    if device == "cuda":
        return "" if find_spec("triton") else "triton is not installed"
    if dtype not in COMPILED_ON_CPU:
        return "torch compiles it for fp32 and less on a CPU"
    return "" if _compiler_found() else "no C++ compiler is installed"


@cache
def _compiler_found() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


@lru_cache(maxsize=1024)
def causal_mask(tokens: int, length: int, device: str) -> BlockMask:
    """The mask of the last ``tokens`` of ``length`` positions, from arithmetic on blocks: no score matrix."""
    with torch.inference_mode(False):
        offset = torch.tensor(length - tokens, device=device)
        rows, columns = -(-tokens // BLOCK), -(-length // BLOCK)
        first = torch.arange(rows, device=device) * BLOCK + (length - tokens)
        last = (first + BLOCK - 1).clamp(max=length - 1)
        # Blocks that even the first query of a row sees to the end; those that some query sees a part of.
        full = ((first + 1) // BLOCK).int()
        partial = (last // BLOCK + 1).int() - full
        every = torch.arange(columns, device=device).expand(rows, columns).int()
        from_partial = (every + full[:, None]) % columns
        return BlockMask.from_kv_blocks(
            partial[None, None],
            from_partial.int()[None, None].contiguous(),
            full[None, None],
            every[None, None].contiguous(),
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda b, h, query, key: key <= query + offset,
            seq_lengths=(tokens, length),
        )


def _eager(*given: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(*given, **options)


def _quiet_at_first(run: Callable[..., Any]) -> Callable[..., Any]:
    """Compiling imports modules that warn of their own age; later calls are not slowed down by looking."""
    seen = False

    def call(*given: Any, **options: Any) -> Any:
        nonlocal seen
        if seen:
            return run(*given, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            found = run(*given, **options)
        seen = True
        return found

    return call


FLEX = Flex()
