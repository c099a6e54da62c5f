"""mdy666's Scalable-Flash-Native-Sparse-Attention: its Triton operators for prefill, a clone that is
importable as `flash_nsa`.

Its scores are stored in fp32 here: its modules store their cubes in fp16, in which small ones vanish. The
window is flash-attn's and has w + 1 keys, so it is asked for w - 1. Sizes and lengths are settings of a
class, set once a shape; its modules compare them again in each call.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from nsa import NSAConfig
from nsa.blocks import num_selection_blocks, own_block
from nsa.routes import Request
from nsabench.peers.branches import Ask
from nsabench.peers.core import (
    PeerCore,
    ascending,
    branches_of,
    by_head,
    by_token,
    ends,
    needs_block,
    needs_flash,
    needs_gpu,
    packed,
)

LONGEST = 256 * 1024
"""Tokens on one GPU, for offsets in int32."""

LEAST_PART = 16
"""The least key or value dim, or part of one, that a tensor core takes."""


@cache
def _package() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("flash_nsa")


_SET: dict[str, tuple[Any, ...]] = {}


def _for(q: torch.Tensor, config: NSAConfig) -> Any:
    """The package, set to the sizes of ``config`` and the lengths of ``q``."""
    package = _package()
    wanted = (*q.shape[:2], q.device, config)
    if _SET.get("to") != wanted:
        helper = package.NSAHelper
        helper.set_hyperparameters(
            kernel_size=config.compression_block_size,
            stride=config.compression_stride,
            block_size=config.selection_block_size,
            window_size=config.window_size - 1,
            top_n=config.num_selected_blocks,
            num_init_blocks=config.num_initial_blocks,
            num_local_blocks=config.num_local_blocks,
        )
        helper.x_cu_seqlens = None  # of the same lengths it would keep the counts of other sizes
        helper.init_cu_seqlens(ends(q.shape[0], q.shape[1], q.device))
        _SET["to"] = wanted
    return package


class Sfnsa(PeerCore):
    """``compress_attn``, ``slc_topk_indices`` from its lse, ``select_attn`` and ``swa_varlen_func``."""

    chooses_alone = False

    def refuse(self, request: Request, branches: Collection[str]) -> str:
        config = request.config
        if find_spec("pkg_resources") is None:
            return "needs pkg_resources: pip install 'setuptools<81'"
        if why := needs_gpu(request):
            return why
        if not _power_of_two(config.compression_stride):
            return "takes d a power of two only"
        if not _power_of_two(config.selection_block_size):
            return "takes l' a power of two only"
        if not _splits(config.head_dim):
            return f"takes key dims of one power of two or the sum of two, each at least {LEAST_PART}"
        if not _power_of_two(config.v_dim) or config.v_dim < LEAST_PART:
            return f"takes value dims that are a power of two of at least {LEAST_PART}"
        if request.kv_len > LONGEST:
            return f"takes up to {LONGEST} tokens"
        if not {"cmp", "score"}.isdisjoint(branches) and (why := needs_block(request)):
            return why
        return needs_flash(request, "flash_attn_interface") if "win" in branches else ""

    def compressed(
        self, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, chooses: bool
    ) -> tuple[torch.Tensor, Any]:
        o, lse = _for(q, config).compress_attn(packed(q), packed(k_cmp), packed(v_cmp), config.scale)
        return o.unflatten(0, q.shape[:2]), lse

    def choose(
        self, q: torch.Tensor, k_cmp: torch.Tensor, config: NSAConfig, known: Any = None
    ) -> torch.Tensor:
        if known is None:
            values = k_cmp if _power_of_two(config.head_dim) else k_cmp[..., :LEAST_PART].contiguous()
            known = self.compressed(q, k_cmp, values, config, chooses=True)[1]
        lists: torch.Tensor = _for(q, config).slc_topk_indices(
            packed(q), packed(k_cmp), known, sm_scale=config.scale, fp32=True, maybe_efficient_version=True
        )[0]
        return lists

    def selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: torch.Tensor, config: NSAConfig
    ) -> torch.Tensor:
        package = _for(q, config)
        o: torch.Tensor = package.select_attn(packed(q), packed(k), packed(v), lists, config.scale)
        return o.unflatten(0, q.shape[:2])

    def sliding(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        o: torch.Tensor = _for(q, config).swa_varlen_func(packed(q), packed(k), packed(v), config.scale)
        return o.unflatten(0, q.shape[:2])

    def lists_of(self, blocks: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        # An empty slot holds the number of blocks, as its own choice writes it.
        return by_head(blocks.masked_fill(blocks < 0, num_selection_blocks(blocks.shape[1], config)))

    def blocks_of(self, lists: torch.Tensor, batch: int, config: NSAConfig) -> torch.Tensor:
        found = by_token(lists, batch)
        own = own_block(torch.arange(found.shape[1], device=found.device), config)
        return ascending(found, own, config.num_selected_blocks)


def full_lists(ask: Ask) -> str:
    """Why lists cannot be attended that hold fewer blocks than exist, or repeat one; empty where they can:
    it counts on as many as a query can have, from the first slot on.
    """
    if ask.blocks is None:
        return ""
    own = own_block(torch.arange(ask.blocks.shape[1], device=ask.blocks.device), ask.config)
    wanted = (own + 1).clamp(max=ask.blocks.shape[-1])[:, None, None]
    slots = torch.arange(ask.blocks.shape[-1], device=ask.blocks.device)
    full = (ask.blocks >= 0) == (slots < wanted)
    return "" if bool(full.all()) else "takes lists with every slot filled that can be"


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _splits(dim: int) -> bool:
    """Whether a dim is a power of two, or the two of which the larger is the greatest below it."""
    if _power_of_two(dim):
        return dim >= LEAST_PART
    rest = dim - (1 << (dim.bit_length() - 1))
    return _power_of_two(rest) and rest >= LEAST_PART


CORES = {"": Sfnsa()}
"""What can be timed, by variant."""

BRANCHES = branches_of(CORES[""], full_lists)
"""What is asked of it branch by branch."""
