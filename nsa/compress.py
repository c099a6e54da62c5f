"""phi: from the tokens of a block to one compressed key or value (eq. 7; rules 1 and 10 of the semantics).

Every module maps ``x (B, T, H, D)``, whose first token starts a block, to ``(B, C, H, D)`` with the ``C``
blocks that are complete in ``T`` tokens. ``conv`` and ``mlp`` add a learned intra-block position and begin as
the exact average, so the three agree before training.
"""

from __future__ import annotations

import torch
from torch import nn

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig


class MeanCompression(nn.Module):
    """The average of a block's tokens; no parameters."""

    def __init__(self, config: NSAConfig, dim: int) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B,T,H,D) -> (B,C,H,D)``. Each token is read once: strides are summed, then added into blocks."""
        block, stride = self.config.compression_block_size, self.config.compression_stride
        count = num_compressed_blocks(x.shape[1], self.config)
        strides = block // stride
        if count == 0:
            return x[:, :0]
        sums = x[:, : (count + strides - 1) * stride].unflatten(1, (-1, stride)).sum(2)
        total = sums[:, :count]
        for shift in range(1, strides):
            total = total + sums[:, shift : shift + count]
        return total / block


class _BlockwiseCompression(nn.Module):
    """Shared by learned phis: tokens of each block, with the intra-block position added."""

    def __init__(self, config: NSAConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.position = nn.Parameter(torch.zeros(config.compression_block_size, dim))

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``(B,T,H,D) -> (B,C,H,l,D)``."""
        block, stride = self.config.compression_block_size, self.config.compression_stride
        if x.shape[1] < block:
            return x.new_zeros(x.shape[0], 0, x.shape[2], block, x.shape[3])
        return x.unfold(1, block, stride).transpose(-1, -2) + self.position


class ConvCompression(_BlockwiseCompression):
    """A learned weight per KV head, place in the block and channel (a depthwise convolution of stride d)."""

    def __init__(self, config: NSAConfig, dim: int) -> None:
        super().__init__(config, dim)
        block = config.compression_block_size
        self.weight = nn.Parameter(torch.full((config.num_kv_heads, block, dim), 1.0 / block))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B,T,H,D) -> (B,C,H,D)``."""
        return (self._blocks(x) * self.weight).sum(3)


class MLPCompression(_BlockwiseCompression):
    """The average plus a two-layer MLP on the block's tokens, shared by the KV heads; its last layer
    begins at zero.
    """

    def __init__(self, config: NSAConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.up = nn.Linear(config.compression_block_size * dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B,T,H,D) -> (B,C,H,D)``."""
        blocks = self._blocks(x)
        residual: torch.Tensor = self.down(nn.functional.silu(self.up(blocks.flatten(3))))
        return blocks.mean(3) + residual


COMPRESSIONS: dict[str, type[nn.Module]] = {
    "mean": MeanCompression,
    "conv": ConvCompression,
    "mlp": MLPCompression,
}
