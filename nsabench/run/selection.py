"""Which blocks a cell's queries attend where not the scores decide (``selection``), and how far neighbouring
queries agree.

``random``: uniform. ``overlap=X``: neighbours share that part of their free blocks. ``file=PATH``: captured
from a layer (:mod:`nsabench.run.selection_file`). A block is free where it is neither an initial nor a local
one and the query begins after more than ``n`` blocks, so that there is a choice at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nsa import NSAConfig, selection_hook
from nsa.blocks import own_block
from nsabench.plan import Cell
from nsabench.run.selection_file import load_selection
from nsabench.run.steps import Span
from nsabench.run.work import config_of

Array = np.ndarray[Any, Any]

TILE = 4
"""Neighbouring queries whose blocks are united."""

# Queries and sequences that are looked at for what neighbours share, and queries in a run.
LOOKED_AT, SEQUENCES, RUN = 4096, 4, 64
# Random numbers drawn at once: bounds the memory of making a selection.
DRAWN = 2**22
STREAM = 0x5E1EC7
"""Sets the numbers drawn here apart from all others of a seed."""


def blocks_of(cell: Cell, spans: Sequence[Span]) -> dict[int, torch.Tensor]:
    """The blocks each call attends, ``(B,T,H,n)`` int32 on the cell's device, by its first query's position.

    Empty for ``natural``: then the scores decide. The same for every way the tokens are fed. PlanError for a
    file that does not fit.
    """
    kind, _, value = cell.selection.partition("=")
    if kind == "natural":
        return {}
    config, batch = config_of(cell), cell.B
    first, last = min(a for a, _ in spans), max(b for _, b in spans)
    if kind == "file":
        rows, batch = load_selection(value, cell)[first:last], 1
    else:
        keep = float(value) if kind == "overlap" else None
        rows = synthetic(config, batch * cell.groups, (first, last), cell.seed, keep)
    whole = torch.from_numpy(rows).unflatten(1, (batch, -1)).transpose(0, 1).expand(cell.B, -1, -1, -1)
    return {a: whole[:, a - first : b - first].contiguous().to(cell.device) for a, b in spans}


def attending(blocks: Mapping[int, torch.Tensor]) -> AbstractContextManager[None]:
    """A context in which every attention attends ``blocks``, as `blocks_of` gives them, after its scores."""
    if not blocks:
        return nullcontext()

    def given(chosen: torch.Tensor, q_start: int | torch.Tensor) -> torch.Tensor:
        return blocks[int(q_start)]

    return selection_hook(given)


def synthetic(config: NSAConfig, lanes: int, span: Span, seed: int, keep: float | None) -> Array:
    """Blocks of the queries of ``span``, ``(rows, lanes, n)`` int32 as :func:`nsa.select_blocks` gives them:
    forced ones, and free ones drawn uniformly in each lane, which are the KV heads of a batch.

    ``keep`` None draws each row anew. Else a row has each free block of the row before with that probability,
    and in place of every other one a block that the row before had not, as far as there are enough of those.
    """
    n, initial, local = config.num_selected_blocks, config.num_initial_blocks, config.num_local_blocks
    own = own_block(torch.arange(*span), config).numpy()
    slot = np.arange(n)
    whole = np.where(slot <= own[:, None, None], slot, -1).astype(np.int32).repeat(lanes, 1)
    begin, free = int((own < n).sum()), n - initial - local
    rows = whole[begin:]
    if local:
        rows[:, :, n - local :] = own[begin:, None, None] - local + 1 + np.arange(local)
    if free and len(rows):
        random = np.random.default_rng((seed, STREAM))
        others = own[begin:] + 1 - initial - local
        drawn = rows[:, :, initial : initial + free]
        part = max(1, DRAWN // (lanes * free))
        before: Array | None = None
        for at in range(0, len(rows), part):
            some = slice(at, at + part)
            if keep is None:
                drawn[some] = np.sort(_distinct(random, others[some], lanes, free), -1)
            else:
                before = _chain(random, others[some], drawn[some], keep, before)
        drawn += initial
    return whole


def _chain(
    random: np.random.Generator, others: Array, into: Array, keep: float, before: Array | None
) -> Array:
    """Fill ``into (rows, lanes, free)``, ascending numbers below ``others (rows,)``, each row from the one
    before; returns the last.
    """
    rows, lanes, free = into.shape
    # The other blocks are counted through in ascending order: a new one is drawn by its number among them.
    fresh = _distinct(random, others - free, lanes, free)
    fresh[random.random(fresh.shape) < keep] = -1
    places = np.arange(free, dtype=np.int32)
    for row in range(rows):
        if before is None:
            before = np.sort(_distinct(random, others[:1], lanes, free)[0], -1)
        else:
            number = fresh[row]
            passed = ((before - places)[:, None, :] <= number[:, :, None]).sum(-1, dtype=np.int32)
            before = np.where(number < 0, before, number + passed)
            before.sort(-1)
        into[row] = before
    assert before is not None
    return before


def _distinct(random: np.random.Generator, below: Array, lanes: int, count: int) -> Array:
    """``(rows, lanes, count)`` int32: distinct uniform numbers below ``below (rows,)``, in random order.

    Where there are fewer, -1 stands for the rest (Floyd's sampling).
    """
    most = np.minimum(below, count)[:, None]
    found = np.full((len(below), lanes, count), -1, np.int32)
    for i in range(count):
        top = below[:, None] - most + i
        pick = (random.random((len(below), lanes)) * (top + 1)).astype(np.int32)
        taken = (found[:, :, :i] == pick[:, :, None]).any(-1)
        found[:, :, i] = np.where(i < most, np.where(taken, top, pick), -1)
    return random.permuted(found, axis=-1)


@dataclass(frozen=True)
class Sharing:
    """How far neighbouring queries agree, in counts that add up over calls.

    ``shared`` of ``free`` blocks of queries are also among those, free or forced, of the query before.
    ``union`` different blocks are those of ``tiles`` tiles of TILE neighbouring queries, forced ones too; a
    tile begins at a position that TILE divides. Only queries with a choice count, as the module defines it.
    """

    shared: int = 0
    free: int = 0
    union: int = 0
    tiles: int = 0

    def __add__(self, other: Sharing) -> Sharing:
        return Sharing(
            self.shared + other.shared,
            self.free + other.free,
            self.union + other.union,
            self.tiles + other.tiles,
        )

    @property
    def neighbour_overlap(self) -> float | None:
        """Part of a query's free blocks that the query before it selects too; None without such queries."""
        return self.shared / self.free if self.free else None

    @property
    def union_blocks(self) -> float | None:
        """Different blocks of TILE neighbouring queries of a KV head, mean; None without such queries."""
        return self.union / self.tiles if self.tiles else None


NOTHING = Sharing()


def sharing(blocks: torch.Tensor, q_start: int, config: NSAConfig) -> Sharing:
    """What neighbours share in ``blocks (B,T,H,n)`` of queries from ``q_start`` on: all queries of the first
    SEQUENCES sequences, or a spread of LOOKED_AT.
    """
    blocks = blocks[:SEQUENCES]
    n, rows = config.num_selected_blocks, blocks.shape[1]
    begin = min(rows, max(0, n * config.selection_block_size - q_start))
    runs = max(1, LOOKED_AT // RUN)
    if rows - begin <= LOOKED_AT:
        return _shared(blocks[:, begin:].cpu(), q_start + begin, config)
    last, found = rows - RUN, Sharing()
    for number in range(runs):
        at = begin + (last - begin) * number // max(1, runs - 1)
        found += _shared(blocks[:, at : at + RUN].cpu(), q_start + at, config)
    return found


def _shared(blocks: torch.Tensor, q_start: int, config: NSAConfig) -> Sharing:
    rows = blocks.shape[1]
    own = own_block(torch.arange(q_start, q_start + rows), config)[:, None, None]
    forced = (blocks < config.num_initial_blocks) | (blocks > own - config.num_local_blocks)
    free = (~forced & (blocks >= 0))[:, 1:]
    again = (blocks[:, 1:, :, :, None] == blocks[:, :-1, :, None, :]).any(-1) & free
    skipped = min(rows, -q_start % TILE)
    tiles = (rows - skipped) // TILE
    united = (
        blocks[:, skipped : skipped + tiles * TILE]
        .unflatten(1, (tiles, TILE))
        .transpose(2, 3)
        .flatten(3)
        .sort(-1)
        .values
    )
    new = (united >= 0) & (united != united.roll(1, -1))
    # Of equal blocks the first counts; the very first has nothing before it.
    new[..., :1] = united[..., :1] >= 0
    return Sharing(int(again.sum()), int(free.sum()), int(new.sum()), int(new[..., 0].numel()))
