"""Packed sequences: whole ones, one after the other, in the one row of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig


@dataclass(frozen=True, eq=False)
class Packed:
    """Where each of ``n`` sequences begins: in ``(1,T,...)`` tensors of tokens, and in ``(1,C,...)`` ones of
    compressed blocks, of which each sequence has its own and none reaches into the next.

    ``lengths`` are known to the host; ``tokens`` and ``blocks`` ``(n + 1,)`` int32, from 0 to T and to C, are
    on the tensors' device.
    """

    lengths: tuple[int, ...]
    blocks_each: tuple[int, ...]
    tokens: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def of(
        cls,
        cu_seqlens: torch.Tensor,
        num_tokens: int,
        config: NSAConfig,
        *,
        device: torch.device | None = None,
    ) -> Packed:
        """The sequences that ``cu_seqlens (n + 1,)`` bounds, ascending integers from 0 to ``num_tokens``, for
        tensors on ``device`` (that of ``cu_seqlens``).

        The host waits for ``cu_seqlens`` where it is on a GPU.

        Raises:
            ValueError: bounds that do not ascend from 0 to ``num_tokens``.
        """
        bounds = cu_seqlens.tolist()
        ascending = len(bounds) > 1 and all(a <= b for a, b in pairwise(bounds))
        if not ascending or bounds[0] != 0 or bounds[-1] != num_tokens:
            raise ValueError(f"cu_seqlens must ascend from 0 to {num_tokens}, got {bounds}")
        lengths = tuple(b - a for a, b in pairwise(bounds))
        each = tuple(num_compressed_blocks(length, config) for length in lengths)
        blocks = torch.tensor(list(accumulate(each, initial=0)), dtype=torch.int32)
        device = cu_seqlens.device if device is None else device
        tokens = cu_seqlens.to(device=device, dtype=torch.int32).contiguous()
        return cls(lengths, each, tokens, blocks.to(device))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Tokens and compressed blocks of each sequence that has any token."""
        tokens = pairwise(accumulate(self.lengths, initial=0))
        blocks = pairwise(accumulate(self.blocks_each, initial=0))
        for token, block in zip(tokens, blocks, strict=True):
            if token[0] < token[1]:
                yield slice(*token), slice(*block)

    def positions(self) -> torch.Tensor:
        """``(T,)`` int64: the position of each token in its sequence."""
        begins = self.tokens[:-1].long().repeat_interleave(self.tokens.diff(), output_size=sum(self.lengths))
        return torch.arange(len(begins), device=begins.device) - begins
