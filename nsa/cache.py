"""The KV cache of one NSA layer: what each branch keeps of the past, in memory taken once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig

KV = tuple[torch.Tensor, torch.Tensor]


class BranchViews(NamedTuple):
    """Keys and values of every branch, ``(B, tokens, H, D or DV)``; ``win_start`` is the position of
    ``win[0][:, 0]``.
    """

    cmp: KV
    sel: KV
    win: KV
    win_start: int


class CacheState(NamedTuple):
    """What :meth:`KVCache.rollback` needs to forget the tokens appended after it was taken."""

    length: int


class _Rows:
    """Rows of K and V ``(B, capacity, H, D or DV)``: written in place, or concatenated where gradients
    must flow.
    """

    def __init__(self, like: list[torch.Tensor], capacity: int, keep_graph: bool) -> None:
        self.keep_graph = keep_graph
        rows = 0 if keep_graph else capacity
        self.data = [t.new_zeros(t.shape[0], rows, *t.shape[2:]) for t in like]

    def write(self, at: int, new: KV) -> None:
        for i, part in enumerate(new):
            if self.keep_graph:
                self.data[i] = torch.cat([self.data[i][:, :at], part], 1)
            else:
                self.data[i][:, at : at + part.shape[1]] = part

    def view(self, start: int, end: int) -> KV:
        return self.data[0][:, start:end], self.data[1][:, start:end]

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.data)


class _Trailing:
    """The last tokens of a sequence, in rows that move to the front when they reach the end."""

    def __init__(self, like: list[torch.Tensor], capacity: int, keep_graph: bool) -> None:
        self.capacity = capacity
        self.rows = _Rows(like, capacity, keep_graph)
        self.start = 0  # position of the first row

    def append(self, length: int, needed: int, keep: int, new: KV) -> KV:
        """Add tokens at position ``length``; return the ``needed`` tokens before them and themselves.

        At least the last ``keep`` tokens stay.
        """
        count, held = new[0].shape[1], length - self.start
        if held + count > self.capacity or self.rows.keep_graph:
            kept = self.rows.view(held - needed, held)
            if needed + count > self.capacity:
                whole = (torch.cat([kept[0], new[0]], 1), torch.cat([kept[1], new[1]], 1)) if needed else new
                last = min(keep, needed + count)
                self.rows.write(
                    0, (whole[0][:, needed + count - last :], whole[1][:, needed + count - last :])
                )
                self.start = length + count - last
                return whole
            self.rows.write(0, (kept[0].clone(), kept[1].clone()))
            self.start, held = length - needed, needed
        self.rows.write(held, new)
        return self.rows.view(held - needed, held + count)


class KVCache:
    """Preallocated keys and values of the three branches, updated in place.

    Per branch and sequence it keeps: ``cmp`` every complete compressed block and the raw tokens of the blocks
    still open (``2 l`` rows); ``sel`` every token; ``win`` the window (``2 w`` rows). Trailing rows move to
    the front when full.

    Args:
        config: the layer's configuration.
        batch_size: sequences, all of one length.
        max_seq_len: tokens it can hold; appending more is a ValueError and changes nothing.
        dtype, device: of the stored tensors.
        shared_kv: the window reads the selected branch's keys, for a layer built with ``shared_kv=True``.
        keep_graph: let gradients flow through the cache (chunked or stepwise training). Rows are then
        concatenated at
            each append instead of written in place.
    """

    def __init__(
        self,
        config: NSAConfig,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shared_kv: bool = False,
        keep_graph: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.config, self.batch_size, self.max_seq_len = config, batch_size, max_seq_len
        self.shared_kv, self.keep_graph = shared_kv, keep_graph
        self.length = 0
        heads = config.num_kv_heads
        like = [
            torch.empty(batch_size, 0, heads, dim, dtype=dtype, device=device)
            for dim in (config.head_dim, config.v_dim)
        ]
        window_rows = 0 if shared_kv else min(max_seq_len, 2 * config.window_size)
        self._cmp = _Rows(like, num_compressed_blocks(max_seq_len, config), keep_graph)
        self._open = _Trailing(like, min(max_seq_len, 2 * config.compression_block_size), keep_graph)
        self._sel = _Rows(like, max_seq_len, keep_graph)
        self._win = _Trailing(like, window_rows, keep_graph)

    @property
    def num_blocks(self) -> int:
        """Complete compressed blocks held."""
        return num_compressed_blocks(self.length, self.config)

    def bytes_per_branch(self) -> dict[str, int]:
        """Allocated bytes of ``cmp``, ``sel`` and ``win``, over the whole batch."""
        return {
            "cmp": self._cmp.bytes() + self._open.rows.bytes(),
            "sel": self._sel.bytes(),
            "win": self._win.rows.bytes(),
        }

    def append(self, raw: KV, sel: KV, win: KV, compress: Callable[[KV, int], KV]) -> BranchViews:
        """Add ``T`` tokens and return what their queries attend.

        Args:
            raw, sel, win: keys ``(B,T,H,D)`` and values ``(B,T,H,DV)``; ``raw`` is what compression works on.
            compress: maps raw tokens that begin at block ``i`` (second argument) to the complete blocks among
            them.
        """
        batch, new = sel[0].shape[:2]
        if batch != self.batch_size:
            raise ValueError(f"this cache holds {self.batch_size} sequences, got a batch of {batch}")
        stored = self._sel.data[0].dtype
        if sel[0].dtype != stored:
            raise ValueError(f"this cache stores {stored}, got {sel[0].dtype}")
        if self.length + new > self.max_seq_len:
            raise ValueError(
                f"the cache is full: {self.length} + {new} tokens, max_seq_len is {self.max_seq_len}"
            )
        self._append_compressed(raw, compress)
        self._sel.write(self.length, sel)
        before = min(self.length, self.config.window_size - 1)
        if self.shared_kv:
            win_view = self._sel.view(self.length - before, self.length + new)
        else:
            win_view = self._win.append(self.length, before, self.config.window_size, win)
        start = self.length - before
        self.length += new
        return BranchViews(
            self._cmp.view(0, self.num_blocks), self._sel.view(0, self.length), win_view, start
        )

    def _append_compressed(self, raw: KV, compress: Callable[[KV, int], KV]) -> None:
        blocks = self.num_blocks
        open_tokens = self.length - blocks * self.config.compression_stride
        tokens = self._open.append(self.length, open_tokens, self.config.compression_block_size, raw)
        if num_compressed_blocks(self.length + raw[0].shape[1], self.config) > blocks:
            self._cmp.write(blocks, compress(tokens, blocks))

    def checkpoint(self) -> CacheState:
        """The present state, at no cost."""
        return CacheState(self.length)

    def rollback(self, state: CacheState) -> None:
        """Forget every token appended since ``state`` was taken (speculative decoding; timing one step
        again).

        One token can always be taken back; many only while the rows that ``state`` needs are still held.

        Raises:
            ValueError: the state is ahead of the cache, or the window or an open block has moved on past it.
        """
        length, config = state.length, self.config
        if length > self.length:
            raise ValueError(f"cannot roll back from {self.length} tokens forward to {length}")
        blocks = num_compressed_blocks(length, config)
        needed = [(self._open, blocks * config.compression_stride)]
        if not self.shared_kv:
            needed.append((self._win, max(0, length - config.window_size + 1)))
        for trailing, first in needed:
            if trailing.start > first and first < length:
                raise ValueError(
                    f"cannot roll back to {length} tokens: tokens from {first} on were needed and are gone"
                )
        for trailing, _ in needed:
            trailing.start = min(trailing.start, length)
        self.length = length

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.length = self._open.start = self._win.start = 0
