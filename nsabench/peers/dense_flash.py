"""Dense attention through the FlashAttention libraries: 2 (the package, else the kernels inside torch), 3, 4.

All of them align a causal mask to the bottom right, take grouped KV heads as they are and want eights of
channels.
"""

from __future__ import annotations

import inspect
import re
from abc import abstractmethod
from functools import cache, lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch

from nsabench.peers.dense import widened
from nsabench.peers.dense_kernels import HALVES, DenseKernel, Problem, changes_text, dtype_word

LEAST_FA4 = 20
"""The first beta whose function takes the arguments used here."""


class FlashKernel(DenseKernel):
    """What the three have in common. ``widest`` is the largest head dim; ``generations`` are the major
    numbers of the compute capabilities, empty for all that torch runs on; ``install`` gets the library.
    """

    tokens_first = True
    widest: int
    generations: tuple[int, ...] = ()
    install: str

    @abstractmethod
    def version(self) -> str:
        """The library and its version, empty where it is not installed; it is not imported."""

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor: ...

    def refusal(self, problem: Problem) -> str:
        word = self.name.partition(":")[2]
        if problem.device.type != "cuda":
            return f"{word} runs on cuda, not on {problem.device.type}"
        if not self.version():
            return f"{word} is not installed: {self.install}"
        if problem.dtype not in HALVES:
            return f"{word} takes fp16 and bf16, not {dtype_word(problem.dtype)}"
        width = self.width(problem.key_dim, problem.value_dim, problem.gradients)
        if max(width, problem.key_dim) > self.widest:
            return f"{word} takes head dims up to {self.widest}, not {max(width, problem.key_dim)}"
        return ""

    def probe(self, problem: Problem) -> str:
        major, minor = torch.cuda.get_device_capability(problem.device)
        if self.generations and major not in self.generations:
            made_for = " and ".join(f"{one}.x" for one in self.generations)
            word = self.name.partition(":")[2]
            return f"{word} is made for compute capability {made_for}, not {major}.{minor}"
        return super().probe(problem)

    def width(self, key_dim: int, value_dim: int, gradients: bool) -> int:
        """The channels that all tensors are padded to, eights of them; 0 where they go in as they are."""
        width = -(-max(key_dim, value_dim) // 8) * 8
        return 0 if key_dim == value_dim == width else width

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        key_dim, value_dim = q.shape[-1], v.shape[-1]
        width = self.width(key_dim, value_dim, _needs_gradients(q, k, v))
        if width:
            q, k, v = (widened(t, width) for t in (q, k, v))
        return self.attend(q, k, v, key_dim**-0.5)[..., :value_dim]

    def provider(self, problem: Problem) -> str:
        width = self.width(problem.key_dim, problem.value_dim, problem.gradients)
        return self.version() + changes_text(problem, width=width)


class Flash2(FlashKernel):
    """FlashAttention 2. Without the package, the kernels inside torch take packed sequences: the keys of
    several are copied together unless a cache is read to its end.
    """

    name = "dense:fa2"
    families = ("flash",)
    widest = 256
    install = "pip install 'nsabench[flash-attn]'"

    def version(self) -> str:
        return _package_of_fa2() or _torch_varlen()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if _package_of_fa2():
            package = import_module("flash_attn")
            return _output(package.flash_attn_func(q, k, v, softmax_scale=scale, causal=True))
        varlen: Any = import_module("torch.nn.attention.varlen").varlen_attn
        batch, rows, keys = q.shape[0], q.shape[1], k.shape[1]
        cu_q, cu_k = _borders(batch, rows, str(q.device)), _borders(batch, keys, str(q.device))
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
        if _wants_to_be_told():
            options["enable_gqa"] = True
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return _output(varlen(q, k, v, cu_q, cu_k, rows, keys, **options)).unflatten(0, (batch, rows))


class Flash3(FlashKernel):
    """FlashAttention 3. Without gradients it splits the keys of few queries over the GPU as it sees fit."""

    name = "dense:fa3"
    families = ("fa3",)
    shows = False
    widest = 256
    generations = (9,)
    install = (
        "git clone https://github.com/Dao-AILab/flash-attention && cd flash-attention/hopper && "
        "python setup.py install"
    )

    def version(self) -> str:
        return _package("flash_attn_interface", "flash_attn_3", "flash-attn-3")

    def width(self, key_dim: int, value_dim: int, gradients: bool) -> int:
        taken = 128 < key_dim <= 192 and 96 < value_dim <= 128 and not gradients
        return 0 if taken else super().width(key_dim, value_dim, gradients)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        splits = 1 if _needs_gradients(q, k, v) else 0
        package = import_module("flash_attn_interface")
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True, "num_splits": splits}
        return _output(package.flash_attn_func(q, k, v, **options))


class Flash4(FlashKernel):
    """FlashAttention 4."""

    name = "dense:fa4"
    # Its kernels are launched past torch: no operator shows.
    families = ("fa4",)
    shows = False
    widest = 256
    generations = (9, 10)
    install = "pip install 'nsabench[fa4]'"

    def version(self) -> str:
        found = _distribution("flash-attn-4")
        beta = re.search(r" 4\.0\.0\.?b(\d+)", found)
        return "" if beta and int(beta[1]) < LEAST_FA4 else found

    def width(self, key_dim: int, value_dim: int, gradients: bool) -> int:
        # Blackwell has kernels up to 128 channels, and one for these two.
        if (key_dim, value_dim) == (192, 128) and _generation() >= 10:
            return 0
        return super().width(key_dim, value_dim, gradients)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        package = import_module("flash_attn.cute")
        return _output(package.flash_attn_func(q, k, v, softmax_scale=scale, causal=True))


def _generation() -> int:
    """The major compute capability of the GPU in use; 0 before one is."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_initialized() else 0


def _output(found: Any) -> torch.Tensor:
    """The output, of libraries that return more beside it in some versions."""
    o: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return o


def _needs_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@lru_cache(maxsize=1024)
def _borders(batch: int, tokens: int, device: str) -> torch.Tensor:
    """Where each of ``batch`` sequences of ``tokens`` begins and ends, int32."""
    with torch.inference_mode(False):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens


@cache
def _wants_to_be_told() -> bool:
    """Whether torch's kernels want to be told of grouped KV heads: 2.11 takes them as they come."""
    varlen: Any = import_module("torch.nn.attention.varlen")
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


@cache
def _package_of_fa2() -> str:
    """The package and its version from 2.7 on; flash-attn 4 installs under the same name."""
    if find_spec("flash_attn_2_cuda") is None:
        return ""
    found = _distribution("flash-attn")
    numbers = tuple(int(part) for part in found.partition(" ")[2].split(".")[:2]) if found else (0,)
    return found if (2, 7) <= numbers < (3, 0) else ""


def _torch_varlen() -> str:
    if not torch.backends.cuda.is_flash_attention_available():
        return ""
    return f"torch {torch.__version__} varlen"


def _package(module: str, *distributions: str) -> str:
    """A module's distribution and its version; empty where there is no such module."""
    if find_spec(module) is None:
        return ""
    return next(filter(None, map(_distribution, distributions)), module)


def _distribution(name: str) -> str:
    try:
        return f"{name.replace('-', '_')} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return ""


FA2, FA3, FA4 = Flash2(), Flash3(), Flash4()
