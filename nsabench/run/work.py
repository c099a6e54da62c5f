"""What a step must do, counted from its shapes: tokens read, floating-point operations, bytes moved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from nsa import NSAConfig
from nsa.blocks import num_compressed_blocks, tokens_read
from nsabench.plan import Cell

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Work:
    """``flops`` FLOP and ``bytes`` of one step; KV ``reads_tokens`` of its last query, and of dense
    attention's.
    """

    flops: int
    bytes: int
    reads_tokens: int
    reads_tokens_dense: int


@dataclass(frozen=True)
class Part:
    """``flops`` FLOP and ``bytes`` of one stage of a step."""

    flops: int
    bytes: int

    def plus(self, other: Part) -> Part:
        """Both together."""
        return Part(self.flops + other.flops, self.bytes + other.bytes)


def config_of(cell: Cell) -> NSAConfig:
    """The attention's configuration of a cell; ValueError in one line where its sizes do not fit each
    other.
    """
    return NSAConfig(
        num_heads=cell.heads,
        num_kv_heads=cell.groups,
        head_dim=cell.dk,
        value_dim=cell.dv,
        compression_block_size=cell.l,
        compression_stride=cell.d,
        selection_block_size=cell.l_sel,
        num_selected_blocks=cell.n_sel,
        window_size=cell.w,
    )


def count_work(cell: Cell, branches: tuple[str, ...], parameters: int) -> Work:
    """Work of one step of NSA that runs ``branches`` (of cmp, sel, win) in a layer of ``parameters`` weights.

    FLOPs count a multiply-add as two, attention by its exact causal pairs, the scores' product once (it is
    the compressed branch's) and without a gradient, a backward as two and a half forwards of attention and
    two of the projections. Bytes are the least a step can move: weights, tokens in and out, and each key and
    value it reads, once. A core has no weights; its tokens are queries and gates in and heads' values out.
    """
    last = tokens_read(cell.S, config_of(cell))
    reads = sum(last[branch] for branch in branches)
    return _sum(stage_work(cell, branches, parameters), reads, cell.S)


def stage_work(cell: Cell, branches: tuple[str, ...], parameters: int) -> dict[str, Part]:
    """The same work by the stage that does it; stages for which none is counted are left out.

    What several stages need is counted once, as in the whole: a core's queries with the first branch, its
    gates and output with ``gate``, a layer's tokens in and out with ``proj``. What one stage hands to the
    next is not counted: a stage by itself moves more than its bytes here.
    """
    config = config_of(cell)
    pairs = _pairs(cell.S - _queries(cell), cell.S, config)
    last = tokens_read(cell.S, config)
    cached = last if cell.phase == "decode" else {b: _stored(b, cell.S, config) for b in last}
    parts = {branch: _attend(cell, pairs[branch], cached[branch]) for branch in branches}
    if "sel" in branches and "cmp" not in branches:
        parts = {"score": _score(cell, pairs["cmp"], last["cmp"]), **parts}
    return _with_tokens(cell, parts, parameters, gates=3 * cell.heads)


def count_dense_work(cell: Cell, parameters: int) -> Work:
    """Work of one step of dense causal attention of the cell's shape, counted as :func:`count_work` does."""
    queries = _queries(cell)
    pairs = queries * (cell.S - queries) + queries * (queries + 1) // 2
    attention = {"attention": _attend(cell, pairs, cell.S)}
    return _sum(_with_tokens(cell, attention, parameters, gates=0), cell.S, cell.S)


def _queries(cell: Cell) -> int:
    return 1 if cell.phase == "decode" else cell.S


# By passes, in halves of a forward: the FLOPs of attention, whose backward is two and a half forwards.
_ATTENTION_HALVES = {"fwd": 2, "bwd": 5, "fwd_bwd": 7}
_PROJECTIONS = {"fwd": 1, "bwd": 2, "fwd_bwd": 3}
_SCORINGS = {"fwd": 1, "bwd": 0, "fwd_bwd": 1}
# A backward reads what the forward read and writes a gradient for each of it.
_MOVES = {"fwd": 1, "bwd": 2, "fwd_bwd": 3}


def _attend(cell: Cell, pairs: int, tokens: int) -> Part:
    """Attention of ``pairs`` of query and key per head, that reads ``tokens`` keys and values a KV head."""
    forward = cell.B * 2 * cell.heads * (cell.dk + cell.dv) * pairs
    elements = cell.B * cell.groups * tokens * (cell.dk + cell.dv)
    return Part(forward * _ATTENTION_HALVES[cell.passes] // 2, _moved(cell, elements))


def _score(cell: Cell, pairs: int, tokens: int) -> Part:
    """Scores of ``pairs`` per head, from ``tokens`` keys a KV head."""
    forward = cell.B * 2 * cell.heads * cell.dk * pairs
    return Part(forward * _SCORINGS[cell.passes], _moved(cell, cell.B * cell.groups * tokens * cell.dk))


def _with_tokens(cell: Cell, parts: dict[str, Part], parameters: int, *, gates: int) -> dict[str, Part]:
    """Attention's parts with what goes in and out: of a layer tokens and weights, of a core queries, heads'
    values and ``gates`` channels a token.
    """
    tokens = cell.B * _queries(cell)
    if cell.scope == "module":
        flops = 2 * tokens * parameters * _PROJECTIONS[cell.passes]
        return {"proj": Part(flops, _moved(cell, tokens * 2 * cell.dim + parameters)), **parts}
    queries = Part(0, _moved(cell, tokens * cell.heads * cell.dk))
    output = Part(0, _moved(cell, tokens * (cell.heads * cell.dv + gates)))
    parts = {**parts, "gate": output}
    first = next(iter(parts))
    return {**parts, first: parts[first].plus(queries)}


def _moved(cell: Cell, elements: int) -> int:
    return elements * ELEMENT_BYTES[cell.dtype] * _MOVES[cell.passes]


def _sum(parts: dict[str, Part], reads: int, dense: int) -> Work:
    return Work(sum(p.flops for p in parts.values()), sum(p.bytes for p in parts.values()), reads, dense)


def _stored(branch: str, length: int, config: NSAConfig) -> int:
    return num_compressed_blocks(length, config) if branch == "cmp" else length


@lru_cache(maxsize=64)
def _pairs(first: int, last: int, config: NSAConfig) -> dict[str, int]:
    """Query-key pairs per head of the queries at positions ``[first, last)``, by branch."""
    total = {"cmp": 0, "sel": 0, "win": 0}
    for length in range(first + 1, last + 1):
        for branch, tokens in tokens_read(length, config).items():
            total[branch] += tokens
    return total
