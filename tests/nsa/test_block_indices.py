"""Blocks that are given: in place of scores by argument, after scores by a hook; values, gradients, modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

import nsa.reference as reference
from nsa import KVCache, NativeSparseAttention, NSAConfig, nsa_attention, selection_hook, stage_hook
from nsa.blocks import num_compressed_blocks
from nsa.routes import backends
from nsa.testing import against_spec, check, error_budget

Small = Callable[..., NSAConfig]

ROWS, DIM = 150, 24


def inputs(config: NSAConfig, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator).to(dtype)

    blocks, heads = num_compressed_blocks(ROWS, config), config.num_kv_heads
    tensors = {"q": normal(ROWS, config.num_heads, config.head_dim)}
    for branch, count in (("cmp", blocks), ("sel", ROWS), ("win", ROWS)):
        tensors[f"k_{branch}"] = normal(count, heads, config.head_dim)
        tensors[f"v_{branch}"] = normal(count, heads, config.v_dim)
    return tensors | {"gates": normal(ROWS, config.num_heads, 3).sigmoid()}


def other_blocks(config: NSAConfig, batch: int = 2, rows: int = ROWS) -> torch.Tensor:
    """What the specification selects for other keys and queries: right in form, and not what these choose."""
    generator = torch.Generator().manual_seed(11)
    shapes = ((rows, config.num_heads), (num_compressed_blocks(rows, config), config.num_kv_heads))
    q, keys = (torch.randn(batch, *shape, config.head_dim, generator=generator) for shape in shapes)
    return reference.select_blocks(q, keys, config, kv_len=rows)


def gated_sum(config: NSAConfig, blocks: torch.Tensor, **t: torch.Tensor) -> torch.Tensor:
    parts = (
        reference.compressed_attention(t["q"], t["k_cmp"], t["v_cmp"], config)[0],
        reference.selected_attention(t["q"], t["k_sel"], t["v_sel"], blocks, config)[0],
        reference.sliding_attention(t["q"], t["k_win"], t["v_win"], config)[0],
    )
    gates = t["gates"].unbind(-1)
    return sum((o * gate.unsqueeze(-1) for o, gate in zip(parts, gates, strict=True)), torch.zeros(()))


ON_CPU = [name for name in ("auto", *backends("sel")) if name.split(":")[0] in ("auto", "gather", "sdpa")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ON_CPU)
def test_values_and_gradients_with_given_blocks_are_the_specification_s(
    backend: str, dtype: torch.dtype, small: Small
) -> None:
    config = small(value_dim=8)
    blocks = other_blocks(config)
    tensors = inputs(config, dtype)
    natural = reference.select_blocks(tensors["q"], tensors["k_cmp"], config, kv_len=ROWS)
    assert not torch.equal(blocks, natural)
    outcome = against_spec(
        lambda **given: nsa_attention(**given, config=config, routing=f"sel={backend}", block_indices=blocks),
        lambda **given: gated_sum(config, blocks, **given),
        tensors,
        gradients=True,
    )
    assert len(outcome) == 9
    for name, result in outcome.items():
        assert result.ok, f"{name}: {result}"


def stages_of(act: Callable[[], object]) -> list[str]:
    seen: list[str] = []

    @contextmanager
    def note(name: str) -> Any:
        seen.append(name)
        yield

    with stage_hook(note):
        act()
    return seen


def test_the_argument_skips_the_scores_and_the_hook_does_not(small: Small) -> None:
    config = small()
    tensors, blocks = inputs(config), other_blocks(config)
    assert stages_of(lambda: nsa_attention(**tensors, config=config, block_indices=blocks)) == [
        *("cmp", "sel", "win", "gate")
    ]
    asked: list[Any] = []

    def answer(chosen: torch.Tensor, q_start: Any) -> torch.Tensor:
        asked.append((chosen, q_start))
        return blocks

    with selection_hook(answer):
        assert stages_of(lambda: nsa_attention(**tensors, config=config)) == [
            *("cmp", "score", "sel", "win", "gate")
        ]
        hooked = nsa_attention(**tensors, config=config)
    given = nsa_attention(**tensors, config=config, block_indices=blocks)
    assert torch.equal(hooked, given)
    assert not torch.equal(hooked, nsa_attention(**tensors, config=config))
    natural = reference.select_blocks(tensors["q"], tensors["k_cmp"], config, kv_len=ROWS)
    assert [q_start for _, q_start in asked] == [0, 0]
    assert torch.equal(asked[0][0], natural)


def test_the_innermost_hook_is_asked_and_the_outer_one_comes_back(small: Small) -> None:
    config = small()
    tensors, asked = inputs(config), []

    def hook(name: str) -> Callable[..., torch.Tensor]:
        def record(chosen: torch.Tensor, q_start: Any) -> torch.Tensor:
            asked.append(name)
            return chosen

        return record

    with selection_hook(hook("outer")):
        with selection_hook(hook("inner")):
            nsa_attention(**tensors, config=config)
        with pytest.raises(RuntimeError, match="on purpose"), selection_hook(hook("broken")):
            raise RuntimeError("on purpose")
        nsa_attention(**tensors, config=config)
    nsa_attention(**tensors, config=config)
    assert asked == ["inner", "outer"]


def test_a_branch_that_is_off_asks_nobody(small: Small) -> None:
    config = small()
    tensors = inputs(config)

    def never(chosen: torch.Tensor, q_start: Any) -> torch.Tensor:
        raise AssertionError("asked")

    with selection_hook(never):
        off = nsa_attention(**tensors, config=config, routing="sel=off")
    given = nsa_attention(**tensors, config=config, routing="sel=off", block_indices=other_blocks(config))
    assert torch.equal(off, given)


@pytest.mark.parametrize("chunks", [[ROWS], [37, 100, 13], [1] * ROWS])
@pytest.mark.parametrize("how", ["argument", "hook"])
def test_every_way_to_feed_a_prompt_attends_the_same_blocks(
    chunks: list[int], how: str, small: Small
) -> None:
    config = small()
    torch.manual_seed(0)
    layer = NativeSparseAttention(config, DIM).double()
    x, blocks = torch.randn(2, ROWS, DIM, dtype=torch.float64), other_blocks(config)
    bounds = [0, *torch.tensor(chunks).cumsum(0).tolist()]
    with torch.no_grad():
        whole = layer(x, block_indices=blocks)
        assert not torch.allclose(whole, layer(x))
        cache = KVCache(config, 2, ROWS, dtype=torch.float64)
        parts = []
        for a, b in pairwise(bounds):
            if how == "argument":
                parts.append(layer(x[:, a:b], cache, block_indices=blocks[:, a:b]))
            else:
                with selection_hook(lambda chosen, start: blocks[:, start : start + chosen.shape[1]]):
                    parts.append(layer(x[:, a:b], cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_packed_sequences_count_their_own_blocks(small: Small) -> None:
    config = small()
    torch.manual_seed(0)
    layer = NativeSparseAttention(config, DIM).double()
    x = torch.randn(1, ROWS, DIM, dtype=torch.float64)
    first, second = other_blocks(config, 1, 90), other_blocks(config, 1, 60)
    packed = layer(x, cu_seqlens=torch.tensor([0, 90, ROWS]), block_indices=torch.cat([first, second], 1))
    alone = [layer(x[:, :90], block_indices=first), layer(x[:, 90:], block_indices=second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"^block_indices must be \(1, 150, 2, 4\), got \(1, 90, 2, 4\)$"):
        layer(x, cu_seqlens=torch.tensor([0, 90, ROWS]), block_indices=first)


def test_the_layer_s_gradients_flow_with_given_blocks_and_none_to_the_scores(small: Small) -> None:
    config = small()
    tensors = {name: t.requires_grad_() for name, t in inputs(config).items()}
    blocks = other_blocks(config)
    nsa_attention(**tensors, config=config, routing="cmp=off", block_indices=blocks).sum().backward()
    assert tensors["k_cmp"].grad is None
    assert (tensors["k_sel"].grad != 0).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b[:, 1:], r"^block_indices must be \(2, 150, 2, 4\), got \(2, 149, 2, 4\)$"),
        (lambda b: b[..., :3], r"^block_indices must be \(2, 150, 2, 4\), got \(2, 150, 2, 3\)$"),
        (lambda b: b.long(), r"^block_indices must be torch.int32 on cpu, got torch.int64 on cpu$"),
        (lambda b: b.clamp(min=10), r"^block_indices must be below 10, got 10$"),
        (lambda b: b.to("meta"), r"^block_indices must be torch.int32 on cpu, got torch.int32 on meta$"),
    ],
)
def test_blocks_that_cannot_be_are_refused(change: Any, said: str, small: Small) -> None:
    config = small()
    with pytest.raises(ValueError, match=said):
        nsa_attention(**inputs(config), config=config, block_indices=change(other_blocks(config)))


def test_a_hook_that_answers_in_another_form_is_refused(small: Small) -> None:
    config = small()
    with (
        selection_hook(lambda chosen, start: chosen[:, :-1]),
        pytest.raises(ValueError, match=r"^a selection hook must return \(\(2, 150, 2, 4\), torch.int32, "),
    ):
        nsa_attention(**inputs(config), config=config)


def test_the_scores_of_each_backend_run_under_a_hook(small: Small) -> None:
    """What a benchmark with made-up blocks relies on: each row of `score` computes what it always does."""
    config = small()
    tensors = inputs(config, torch.float32)
    expected = gated_sum(config, other_blocks(config), **{k: t.double() for k, t in tensors.items()})
    for backend in ("reference", "chunked"):
        with selection_hook(lambda chosen, start: other_blocks(config)):
            out = nsa_attention(**tensors, config=config, routing=f"score={backend}")
        eager = gated_sum(config, other_blocks(config), **tensors)
        assert check(out, expected, error_budget(expected, eager, 4.0)).ok
