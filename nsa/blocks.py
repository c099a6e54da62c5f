"""Integer geometry of NSA: which blocks exist, who sees them, and how the two block grids overlap.

Positions are 0-based. ``l d l' n w`` are the configuration's compression block, stride, selection block,
number selected and window. Functions of a position take a python int or an integer tensor alike.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from nsa.config import NSAConfig

IntLike = TypeVar("IntLike", int, torch.Tensor)


def num_compressed_blocks(length: int, config: NSAConfig) -> int:
    """Complete compressed blocks in ``length`` tokens; 0 while ``length < l``."""
    return max(0, (length - config.compression_block_size) // config.compression_stride + 1)


def visible_compressed_blocks(position: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    """Compressed blocks a query at ``position`` sees: those with ``i d + l - 1 <= position``. Same shape,
    int64.
    """
    past = position - (config.compression_block_size - 1)
    return (torch.div(past, config.compression_stride, rounding_mode="floor") + 1).clamp_min(0)


def num_selection_blocks(length: int, config: NSAConfig) -> int:
    """Selection blocks that begin within ``length`` tokens; the last may be incomplete."""
    return -(-length // config.selection_block_size)


def own_block(position: IntLike, config: NSAConfig) -> IntLike:
    """Selection block that holds ``position``."""
    return position // config.selection_block_size


def window_start(position: int, config: NSAConfig) -> int:
    """First key of the window of a query at ``position``: ``max(0, position - w + 1)``."""
    return max(0, position - config.window_size + 1)


def overlap_weights(config: NSAConfig) -> tuple[int, tuple[int, ...]]:
    """Eq. 9 as a stencil: ``score[j] = sum_m weights[m] * p_cmp[j * l'/d + first + m]``.

    Weight ``m`` counts the pairs (stride of the selection block, stride of the compressed block) that land on
    that compressed block; out-of-range blocks count 0. For 32/16/64: first = -1, weights 1 2 2 2 1.
    """
    per_selection = config.selection_block_size // config.compression_stride
    per_compression = config.compression_block_size // config.compression_stride
    first = 1 - per_compression
    counts = [0] * (per_selection + per_compression - 1)
    for m in range(per_selection):
        for n in range(per_compression):
            counts[m - n - first] += 1
    return first, tuple(counts)


def tokens_read(length: int, config: NSAConfig) -> dict[str, int]:
    """Key tokens one decode step at ``length`` tokens reads per KV head and branch, exactly.

    The query is the last token, ``length - 1``. ``cmp`` counts complete compressed blocks, ``sel`` the tokens
    of the selected blocks up to the query, ``win`` the window. Their sum is the paper's table 4 without its
    rounding (8192 tokens: 511 + 1024 + 512 = 2047).
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    size = config.selection_block_size
    last = (length - 1) // size
    own = length - last * size
    if last + 1 <= config.num_selected_blocks:
        selected = length
    elif config.num_local_blocks:
        selected = (config.num_selected_blocks - 1) * size + own
    else:
        # The own block competes; counted as chosen, the most a step can read is one block more than its own
        # tail.
        selected = config.num_selected_blocks * size
    return {
        "cmp": num_compressed_blocks(length, config),
        "sel": selected,
        "win": min(length, config.window_size),
    }


def query_positions(q_start: int | torch.Tensor, num_queries: int, device: torch.device) -> torch.Tensor:
    """Absolute positions of the queries, ``(1, T)`` or ``(B, T)`` int64, from an int or ``(B,)`` start."""
    steps = torch.arange(num_queries, device=device)
    if isinstance(q_start, torch.Tensor):
        return q_start.to(device=device, dtype=torch.int64).reshape(-1, 1) + steps
    return (steps + q_start).unsqueeze(0)
