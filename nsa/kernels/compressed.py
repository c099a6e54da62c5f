"""Compressed attention: each query over the compressed blocks complete at its position (rules 1 to 3)."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig
from nsa.kernels._ranges import attend, static
from nsa.kernels._tiles import Output, layout_of
from nsa.packing import Packed

STATIC = static("compressed")


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    packed: Packed | None = None,
) -> Output:
    """See :func:`nsa.reference.compressed_attention`; fp32, fp16 or bf16, forward only."""
    block, stride = config.compression_block_size, config.compression_stride
    layout = layout_of(q, k_cmp, packed, by_blocks=True)
    return attend(q, k_cmp, v_cmp, config, q_start, layout, block=block, stride=stride)
