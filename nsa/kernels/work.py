"""What each kernel does in one call of its branch, declared for the roofline: FLOPs and bytes, by arithmetic.

A declaration counts what the kernel is written to do, tile by tile, not the least that its branch needs: the
masked part of a tile of keys costs as much as the rest, and a row tile reads its keys anew. It takes the very
constants that the kernel is compiled for (``launched`` of its module). Operators of torch between the kernels
(sums over lists, zeros) are not declared. Nothing here imports Triton, but :func:`declared`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from math import ceil

import torch

from nsa.blocks import num_compressed_blocks, own_block, tokens_read
from nsa.config import NSAConfig

Facts = Mapping[str, int]
"""A kernel's constants, and those of its arguments that decide how far it walks, by their names."""
Launched = Mapping[str, Facts]
"""Those of each kernel that a call launches, in order."""

INT = 4  # bytes of an index, a word, a score, an lse
_MODULES = {"cmp": "compressed", "score": "selection", "sel": "selected", "win": "sliding"}


@dataclass(frozen=True)
class KernelWork:
    """What a kernel does in one call of its branch, over all its launches.

    ``flops`` of matrix products, a multiply-add being two, over whole tiles; none of exponentials and other
    arithmetic of single elements. ``l2_bytes`` between L2 and the SMs: what each program's loads and stores
    touch, masked elements apart. ``dram_bytes``: the least from and to memory, where each input, output and
    scratch tensor is read once and written once.
    """

    kernel: str
    flops: int
    l2_bytes: int
    dram_bytes: int


@dataclass(frozen=True)
class Call:
    """One call of a branch: ``num_queries`` tokens, one at least, from position ``q_start`` on, in each of
    ``batch`` sequences of ``kv_len`` tokens, at least ``q_start + num_queries``.

    What a tile selects depends on the data. ``overlap``: neighbours share that part of their free blocks, the
    others being drawn anew as by ``nsabench --selection overlap=X``; None for blocks drawn at random, each
    token by itself. ``union_blocks``: tokens of a tile, and the different blocks of one as measured, mean
    over tiles whose tokens have more blocks than they select; it is taken where the kernel's tiles are these.
    ``lse_given``: scores begin with the lse of compressed attention.
    """

    config: NSAConfig
    num_queries: int
    kv_len: int
    batch: int = 1
    q_start: int = 0
    dtype: torch.dtype = torch.bfloat16
    overlap: float | None = None
    union_blocks: tuple[int, float] | None = None
    lse_given: bool = False

    @property
    def heads(self) -> int:
        """KV heads of all sequences."""
        return self.batch * self.config.num_kv_heads

    @property
    def positions(self) -> range:
        """Of the queries."""
        return range(self.q_start, self.q_start + self.num_queries)

    @property
    def key_bytes(self) -> int:
        """Bytes of a key of one head, or of a query."""
        return self.config.head_dim * self.dtype.itemsize

    @property
    def value_bytes(self) -> int:
        """Bytes of a value of one head, or of a row of the output."""
        return self.config.v_dim * self.dtype.itemsize


def declared(branch: str, backend: str, call: Call, arch: tuple[int, int] = (9, 0)) -> tuple[KernelWork, ...]:
    """The kernels of ``backend`` (``triton``, ``triton:union``, ...) of a branch on compute capability
    ``arch``, in the order of their launch. Needs Triton, whose modules choose the launches.
    """
    module = import_module(f"nsa.kernels.{_MODULES[branch]}")
    variant = backend.partition(":")[2]
    return kernel_work(module.launched(call, arch, *([variant] if variant else [])), call)


def kernel_work(launched: Launched, call: Call) -> tuple[KernelWork, ...]:
    """The work of each kernel ``launched``. KeyError for a kernel that is not in :data:`DECLARED`."""
    return tuple(
        KernelWork(kernel, *(round(number) for number in DECLARED[kernel](call, facts)))
        for kernel, facts in launched.items()
    )


def expected_union(positions: range, config: NSAConfig, overlap: float | None = None) -> float:
    """Different blocks that neighbours at ``positions`` are expected to select together, forced ones too.

    Free blocks are drawn as :class:`Call` says of ``overlap``; a token with no more than ``n`` blocks takes
    all. Exact: of the blocks that a token adds, as many are new as the union leaves out of those it may draw.
    """
    forced = config.num_initial_blocks + config.num_local_blocks
    free = config.num_selected_blocks - forced
    union, before = 0.0, -1
    for position in positions:
        own = own_block(position, config)
        others = own + 1 - forced
        if own < config.num_selected_blocks:
            union = own + 1.0
        else:
            begins = before < 0
            union = float(forced) if begins else union + min(own - before, config.num_local_blocks)
            pool, fresh = others, float(free)
            if overlap is not None and not begins:
                pool, fresh = others - free, (1 - overlap) * min(free, others - free)
            if pool:
                union += fresh * (others - (union - forced)) / pool
        before = own
    return union


Work = tuple[float, float, float]
"""FLOPs, bytes between L2 and the SMs, least bytes of memory."""


def _steps(items: int, size: int) -> int:
    return -(-items // size)


def _row_bytes(call: Call) -> int:
    """Queries read, outputs and lse written, each once."""
    rows = call.heads * call.num_queries * call.config.group_size
    return rows * (call.key_bytes + call.value_bytes + INT)


def _products(facts: Facts) -> int:
    """FLOPs of one tile of rows and one of keys: logits and output."""
    return 2 * facts["BLOCK_M"] * facts["BLOCK_N"] * (facts["D0"] + facts["D1"] + facts["DV_PADDED"])


def _row_tiles(call: Call, rows_of_tile: int) -> Iterator[tuple[int, int, int]]:
    """Positions of the first and of the last token of each tile of a head's rows, and how many rows."""
    group = call.config.group_size
    rows = call.num_queries * group
    for row in range(0, rows, rows_of_tile):
        last = min(row + rows_of_tile, rows) - 1
        yield call.positions[row // group], call.positions[last // group], last + 1 - row


def _attention(call: Call, facts: Facts) -> Work:
    def end(position: int) -> int:
        past = max(position + 1 + facts["stride"] - facts["block"], 0)
        return min(past // facts["stride"], facts["num_keys"])

    keys = steps = 0
    for earliest, latest, _ in _row_tiles(call, facts["BLOCK_M"]):
        walked = max(0, end(latest) - max(earliest - facts["window"] + 1, 0))
        keys += walked
        steps += _steps(walked, facts["BLOCK_N"])
    first, last = call.positions[0], call.positions[-1]
    seen = max(0, end(last) - max(first - facts["window"] + 1, 0))
    a_key = call.key_bytes + call.value_bytes
    rows = _row_bytes(call)
    flops = call.heads * steps * _products(facts)
    return flops, rows + call.heads * keys * a_key, rows + call.heads * seen * a_key


def _visible(call: Call, position: int) -> int:
    """Compressed blocks complete at ``position``."""
    return num_compressed_blocks(min(position + 1, call.kv_len), call.config)


def _product_dims(facts: Facts) -> int:
    """Dims of a product of logits, which in fp32 takes slices of them."""
    if facts["SLICE"]:
        return _steps(facts["D"], facts["SLICE"]) * facts["SLICE"]
    return facts["D0"] + facts["D1"]


def _lse(call: Call, facts: Facts) -> Work:
    keys = steps = queries = 0
    held, most = call.num_queries * call.config.group_size, num_compressed_blocks(call.kv_len, call.config)
    for _, latest, rows in _row_tiles(call, facts["BLOCK_M"]):
        walked = _steps(_visible(call, latest), facts["BLOCK_N"])
        steps += walked
        keys += min(walked * facts["BLOCK_N"], most)
        queries += rows * (walked if facts["SLICE"] else 1)
    flops = call.heads * steps * 2 * facts["BLOCK_M"] * facts["BLOCK_N"] * _product_dims(facts)
    read = call.heads * call.key_bytes
    written = call.heads * held * INT
    seen = _visible(call, call.positions[-1])
    return flops, (queries + keys) * read + written, (held + seen) * read + written


def _scores(call: Call, facts: Facts) -> Work:
    keys = steps = queries = scores = 0
    tokens, group, blocks = facts["TOKENS"], call.config.group_size, facts["BLOCKS"]
    held, most = call.num_queries * group, num_compressed_blocks(call.kv_len, call.config)
    pieces = facts["PADDED"] * blocks // facts["COLUMNS"]
    for _, latest, rows in _row_tiles(call, tokens * group):
        walked = _steps(min(own_block(latest, call.config) + 1, facts["width"]), blocks)
        steps += walked * pieces
        keys += min(walked * blocks * facts["PER_BLOCK"], most)
        queries += rows * (walked * pieces if facts["SLICE"] else 1)
        scores += min(walked * blocks, facts["width"]) * tokens
    flops = call.heads * steps * 2 * facts["COLUMNS"] * facts["GP"] * tokens * _product_dims(facts)
    read = call.heads * call.key_bytes
    others = call.heads * (held + scores) * INT
    seen = _visible(call, call.positions[-1])
    return flops, (queries + keys) * read + others, (held + seen) * read + others


def _top_n(call: Call, facts: Facts) -> Work:
    config, segment = call.config, facts["SEGMENT"]
    n = config.num_selected_blocks

    @cache
    def entries(own: int, longest: int) -> tuple[int, int]:
        """Scores that compete for a token's free slots; and all entries read and written, slots included."""
        end = min(own + 1, facts["num_blocks"])
        first = min(config.num_initial_blocks, end)
        last = min(max(own + 1 - config.num_local_blocks, first), end)
        need = n - first - (end - last)
        competing = max(0, min(last, facts["width"]) - first)
        taken, moved = 0, competing
        for at in range(segment, longest + segment, segment):
            held, taken = taken, min(need, max(0, min(last, at) - first))
            moved += 2 * held + taken
        return competing, moved + n - taken

    scores = moved = 0
    for at in range(0, call.num_queries, facts["ROWS"]):
        owns = [own_block(position, config) for position in call.positions[at : at + facts["ROWS"]]]
        longest = min(max(owns) + 1 - config.num_local_blocks, facts["num_blocks"])
        for own in owns:
            competing, touched = entries(own, max(longest, min(config.num_initial_blocks, max(owns) + 1)))
            scores, moved = scores + competing, moved + touched
    chosen = call.num_queries * n
    return 0, call.heads * moved * INT, call.heads * (scores + chosen) * INT


def _pairs(call: Call) -> int:
    """Blocks that the queries of one head select, each counted for each query."""
    most = call.config.num_selected_blocks
    return sum(min(own_block(position, call.config) + 1, most) for position in call.positions)


def _selected_keys(call: Call) -> int:
    """Keys in them up to each query."""
    return sum(tokens_read(position + 1, call.config)["sel"] for position in call.positions)


def _least_of_keys(call: Call) -> int:
    """Bytes of the keys and values that any query selects, each once; of a prompt all."""
    keys = min(call.positions[-1] + 1, _selected_keys(call))
    return call.heads * keys * (call.key_bytes + call.value_bytes)


def _slots(call: Call) -> int:
    """Bytes of the lists of blocks."""
    return call.heads * call.num_queries * call.config.num_selected_blocks * INT


def _chunks(call: Call, facts: Facts) -> Iterator[tuple[int, int]]:
    """Of each chunk of queries: blocks that any of its queries can see, and tiles of ``TOKENS``."""
    for row in range(0, call.num_queries, facts["CHUNK"]):
        part = call.positions[row : row + facts["CHUNK"]]
        yield own_block(part[-1], call.config) + 1, _steps(len(part), facts["TOKENS"])


def _words(call: Call, facts: Facts) -> int:
    """Bytes of the words of a tile and a block."""
    return call.heads * INT * sum(blocks * tiles for blocks, tiles in _chunks(call, facts))


def _mark(call: Call, facts: Facts) -> Work:
    # Torch has filled the words with zeros before.
    return 0, _slots(call) + call.heads * _pairs(call) * INT, _slots(call) + _words(call, facts)


def _unions(call: Call, facts: Facts) -> Iterator[tuple[float, int]]:
    """Of each tile of a head, the units of ``PER_UNIT`` blocks it selects, and the keys it may see.

    Units of several blocks are taken to be as many as there can be: no two of its blocks share one.
    """
    config = call.config
    for at in range(0, call.num_queries, facts["TOKENS"]):
        tile = call.positions[at : at + facts["TOKENS"]]
        visible = tile[-1] + 1
        tokens, measured = call.union_blocks or (0, 0.0)
        if tokens == facts["TOKENS"] and own_block(tile[0], config) >= config.num_selected_blocks:
            blocks = measured
        else:
            blocks = expected_union(tile, config, call.overlap)
        if facts["PER_UNIT"] > 1:
            blocks = min(blocks, _steps(visible, config.selection_block_size * facts["PER_UNIT"]))
        yield blocks, visible


def _compact(call: Call, facts: Facts) -> Work:
    units = sum(units for units, _ in _unions(call, facts))
    tiles = sum(tiles for _, tiles in _chunks(call, facts))
    kept = units * (2 if facts["PER_UNIT"] == 1 else 1) + tiles
    moved = _words(call, facts) + call.heads * kept * INT
    return 0, moved, moved


def _union(call: Call, facts: Facts) -> Work:
    size = facts["BLOCK_SIZE"] * facts["PER_UNIT"]
    steps = keys = entries = 0.0
    for units, visible in _unions(call, facts):
        steps += units * facts["PIECES"]
        # The unit of the last token, always selected where any is local, is read up to that token.
        keys += units * size - (-visible % size if call.config.num_local_blocks else 0)
        per_step = 2 if facts["PER_UNIT"] == 1 else 1 + facts["PER_UNIT"]
        entries += 1 + units * facts["PIECES"] * per_step
    programs = call.heads * facts["PARTS"]
    rows = _row_bytes(call)
    l2 = rows + programs * (keys * (call.key_bytes + call.value_bytes) + entries * INT)
    lists = call.heads * entries * INT
    return programs * steps * _products(facts), l2, rows + _least_of_keys(call) + lists


def _query_major(call: Call, facts: Facts) -> Work:
    n = call.config.num_selected_blocks
    programs = call.heads * facts["PARTS"]
    # An empty slot is walked as any other, but nothing of it is read.
    steps = call.num_queries * n * facts["PIECES"]
    indices = call.num_queries * n * (1 + facts["PIECES"])
    keys = _selected_keys(call) * (call.key_bytes + call.value_bytes)
    rows = _row_bytes(call)
    l2 = rows + programs * (keys + indices * INT)
    return programs * steps * _products(facts), l2, rows + _least_of_keys(call) + _slots(call)


def _rank(call: Call, facts: Facts) -> Work:
    totals = call.heads * INT * sum(blocks for blocks, _ in _chunks(call, facts))
    moved = 2 * _words(call, facts) + totals
    return 0, moved, moved


def _place(call: Call, facts: Facts) -> Work:
    pairs, slots = call.heads * _pairs(call) * INT, _slots(call)
    # Of each pair the end (two words), total, rank and word of its block, at most: neighbours share them.
    # Every earlier slot is read again.
    repeated = slots - call.heads * call.num_queries * INT
    lists = 2 * _words(call, facts) + 3 * call.heads * INT * sum(b for b, _ in _chunks(call, facts))
    return 0, 2 * slots + repeated + 6 * pairs, 2 * slots + pairs + lists


def _part_bytes(call: Call) -> int:
    """Bytes of the parts of outputs and lse, one for each query, head and block selected."""
    return call.heads * _pairs(call) * call.config.group_size * (call.value_bytes + INT)


def _lists(call: Call, facts: Facts) -> Iterator[tuple[float, int]]:
    """Of each chunk and block, how many queries of a head are expected to select it, and its visible keys."""
    config, size = call.config, call.config.selection_block_size
    initial, local, n = config.num_initial_blocks, config.num_local_blocks, config.num_selected_blocks
    for row in range(0, call.num_queries, facts["CHUNK"]):
        part = call.positions[row : row + facts["CHUNK"]]
        rises = [0.0] * (own_block(part[-1], config) + 2)
        for own, queries in Counter(own_block(position, config) for position in part).items():
            free, end = (initial, own + 1 - local) if own >= n else (own + 1, own + 1)
            chance = (n - initial - local) / (end - free) if end > free else 1.0
            for block, rise in ((0, 1.0), (free, chance - 1.0), (end, 1.0 - chance), (own + 1, -1.0)):
                rises[block] += queries * rise
        for block, expected in enumerate(accumulate(rises[:-1])):
            yield expected, min(size, part[-1] + 1 - block * size)


def _block(call: Call, facts: Facts) -> Work:
    tiles = keys = 0
    for expected, visible in _lists(call, facts):
        # What rounding leaves of a sum of chances is no query.
        walked = ceil(expected / facts["TOKENS"] - 1e-6)
        tiles += walked
        keys += walked * visible
    programs = call.heads * facts["PARTS"]
    listed = call.heads * _pairs(call) * INT
    queries, parts = call.config.group_size * call.key_bytes, _part_bytes(call)
    l2 = programs * keys * (call.key_bytes + call.value_bytes)
    l2 += call.heads * _pairs(call) * queries + listed * facts["PARTS"] + parts
    dram = _least_of_keys(call) + call.heads * call.num_queries * queries + listed + parts
    return programs * tiles * facts["PIECES"] * _products(facts), l2, dram


def _merge(call: Call, facts: Facts) -> Work:
    rows = call.heads * call.num_queries * call.config.group_size * (call.value_bytes + INT)
    moved = _part_bytes(call) + rows + _slots(call)
    return 0, moved, moved


DECLARED: dict[str, Callable[[Call, Facts], Work]] = {
    "_attention_kernel": _attention,
    "_lse_kernel": _lse,
    "_scores_kernel": _scores,
    "_top_n_kernel": _top_n,
    "_mark_kernel": _mark,
    "_compact_kernel": _compact,
    "_union_kernel": _union,
    "_query_kernel": _query_major,
    "_rank_kernel": _rank,
    "_place_kernel": _place,
    "_block_kernel": _block,
    "_merge_kernel": _merge,
}
"""The work of each kernel that is launched, by its name."""
