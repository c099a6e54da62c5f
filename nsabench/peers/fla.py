"""`fla.ops.nsa` of fla-core: its plain torch functions, which run anywhere, and its Triton kernels.

Both have l = d = l', blocks pooled by their mean, one K and V for all branches. Asked branch by branch, with
compressed keys given, that remains only where blocks are chosen: overlapping blocks are attended by shifted
queries. The window is flash-attn's own, and only timed. What is timed takes l = d: shifted copies of queries
are no work of fla's.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import pad

from nsa import NSAConfig
from nsa.routes import Request
from nsabench.peers.branches import Ask, PeerBranch, no_fp64, whole_sequences
from nsabench.peers.core import PeerCore, needs_flash

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


class _Core(PeerCore):
    """What its two ways to compute have in common: block lists as ours, in any order."""

    def refuse(self, request: Request, branches: Collection[str]) -> str:
        ask = Ask(request)
        config = request.config
        why = self._refuse(ask)
        if not why and config.compression_block_size != config.compression_stride:
            why = "" if set(branches).isdisjoint({"cmp", "score"}) else "l = d only"
        if not why and "score" in branches:
            why = _chooses(ask) or self._refuse_choice(ask)
        if not why and "win" in branches:
            why = self._refuse_window(request)
        return why

    def _refuse(self, ask: Ask) -> str:
        raise NotImplementedError

    def _refuse_choice(self, ask: Ask) -> str:
        return ""

    def _refuse_window(self, request: Request) -> str:
        raise NotImplementedError

    def lists_of(self, blocks: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        return blocks

    def blocks_of(self, lists: torch.Tensor, batch: int, config: NSAConfig) -> torch.Tensor:
        return _ascending(lists[..., : config.num_selected_blocks])


class Fused(_Core):
    """What `parallel_nsa` calls: its kernels, the choice from the lse of the compressed branch."""

    def _refuse(self, ask: Ask) -> str:
        return _fused(ask)

    def _refuse_choice(self, ask: Ask) -> str:
        return _fused_chooses(ask)

    def _refuse_window(self, request: Request) -> str:
        return needs_flash(request)

    def compressed(
        self, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, chooses: bool
    ) -> tuple[torch.Tensor, Any]:
        tokens = q.shape[1]
        k_cmp, v_cmp = (_whole(t, tokens, config) for t in (k_cmp, v_cmp))
        attend = _ops("compression").parallel_nsa_compression
        found: tuple[torch.Tensor, Any] = attend(
            q, k_cmp, v_cmp, tokens, config.compression_stride, config.scale
        )
        return found

    def choose(
        self, q: torch.Tensor, k_cmp: torch.Tensor, config: NSAConfig, known: Any = None
    ) -> torch.Tensor:
        tokens = q.shape[1]
        n, size = config.num_selected_blocks, config.selection_block_size
        choose = _ops("parallel").parallel_nsa_topk
        lists: torch.Tensor = choose(q, _whole(k_cmp, tokens, config), tokens, known, n, size, config.scale)
        return lists

    def selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: torch.Tensor, config: NSAConfig
    ) -> torch.Tensor:
        # The function behind `parallel_nsa`, which pools keys and values first, wanted or not.
        attend = _ops("parallel").ParallelNSAFunction.apply
        n, size = config.num_selected_blocks, config.selection_block_size
        o: torch.Tensor = attend(q, k, v, lists, n, size, config.scale, None)
        return o

    def sliding(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        attend = import_module("flash_attn").flash_attn_func
        window = (config.window_size - 1, 0)
        o: torch.Tensor = attend(q, k, v, softmax_scale=config.scale, causal=True, window_size=window)
        return o


class Naive(_Core):
    """Its plain torch functions."""

    def _refuse(self, ask: Ask) -> str:
        return no_fp64(ask)

    def _refuse_window(self, request: Request) -> str:
        return "offers no sliding branch; ask with win=off"

    def compressed(
        self, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, chooses: bool
    ) -> tuple[torch.Tensor, Any]:
        return naive_compressed(q, k_cmp, v_cmp, config)[0], None

    def choose(
        self, q: torch.Tensor, k_cmp: torch.Tensor, config: NSAConfig, known: Any = None
    ) -> torch.Tensor:
        return naive_select(q, k_cmp, config)

    def selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: torch.Tensor, config: NSAConfig
    ) -> torch.Tensor:
        return naive_selected(q, k, v, lists, config)[0]

    def sliding(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        raise NotImplementedError("fla's plain functions have no sliding branch")


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

CORES = {"": Fused(), "naive": Naive()}
"""What can be timed, by variant."""
