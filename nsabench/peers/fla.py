"""`fla.ops.nsa` of fla-core: its plain torch functions, which run anywhere, and its Triton kernels.

Both have l = d = l', blocks pooled by their mean, one K and V for all branches. Asked branch by branch, with
compressed keys given, that remains only where blocks are chosen: overlapping blocks are attended by shifted
queries. The window is flash-attn's own, and not asked here.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

from nsa import NSAConfig
from nsabench.peers.branches import Ask, PeerBranch, no_fp64, whole_sequences

LEAST_GROUP = 16
WIDEST_HEAD = 256

Output = tuple[torch.Tensor, torch.Tensor | None]


@cache
def _ops(name: str) -> ModuleType:
    """A module of `fla.ops.nsa`; what it warns of as it is imported (no GPU, no flash-attn) is said by
    refusals.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"fla.ops.nsa.{name}")


def naive_compressed(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """`naive_nsa_compression`, as :func:`nsa.reference.compressed_attention`."""
    late, q, k_cmp, v_cmp = _shifted(q, k_cmp, v_cmp, config)
    attend = _ops("naive").naive_nsa_compression
    o, lse = attend(q, k_cmp, v_cmp, config.compression_stride, config.scale)
    return pad(o, (0, 0, 0, 0, late, 0)), pad(lse.detach(), (0, 0, late, 0), value=float("-inf"))


def naive_select(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: Any = 0,
    kv_len: int | None = None,
) -> torch.Tensor:
    """`naive_nsa_topk`, as :func:`nsa.reference.select_blocks`."""
    keys = _whole(k_cmp, q.shape[1], config)
    choose = _ops("naive").naive_nsa_topk
    with torch.no_grad():
        return _ascending(
            choose(q, keys, config.num_selected_blocks, config.selection_block_size, config.scale)
        )


def naive_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: Any = 0,
) -> Output:
    """`naive_nsa_selection`, as :func:`nsa.reference.selected_attention`; it gives no lse."""
    attend = _ops("naive").naive_nsa_selection
    return attend(q, k, v, block_indices.long(), config.selection_block_size, config.scale), None


def fused_compressed(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """`parallel_nsa_compression`. Its lse is 0, not -inf, where nothing is visible: not compared."""
    late, q, k_cmp, v_cmp = _shifted(q, k_cmp, v_cmp, config)
    attend = _ops("compression").parallel_nsa_compression
    o, _ = attend(q, k_cmp, v_cmp, q.shape[1], config.compression_stride, config.scale)
    return pad(o, (0, 0, 0, 0, late, 0)), None


def fused_select(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: Any = 0,
    kv_len: int | None = None,
) -> torch.Tensor:
    """`parallel_nsa_topk`, less what it chooses beyond n: it rounds n up to a power of two."""
    tokens = kv_len or int(torch.as_tensor(q_start).max()) + q.shape[1]
    keys = _whole(k_cmp, tokens, config)
    choose = _ops("parallel").parallel_nsa_topk
    n, size = config.num_selected_blocks, config.selection_block_size
    with torch.no_grad():
        chosen = choose(q, keys, tokens, None, n, size, config.scale)
    return _ascending(chosen[..., :n])


def fused_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: Any = 0,
) -> Output:
    """`parallel_nsa` with neither compressed nor sliding branch. Its backward takes 2^i slots of a list."""
    attend = _ops("parallel").parallel_nsa
    slots = block_indices.shape[-1]
    block_indices = pad(block_indices, (0, _power_of_two(slots) - slots), value=-1)
    o = attend(
        q,
        k,
        v,
        block_indices=block_indices.long(),
        block_counts=block_indices.shape[-1],
        block_size=config.selection_block_size,
        scale=config.scale,
    )
    return o, None


def _shifted(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What fla is given for overlapping blocks: blocks of d tokens, and the queries from ``l - d`` on.

    A query then sees block i from token ``i d + d - 1`` on, which of the whole is ``i d + l - 1``; those left
    out see nothing. The first returned is how many they are.
    """
    late = min(config.compression_block_size - config.compression_stride, q.shape[1] - 1)
    q = q[:, late:]
    return late, q, _whole(k_cmp, q.shape[1], config), _whole(v_cmp, q.shape[1], config)


def _whole(t: torch.Tensor, tokens: int, config: NSAConfig) -> torch.Tensor:
    """Compressed keys or values as fla pools them: with the unfinished block too, which no query sees."""
    blocks = -(-tokens // config.compression_stride)
    return pad(t, (0, 0, 0, 0, 0, max(0, blocks - t.shape[1])))


def _power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def _ascending(chosen: torch.Tensor) -> torch.Tensor:
    """Indices in ascending order, -1 at the tail, int32."""
    last = torch.iinfo(torch.int32).max
    ordered = chosen.masked_fill(chosen < 0, last).sort(-1).values
    return ordered.masked_fill(ordered == last, -1).to(torch.int32)


def _chooses(ask: Ask) -> str:
    config = ask.config
    sizes = (config.compression_block_size, config.compression_stride, config.selection_block_size)
    if len(set(sizes)) > 1:
        return "l = d = l' only"
    if (config.num_initial_blocks, config.num_local_blocks) != (1, 2):
        return "1 initial and 2 local blocks only"
    return ""


def _fused(ask: Ask) -> str:
    request, config = ask.request, ask.config
    if request.device != "cuda":
        return f"Triton kernels: need a CUDA GPU, got {request.device}"
    group = config.group_size
    if group < LEAST_GROUP or group & (group - 1):
        return f"G a power of two of at least {LEAST_GROUP} only"
    if max(config.head_dim, config.v_dim) > WIDEST_HEAD:
        return f"head dims up to {WIDEST_HEAD} only"
    return no_fp64(ask) or _last_queries(ask)


def _last_queries(ask: Ask) -> str:
    request = ask.request
    starts = torch.as_tensor(ask.q_start)
    if bool((starts != request.kv_len - request.num_queries).any()):
        return "takes the last queries of a sequence, got others"
    if request.needs_grad and request.num_queries != request.kv_len:
        return "gradients for whole sequences only"
    return ""


def _fused_chooses(ask: Ask) -> str:
    n, size = ask.config.num_selected_blocks, ask.config.selection_block_size
    if size < 2 * _power_of_two(n):
        return "l' of at least twice n, n rounded up to a power of two, only"
    return ""


def _naive(ask: Ask) -> str:
    return whole_sequences(ask) or no_fp64(ask)


BRANCHES = (
    PeerBranch("cmp", "naive", naive_compressed, _naive),
    PeerBranch("score", "naive", naive_select, lambda ask: _chooses(ask) or _naive(ask)),
    PeerBranch("sel", "naive", naive_selected, _naive),
    PeerBranch("cmp", "", fused_compressed, lambda ask: whole_sequences(ask) or _fused(ask)),
    PeerBranch("score", "", fused_select, lambda ask: _fused(ask) or _chooses(ask) or _fused_chooses(ask)),
    PeerBranch("sel", "", fused_selected, _fused),
)
"""What is asked of fla-core."""
