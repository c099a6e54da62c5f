"""Block geometry by brute force: every count is counted token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa.reference as reference
from nsa.blocks import (
    num_compressed_blocks,
    num_selection_blocks,
    overlap_weights,
    own_block,
    query_positions,
    tokens_read,
    visible_compressed_blocks,
    window_start,
)
from nsa.config import NSAConfig

Small = Callable[..., NSAConfig]

PAPER = NSAConfig(64, 4, 192, 128)


@st.composite
def configs(draw: st.DrawFn) -> NSAConfig:
    stride = draw(st.integers(1, 4))
    block = draw(st.integers(1, 4))
    selection = draw(st.integers(block, 6))
    selected = draw(st.integers(1, 5))
    initial = draw(st.integers(0, selected))
    return NSAConfig(
        2,
        1,
        4,
        compression_block_size=block * stride,
        compression_stride=stride,
        selection_block_size=selection * stride,
        num_selected_blocks=selected,
        window_size=draw(st.integers(1, 30)),
        num_initial_blocks=initial,
        num_local_blocks=draw(st.integers(0, selected - initial)),
    )


def compressed_tokens(i: int, config: NSAConfig) -> range:
    """Rule 1: block ``i`` covers ``[i d, i d + l - 1]``."""
    start = i * config.compression_stride
    return range(start, start + config.compression_block_size)


def selection_tokens(j: int, config: NSAConfig) -> range:
    return range(j * config.selection_block_size, (j + 1) * config.selection_block_size)


@given(configs(), st.integers(0, 60))
def test_compressed_blocks_exist_while_complete(config: NSAConfig, length: int) -> None:
    complete = [i for i in range(length + 1) if compressed_tokens(i, config)[-1] < length]
    assert num_compressed_blocks(length, config) == len(complete)


@given(configs())
def test_a_query_sees_the_blocks_that_end_at_or_before_it(config: NSAConfig) -> None:
    position = torch.arange(60)
    visible = visible_compressed_blocks(position, config)
    counted = [sum(compressed_tokens(i, config)[-1] <= t for i in range(61)) for t in range(60)]
    assert visible.tolist() == counted
    assert visible.dtype == torch.int64
    assert visible_compressed_blocks(position.view(6, 10), config).tolist() == visible.view(6, 10).tolist()
    # What a query sees is what exists once it is the last token.
    assert counted == [num_compressed_blocks(t + 1, config) for t in range(60)]


@given(configs(), st.integers(0, 60))
def test_selection_blocks_begin_within_the_tokens(config: NSAConfig, length: int) -> None:
    begun = [j for j in range(length + 1) if selection_tokens(j, config)[0] < length]
    assert num_selection_blocks(length, config) == len(begun)


@given(configs(), st.integers(0, 60))
def test_own_block_holds_the_position(config: NSAConfig, position: int) -> None:
    assert position in selection_tokens(own_block(position, config), config)
    assert own_block(torch.tensor([position]), config).tolist() == [own_block(position, config)]


@given(configs(), st.integers(0, 60))
def test_window_includes_the_query(config: NSAConfig, position: int) -> None:
    keys = range(window_start(position, config), position + 1)
    assert len(keys) == min(position + 1, config.window_size)


@given(configs())
def test_overlap_weights_are_the_pairs_of_equation_9(config: NSAConfig) -> None:
    """0-based, the pair (m, n) of block j lands on compressed block ``(l'/d) (j + 1) - 1 - m - n``."""
    first, weights = overlap_weights(config)
    per_selection = config.selection_block_size // config.compression_stride
    per_compression = config.compression_block_size // config.compression_stride
    j = 3
    landed: dict[int, int] = {}
    for m in range(per_selection):
        for n in range(per_compression):
            i = per_selection * (j + 1) - 1 - m - n
            landed[i] = landed.get(i, 0) + 1
    assert {j * per_selection + first + m: weight for m, weight in enumerate(weights)} == landed


@given(configs())
def test_overlap_weights_count_shared_strides(config: NSAConfig) -> None:
    """The same stencil from its meaning: how many strides two blocks have in common."""
    first, weights = overlap_weights(config)
    stride = config.compression_stride
    j = 5
    shared = {
        i: len(set(compressed_tokens(i, config)) & set(selection_tokens(j, config))) // stride
        for i in range(15 * config.selection_block_size)
    }
    start = j * config.selection_block_size // stride + first
    expected = {start + m: weight for m, weight in enumerate(weights)}
    assert {i: weight for i, weight in shared.items() if weight} == expected


def test_overlap_weights_of_the_paper() -> None:
    assert overlap_weights(PAPER) == (-1, (1, 2, 2, 2, 1))


def test_overlap_weights_without_overlap(small: Small) -> None:
    config = small(compression_block_size=16, compression_stride=16, selection_block_size=64)
    assert overlap_weights(config) == (0, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("length", "compressed", "total"),
    [(8192, 511, 2047), (16384, 1023, 2559), (32768, 2047, 3583), (65536, 4095, 5631)],
)
def test_tokens_read_is_table_4_of_the_paper(length: int, compressed: int, total: int) -> None:
    read = tokens_read(length, PAPER)
    assert read == {"cmp": compressed, "sel": 1024, "win": 512}
    assert sum(read.values()) == total


def tokens_of_the_last_query(length: int, config: NSAConfig, seed: int) -> dict[str, int]:
    """Keys with a gradient, through the specification: what the last query really attends."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, 4, generator=generator, dtype=torch.float64)

    q, k_cmp, k = normal(1, 2), normal(num_compressed_blocks(length, config), 1), normal(length, 1)
    start = length - 1
    chosen = reference.select_blocks(q, k_cmp, config, q_start=start)

    def attended(values: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor]) -> int:
        values = values.clone().requires_grad_()
        branch(values).sum().backward()
        assert values.grad is not None
        return int((values.grad != 0).any(-1).sum())

    return {
        "cmp": attended(
            k_cmp, lambda v: reference.compressed_attention(q, k_cmp, v, config, q_start=start)[0]
        ),
        "sel": attended(k, lambda v: reference.selected_attention(q, k, v, chosen, config, q_start=start)[0]),
        "win": attended(k, lambda v: reference.sliding_attention(q, k, v, config, q_start=start)[0]),
    }


@settings(max_examples=60)
@given(configs(), st.integers(1, 80))
def test_tokens_read_is_what_the_specification_attends(config: NSAConfig, length: int) -> None:
    read, attended = tokens_read(length, config), tokens_of_the_last_query(length, config, seed=length)
    if config.num_local_blocks:
        assert read == attended
    else:  # whether the own, incomplete block is chosen depends on the data: the count is the most it can be
        assert {name: read[name] for name in ("cmp", "win")} == {n: attended[n] for n in ("cmp", "win")}
        assert attended["sel"] <= read["sel"] <= length


@pytest.mark.parametrize("length", [0, -1])
def test_tokens_read_of_nothing(length: int) -> None:
    with pytest.raises(ValueError, match=rf"^length must be at least 1, got {length}$"):
        tokens_read(length, PAPER)


def test_query_positions_from_an_int_or_a_tensor() -> None:
    cpu = torch.device("cpu")
    assert query_positions(5, 3, cpu).tolist() == [[5, 6, 7]]
    per_sequence = query_positions(torch.tensor([5, 0], dtype=torch.int32), 3, cpu)
    assert per_sequence.tolist() == [[5, 6, 7], [0, 1, 2]]
    assert per_sequence.dtype == torch.int64
