"""The branches as rectangles of queries x keys, for backends that work on dense tiles.

Each query row belongs to at most one piece, so nothing is merged and the lse of a piece is the row's; rows in
no piece are empty (output 0, lse -inf). A piece is cut so that little of it is masked, and it holds its mask
as patches: only the columns where something is hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from nsa.blocks import num_compressed_blocks, num_selection_blocks
from nsa.config import NSAConfig

Output = tuple[torch.Tensor, torch.Tensor]
NEG_INF = float("-inf")

# Rows of a piece: few enough that a triangular or banded one wastes little, enough to feed a matrix product.
# Large calls also keep several threads busy: each call ends in a barrier.
BAND_ROWS = 64
COMPRESSED_ROWS = 512
CAUSAL_ROWS = 256
CAUSAL_FROM = 768  # torch's CPU kernel skips what is above the diagonal from here on
GROWING_ROWS = 256
SELECTED_ROWS = 64
# torch's CPU kernel takes a tenth longer over 575 keys than over 576, and three times as long over 15 as over
# 16.
ALIGNED_KEYS = 16


@dataclass(frozen=True)
class Patch:
    """What a piece hides among its columns from ``column`` on.

    ``mask()`` is additive, ``(B*H or 1, rows, width)`` in the queries' dtype: 0 where allowed, -inf where
    hidden. Additive, so that no polarity can be mistaken.
    """

    column: int
    mask: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Queries ``[row, row_end)`` attend keys ``[key, key_end)`` but for the patches.

    ``may_be_empty``: some row may hide every key; otherwise each row sees at least one. ``causal``:
    row i sees the keys up to the i-th, by the kernel's own mask. ``copies``: the same piece again, moved on
    by its rows each time.
    """

    row: int
    row_end: int
    key: int
    key_end: int
    patches: tuple[Patch, ...] = ()
    may_be_empty: bool = False
    causal: bool = False
    copies: int = 1

    def each(self) -> list[Piece]:
        """Its copies, one by one."""
        if self.copies == 1:
            return [self]
        rows = self.row_end - self.row
        moved = range(0, rows * self.copies, rows)
        return [
            replace(
                self,
                row=self.row + m,
                row_end=self.row_end + m,
                key=self.key + m,
                key_end=self.key_end + m,
                copies=1,
            )
            for m in moved
        ]


def _chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    return ((row, min(row + size, stop)) for row in range(start, stop, size))


def _arange(start: int, end: int, device: torch.device) -> torch.Tensor:
    return torch.arange(start, end, device=device)


def _hide(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, NEG_INF)


class _Triangles:
    """The masks of a call's diagonals: interior pieces share theirs, so each shape is built once."""

    def __init__(self, like: torch.Tensor) -> None:
        self.like = like
        self.built: dict[tuple[int, int, int, bool], torch.Tensor] = {}

    def above(self, rows: int, columns: int) -> torch.Tensor:
        """Hide column c from row i when ``c >= i``."""
        return self._get(rows, columns, 0, True)

    def below(self, rows: int, columns: int, diagonal: int) -> torch.Tensor:
        """Hide column c from row i when ``c <= i + diagonal``."""
        return self._get(rows, columns, diagonal, False)

    def _get(self, rows: int, columns: int, diagonal: int, above: bool) -> torch.Tensor:
        key = (rows, columns, diagonal, above)
        if key not in self.built:
            ones = torch.ones(1, rows, columns, dtype=torch.bool, device=self.like.device)
            hidden = ones.triu(diagonal) if above else ones.tril(diagonal)
            self.built[key] = _hide(hidden, self.like.dtype)
        return self.built[key]


def compressed_pieces(q: torch.Tensor, blocks: int, config: NSAConfig, q_start: int) -> list[Piece]:
    """Queries ``q (B,T,..)`` from position ``q_start`` over ``blocks`` compressed blocks; rows that see
    none are left out.
    """
    pieces = []
    first_seeing = max(0, config.compression_block_size - 1 - q_start)
    for row, end in _chunks(first_seeing, q.shape[1], COMPRESSED_ROWS):
        least = min(num_compressed_blocks(q_start + row + 1, config), blocks)
        most = min(num_compressed_blocks(q_start + end, config), blocks)

        def stairs(row: int = row, end: int = end, least: int = least, most: int = most) -> torch.Tensor:
            last_token = (
                _arange(least, most, q.device) * config.compression_stride + config.compression_block_size - 1
            )
            hidden = last_token > _arange(q_start + row, q_start + end, q.device).unsqueeze(1)
            return _hide(hidden.unsqueeze(0), q.dtype)

        if most:
            pieces.append(Piece(row, end, 0, most, (Patch(least, stairs),) if least < most else ()))
    return pieces


def sliding_pieces(q: torch.Tensor, length: int, config: NSAConfig, q_start: int) -> list[Piece]:
    """The band of ``w`` keys up to each query: a triangle hidden at its left end, where keys fall out, one
    at its right.
    """
    width = config.window_size
    triangles = _Triangles(q)
    pieces: list[Piece] = []
    growing = min(q.shape[1], max(0, width - q_start))  # rows whose window still begins at the first key
    chunks = [*_chunks(0, growing, GROWING_ROWS), *_chunks(growing, q.shape[1], BAND_ROWS)]
    for row, end in chunks:
        first, last = q_start + row, q_start + end - 1
        key, key_end = max(0, first - width + 1), min(length, last + 1)
        if key_end <= key:
            continue  # queries past the last key see nothing
        if end - row > 1:
            key -= min(key, -(key_end - key) % ALIGNED_KEYS)
        before = pieces[-1] if pieces else None
        whole = end - row == BAND_ROWS and key_end == last + 1
        if before is not None and whole and before.key > 0 and before.key + before.copies * BAND_ROWS == key:
            pieces[-1] = replace(before, copies=before.copies + 1)
            continue
        patches = []
        fallen = min(last - width + 1, key_end) - key
        if fallen > 0:  # row i hides column c when key + c < first + i - w + 1
            patches.append(Patch(0, partial(triangles.below, end - row, fallen, first - width - key)))
        if key_end > first + 1:
            patches.append(Patch(first + 1 - key, partial(triangles.above, end - row, key_end - first - 1)))
        pieces.append(Piece(row, end, key, key_end, tuple(patches), may_be_empty=key_end <= last))
    return pieces


def dense_prefix(block_indices: torch.Tensor, config: NSAConfig, q_start: int) -> int:
    """Number of leading rows of ``block_indices (B,T,H,N)`` that list every block up to their own, ascending,
    in every head.

    Read on the host, once. Only rows at positions before ``N l'`` can.
    """
    size, slots = config.selection_block_size, block_indices.shape[-1]
    rows = min(block_indices.shape[1], max(0, slots * size - q_start))
    if rows == 0:
        return 0
    taken = block_indices[:, :rows]
    own = (_arange(q_start, q_start + rows, taken.device) // size)[:, None, None]
    block = _arange(0, slots, taken.device)
    incomplete = ((taken != block) & (block <= own)).flatten(2).any(-1).any(0)
    return int(incomplete.int().argmax()) if bool(incomplete.any()) else rows


def selected_pieces(
    q: torch.Tensor, block_indices: torch.Tensor, length: int, config: NSAConfig, q_start: int
) -> list[Piece]:
    """All keys up to each query with what is not selected hidden; leading rows that select everything are
    plain causal.
    """
    size = config.selection_block_size
    batch, rows, kv_heads = block_indices.shape[:3]
    dense_rows = dense_prefix(block_indices, config, q_start)
    num_blocks = num_selection_blocks(length, config)
    triangles = _Triangles(q)
    pieces = causal_pieces(q, dense_rows, length, q_start)
    block_mask = q.new_full((batch, rows - dense_rows, kv_heads, num_blocks + 1), NEG_INF)
    slots = block_indices[:, dense_rows:]
    block_mask.scatter_(-1, torch.where(slots < 0, num_blocks, slots).long(), 0.0)
    block_mask = block_mask[..., :num_blocks].transpose(1, 2).flatten(0, 1)  # (B*H, T, blocks)
    for row, end in _chunks(dense_rows, rows, SELECTED_ROWS):
        first, key_end = q_start + row, min(length, q_start + end)
        if key_end == 0:
            continue

        def chosen(row: int = row, end: int = end, key_end: int = key_end) -> torch.Tensor:
            blocks = block_mask[
                :, row - dense_rows : end - dense_rows, : num_selection_blocks(key_end, config)
            ]
            return blocks.repeat_interleave(size, dim=-1)[..., :key_end]

        patches = [Patch(0, chosen)]
        if key_end > first + 1:
            patches.append(Patch(first + 1, partial(triangles.above, end - row, key_end - first - 1)))
        pieces.append(Piece(row, end, 0, key_end, tuple(patches), may_be_empty=True))
    return pieces


def causal_pieces(q: torch.Tensor, rows: int, length: int, q_start: int) -> list[Piece]:
    """The first ``rows`` queries over every key up to each."""
    if q_start == 0 and CAUSAL_FROM <= rows <= length:
        return [Piece(0, rows, 0, rows, causal=True)]
    triangles = _Triangles(q)
    pieces = []
    for row, end in _chunks(0, rows, CAUSAL_ROWS):
        first, key_end = q_start + row, min(length, q_start + end)
        ahead = key_end - first - 1
        patches = (Patch(first + 1, partial(triangles.above, end - row, ahead)),) if ahead > 0 else ()
        if key_end:
            pieces.append(Piece(row, end, 0, key_end, patches))
    return pieces


def per_sequence(
    fn: Callable[..., Output], tensors: tuple[torch.Tensor, ...], config: NSAConfig, q_start: torch.Tensor
) -> Output:
    """Run ``fn`` on each sequence of a batch with its own start; the starts are read on the host."""
    parts = [
        fn(*(t[b : b + 1] for t in tensors), config, q_start=start)
        for b, start in enumerate(q_start.tolist())
    ]
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])
