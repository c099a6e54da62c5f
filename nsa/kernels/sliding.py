"""Sliding attention: each query over the last ``w`` keys, its own included (rule 8)."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig
from nsa.kernels._ranges import attend, static
from nsa.kernels._tiles import Output, layout_of
from nsa.packing import Packed

STATIC = static("sliding")


def sliding_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    packed: Packed | None = None,
) -> Output:
    """See :func:`nsa.reference.sliding_attention`; fp32, fp16 or bf16, forward only."""
    layout = layout_of(q, k, packed)
    return attend(q, k, v, config, q_start, layout, window=config.window_size)
