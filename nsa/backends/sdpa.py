"""Compressed, selected and sliding attention through torch's fused SDPA kernels, one call a piece. Runs
anywhere.

No mask larger than one piece exists at a time. Selected attention works on every key up to the query and
masks what is
not selected: exact, and quadratic beyond ``n l'`` tokens.
"""

from __future__ import annotations

import torch

from nsa.backends._fused import attend_pieces
from nsa.backends._pieces import Output, compressed_pieces, per_sequence, selected_pieces, sliding_pieces
from nsa.config import NSAConfig


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.compressed_attention`. A ``q_start`` tensor is read on the host, once a
    call.
    """
    if isinstance(q_start, torch.Tensor):
        return per_sequence(compressed_attention, (q, k_cmp, v_cmp), config, q_start)
    pieces = compressed_pieces(q, k_cmp.shape[1], config, q_start)
    return attend_pieces(q, k_cmp, v_cmp, pieces, config.scale)


def sliding_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: int | torch.Tensor = 0
) -> Output:
    """See :func:`nsa.reference.sliding_attention`. A ``q_start`` tensor is read on the host, once a call."""
    if isinstance(q_start, torch.Tensor):
        return per_sequence(sliding_attention, (q, k, v), config, q_start)
    pieces = sliding_pieces(q, k.shape[1], config, q_start)
    return attend_pieces(q, k, v, pieces, config.scale)


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.selected_attention`. Which rows select everything is read on the host, once
    a call.
    """
    if isinstance(q_start, torch.Tensor):
        return per_sequence(selected_attention, (q, k, v, block_indices), config, q_start)
    return attend_pieces(
        q, k, v, selected_pieces(q, block_indices, k.shape[1], config, q_start), config.scale
    )
