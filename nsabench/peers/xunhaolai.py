"""XunhaoLai's native-sparse-attention-triton: its Triton kernels for prefill, a clone that is importable as
`native_sparse_attention`.

Its compressed attention gives output and selected blocks in one call, which is made once where both are
wanted. The window is flash-attn's, as in its own module, which asks it for w + 1 keys; here for w.
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
from nsa.blocks import num_compressed_blocks, own_block
from nsa.routes import Request
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

BLOCK_SIZES = (32, 64, 128, 256)
WIDEST_HEAD = 128


@cache
def _op(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(import_module(module), name)


class XunhaoLai(PeerCore):
    """``compressed_attention``, ``topk_sparse_attention`` and flash-attn's window."""

    chooses_alone = False

    def refuse(self, request: Request, branches: Collection[str]) -> str:
        config = request.config
        if find_spec("einops") is None:
            return "needs einops: pip install einops"
        if why := needs_gpu(request):
            return why
        if config.head_dim != config.v_dim or config.head_dim > WIDEST_HEAD:
            return f"takes one head dim up to {WIDEST_HEAD}"
        if "sel" in branches and config.selection_block_size not in BLOCK_SIZES:
            return f"takes l' of {', '.join(map(str, BLOCK_SIZES))} only"
        if not {"cmp", "score"}.isdisjoint(branches):
            if why := needs_block(request):
                return why
            if num_compressed_blocks(request.kv_len, config) >= request.kv_len:
                return "takes fewer compressed blocks than tokens only"
        return needs_flash(request) if "win" in branches else ""

    def compressed(
        self, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, chooses: bool
    ) -> tuple[torch.Tensor, Any]:
        (batch, tokens), blocks = q.shape[:2], k_cmp.shape[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of 0 blocks to choose, which is meant
            o, lists = _op("native_sparse_attention.ops", "compressed_attention")(
                packed(q),
                packed(k_cmp),
                packed(v_cmp),
                config.compression_block_size,
                config.compression_stride,
                config.selection_block_size,
                config.num_selected_blocks if chooses else 0,
                ends(batch, tokens, q.device),
                ends(batch, blocks, q.device),
                tokens,
                blocks,
                config.scale,
                config.num_initial_blocks,
                config.num_local_blocks,
            )
        return o.unflatten(0, (batch, tokens)), lists

    def choose(
        self, q: torch.Tensor, k_cmp: torch.Tensor, config: NSAConfig, known: Any = None
    ) -> torch.Tensor:
        lists = self.compressed(q, k_cmp, k_cmp, config, chooses=True)[1] if known is None else known
        assert isinstance(lists, torch.Tensor)
        return lists

    def selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: torch.Tensor, config: NSAConfig
    ) -> torch.Tensor:
        batch, tokens = q.shape[:2]
        attention = _op("native_sparse_attention.ops", "topk_sparse_attention")
        cu_seqlens = ends(batch, tokens, q.device)
        size = config.selection_block_size
        o: torch.Tensor = attention(packed(q), packed(k), packed(v), lists, size, cu_seqlens, config.scale)
        return o.unflatten(0, (batch, tokens))

    def sliding(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        batch, tokens = q.shape[:2]
        cu_seqlens = ends(batch, tokens, q.device)
        o: torch.Tensor = _op("flash_attn", "flash_attn_varlen_func")(
            packed(q),
            packed(k),
            packed(v),
            cu_seqlens,
            cu_seqlens,
            tokens,
            tokens,
            softmax_scale=config.scale,
            causal=True,
            window_size=(config.window_size - 1, -1),
        )
        return o.unflatten(0, (batch, tokens))

    def lists_of(self, blocks: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        return by_head(blocks)

    def blocks_of(self, lists: torch.Tensor, batch: int, config: NSAConfig) -> torch.Tensor:
        found = by_token(lists, batch)
        own = own_block(torch.arange(found.shape[1], device=found.device), config)
        return ascending(found, own, config.num_selected_blocks)


CORES = {"": XunhaoLai()}
"""What can be timed, by variant."""

BRANCHES = branches_of(CORES[""])
"""What is asked of it branch by branch."""
