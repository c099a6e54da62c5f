"""Compressed, selected and sliding attention through FlashAttention 2, 3 and 4: the same calls of three
libraries. CUDA, fp16 and bf16.
"""

from __future__ import annotations

import torch

from nsa.backends import _flash_installed
from nsa.backends._flash_library import Library, Output
from nsa.backends._flash_packs import selected
from nsa.backends._flash_rows import compressed, sliding
from nsa.config import NSAConfig


class Flash:
    """The three branches through one ``generation`` of FlashAttention: fa2, fa3 or fa4."""

    def __init__(self, generation: str) -> None:
        self.generation = generation

    def provider(self) -> str | None:
        """The installed library and its version, e.g. ``flash_attn 2.8.3``; None without one."""
        return _flash_installed.provider(self.generation)

    def missing(self) -> str | None:
        """What is not installed, and the line that installs it; None where it is."""
        if self.provider() is not None:
            return None
        return f"{_flash_installed.MISSING[self.generation]}: {_flash_installed.INSTALL[self.generation]}"

    def library(self) -> Library:
        """The library itself, imported now; RuntimeError without one."""
        return _flash_installed.load(self.generation)

    def sliding_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """See :func:`nsa.reference.sliding_attention`. One call: ``w - 1`` keys to the left, none to the
        right.

        A ``q_start`` tensor runs as packed sequences, without a host synchronisation; every query's own key
        must then exist (``q_start + T <= S``), else the device asserts.
        """
        return sliding(self.library(), q, k, v, config, q_start, packed=False)

    def sliding_attention_varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """:meth:`sliding_attention` through the kernel for packed sequences, whatever ``q_start`` is."""
        return sliding(self.library(), q, k, v, config, q_start, packed=True)

    def compressed_attention(
        self,
        q: torch.Tensor,
        k_cmp: torch.Tensor,
        v_cmp: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """See :func:`nsa.reference.compressed_attention`. At most three calls, whatever the length.

        ``d`` consecutive queries see the same number of blocks. One packed sequence for each such bucket
        would be exact, but it fills ``d`` rows of a tile of 64 or 128 and needs every prefix of the keys
        packed, half of ``C^2`` keys. Taken the other way, every ``d``-th query sees exactly one block more
        than the one before it: each of the ``d`` phases is plain causal attention of ``T/d`` queries over the
        same ``C`` keys. The phases run as heads of one call. That copies either the keys, ``d`` times (``d
        C`` is about the length), or the queries, whichever is less. What fills no whole bucket, at either
        end, sees one number of blocks and is a call without a mask.

        A ``q_start`` tensor with one query a sequence (decode) runs without a host synchronisation; with more
        queries it is read on the host, once a call.
        """
        return compressed(self.library(), q, k_cmp, v_cmp, config, q_start, packed=False)

    def compressed_attention_varlen(
        self,
        q: torch.Tensor,
        k_cmp: torch.Tensor,
        v_cmp: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """:meth:`compressed_attention` through the kernel for packed sequences, whatever ``q_start`` is."""
        return compressed(self.library(), q, k_cmp, v_cmp, config, q_start, packed=True)

    def selected_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_indices: torch.Tensor,
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
    ) -> Output:
        """See :func:`nsa.reference.selected_attention`. Each (token, KV head) is a packed sequence of G
        queries.

        Its keys are the selected tokens up to the query itself, so the call is not causal: a causal one would
        hide keys from the group's first heads. Keys are packed in chunks of bounded memory, and again in the
        backward, without a loop over queries or a host synchronisation; their gradients add up in fp32.
        """
        return selected(self.library(), q, k, v, block_indices, config, q_start)


FA2, FA3, FA4 = Flash("fa2"), Flash("fa3"), Flash("fa4")
