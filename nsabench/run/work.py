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
    config = config_of(cell)
    pairs = _pairs(cell.S - _queries(cell), cell.S, config)
    used = {branch: pairs[branch] for branch in branches}
    scored = 0 if "cmp" in branches or "sel" not in branches else pairs["cmp"]

    last = tokens_read(cell.S, config)
    reads = {branch: last[branch] for branch in branches}
    decode = cell.phase == "decode"
    cached = reads if decode else {b: _stored(b, cell.S, config) for b in branches}
    keys = dict(cached)
    if scored:
        keys["score"] = last["cmp"]
    return _work(
        cell,
        parameters,
        pairs=sum(used.values()),
        scored=scored,
        keys=sum(keys.values()),
        values=sum(cached.values()),
        reads=sum(reads.values()),
        gates=3 * cell.heads,
    )


def count_dense_work(cell: Cell, parameters: int) -> Work:
    """Work of one step of dense causal attention of the cell's shape, counted as :func:`count_work` does."""
    queries = _queries(cell)
    pairs = queries * (cell.S - queries) + queries * (queries + 1) // 2
    return _work(cell, parameters, pairs=pairs, scored=0, keys=cell.S, values=cell.S, reads=cell.S, gates=0)


def _queries(cell: Cell) -> int:
    return 1 if cell.phase == "decode" else cell.S


def _work(
    cell: Cell, parameters: int, *, pairs: int, scored: int, keys: int, values: int, reads: int, gates: int
) -> Work:
    """``pairs`` of query and key per head, ``scored`` more without values; ``keys`` and ``values`` tokens
    read per KV head; ``gates`` channels a core is given per token.
    """
    tokens = cell.B * _queries(cell)
    attention = cell.B * 2 * cell.heads * (cell.dk + cell.dv) * pairs
    scoring = cell.B * 2 * cell.heads * cell.dk * scored
    projections = 2 * tokens * parameters
    forward = attention + scoring + projections
    backward = attention * 5 // 2 + 2 * projections
    flops = {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[cell.passes]

    size = ELEMENT_BYTES[cell.dtype]
    kv = cell.B * cell.groups * (keys * cell.dk + values * cell.dv) * size
    channels = 2 * cell.dim if cell.scope == "module" else cell.heads * (cell.dk + cell.dv) + gates
    one_pass = kv + tokens * channels * size + parameters * size
    # A backward reads what the forward read and writes a gradient for each of it.
    moved = {"fwd": one_pass, "bwd": 2 * one_pass, "fwd_bwd": 3 * one_pass}[cell.passes]
    return Work(flops, moved, reads, cell.S)


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
