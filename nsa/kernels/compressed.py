"""Compressed attention: each query over the compressed blocks complete at its position (rules 1 to 3)."""

from __future__ import annotations

import torch

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.kernels._ranges import attend, static
from nsa.kernels._ranges import launched as launched_ranges
from nsa.kernels._tiles import Output, layout_of
from nsa.kernels.work import Call, Launched
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


def launched(call: Call, arch: tuple[int, int]) -> Launched:
    """What is launched for ``call``, for :mod:`nsa.kernels.work`."""
    config = call.config
    block, stride = config.compression_block_size, config.compression_stride
    num_keys = num_compressed_blocks(call.kv_len, config)
    return launched_ranges(call, arch, num_keys, block=block, stride=stride)
