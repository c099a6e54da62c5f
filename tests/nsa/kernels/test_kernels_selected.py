"""The three ways of selected attention, and the lists they walk: on shapes that reach each of their paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nsa.reference
from nsa.blocks import num_selection_blocks
from nsa.config import NSAConfig
from nsa.routes import TABLE, Row
from nsa.testing import assert_matches, error_budget

pytest.importorskip("triton")
interpret = pytest.mark.interpret

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
Runnable = Callable[..., Callable[..., Any]]

ROWS = {row.backend.partition(":")[2]: row for row in TABLE if row.backend.startswith("triton:")}


def rows(*variants: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", [pytest.param(ROWS[name], id=name) for name in variants])


each = rows("union", "kv_outer", "query_major")
# A program a token and KV head: too slow to interpret over many tokens.
with_lists = rows("union", "kv_outer")


def assert_parity(
    function: Callable[..., Any], tensors: dict[str, Any], config: NSAConfig, q_start: int | torch.Tensor = 0
) -> None:
    """Output and lse of one call against the specification, as the fixture ``parity`` judges two calls."""
    found = function(**tensors, config=config, q_start=q_start)
    given = {name: t.cpu() for name, t in tensors.items()}
    start = q_start.cpu() if isinstance(q_start, torch.Tensor) else q_start
    eager = nsa.reference.selected_attention(**given, config=config, q_start=start)
    given |= {name: given[name].double() for name in ("q", "k", "v")}
    exact = nsa.reference.selected_attention(**given, config=config, q_start=start)
    magnitude = max(float(given[name].abs().max()) for name in ("q", "k", "v"))
    for name, mine, wanted, rounded in zip(("o", "lse"), found, exact, eager, strict=True):
        assert_matches(mine, wanted, error_budget(wanted, rounded, magnitude), name)


def random_lists(batch: int, tokens: int, config: NSAConfig, keys: int, slots: int) -> torch.Tensor:
    """Any order, empty slots, repeated blocks and blocks of the future."""
    generator = torch.Generator().manual_seed(3)
    shape = (batch, tokens, config.num_kv_heads, slots)
    return torch.randint(-1, num_selection_blocks(keys, config), shape, generator=generator).int()


@interpret
@with_lists
@pytest.mark.parametrize(
    ("group", "tokens", "block"),
    [
        pytest.param(1, 75, 16, id="32 tokens a tile, three tiles"),
        pytest.param(3, 43, 8, id="21 tokens, 63 of 64 rows; two blocks a tile of keys"),
        pytest.param(4, 21, 64, id="one block of 64"),
        pytest.param(5, 14, 4, id="12 tokens, four blocks a tile of keys"),
        pytest.param(16, 5, 24, id="4 tokens, a block padded to 32 keys"),
        pytest.param(130, 2, 80, id="one token in three parts, a block in two pieces"),
    ],
)
def test_tiles(
    row: Row,
    group: int,
    tokens: int,
    block: int,
    small: Small,
    draw: Draw,
    runnable: Runnable,
    kernel_device: str,
) -> None:
    heads = 1 if group > 16 else 2
    config = small(
        num_heads=heads * group,
        num_kv_heads=heads,
        selection_block_size=block,
        compression_block_size=4,
        compression_stride=4,
        value_dim=24,
    )
    keys = max(tokens + 9, 2 * block + 7)
    dtype = torch.float32 if kernel_device == "cpu" else torch.bfloat16
    tensors = draw("sel", config, tokens, batch=1, keys=keys, dtype=dtype, device=kernel_device)
    tensors["block_indices"] = random_lists(1, tokens, config, keys, 5).to(kernel_device)
    assert_parity(runnable(row, tensors, config), tensors, config, keys - tokens - 3)


@interpret
@each
@pytest.mark.parametrize(("group", "block"), [(1, 64), (6, 8), (16, 24)])
def test_few_queries_that_start_anywhere(
    row: Row, group: int, block: int, small: Small, draw: Draw, runnable: Runnable, kernel_device: str
) -> None:
    """In fp16, of 40 and 192 dims, which are split and filled up."""
    config = small(num_heads=group, num_kv_heads=1, selection_block_size=block, head_dim=192, value_dim=40)
    q_start = torch.tensor([70, 0])
    dtype = torch.float16
    tensors = draw("sel", config, 2, q_start=q_start, keys=80, dtype=dtype, device=kernel_device)
    tensors["block_indices"] = random_lists(2, 2, config, 80, 3).to(kernel_device)
    assert_parity(runnable(row, tensors, config), tensors, config, q_start.to(kernel_device))


LISTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda lists: torch.full_like(lists, -1),
    "no slot": lambda lists: lists[..., :0],
    "one block many times": lambda lists: lists[..., :1].expand(*lists.shape[:-1], 6),
    "int64, strided": lambda lists: torch.stack([lists.long(), lists.long() * 0], -1)[..., 0],
    "three of every row, the rest empty": lambda lists: lists.index_fill(1, torch.tensor([0, 2]), -1),
}


@interpret
@each
@pytest.mark.parametrize("lists", list(LISTS))
def test_lists(
    row: Row, lists: str, small: Small, draw: Draw, runnable: Runnable, kernel_device: str
) -> None:
    config = small(num_kv_heads=1)
    tensors = draw("sel", config, 3, batch=1, q_start=38, device=kernel_device)
    tensors["block_indices"] = LISTS[lists](tensors["block_indices"].cpu()).to(kernel_device)
    assert_parity(runnable(row, tensors, config), tensors, config, 38)


@interpret
@each
@pytest.mark.parametrize("missing", ["queries", "sequences", "keys"])
def test_nothing_to_do(
    row: Row, missing: str, small: Small, draw: Draw, runnable: Runnable, kernel_device: str
) -> None:
    config = small()
    tensors = draw("sel", config, 3, q_start=20, device=kernel_device)
    function = runnable(row, tensors, config)
    for name, tensor in tensors.items():
        if missing == "sequences":
            tensors[name] = tensor[:0]
        elif (name in ("k", "v")) == (missing == "keys"):
            tensors[name] = tensor[:, :0]
    o, lse = function(**tensors, config=config, q_start=20)
    assert o.shape == (*tensors["q"].shape[:3], 16)
    assert lse.shape == o.shape[:3]
    assert (o == 0).all()
    assert (lse == float("-inf")).all()


@interpret
@pytest.mark.parametrize(
    ("row", "budget"),
    [
        pytest.param(ROWS["union"], 1, id="union, a tile at a time"),
        pytest.param(ROWS["union"], 400, id="union, two tiles"),
        pytest.param(ROWS["kv_outer"], 1, id="kv_outer, 32 rows of a head at a time"),
        pytest.param(ROWS["kv_outer"], 50_000, id="kv_outer, all rows of a head"),
    ],
)
def test_chunks_change_no_bit(
    row: Row,
    budget: int,
    small: Small,
    draw: Draw,
    runnable: Runnable,
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nsa.kernels._by_keys
    import nsa.kernels._union

    config = small(num_heads=4)
    tensors = draw("sel", config, 70, batch=1, q_start=30, device=kernel_device)
    function = runnable(row, tensors, config)
    whole = function(**tensors, config=config, q_start=30)
    launched: list[int] = []
    original = nsa.kernels._union.mark
    monkeypatch.setattr(nsa.kernels._union, "mark", lambda *a, **b: launched.append(1) or original(*a, **b))
    for module in (nsa.kernels._union, nsa.kernels._by_keys):
        monkeypatch.setattr(module, "CHUNK_BYTES", budget)
    for part, expected in zip(function(**tensors, config=config, q_start=30), whole, strict=True):
        assert torch.equal(part, expected)
    assert len(launched) > 1


@interpret
@each
def test_later_keys_are_not_read(
    row: Row, small: Small, draw: Draw, runnable: Runnable, kernel_device: str
) -> None:
    """NaN in all of them, the rest of the last query's own block too."""
    config = small(num_kv_heads=1, selection_block_size=64)
    tensors = draw("sel", config, 2, batch=1, keys=200, q_start=70, dtype=torch.float16, device=kernel_device)
    function = runnable(row, tensors, config)
    assert_parity(function, tensors, config, 70)
    before = function(**tensors, config=config, q_start=70)
    for name in ("k", "v"):
        tensors[name][:, 72:] = float("nan")
    for mine, theirs in zip(function(**tensors, config=config, q_start=70), before, strict=True):
        assert torch.equal(mine, theirs)


@interpret
@with_lists
@pytest.mark.parametrize("block", [8, 16])
def test_a_row_does_not_feel_its_neighbours_lists(
    row: Row, block: int, small: Small, draw: Draw, runnable: Runnable, kernel_device: str
) -> None:
    """Bit for bit, although its tile walks more blocks."""
    config = small(selection_block_size=block)
    tensors = draw("sel", config, 40, q_start=40, device=kernel_device)
    function = runnable(row, tensors, config)
    before = function(**tensors, config=config, q_start=40)
    other = tensors["block_indices"].clone()
    other[:, 21:] = torch.arange(4, dtype=torch.int32, device=kernel_device)
    after = function(**tensors | {"block_indices": other}, config=config, q_start=40)
    for mine, theirs in zip(after, before, strict=True):
        assert torch.equal(mine[:, :21], theirs[:, :21])
        assert not torch.equal(mine[:, 21:], theirs[:, 21:])


@pytest.mark.parametrize(
    ("group", "queries", "expected"),
    [
        (16, 15, "query_major"),
        (16, 16, "union"),
        (5, 4096, "union"),
        (4, 4096, "kv_outer"),
        (1, 1, "query_major"),
    ],
)
def test_the_way_is_chosen_by_shapes(
    group: int, queries: int, expected: str, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa.kernels import selected

    taken: list[str] = []
    for way in ROWS:
        monkeypatch.setattr(
            selected,
            f"selected_attention_{way}",
            lambda *a, name=way, **b: taken.append(name) or (None, None),
        )
    q = torch.empty(1, queries, group, 16, device="meta")
    config = small(num_heads=group, num_kv_heads=1)
    selected.selected_attention(q, q, q, q, config)
    assert taken == [expected]


@interpret
@pytest.mark.parametrize("words", [2, 1024], ids=["many steps", "one step"])
def test_words_units_and_ranks_hold_what_was_asked(
    words: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa.kernels import _union
    from nsa.kernels._union import Asked, lists_of_blocks, lists_of_tiles

    monkeypatch.setattr(_union, "_COMPACT_WORDS", words)
    monkeypatch.setattr(_union, "_RANK_WORDS", words)
    monkeypatch.setattr(_union, "_MARK_BLOCK", 64)
    config = NSAConfig(2, 2, 16, selection_block_size=8, compression_block_size=8, compression_stride=8)
    lists = random_lists(2, 70, config, 100, 6)
    asked = Asked.of(lists.to(kernel_device), 30, torch.empty(2, 100), config, None)
    rows_of = range(70)  # three words of 32, four tiles of 21
    wanted = torch.zeros(4, 70, 13, dtype=torch.bool)
    by_head = lists.transpose(1, 2).flatten(0, 1).long()
    for block in range(13):
        wanted[..., block] = (by_head == block).any(-1) & (block * 8 <= torch.arange(30, 100))
    found = lists_of_tiles(asked, rows_of, 21, 2)
    for head in range(4):
        for tile in range(4):
            some = wanted[head, tile * 21 : tile * 21 + 21].any(0)
            pairs = torch.nn.functional.pad(some, (0, 1)).view(7, 2).any(1).nonzero().flatten().tolist()
            count = int(found.counts[head, tile])
            assert found.units[head, tile, :count].tolist() == pairs
    found = lists_of_blocks(asked, rows_of, range(1, 4))
    assert torch.equal(found.totals.cpu(), wanted[1:].sum(1).int())
    for tile in range(3):
        assert torch.equal(found.ranks[..., tile].cpu(), wanted[1:, : tile * 32].sum(1).int())


def test_launches_fit_every_architecture() -> None:
    """By the prediction of their shared memory; two blocks an SM where the paper's dims run on Hopper."""
    from nsa.kernels import _by_keys, selected
    from nsa.kernels._key_tile import shared_bytes

    room = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
    for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)):
        for dtype in (torch.bfloat16, torch.float32):
            for group in (1, 3, 16, 64):
                config = NSAConfig(group, 1, *dims)
                for choose in (selected.choose_union, selected.choose_query_major, _by_keys.choose):
                    for arch, kib in room.items():
                        launch = choose(config, dtype, arch)
                        need = shared_bytes(launch, *dims, dtype.itemsize)
                        assert need <= kib * 1024 or launch.block_n == 16
    for dims in ((64, 64), (128, 128), (192, 128)):
        launch = selected.choose_union(NSAConfig(64, 4, *dims), torch.bfloat16, (9, 0))
        assert 2 * shared_bytes(launch, *dims, 2) < 226 * 1024
