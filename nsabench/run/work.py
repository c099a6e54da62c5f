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
    """Work of one step that runs ``branches`` (of cmp, sel, win) in a layer of ``parameters`` weights.

    FLOPs count a multiply-add as two, attention by its exact causal pairs, the scores' product once (it is
    the compressed branch's) and without a gradient, a backward as two and a half forwards of attention and
    two of the projections. Bytes are the least a step can move: weights, tokens in and out, and each key and
    value it reads, once.
    """
    config = config_of(cell)
    decode = cell.phase == "decode"
    queries = 1 if decode else cell.S
    first = cell.S - queries
    pairs = _pairs(first, cell.S, config)
    used = {branch: pairs[branch] for branch in branches}
    scored = 0 if "cmp" in branches or "sel" not in branches else pairs["cmp"]
    per_pair = 2 * cell.heads * (cell.dk + cell.dv)
    attention = cell.B * per_pair * sum(used.values())
    scoring = cell.B * 2 * cell.heads * cell.dk * scored
    projections = 2 * cell.B * queries * parameters
    forward = attention + scoring + projections
    backward = attention * 5 // 2 + 2 * projections
    flops = {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[cell.passes]

    size = ELEMENT_BYTES[cell.dtype]
    last = tokens_read(cell.S, config)
    reads = {branch: last[branch] for branch in branches}
    cached = reads if decode else {b: _stored(b, cell.S, config) for b in branches}
    keys = dict(cached)
    if scored:
        keys["score"] = last["cmp"]
    kv = cell.B * cell.groups * (sum(keys.values()) * cell.dk + sum(cached.values()) * cell.dv) * size
    activations = 2 * cell.B * queries * cell.dim * size
    one_pass = kv + activations + parameters * size
    # A backward reads what the forward read and writes a gradient for each of it.
    moved = {"fwd": one_pass, "bwd": 2 * one_pass, "fwd_bwd": 3 * one_pass}[cell.passes]
    return Work(flops, moved, sum(reads.values()), cell.S)


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
