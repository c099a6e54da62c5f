"""Backends with one planted mistake each, of the signature of the branch's function in the specification."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import torch

from nsa import NSAConfig, reference
from nsa.blocks import query_positions

Output = tuple[torch.Tensor, torch.Tensor]

calls = count()


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, config: NSAConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(B,H,G,T,S)``, -inf where ``allowed (B|1,H|1,T,S)`` is not, and values ``(B,H,S,DV)``."""
    grouped = q.unflatten(2, (config.num_kv_heads, config.group_size))
    logits = torch.einsum("bthgd,bshd->bhgts", grouped, k).to(reference.softmax_dtype(q.dtype)) * config.scale
    return logits.masked_fill(~allowed.unsqueeze(2), float("-inf")), v.transpose(1, 2)


def output(p: torch.Tensor, v: torch.Tensor, lse: torch.Tensor) -> Output:
    o = torch.einsum("bhgts,bhsd->bthgd", p.to(v.dtype), v).flatten(2, 3)
    return o, lse.permute(0, 3, 1, 2).flatten(2, 3).detach()


def window(q: torch.Tensor, k: torch.Tensor, config: NSAConfig, q_start: Any) -> torch.Tensor:
    position = query_positions(q_start, q.shape[1], q.device).unsqueeze(-1)
    key = torch.arange(k.shape[1], device=q.device)
    return ((key <= position) & (key > position - config.window_size)).unsqueeze(1)


def listed(
    q: torch.Tensor, k: torch.Tensor, lists: torch.Tensor, config: NSAConfig, q_start: Any
) -> torch.Tensor:
    blocks = torch.arange(k.shape[1], device=q.device) // config.selection_block_size
    chosen = (lists.unsqueeze(-1) == blocks).any(-2).transpose(1, 2)
    causal = torch.arange(k.shape[1], device=q.device) <= query_positions(
        q_start, q.shape[1], q.device
    ).unsqueeze(-1)
    return chosen & causal.unsqueeze(1)


def win_mask_polarity(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """True of a boolean mask taken for "leave out"."""
    logits, values = masked(q, k, v, ~window(q, k, config, q_start), config)
    some = (logits > float("-inf")).any(-1, keepdim=True)
    p = logits.masked_fill(~some, 0.0).softmax(-1) * some
    return output(p, values, logits.logsumexp(-1))


def win_one_too_many(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """w + 1 keys."""
    wider = replace(config, window_size=config.window_size + 1)
    return reference.sliding_attention(q, k, v, wider, q_start=q_start)


def win_decode_one_too_many(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """w + 1 keys, but in decode alone."""
    wider = replace(config, window_size=config.window_size + (q.shape[1] == 1))
    return reference.sliding_attention(q, k, v, wider, q_start=q_start)


def win_shared_maximum(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """The first query's maximum subtracted from the logits of all."""
    allowed = window(q, k, config, q_start)
    logits, values = masked(q, k, v, allowed, config)
    some = allowed.unsqueeze(2).any(-1, keepdim=True)
    safe = logits.masked_fill(~some, 0.0)
    top = safe[..., :1, :].amax(-1, keepdim=True).detach()
    weights = (safe - top).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1).masked_fill(~some.squeeze(-1), float("-inf"))
    return output(weights / total * some, values, lse)


def win_knows_its_batch(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """One more unit in the last place for each sequence of the batch, in fp32."""
    o, lse = reference.sliding_attention(q, k, v, config, q_start=q_start)
    return (o * (1 + torch.finfo(o.dtype).eps * q.shape[0]) if o.dtype == torch.float32 else o), lse


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * (1 + torch.finfo(grad.dtype).eps * (next(calls) % 2))


def win_backward_that_varies(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """Every other backward differs in the last place, as sums by atomics do."""
    o, lse = reference.sliding_attention(q, k, v, config, q_start=q_start)
    return _Noise.apply(o), lse


def win_crash(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """A kernel that does not compile for G = 3."""
    if config.group_size == 3:
        raise RuntimeError("G must be a power of two\nsecond line")
    return reference.sliding_attention(q, k, v, config, q_start=q_start)


def cmp_early(q: Any, k_cmp: Any, v_cmp: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
    """A block seen from its first token of its last stride on, before it is complete."""
    sooner = config.compression_stride - 1
    return reference.compressed_attention(q, k_cmp, v_cmp, config, q_start=q_start + sooner)


def cmp_gradient_of_empty_rows(
    q: Any, k_cmp: Any, v_cmp: Any, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """An added mask of -inf, whose NaN is mended in the output alone."""
    position = query_positions(q_start, q.shape[1], q.device).unsqueeze(-1)
    last = torch.arange(k_cmp.shape[1]) * config.compression_stride + config.compression_block_size - 1
    seen = (last <= position).unsqueeze(1)
    if k_cmp.shape[1] == 0:
        return reference.compressed_attention(q, k_cmp, v_cmp, config, q_start=q_start)
    logits, values = masked(q, k_cmp, v_cmp, torch.ones_like(seen), config)
    logits = logits + torch.where(seen, 0.0, float("-inf")).unsqueeze(2)
    return output(logits.softmax(-1).nan_to_num(), values, logits.detach().logsumexp(-1))


def sel_poisoned_by_empty(
    q: Any, k: Any, v: Any, block_indices: Any, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """An online softmax over the slots, whose first empty slot gives exp(-inf + inf)."""
    logits, values = masked(q, k, v, listed(q, k, block_indices, config, q_start), config)
    dtype, size = logits.dtype, config.selection_block_size
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[-1] % size), value=float("-inf"))
    tiles = padded.unflatten(-1, (-1, size))
    slots = block_indices.transpose(1, 2)[:, :, None].long()
    repeated = (slots.unsqueeze(-1) == slots.unsqueeze(-2)).tril(-1).any(-1)
    top = logits.new_full(logits.shape[:-1], float("-inf"))
    total, weights = torch.zeros_like(top), torch.zeros_like(padded)
    for slot in range(slots.shape[-1]):
        block = slots[..., slot].expand(top.shape)
        tile = tiles.gather(-2, block.clamp_min(0)[..., None, None].expand(*top.shape, 1, size)).squeeze(-2)
        empty = (block < 0) | repeated[..., slot].expand(top.shape)
        tile = tile.masked_fill(empty[..., None], float("-inf"))
        new = torch.maximum(top, tile.detach().amax(-1))
        scale = (top - new).exp()
        part = (tile - new[..., None]).exp()
        place = block.clamp_min(0)[..., None] * size + torch.arange(size)
        weights = (weights * scale[..., None]).scatter_add(-1, place, part)
        total, top = total * scale + part.sum(-1), new
    p = weights[..., : logits.shape[-1]] / total[..., None]
    return output(p.to(dtype), values, top + total.log())


def sel_nothing_is_nan(
    q: Any, k: Any, v: Any, block_indices: Any, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """A plain softmax, NaN where a list is empty."""
    logits, values = masked(q, k, v, listed(q, k, block_indices, config, q_start), config)
    return output(logits.softmax(-1), values, logits.logsumexp(-1))


def sel_counts_twice(
    q: Any, k: Any, v: Any, block_indices: Any, config: NSAConfig, *, q_start: Any = 0
) -> Output:
    """A block named twice weighs double."""
    logits, values = masked(q, k, v, listed(q, k, block_indices, config, q_start), config)
    blocks = torch.arange(k.shape[1]) // config.selection_block_size
    times = (block_indices.unsqueeze(-1) == blocks).sum(-2).transpose(1, 2)[:, :, None]
    logits = logits + times.clamp_min(1).log().to(logits.dtype)
    some = (logits > float("-inf")).any(-1, keepdim=True)
    lse = logits.logsumexp(-1)
    return output(logits.masked_fill(~some, 0.0).softmax(-1) * some, values, lse)


def ranked(scores: torch.Tensor, config: NSAConfig, q_start: Any, rows: int, higher: bool) -> torch.Tensor:
    """Rule 6 from any scores; ``higher`` gives ties to the higher index."""
    block = torch.arange(scores.shape[-1])
    position = query_positions(q_start, rows, scores.device)
    own = (position // config.selection_block_size)[:, :, None, None]
    forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
    scores = scores.masked_fill(forced, float("inf")).masked_fill(block > own, float("-inf"))
    scores = scores.flip(-1) if higher else scores
    found = scores.sort(dim=-1, descending=True, stable=True)
    n, end = config.num_selected_blocks, scores.shape[-1]
    chosen = end - 1 - found.indices if higher else found.indices
    chosen = chosen[..., :n].masked_fill(found.values[..., :n] == float("-inf"), end).sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == end, -1)
    return torch.nn.functional.pad(chosen, (0, n - chosen.shape[-1]), value=-1).to(torch.int32)


def score_fp16_cube(q: Any, k_cmp: Any, config: NSAConfig, *, q_start: Any = 0, kv_len: Any = None) -> Any:
    """Scores kept in fp16, and cubed."""
    scores = reference.block_scores(q, k_cmp, config, q_start=q_start, kv_len=kv_len)
    return ranked(scores.half() ** 3, config, q_start, q.shape[1], higher=False)


def score_higher_ties(q: Any, k_cmp: Any, config: NSAConfig, *, q_start: Any = 0, kv_len: Any = None) -> Any:
    """Ties to the higher index."""
    scores = reference.block_scores(q, k_cmp, config, q_start=q_start, kv_len=kv_len)
    return ranked(scores, config, q_start, q.shape[1], higher=True)


def score_largest_head(q: Any, k_cmp: Any, config: NSAConfig, *, q_start: Any = 0, kv_len: Any = None) -> Any:
    """The largest of a group's scores in place of their sum."""
    one = replace(config, num_kv_heads=config.num_heads)
    keys = k_cmp.repeat_interleave(config.group_size, 2)
    scores = reference.block_scores(q, keys, one, q_start=q_start, kv_len=kv_len)
    largest = scores.unflatten(2, (config.num_kv_heads, config.group_size)).amax(3)
    return ranked(largest, config, q_start, q.shape[1], higher=False)


def score_flat_weights(q: Any, k_cmp: Any, config: NSAConfig, *, q_start: Any = 0, kv_len: Any = None) -> Any:
    """Each compressed block that overlaps counts once, in place of eq. 9's weights."""
    position = query_positions(q_start, q.shape[1], q.device).unsqueeze(-1)
    first = torch.arange(k_cmp.shape[1]) * config.compression_stride
    seen = (first + config.compression_block_size - 1 <= position).unsqueeze(1)
    logits, _ = masked(q.float(), k_cmp.float(), k_cmp, seen, config)
    p = logits.softmax(-1).nan_to_num().sum(2)
    length = int(position.max()) + 1 if kv_len is None else kv_len
    size = config.selection_block_size
    begins = torch.arange(-(-length // size))[:, None] * size
    overlaps = (first < begins + size) & (first + config.compression_block_size > begins)
    scores = torch.einsum("bhtc,jc->bthj", p, overlaps.float())
    return ranked(scores, config, q_start, q.shape[1], higher=False)
