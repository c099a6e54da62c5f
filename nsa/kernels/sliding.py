"""Sliding attention: each query over the last ``w`` keys, its own included (rule 8)."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig
from nsa.kernels._ranges import attend, static
from nsa.kernels._ranges import launched as launched_ranges
from nsa.kernels._tiles import Output, layout_of
from nsa.kernels.work import Call, Launched
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


def launched(call: Call, arch: tuple[int, int]) -> Launched:
    """What is launched for ``call``, for :mod:`nsa.kernels.work`."""
    return launched_ranges(call, arch, call.kv_len, window=call.config.window_size)
