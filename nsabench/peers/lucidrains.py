"""`SparseAttention` of native-sparse-attention-pytorch: its three branches and its choice, on given tensors.

The module's projections, rotation and gates are replaced by what hands tensors through unchanged: the branch
that is asked runs in the module's own ``forward``, with its gate open and the others closed.

Its window holds ``sliding_window_size + 1`` keys, so it is built with ``w - 1``. Its selected branch chooses
blocks itself: to be given a list, each query gets one more channel per block, whose product with that block's
compressed key is 0 for a block of the list and very negative for others. Keys and values hold zeros there, so
attention itself is untouched. Its compressed branch and its choice are run as they are: they differ.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.functional import pad

from nsa import NSAConfig
from nsa.blocks import num_selection_blocks, own_block
from nsabench.peers.branches import Ask, PeerBranch, whole_sequences

OPEN = ("cmp", "sel", "win")  # the order of its gates
# Its scores compete with a constant -1000; what is that far below has no share left in any dtype.
_REFUSED = -2000.0

Output = tuple[torch.Tensor, torch.Tensor | None]


@cache
def _module() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("native_sparse_attention_pytorch").SparseAttention


def compressed_attention(
    q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """Its compressed branch on given blocks, as :func:`nsa.reference.compressed_attention`; it gives no
    lse.
    """
    layer = _layer("cmp", q, k_cmp.shape[2], config, stride=config.compression_stride)
    layer.k_compress, layer.v_compress = _Given(k_cmp, config), _Given(v_cmp, config)
    return _output(layer, q), None


def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: Any = 0,
    kv_len: int | None = None,
) -> torch.Tensor:
    """The blocks that it attends for given compressed keys, as :func:`nsa.reference.select_blocks`: its own
    choice of ``n - 1``, and the own block.
    """
    layer = _layer("sel", q, k_cmp.shape[2], config, stride=config.compression_stride)
    layer.num_selected_blocks = config.num_selected_blocks - 1
    layer.k_compress = _Given(k_cmp, config)
    own = own_block(torch.arange(q.shape[1], device=q.device), config)[:, None, None]
    own = own.expand(q.shape[0], -1, k_cmp.shape[2], 1)
    try:
        with torch.no_grad():
            # What makes its mask for FlexAttention is given the blocks it chose.
            layer(_packed(q, q.new_zeros(*_keys(q, k_cmp.shape[2]))), fine_selection_flex_mask=_Chosen.tell)
        chosen = own
    except _Chosen as told:
        found = told.blocks.transpose(1, 2)
        chosen = torch.cat([found.masked_fill(found >= own, -1), own], -1)
    last = torch.iinfo(torch.int32).max
    ordered = chosen.masked_fill(chosen < 0, last).sort(-1).values
    ordered = ordered.masked_fill(ordered == last, -1).to(torch.int32)
    return pad(ordered, (0, config.num_selected_blocks - ordered.shape[-1]), value=-1)


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: Any = 0,
) -> Output:
    """Its selected branch on the blocks of a list, as :func:`nsa.reference.selected_attention`; it gives no
    lse.
    """
    size = config.selection_block_size
    blocks = num_selection_blocks(k.shape[1], config) if k.shape[1] >= size else 0
    if blocks:
        listed = _members(block_indices, blocks).repeat_interleave(config.group_size, 2)
        refused = torch.where(listed, 0.0, _REFUSED * (q.shape[-1] + blocks) ** 0.5).to(q)
        q = torch.cat([q, refused], -1)
        k, v = (pad(t, (0, blocks)) for t in (k, v))
    layer = _layer("sel", q, k.shape[2], config, stride=size)
    layer.k_compress = _BlockNames(blocks)
    return _output(layer, q, k, v)[..., : config.v_dim], None


def sliding_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """Its sliding branch, as :func:`nsa.reference.sliding_attention`; it gives no lse."""
    # A stride longer than the sequence leaves nothing to compress and to choose from.
    stride = q.shape[1] + 1
    return _output(
        _layer("win", q, k.shape[2], config, stride=stride, window=config.window_size - 1), q, k, v
    ), None


def _layer(
    branch: str, q: torch.Tensor, kv_heads: int, config: NSAConfig, *, stride: int, window: int = 1
) -> Any:
    """Its module for ``q (B,T,HQ,D)`` with the gate of one branch open; what it compresses is nothing."""
    heads, width = q.shape[2:]
    block = stride if branch == "win" else config.selection_block_size
    with torch.random.fork_rng(devices=[]):  # weights that nothing uses
        layer = _module()(
            dim=(heads + 2 * kv_heads) * width,
            dim_head=width,
            heads=heads,
            kv_heads=kv_heads,
            sliding_window_size=window,
            compress_block_size=config.compression_block_size if stride < block else stride,
            compress_block_sliding_stride=stride,
            selection_block_size=block,
            num_selected_blocks=-(-q.shape[1] // block),
            causal=True,
            norm=False,
            compress_mlp=_Nothing(),
            strategy_combine_mlp=nn.Identity(),
        )
    layer.to_qkv = layer.combine_heads = nn.Identity()
    layer.rotary_emb = _Unrotated()
    layer.to_strategy_combine = _Gate(OPEN.index(branch), heads)
    # What it divides by the root of; channels that name blocks are none of the head's.
    layer.scale = layer.sliding_window.scale = config.scale
    return layer.to(q)


def _output(layer: Any, q: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
    """``(B,T,HQ,D)`` of its module for q, k and v; zeros in place of k and v that no branch needs."""
    given = kv or (q.new_zeros(_keys(q, layer.kv_heads)),) * 2
    o: torch.Tensor = layer(_packed(q, *given))
    return o.unflatten(-1, q.shape[2:])


def _keys(q: torch.Tensor, kv_heads: int) -> tuple[int, ...]:
    return (*q.shape[:2], kv_heads, q.shape[3])


def _packed(*tensors: torch.Tensor) -> torch.Tensor:
    """q, k and v as its projection would return them."""
    q, k, v = tensors if len(tensors) == 3 else (tensors[0], tensors[1], tensors[1])
    return torch.cat([t.flatten(2) for t in (q, k, v)], -1)


class _Chosen(Exception):
    """Carries the blocks ``(B,H,T,n)`` that its module chose out of it."""

    def __init__(self, blocks: torch.Tensor) -> None:
        super().__init__()
        self.blocks = blocks

    @staticmethod
    def tell(blocks: torch.Tensor, **given: Any) -> NoReturn:
        """Stop at the choice."""
        raise _Chosen(blocks)


class _Given(nn.Module):
    """In place of a compression ``(B,H,W,l,D) -> (B,H,W,D)``: given blocks ``(B,C,H,D)``.

    Its block ``i`` ends where ours of index ``i - (l - d) / d`` does; those before the first are zero.
    """

    def __init__(self, blocks: torch.Tensor, config: NSAConfig) -> None:
        super().__init__()
        self.blocks = blocks.transpose(1, 2)
        self.before = config.compression_block_size // config.compression_stride - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[2]
        placed = pad(self.blocks, (0, 0, self.before, 0))[:, :, :count]
        return pad(placed, (0, 0, 0, count - placed.shape[2]))


class _BlockNames(nn.Module):
    """In place of the compression of keys ``(B,H,W,block,D) -> (B,H,W,D)``: block j is 1 in channel j of the
    last ``channels``, 0 elsewhere.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, count, _, width = x.shape
        names = x.new_zeros(count, width)
        first = width - self.channels
        for j in range(min(count, self.channels)):
            names[j, first + j] = 1.0
        return names.expand(batch, heads, count, width)


class _Nothing(nn.Module):
    """In place of a compression: zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:3], x.shape[-1])


class _Unrotated(nn.Module):
    """In place of its rotation: queries and keys come rotated."""

    def rotate_queries_with_cached_keys(
        self, q: torch.Tensor, k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as they are."""
        return q, k


class _Gate(nn.Module):
    """In place of its gates ``(B,T,dim) -> (B,HQ,T,3)``: one open, the others closed."""

    def __init__(self, place: int, heads: int) -> None:
        super().__init__()
        self.place, self.heads = place, heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = x.new_zeros(x.shape[0], self.heads, x.shape[1], 3)
        gates[..., self.place] = 1.0
        return gates


def _members(indices: torch.Tensor, blocks: int) -> torch.Tensor:
    """Which of ``blocks`` blocks a list holds: ``(B,T,H,N) -> (B,T,H,blocks)`` bool."""
    slots = torch.where(indices < 0, blocks, indices).long()
    shape = (*indices.shape[:-1], blocks + 1)
    found = torch.zeros(shape, dtype=torch.bool, device=indices.device)
    return found.scatter(-1, slots, True)[..., :blocks]


def _takes(ask: Ask) -> str:
    config = ask.config
    if config.head_dim != config.v_dim:
        return "one head dim for keys and values only"
    return whole_sequences(ask)


def _slides(ask: Ask) -> str:
    # Its window is given by one key less, which must be one at least.
    return "a window of at least 2 keys only" if ask.config.window_size < 2 else _takes(ask)


def _selects(ask: Ask) -> str:
    why = _takes(ask)
    if why or ask.blocks is None:
        return why
    own = own_block(torch.arange(ask.blocks.shape[1], device=ask.blocks.device), ask.config)
    if bool((ask.blocks != own[:, None, None]).all(-1).any()):
        return "attends the own block of every query, also where a list is without it"
    return ""


def _chooses(ask: Ask) -> str:
    return whole_sequences(ask)


BRANCHES = (
    PeerBranch(
        "cmp",
        "",
        compressed_attention,
        _takes,
        "a query sees a block one token after it is complete; l - d zeros stand before the first token; a "
        "learned key is seen by every query",
    ),
    PeerBranch(
        "score",
        "",
        select_blocks,
        _chooses,
        "own scores: the mean of logits over the group and over a block's strides, normalised again; no "
        "block is selected by rule but the own one",
    ),
    PeerBranch("sel", "", selected_attention, _selects),
    PeerBranch("win", "", sliding_attention, _slides),
)
"""What is asked of native-sparse-attention-pytorch."""
