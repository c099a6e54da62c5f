"""Packed sequences: where they lie, who computes them in one call, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa import nsa_attention, selection_hook, stage_hook
from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.packing import Packed
from nsa.routes import TABLE, Request, resolve
from tests.nsa.recorder import Recorder

Small = Callable[..., NSAConfig]


def packed_of(lengths: list[int], config: NSAConfig) -> Packed:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Packed.of(bounds, sum(lengths), config)


def inputs(packed: Packed, config: NSAConfig) -> dict[str, Any]:
    """Arguments of nsa_attention by name, random, in fp64."""
    torch.manual_seed(0)
    tokens, blocks = sum(packed.lengths), sum(packed.blocks_each)

    def draw(rows: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, rows, heads, width, dtype=torch.float64)

    kv = {
        f"{side}_{branch}": draw(
            blocks if branch == "cmp" else tokens,
            config.num_kv_heads,
            config.head_dim if side == "k" else config.v_dim,
        )
        for branch in ("cmp", "sel", "win")
        for side in ("k", "v")
    }
    q, gates = draw(tokens, config.num_heads, config.head_dim), draw(tokens, config.num_heads, 3)
    return {"q": q, **kv, "gates": gates, "config": config, "packed": packed}


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6))
def test_sequences_lie_one_after_the_other(lengths: list[int]) -> None:
    config = NSAConfig(
        2, 1, 16, compression_block_size=8, compression_stride=4, selection_block_size=16, window_size=24
    )
    packed = packed_of(lengths, config)
    assert packed.lengths == tuple(lengths)
    assert packed.longest == max(lengths)
    assert packed.tokens.diff().tolist() == lengths
    assert packed.blocks.diff().tolist() == [num_compressed_blocks(one, config) for one in lengths]
    assert (packed.tokens[0], packed.blocks[0]) == (0, 0)
    assert {packed.tokens.dtype, packed.blocks.dtype} == {torch.int32}
    assert packed.positions().tolist() == [t for length in lengths for t in range(length)]
    found = list(packed.parts())
    assert [tokens.stop - tokens.start for tokens, _ in found] == [one for one in lengths if one]
    for tokens, blocks in found:
        assert tokens.start in packed.tokens
        assert blocks.stop - blocks.start == num_compressed_blocks(tokens.stop - tokens.start, config)


def test_only_backends_that_say_so_take_them_in_one_call(small: Small) -> None:
    assert {row.backend for row in TABLE if "packed" in row.takes} == {
        row.backend for row in TABLE if row.backend.startswith("triton")
    }
    assert {row.branch for row in TABLE if "lse" in row.takes} == {"score"}
    route = resolve("reference", Request("cpu", torch.float64, 8, 8, False, small()))
    assert not route.takes_packed
    assert not route.shares_lse


def test_backends_that_do_not_compute_them_one_by_one(small: Small) -> None:
    config, calls = small(), Recorder()
    packed = packed_of([40, 0, 7, 60], config)
    given = inputs(packed, config)
    with stage_hook(calls):
        found = nsa_attention(**given, routing="reference")
    assert calls.seen.count("cmp") == 3
    for tokens, blocks in packed.parts():
        one = {
            name: value[:, blocks if name in ("k_cmp", "v_cmp") else tokens]
            for name, value in given.items()
            if isinstance(value, torch.Tensor)
        }
        assert torch.equal(found[:, tokens], nsa_attention(**one, config=config, routing="reference"))


def test_no_token_at_all(small: Small) -> None:
    config = small()
    packed = packed_of([0, 0], config)
    assert nsa_attention(**inputs(packed, config)).shape == (1, 0, config.num_heads, config.v_dim)


def test_known_blocks_are_cut_with_their_sequences(small: Small) -> None:
    config = small()
    packed = packed_of([33, 20], config)
    given = inputs(packed, config)
    blocks = torch.zeros(1, 53, config.num_kv_heads, config.num_selected_blocks, dtype=torch.int32)
    blocks[:, :, :, 1:] = -1
    seen: list[torch.Tensor] = []

    def keep(chosen: torch.Tensor, q_start: int | torch.Tensor) -> torch.Tensor:
        seen.append(chosen)
        return chosen

    with selection_hook(keep):
        nsa_attention(**given, block_indices=blocks)
    assert [tuple(one.shape[:2]) for one in seen] == [(1, 33), (1, 20)]


def test_what_is_not_of_these_sequences(small: Small) -> None:
    config = small()
    given = inputs(packed_of([33, 20], config), config)
    with pytest.raises(ValueError, match=r"^packed sequences are whole: .* must be 0, got 1 and 0$"):
        nsa_attention(**given, q_start=1)
    with pytest.raises(ValueError, match=r"^packed sequences are whole: .* must be 0, got 0 and 2$"):
        nsa_attention(**given, win_start=2)
    other = packed_of([33, 21], config)
    with pytest.raises(
        ValueError, match=r"^packed sequences of 54 tokens and 11 compressed blocks need B = 1"
    ):
        nsa_attention(**(given | {"packed": other}))
