"""Sliding attention: each query over the last ``w`` keys, its own included (rule 8)."""

from __future__ import annotations

import torch

from nsa.config import NSAConfig
from nsa.kernels._ranges import attend, static
from nsa.kernels._ranges import launched as launched_ranges
from nsa.kernels._tiles import Output
from nsa.kernels.work import Call, Launched

STATIC = static("sliding")


def sliding_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: int | torch.Tensor = 0
) -> Output:
    """See :func:`nsa.reference.sliding_attention`; fp32, fp16 or bf16, forward only."""
    return attend(q, k, v, config, q_start, window=config.window_size)


def launched(call: Call, arch: tuple[int, int]) -> Launched:
    """What is launched for ``call``, for :mod:`nsa.kernels.work`."""
    return launched_ranges(call, arch, call.kv_len, window=call.config.window_size)
