"""Why a row of the route table cannot run a request, or why ``auto`` passes over it.

A predicate takes a `Request` and returns the reason in words, or None. Whether a library is there is
asked of its own module, imported when a request needs the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch

from nsa.config import NSAConfig


@dataclass(frozen=True)
class Request:
    """The facts a row may refuse on, known before anything runs. ``device`` is a device type such as
    ``cuda``.
    """

    device: str
    dtype: torch.dtype
    num_queries: int
    kv_len: int
    needs_grad: bool
    config: NSAConfig


@cache
def load(target: str) -> Callable[..., Any]:
    """The function that ``module:name`` names; the module is imported now."""
    module, name = target.split(":")
    fn: Callable[..., Any] = attrgetter(name)(import_module(module))
    return fn


def runs_anywhere(request: Request) -> str | None:
    return None


def fused_sdpa(request: Request) -> str | None:
    if request.device not in ("cpu", "cuda"):
        return f"runs on cpu and cuda, got {request.device}"
    if request.device == "cuda" and request.dtype == torch.float64:
        return "torch's fused CUDA kernels take fp32, fp16 and bf16, got fp64"
    return None


def on_cpu(request: Request) -> str | None:
    return (
        None
        if request.device == "cpu"
        else f"reads sizes on the host per block; runs on cpu, got {request.device}"
    )


_DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLASH = "nsa.backends.flash"


def _flash_takes(request: Request, generation: str) -> str | None:
    """Why no GPU would run it, or this torch or installation does not."""
    if request.device != "cuda":
        return f"needs a CUDA GPU, got {request.device}"
    if request.dtype not in (torch.float16, torch.bfloat16):
        return f"takes fp16 and bf16, got {_DTYPES.get(request.dtype, request.dtype)}"
    dim = max(request.config.head_dim, request.config.v_dim)
    if dim > 256:
        return f"head_dim at most 256, got {dim}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, got ROCm"
    missing: str | None = load(f"{FLASH}:{generation.upper()}.missing")()
    return missing


def fa2_takes(request: Request) -> str | None:
    return _flash_takes(request, "fa2") or _compute_capability((8, 0))


def fa3_takes(request: Request) -> str | None:
    return _flash_takes(request, "fa3") or _gpu_of("FlashAttention 3", {9: "Hopper (sm_90)"})


def fa4_takes(request: Request) -> str | None:
    why = _flash_takes(request, "fa4") or _gpu_of(
        "FlashAttention 4", {9: "Hopper (sm_90)", 10: "Blackwell (sm_100)"}
    )
    if why is not None:
        return why
    dims = request.config.head_dim, request.config.v_dim
    if torch.cuda.get_device_capability()[0] == 9:
        if max(dims) > 192 and request.needs_grad:
            return f"head_dim at most 192 on sm_90 with a backward, got {max(dims)}"
        return None
    if max(dims) <= 128 or dims == (192, 128):
        return None
    return f"head dims at most 128, or 192 with 128 for values, on sm_100, got {dims[0]} and {dims[1]}"


def _gpu_of(library: str, generations: dict[int, str]) -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    major, minor = torch.cuda.get_device_capability()
    wanted = " or ".join(generations.values())
    return None if major in generations else f"{library} runs on {wanted}, got sm_{major}{minor}"


CPP_LIBRARY = "nsa.backends._cpp_library"


def cpp(request: Request) -> str | None:
    if request.device != "cpu":
        return f"runs on cpu, got {request.device}"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, got {_DTYPES.get(request.dtype, request.dtype)}"
    why: str | None = load(f"{CPP_LIBRARY}:why_not")()
    return why


def flex(request: Request) -> str | None:
    if request.device == "cpu":
        return "torch's compiled kernel returns no lse on a CPU; flex:eager does, without a kernel"
    if request.device != "cuda":
        return f"runs on cuda, got {request.device}"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, got {_DTYPES.get(request.dtype, request.dtype)}"
    dim = min(request.config.head_dim, request.config.v_dim)
    if dim < 16:
        return f"head_dim at least 16, got {dim}"
    if find_spec("triton") is None:
        return "FlexAttention compiles to Triton, which is not installed: pip install triton"
    return _compute_capability((7, 0))


def _compute_capability(least: tuple[int, int]) -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    found = torch.cuda.get_device_capability()
    return None if found >= least else "needs compute capability {}.{}, got {}.{}".format(*least, *found)


TRITON = "nsa.kernels._installed"


def triton(request: Request) -> str | None:
    """Why none of this project's Triton kernels can run the request."""
    interpreted: bool = request.device == "cpu" and load(f"{TRITON}:interpreted")()
    if request.device != "cuda" and not interpreted:
        return f"needs a CUDA GPU, got {request.device}"
    if request.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"takes fp32, fp16 and bf16, got {_DTYPES.get(request.dtype, request.dtype)}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, got ROCm"
    missing: str | None = load(f"{TRITON}:missing")()
    return missing or (None if interpreted else _compute_capability((8, 0)))


def flex_eager(request: Request) -> str | None:
    return None if request.device in ("cpu", "cuda") else f"runs on cpu and cuda, got {request.device}"


def flex_by_name(request: Request) -> str | None:
    return "a general kernel, compiled at its first call, or unfused: chosen only by name"


def newer_by_name(request: Request) -> str | None:
    return "not yet run by this project on a GPU: chosen only by name"


def unmeasured_by_name(request: Request) -> str | None:
    return "not yet measured by this project on a GPU: chosen only by name"


def varlen_by_name(request: Request) -> str | None:
    return "a variant of fa2, which takes the kernel for packed sequences where lengths differ"


def never_auto(request: Request) -> str | None:
    return "the specification is chosen only by name"


def short_only(request: Request) -> str | None:
    """Masked attention beats gathering only while nearly everything is selected anyway, and only on a CPU."""
    if request.device != "cpu":
        return "reads on the host which rows select everything; gathering does not"
    reach = request.config.num_selected_blocks * request.config.selection_block_size
    if request.kv_len <= reach:
        return None
    return f"works on every key; beyond n l' = {reach} tokens gathering is cheaper, got {request.kv_len}"


def chosen_by_gather(request: Request) -> str | None:
    return "a variant of gather, which chooses between its two by device and number of queries"


def chosen_by_triton(request: Request) -> str | None:
    return "a variant of triton, which chooses between its three by group size and number of queries"
