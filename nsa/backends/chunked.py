"""Block scores and top-n in chunks of query rows: bounded memory, no T x C matrix, any device, no host
synchronisation.
"""

from __future__ import annotations

import math

import torch

from nsa.blocks import (
    num_compressed_blocks,
    num_selection_blocks,
    overlap_weights,
    own_block,
    query_positions,
    visible_compressed_blocks,
)
from nsa.config import NSAConfig

# Elements of the probability matrix of one chunk, all heads: 4 MiB in fp32; less waits for its threads.
CHUNK_ELEMENTS = 2**20
ALIGNED_KEYS = 16
# On a GPU a chunk must fill the machine instead.
CHUNK_ELEMENTS_GPU = 2**26


@torch.no_grad()
def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
) -> torch.Tensor:
    """See :func:`nsa.reference.select_blocks`: the same sets, scores in fp32 (fp64 for fp64 inputs)."""
    batch, rows = q.shape[:2]
    n = config.num_selected_blocks
    if kv_len is None:
        kv_len = rows + (int(q_start.max()) if isinstance(q_start, torch.Tensor) else q_start)
    num_blocks = num_selection_blocks(kv_len, config)
    # Rows with at most n existing blocks take all of them; no score is needed.
    trivial = rows if num_blocks <= n else 0
    if not isinstance(q_start, torch.Tensor):
        trivial = min(rows, max(0, n * config.selection_block_size - q_start))
    position = query_positions(q_start, rows, q.device)
    parts = []
    if trivial:
        block = torch.arange(n, dtype=torch.int32, device=q.device)
        own = own_block(position[:, :trivial, None], config)
        every = torch.where(block <= own, block, -1)
        parts.append(every[:, :, None].expand(batch, -1, config.num_kv_heads, -1))
        if trivial == rows:
            return parts[0]
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = config.group_size
    # (B*H, T*G, D): the G queries of a token are neighbouring rows; a chunk is one product per KV head.
    queries = q[:, trivial:].to(dtype) * (config.scale / math.log(2.0))
    queries = queries.unflatten(2, (config.num_kv_heads, group)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    # Filled up with keys nobody sees: torch's CPU kernels are far slower over 127 columns than over 128.
    keys = k_cmp.transpose(1, 2).flatten(0, 1).to(dtype)
    keys = torch.nn.functional.pad(keys, (0, 0, 0, -keys.shape[1] % ALIGNED_KEYS)).contiguous().mT
    elements = CHUNK_ELEMENTS if q.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    step = max(16, elements // max(1, batch * config.num_heads * k_cmp.shape[1]))
    for row in range(trivial, rows, step):
        end = min(row + step, rows)
        seen = None if isinstance(q_start, torch.Tensor) else (q_start + row + 1, q_start + end)
        chunk = queries[:, (row - trivial) * group : (end - trivial) * group]
        parts.append(_select_rows(chunk, keys, position[:, row:end], num_blocks, seen, config))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _select_rows(
    q: torch.Tensor,
    keys: torch.Tensor,
    position: torch.Tensor,
    num_blocks: int,
    seen: tuple[int, int] | None,
    config: NSAConfig,
) -> torch.Tensor:
    """Top-n of a chunk of queries scaled to base 2, ``(B*H, T*G, D)`` at ``position (B or 1, T)``. Returns
    ``(B,T,H,n)`` int32.

    ``seen``: how many tokens the first and the last query see, where the host knows.
    """
    everyone_sees = 0
    if seen is not None:
        everyone_sees = num_compressed_blocks(seen[0], config)
        columns = num_compressed_blocks(seen[1], config)
        keys = keys[..., : columns + -columns % ALIGNED_KEYS]
        num_blocks = min(num_blocks, num_selection_blocks(seen[1], config))
    p = _group_probabilities(q, keys, position, everyone_sees, config)
    scores = _block_scores(p, num_blocks, config)

    block = torch.arange(num_blocks, device=q.device)
    own = own_block(position, config)[:, None, :, None]
    # Added, not filled: adding vectorises. Forced blocks become +inf, blocks yet to come -inf.
    rank = torch.zeros(own.shape[0], 1, own.shape[2], num_blocks, dtype=scores.dtype, device=q.device)
    rank.masked_fill_(
        (block < config.num_initial_blocks) | (block > own - config.num_local_blocks), float("inf")
    )
    rank.masked_fill_(block > own, float("-inf"))
    return _top_n(scores.add_(rank), config.num_selected_blocks).transpose(1, 2)


def _group_probabilities(
    q: torch.Tensor, keys: torch.Tensor, position: torch.Tensor, everyone_sees: int, config: NSAConfig
) -> torch.Tensor:
    """Sum over the group's heads of p_cmp, ``(B,H,T,C)``. The first ``everyone_sees`` blocks need no mask."""
    heads, blocks = (-1, config.num_kv_heads), keys.shape[-1]
    logits = torch.bmm(q, keys).unflatten(1, (-1, config.group_size)).unflatten(0, heads)  # (B, H, T, G, C)
    visible = visible_compressed_blocks(position, config)[:, None, :, None, None]
    hidden = torch.arange(everyone_sees, blocks, device=q.device) >= visible
    # A finite floor, not -inf: a row that sees no block must not turn into NaN; it is cleared below.
    logits[..., everyone_sees:].masked_fill_(hidden, torch.finfo(logits.dtype).min)
    # softmax in base 2: exp2 costs a third of exp in torch's CPU kernels.
    p = logits.sub_(logits.amax(-1, keepdim=True)).exp2_()
    p.mul_(p.sum(-1, keepdim=True).reciprocal_())
    p[..., everyone_sees:].masked_fill_(hidden, 0.0)
    return p.sum(3)


def _block_scores(p: torch.Tensor, num_blocks: int, config: NSAConfig) -> torch.Tensor:
    """Eq. 9 as a strided stencil over the compressed blocks: ``(B,H,T,C) -> (B,H,T,num_blocks)``."""
    first, weights = overlap_weights(config)
    stride = config.selection_block_size // config.compression_stride
    needed = (num_blocks - 1) * stride + len(weights)
    padded = torch.nn.functional.pad(p, (-first, needed + first - p.shape[-1]))
    scores = p.new_zeros(*p.shape[:-1], num_blocks)
    for m, weight in enumerate(weights):
        scores.add_(padded[..., m::stride][..., :num_blocks], alpha=weight)
    return scores


def _top_n(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Ascending int32 indices of the ``n`` best of the last dim, ties to the lower index, -1 for -inf at
    the tail.
    """
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, dtype=torch.int32, device=scores.device)
    if num_blocks <= n:
        chosen = torch.where(scores == float("-inf"), num_blocks, block)
        chosen = torch.nn.functional.pad(chosen, (0, n - num_blocks), value=num_blocks)
        return torch.where(chosen == num_blocks, -1, chosen).to(torch.int32)
    best = scores.topk(n, dim=-1, sorted=False)
    threshold = best.values.amin(-1, keepdim=True)
    keep = (scores >= threshold) & (scores > float("-inf"))
    if scores.device.type == "cpu" and bool((keep.sum(-1) == n).all()):
        # The common case, seen on the host for free: full rows without a tie at the threshold.
        return best.indices.to(torch.int32).sort(-1).values
    above = scores > threshold
    tied = keep & ~above
    keep = above | (tied & (tied.cumsum(-1) <= n - above.sum(-1, keepdim=True)))
    chosen = torch.where(keep, block, num_blocks).topk(n, dim=-1, largest=False, sorted=True).values
    return torch.where(chosen == num_blocks, -1, chosen).to(torch.int32)
