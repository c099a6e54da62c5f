"""Which FlashAttention is installed, by generation. Nothing is imported and no kernel is tried to decide."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec

import torch

from nsa.backends._flash_library import FlashAttn, FlashAttn3, FlashAttn4, Library, TorchVarlen

INSTALL = {
    "fa2": "pip install 'nsabench[flash-attn]'",
    "fa3": "git clone https://github.com/Dao-AILab/flash-attention && cd flash-attention/hopper && "
    "python setup.py install",
    "fa4": "pip install flash-attn-4",
}
MISSING = {
    "fa2": "neither flash_attn nor a torch with FlashAttention is installed",
    "fa3": "flash_attn_interface is not installed",
    "fa4": "flash-attn-4 is not installed",
}
# The first beta whose functions take the arguments used here.
LEAST_FA4 = 20


@cache
def provider(generation: str) -> str | None:
    """Library and version, e.g. ``flash_attn 2.8.3`` or ``torch 2.13.0 varlen``; None without one."""
    return {"fa2": _second, "fa3": _third, "fa4": _fourth}[generation]()


@cache
def load(generation: str) -> Library:
    """The library :func:`provider` names, imported now; RuntimeError without one."""
    name = provider(generation)
    if name is None:
        raise RuntimeError(f"{MISSING[generation]}: {INSTALL[generation]}")
    if generation == "fa3":
        return FlashAttn3(import_module("flash_attn_interface"), name)
    if generation == "fa4":
        major, _ = torch.cuda.get_device_capability()
        return FlashAttn4(import_module("flash_attn.cute"), name, major)
    if name.startswith("flash_attn"):
        return FlashAttn(import_module("flash_attn"), name)
    return TorchVarlen(import_module("torch.nn.attention.varlen"), name)


def _second() -> str | None:
    """The package ``flash_attn`` where it is installed, else torch, which carries the same kernels."""
    if find_spec("flash_attn_2_cuda") is not None:  # flash_attn 4 installs under the same package name
        for version in _versions("flash-attn"):
            if (2, 7) <= tuple(int(part) for part in version.split(".")[:2]) < (3, 0):
                return f"flash_attn {version}"
    if torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__.split('+')[0]} varlen"
    return None


def _third() -> str | None:
    if find_spec("flash_attn_interface") is None:
        return None
    return " ".join(["flash_attn_3", *_versions("flash-attn-3")][:2])


def _fourth() -> str | None:
    for version in _versions("flash-attn-4"):
        release, _, beta = version.partition("+")[0].partition("b")
        if release != "4.0.0" or not beta or int(beta.partition(".")[0]) >= LEAST_FA4:
            return f"flash-attn-4 {version}"
    return None


def _versions(distribution: str) -> list[str]:
    return [found.version for found in metadata.distributions(name=distribution)]
