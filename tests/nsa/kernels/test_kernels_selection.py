"""Selection as kernels: tiles, chunks and segments of any size give one choice, the specification's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import nsa.reference as reference
from nsa.blocks import overlap_weights
from nsa.config import NSAConfig
from nsa.testing import assert_matches, error_budget
from tests.nsa.selections import assert_chosen

selection = pytest.importorskip("nsa.kernels.selection")
topn = pytest.importorskip("nsa.kernels._topn")
tiles = pytest.importorskip("nsa.kernels._tiles")

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
UseTiles = Callable[..., None]

BF16_H200 = (torch.bfloat16, (9, 0))
# The launches of a GPU, and tiles so small that everything comes in several.
GPU, TINY = "gpu", "tiny"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What ``torch.empty`` gives is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use_tiles(monkeypatch: pytest.MonkeyPatch) -> UseTiles:
    """``use_tiles(which, config, dtype)``: launch what a GPU launches, or tiny tiles, interpreted or not."""

    def patch(which: str, config: NSAConfig, dtype: torch.dtype) -> None:
        with monkeypatch.context() as context:
            context.setattr(selection, "interpreted", lambda: False)
            chosen = selection.settings(config, dtype, (9, 0))
        if which == TINY:
            tiny = tiles.Launch(16, 16, 1, 1, "several of everything")
            chosen = selection.Settings(tiny, tiny)
        monkeypatch.setattr(selection, "settings", lambda *given: chosen)

    return patch


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("per_compression", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 9])
def test_three_numbers_say_every_weight(stride: int, per_compression: int, more: int, small: Small) -> None:
    """The kernel knows eq. 9's weights by their number and the largest of them."""
    config = small(
        compression_block_size=per_compression * stride,
        compression_stride=stride,
        selection_block_size=(per_compression + more) * stride,
    )
    first, weights = overlap_weights(config)
    length, peak = len(weights), max(weights)
    assert weights == tuple(min(place + 1, length - place, peak) for place in range(length))
    assert first == 1 - per_compression == 1 - peak


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("group", "head_dim", "rows", "q_start", "dtype"),
    [
        pytest.param(3, 24, 40, 1_510, torch.float16, id="G=3"),
        pytest.param(16, 192, 10, 8_310, torch.float16, id="d=192"),
        pytest.param(16, 96, 5, 2_010, torch.float32, id="fp32"),
    ],
)
def test_tiles_of_a_gpu_in_the_papers_blocks(
    group: int,
    head_dim: int,
    rows: int,
    q_start: int,
    dtype: torch.dtype,
    draw: Draw,
    use_tiles: UseTiles,
    kernel_device: str,
) -> None:
    """Up to 131 selection blocks: many tiles of keys, two segments of blocks, two items."""
    config = NSAConfig(group, 1, head_dim)
    use_tiles(GPU, config, dtype)
    tensors = draw("score", config, rows, batch=1, q_start=q_start, dtype=dtype, device=kernel_device)
    chosen = selection.select_blocks(**tensors, config=config, q_start=q_start)
    assert_chosen(chosen, tensors, config, q_start=q_start)


@pytest.mark.interpret
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"compression_block_size": 4, "selection_block_size": 4},
        {"compression_block_size": 16, "compression_stride": 16},
        {"compression_block_size": 4, "selection_block_size": 32},
        {"compression_block_size": 6, "compression_stride": 2, "selection_block_size": 10},
        {"compression_block_size": 9, "compression_stride": 3, "selection_block_size": 9},
        {"compression_block_size": 1, "compression_stride": 1, "selection_block_size": 1},
        {"compression_block_size": 5, "compression_stride": 1, "selection_block_size": 40},
        {"compression_block_size": 32, "compression_stride": 1, "selection_block_size": 32},
        {"num_initial_blocks": 0, "num_local_blocks": 0},
        {"num_initial_blocks": 3, "num_local_blocks": 1},
        {"num_selected_blocks": 7, "num_initial_blocks": 0},
    ],
    ids=lambda shape: ",".join(map(str, shape.values())) or "8,4,16",
)
def test_geometries(
    shape: dict[str, int], small: Small, draw: Draw, use_tiles: UseTiles, kernel_device: str
) -> None:
    """With tiny tiles, blocks of more than 16 compressed ones come in pieces; the last one begins a tile."""
    config = small(num_heads=3, num_kv_heads=1, **shape)
    q_start = max(8 * config.selection_block_size - 3, 80)
    keys = q_start + 6 + 2 * config.selection_block_size
    tensors = draw("score", config, 6, batch=1, keys=keys, q_start=q_start, device=kernel_device)
    chosen = selection.select_blocks(**tensors, config=config, q_start=q_start)
    assert_chosen(chosen, tensors, config, q_start=q_start)
    use_tiles(TINY, config, torch.float32)
    assert torch.equal(selection.select_blocks(**tensors, config=config, q_start=q_start), chosen)


@pytest.mark.interpret
@pytest.mark.parametrize("group", [1, 5, 40])
def test_groups_smaller_and_larger_than_a_tile(
    group: int, small: Small, draw: Draw, use_tiles: UseTiles, kernel_device: str
) -> None:
    config = small(num_heads=2 * group)
    use_tiles(TINY, config, torch.float16)
    tensors = draw("score", config, 5, batch=1, q_start=120, dtype=torch.float16, device=kernel_device)
    assert_chosen(
        selection.select_blocks(**tensors, config=config, q_start=120), tensors, config, q_start=120
    )


@pytest.mark.interpret
@pytest.mark.parametrize("kv_len", [None, 90, 250])
def test_starts_and_lengths(
    kv_len: int | None, small: Small, draw: Draw, use_tiles: UseTiles, kernel_device: str
) -> None:
    """Sequences that start anywhere; tokens that exist behind the last query, or end before it."""
    config = small(num_heads=2, num_kv_heads=1)
    use_tiles(TINY, config, torch.float32)
    starts = torch.tensor([0, 90, 3])
    tensors = draw("score", config, 11, batch=3, keys=kv_len or 101, q_start=starts, device=kernel_device)
    given: dict[str, Any] = {"config": config, "kv_len": kv_len}
    chosen = selection.select_blocks(**tensors, **given, q_start=starts.to(kernel_device))
    assert_chosen(chosen, tensors, q_start=starts, **given)
    for row, start in enumerate(starts.tolist()):
        one = {name: tensor[row : row + 1] for name, tensor in tensors.items()}
        alone = selection.select_blocks(**one, **given, q_start=start)
        assert torch.equal(alone, chosen[row : row + 1])


@pytest.mark.interpret
def test_any_scratch_gives_the_same_lists(
    small: Small, draw: Draw, use_tiles: UseTiles, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    tensors = draw("score", config, 37, q_start=30, device=kernel_device)
    whole = selection.select_blocks(**tensors, config=config, q_start=30)
    use_tiles(TINY, config, torch.float32)
    parts: list[int] = []
    launched = selection.block_scores

    def counted(*given: Any, first_item: int, num_items: int) -> None:
        assert given[0].shape[0] >= num_items
        assert given[0].numel() * 4 <= selection.SCRATCH_BYTES
        parts.extend(range(first_item, first_item + num_items))
        launched(*given, first_item=first_item, num_items=num_items)

    monkeypatch.setattr(selection, "block_scores", counted)
    monkeypatch.setattr(selection, "SCRATCH_BYTES", 3 * 5 * 8 * 4)  # three items of five blocks, 8 tokens
    assert torch.equal(selection.select_blocks(**tensors, config=config, q_start=30), whole)
    assert parts == list(range(5 * 4))


@pytest.mark.interpret
@pytest.mark.parametrize("which", [GPU, TINY])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_lse_is_that_of_the_visible_blocks(
    dtype: torch.dtype, which: str, small: Small, draw: Draw, use_tiles: UseTiles, kernel_device: str
) -> None:
    config = small(num_heads=6, num_kv_heads=2, head_dim=24)
    use_tiles(which, config, dtype)
    tensors = draw("score", config, 50, batch=1, keys=200, q_start=60, dtype=dtype, device=kernel_device)
    lse = torch.empty((1, 50, 6), device=kernel_device)
    layout = tiles.layout_of(tensors["q"], tensors["k_cmp"], None)
    selection._lse(tensors["q"], tensors["k_cmp"], lse, config, 60, layout)
    q, k_cmp = (tensor.cpu() for tensor in tensors.values())
    exact, eager = (
        reference.compressed_attention(q.to(wide), k_cmp.to(wide), k_cmp.to(wide), config, q_start=60)[1]
        for wide in (torch.float64, torch.float32)
    )
    assert_matches(lse.cpu().double() * math.log(2), exact, error_budget(exact, eager))


@pytest.mark.interpret
def test_the_lse_of_compressed_attention_saves_a_pass(
    small: Small, draw: Draw, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    tensors = draw("score", config, 60, device=kernel_device)
    q, k_cmp = (tensor.cpu() for tensor in tensors.values())
    lse = reference.compressed_attention(q, k_cmp, k_cmp, config)[1].to(kernel_device)
    assert torch.isinf(lse[:, :7]).all()
    chosen = selection.select_blocks(**tensors, config=config)
    monkeypatch.setattr(selection, "_lse", None)
    given = selection.select_blocks(**tensors, lse=lse, config=config)
    assert torch.equal(given, chosen)
    assert_chosen(given, tensors, config)


@pytest.mark.interpret
@pytest.mark.parametrize("which", [GPU, TINY])
def test_equal_keys_tie_to_the_lower_block(
    which: str, small: Small, draw: Draw, use_tiles: UseTiles, kernel_device: str
) -> None:
    """Two kinds of blocks: the first of the better kind are chosen, in whatever tile or segment they lie."""
    config = small(compression_block_size=16, compression_stride=16, num_initial_blocks=0, num_local_blocks=1)
    use_tiles(which, config, torch.float32)
    tensors = draw("score", config, 1, batch=1, q_start=799, device=kernel_device)
    better = [3, 17, 18, 30, 31, 45]
    tensors["k_cmp"][:] = 0.0
    tensors["k_cmp"][:, better] = tensors["q"][:, 0, ::2]
    tensors["q"] = tensors["q"][:, :, ::2].repeat_interleave(2, 2).contiguous()
    chosen = selection.select_blocks(**tensors, config=config, q_start=799)
    assert chosen.tolist() == [[[[3, 17, 18, 49]] * 2]]
    tensors["k_cmp"][:] = 0.0
    chosen = selection.select_blocks(**tensors, config=config, q_start=799)
    assert chosen.tolist() == [[[[0, 1, 2, 49]] * 2]]


@pytest.mark.interpret
@pytest.mark.parametrize("logit", [300.0, -300.0, float("-inf")])
def test_logits_of_any_size(logit: float, small: Small, draw: Draw, kernel_device: str) -> None:
    """Compressed blocks far above or below all others; two that weigh nothing at all."""
    config = small(num_heads=3, num_kv_heads=1)
    tensors = draw("score", config, 90, device=kernel_device)
    tensors["q"][..., 0] = 4.0
    tensors["k_cmp"][..., 0] = 0.0
    tensors["k_cmp"][:, [5, 9], :, 0] = logit
    assert_chosen(selection.select_blocks(**tensors, config=config), tensors, config)


@pytest.mark.interpret
def test_what_is_not_yet_visible_is_not_used(small: Small, draw: Draw, kernel_device: str) -> None:
    """NaN in compressed blocks that end after the query; rows that see none at all."""
    config = small()
    tensors = draw("score", config, 100, device=kernel_device)
    before = selection.select_blocks(**tensors, config=config)
    tensors["k_cmp"][:, 12:] = float("nan")  # block 12 ends with token 55
    after = selection.select_blocks(**tensors, config=config)
    assert torch.equal(before[:, :55], after[:, :55])
    own = torch.arange(55) // 16
    slots = torch.arange(4)
    everything = torch.where(slots <= own[:, None], slots, -1)
    assert torch.equal(after[0, :55, 0].cpu().long(), everything)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_what_lies_beside_the_inputs_is_not_used(
    dtype: torch.dtype, small: Small, draw: Draw, kernel_device: str
) -> None:
    """NaN in further heads, dims, tokens and compressed blocks of the same memory."""
    config = small(num_heads=3, num_kv_heads=1, head_dim=24)
    tensors = draw("score", config, 90, batch=1, dtype=dtype, device=kernel_device)
    expected = selection.select_blocks(**tensors, config=config)
    beside = {
        name: torch.nn.functional.pad(tensor, (0, 8, 0, 2, 0, 40), value=float("nan"))[
            :, : tensor.shape[1], : tensor.shape[2], :24
        ]
        for name, tensor in tensors.items()
    }
    assert torch.equal(selection.select_blocks(**beside, config=config), expected)


@pytest.mark.interpret
@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 3, 50), (2, 0, 50), (1, 40, 7)])
def test_nothing_to_score(
    batch: int, rows: int, keys: int, small: Small, draw: Draw, kernel_device: str
) -> None:
    """No sequence, no query, no compressed block."""
    config = small(num_initial_blocks=0, num_local_blocks=0, num_selected_blocks=2)
    tensors = draw("score", config, rows, batch=batch, keys=keys, device=kernel_device)
    chosen = selection.select_blocks(**tensors, config=config)
    assert chosen.shape == (batch, rows, 2, 2)
    if chosen.numel():
        assert chosen[0, [0, 15, 16, 39], 0].tolist() == [[0, -1], [0, -1], [0, 1], [0, 1]]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("segment", "rows", "n", "initial", "local", "num_blocks"),
    [
        (128, 4, 16, 1, 2, 2**30),
        (16, 8, 5, 0, 0, 37),
        (16, 8, 5, 1, 2, 2**30),
        (16, 4, 1, 0, 0, 2**30),
        (16, 8, 6, 2, 4, 2**30),
        (8, 8, 50, 1, 2, 37),
    ],
)
def test_top_n_of_scores_full_of_ties(
    segment: int,
    rows: int,
    n: int,
    initial: int,
    local: int,
    num_blocks: int,
    small: Small,
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores of four values only, zero among them, blocks without a score, and the largest and smallest."""
    config = small(num_selected_blocks=n, num_initial_blocks=initial, num_local_blocks=local)
    monkeypatch.setattr(topn, "SEGMENT", segment)
    monkeypatch.setattr(topn, "ROWS", rows)
    tokens, items, width, start = 8, 2, 41, 640
    scores = torch.randint(0, 4, (2 * items, width, tokens)) * 0.25
    scores[:, 11], scores[:, 29], scores[:, 30] = 3e38, 1e-45, 1e-38
    chosen = torch.full((2, items * tokens - 3, 1, n), -7, dtype=torch.int32, device=kernel_device)
    layout = tiles.layout_of(chosen, scores, None)
    for first, last in ((0, 3), (3, 4)):
        topn.top_n(
            chosen, scores[first:last].to(kernel_device), (None, start), layout, config,
            num_blocks=num_blocks, first_item=first, num_items=last - first,
        )  # fmt: skip
    own = (start + torch.arange(chosen.shape[1])) // 16
    block = torch.arange(min(int(own.max()) + 1, num_blocks))
    for sequence in range(2):
        # Items run from the last tokens to the first, sequences in turn.
        mine = scores[sequence::2].flip(0).movedim(1, -1).flatten(0, 1)[: chosen.shape[1]]
        scored = torch.nn.functional.pad(mine, (0, 50))[:, : len(block)].double()
        forced = (block < initial) | (block > own[:, None] - local)
        scored = scored.masked_fill(forced, float("inf")).masked_fill(block > own[:, None], float("-inf"))
        order = scored.sort(dim=-1, descending=True, stable=True)
        best = order.indices[:, :n].masked_fill(order.values[:, :n] == float("-inf"), 99).sort(-1).values
        best = torch.nn.functional.pad(
            best.masked_fill(best == 99, -1), (0, max(0, n - len(block))), value=-1
        )
        assert torch.equal(chosen[sequence, :, 0].cpu().long(), best)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("arch", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_launches_fit_the_shared_memory(
    head_dim: int, arch: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "interpreted", lambda: False)
    room = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(arch, 99) * 1024
    vector = 2 * sum(tiles.split(head_dim))
    chosen = selection.settings(NSAConfig(64, 4, head_dim), torch.float16, arch)
    assert vector * (chosen.lse.block_m + chosen.lse.num_stages * chosen.lse.block_n) <= room
    assert vector * (chosen.scores.block_n + chosen.scores.num_stages * chosen.scores.block_m) <= room


def test_extra_memory_at_64k_tokens() -> None:
    lse = 65_536 * 64 * 4
    assert lse + selection.SCRATCH_BYTES <= 256 * 2**20
