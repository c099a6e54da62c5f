"""The specification against a second one: a Python loop over queries, written from the rules alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa import compressed_attention, select_blocks, selected_attention, sliding_attention
from nsa.config import NSAConfig
from nsa.reference import block_scores

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def softmax(logits: list[float]) -> tuple[list[float], float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights], top + math.log(sum(weights))


def attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Iterable[int]
) -> tuple[torch.Tensor, float]:
    """One query ``(D,)`` over the named keys of ``k (S,D), v (S,DV)``."""
    keys = list(keys)
    if not keys:
        return torch.zeros(v.shape[1], dtype=torch.float64), -math.inf
    p, lse = softmax([float(q @ k[s]) / math.sqrt(len(q)) for s in keys])
    return sum((weight * v[s] for weight, s in zip(p, keys, strict=True)), torch.zeros_like(v[0])), lse


Keys = Callable[[int, int, int], Iterable[int]]  # (sequence, absolute position, KV head) -> keys


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys, starts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows, heads, _ = q.shape
    group = heads // k.shape[2]
    o = torch.empty(batch, rows, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.empty(batch, rows, heads, dtype=torch.float64)
    for b in range(batch):
        for t in range(rows):
            for head in range(heads):
                own = head // group
                o[b, t, head], lse[b, t, head] = attend_one(
                    q[b, t, head], k[b, :, own], v[b, :, own], keys(b, starts[b] + t, own)
                )
    return o, lse


def visible(t: int, blocks: int, c: NSAConfig) -> list[int]:
    """Rule 1."""
    return [i for i in range(blocks) if i * c.compression_stride + c.compression_block_size - 1 <= t]


def scores_one(q: torch.Tensor, k_cmp: torch.Tensor, t: int, num_blocks: int, c: NSAConfig) -> list[float]:
    """Rules 3 to 5 for one query: ``q (G,D), k_cmp (C,D)``. Eq. 9, with its pairs (m, n) counted from 0."""
    seen = visible(t, len(k_cmp), c)
    total = [0.0] * num_blocks
    if not seen:
        return total
    per_selection = c.selection_block_size // c.compression_stride
    per_compression = c.compression_block_size // c.compression_stride
    for head in q:
        p, _ = softmax([float(head @ k_cmp[i]) / math.sqrt(len(head)) for i in seen])
        for j in range(num_blocks):
            for m in range(per_selection):
                for n in range(per_compression):
                    i = per_selection * (j + 1) - 1 - m - n
                    if 0 <= i < len(p):
                        total[j] += p[i]
    return total


def select_one(scores: list[float], t: int, c: NSAConfig) -> list[int]:
    """Rule 6."""
    own = t // c.selection_block_size
    forced = {*range(c.num_initial_blocks), *range(own - c.num_local_blocks + 1, own + 1)} & set(
        range(own + 1)
    )
    others = sorted(set(range(own + 1)) - forced, key=lambda j: (-scores[j], j))
    chosen = sorted([*forced, *others[: c.num_selected_blocks - len(forced)]])
    return chosen + [-1] * (c.num_selected_blocks - len(chosen))


def start_list(q_start: int | torch.Tensor, batch: int) -> list[int]:
    return q_start.tolist() if isinstance(q_start, torch.Tensor) else [q_start] * batch


@st.composite
def cases(draw: st.DrawFn) -> tuple[NSAConfig, int | torch.Tensor, int, int, int]:
    """Configuration, q_start, rows, tokens that exist, seed. Two sequences."""
    stride = draw(st.integers(1, 3))
    block = draw(st.integers(1, 3))
    selected = draw(st.integers(1, 4))
    initial = draw(st.integers(0, selected))
    kv_heads = draw(st.integers(1, 2))
    config = NSAConfig(
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        compression_block_size=block * stride,
        compression_stride=stride,
        selection_block_size=draw(st.integers(block, 5)) * stride,
        num_selected_blocks=selected,
        window_size=draw(st.integers(1, 12)),
        num_initial_blocks=initial,
        num_local_blocks=draw(st.integers(0, selected - initial)),
    )
    q_start: int | torch.Tensor = draw(st.integers(0, 20))
    if draw(st.booleans()):
        q_start = torch.tensor(draw(st.lists(st.integers(0, 20), min_size=2, max_size=2)))
    rows = draw(st.integers(1, 9))
    length = int(torch.as_tensor(q_start).max()) + rows + draw(st.integers(0, 7))
    return config, q_start, rows, length, draw(st.integers(0, 99))


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=50)
@given(cases())
def test_compressed_attention_and_selection_are_the_rules(case: Any) -> None:
    config, q_start, rows, length, seed = case
    blocks = len(visible(length - 1, length, config))
    q = normal((2, rows, config.num_heads, config.head_dim), seed)
    k_cmp = normal((2, blocks, config.num_kv_heads, config.head_dim), seed + 1)
    v_cmp = normal((2, blocks, config.num_kv_heads, config.v_dim), seed + 2)
    starts = start_list(q_start, 2)

    o, lse = compressed_attention(q, k_cmp, v_cmp, config, q_start=q_start)
    expected = attend(q, k_cmp, v_cmp, lambda b, t, h: visible(t, blocks, config), starts)
    torch.testing.assert_close(o, expected[0], **EXACT)
    torch.testing.assert_close(lse, expected[1], **EXACT)

    scores = block_scores(q, k_cmp, config, q_start=q_start, kv_len=length)
    chosen = select_blocks(q, k_cmp, config, q_start=q_start, kv_len=length)
    grouped = q.unflatten(2, (config.num_kv_heads, -1))
    for b in range(2):
        for row in range(rows):
            for h in range(config.num_kv_heads):
                t = starts[b] + row
                one = scores_one(grouped[b, row, h], k_cmp[b, :, h], t, scores.shape[-1], config)
                torch.testing.assert_close(scores[b, row, h], torch.tensor(one, dtype=torch.float64), **EXACT)
                # Ranked by the specification's own scores: sums in another order may split a tie.
                assert chosen[b, row, h].tolist() == select_one(scores[b, row, h].tolist(), t, config)


@settings(max_examples=50)
@given(cases(), st.data())
def test_selected_attention_is_rule_7(case: Any, data: st.DataObject) -> None:
    config, q_start, rows, length, seed = case
    size = config.selection_block_size
    num_blocks = -(-length // size)
    slots = data.draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(seed)
    lists = torch.randint(-1, num_blocks, (2, rows, config.num_kv_heads, slots), generator=generator).int()
    q = normal((2, rows, config.num_heads, config.head_dim), seed)
    k = normal((2, length, config.num_kv_heads, config.head_dim), seed + 1)
    v = normal((2, length, config.num_kv_heads, config.v_dim), seed + 2)
    starts = start_list(q_start, 2)

    def keys(b: int, t: int, h: int) -> list[int]:
        chosen = set(lists[b, t - starts[b], h].tolist())
        return [s for s in range(length) if s <= t and s // size in chosen]

    o, lse = selected_attention(q, k, v, lists, config, q_start=q_start)
    expected = attend(q, k, v, keys, starts)
    torch.testing.assert_close(o, expected[0], **EXACT)
    torch.testing.assert_close(lse, expected[1], **EXACT)


@settings(max_examples=50)
@given(cases())
def test_sliding_attention_is_rule_8(case: Any) -> None:
    config, q_start, rows, length, seed = case
    q = normal((2, rows, config.num_heads, config.head_dim), seed)
    k = normal((2, length, config.num_kv_heads, config.head_dim), seed + 1)
    v = normal((2, length, config.num_kv_heads, config.v_dim), seed + 2)
    o, lse = sliding_attention(q, k, v, config, q_start=q_start)
    window = config.window_size
    expected = attend(q, k, v, lambda b, t, h: range(max(0, t - window + 1), t + 1), start_list(q_start, 2))
    torch.testing.assert_close(o, expected[0], **EXACT)
    torch.testing.assert_close(lse, expected[1], **EXACT)


def branch_inputs(
    branch: str, draw: Draw, config: NSAConfig, rows: int
) -> tuple[Callable[..., Any], dict[str, Any]]:
    functions: dict[str, Callable[..., Any]] = {
        "cmp": compressed_attention,
        "sel": selected_attention,
        "win": sliding_attention,
    }
    return functions[branch], draw(branch, config, rows, batch=1, dtype=torch.float64)


@pytest.mark.parametrize("branch", ["cmp", "sel", "win"])
def test_gradients_are_those_of_finite_differences(branch: str, draw: Draw) -> None:
    config = NSAConfig(
        2, 1, 3, 2, compression_block_size=4, compression_stride=2, selection_block_size=4,
        num_selected_blocks=2, window_size=3, num_local_blocks=1,
    )  # fmt: skip
    function, tensors = branch_inputs(branch, draw, config, 10)
    if branch == "sel":
        tensors["block_indices"][0, 4] = -1
    leaves = [t.requires_grad_() for t in tensors.values() if t.is_floating_point()]
    rest = [t for t in tensors.values() if not t.is_floating_point()]
    assert torch.autograd.gradcheck(lambda *given: function(*given, *rest, config)[0], leaves)
    assert torch.autograd.gradgradcheck(lambda *given: function(*given, *rest, config)[0], leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("branch", ["cmp", "sel", "win"])
def test_dtypes_of_the_results(branch: str, dtype: torch.dtype, small: Small, draw: Draw) -> None:
    config = small()
    function, _ = branch_inputs(branch, draw, config, 2)
    tensors = draw(branch, config, 40, dtype=dtype)
    o, lse = function(**tensors, config=config)
    assert o.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_scores_are_those_of_the_same_inputs_in_fp32(
    dtype: torch.dtype, small: Small, draw: Draw
) -> None:
    config = small()
    tensors = draw("score", config, 200, dtype=dtype)
    scores = block_scores(**tensors, config=config)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, block_scores(**{n: t.float() for n, t in tensors.items()}, config=config))


def test_probabilities_add_up_over_the_blocks(small: Small, draw: Draw) -> None:
    """Each complete compressed block shares l/d strides with the selection blocks it touches."""
    config = small()
    scores = block_scores(**draw("score", config, 200), config=config)
    expected = torch.full((193,), 4.0)  # G = 2 heads, l/d = 2
    torch.testing.assert_close(scores[:, 7:].sum(-1), expected.expand(2, 2, -1).transpose(1, 2))
    assert (scores[:, :7] == 0).all()


def test_forced_blocks_count_and_rank_first(small: Small) -> None:
    """Rule 6: with n = 4, two initial and two local blocks leave no room, however high others score."""
    config = small(num_initial_blocks=2, num_local_blocks=2)
    q = torch.ones(1, 1, 4, 16)
    k_cmp = torch.zeros(1, 30, 2, 16)
    k_cmp[:, 17] = 10.0  # block 4
    assert select_blocks(q, k_cmp, config, q_start=123).tolist() == [[[[0, 1, 6, 7]] * 2]]
    fewer = small(num_initial_blocks=1, num_local_blocks=2)
    assert select_blocks(q, k_cmp, fewer, q_start=123).tolist() == [[[[0, 4, 6, 7]] * 2]]
    # Initial and local blocks that are the same block are one block.
    assert select_blocks(q, k_cmp, config, q_start=20)[0, 0, 0].tolist() == [0, 1, -1, -1]
    assert select_blocks(q, k_cmp, config, q_start=40)[0, 0, 0].tolist() == [0, 1, 2, -1]


def test_ties_go_to_the_lower_index(small: Small) -> None:
    config = small(num_local_blocks=1)
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    k_cmp = torch.zeros(1, 72, 2, 16, dtype=torch.float64)
    chosen = select_blocks(q, k_cmp, config, q_start=291)
    assert chosen.tolist() == [[[[0, 1, 2, 18]] * 2]]


def test_block_that_ends_with_the_query_is_seen(small: Small) -> None:
    """Rule 1, at the border: block 0 is tokens 0 to 7."""
    config = small()
    q, k, v = torch.ones(1, 2, 4, 16), torch.ones(1, 1, 2, 16), torch.full((1, 1, 2, 16), 3.0)
    o, lse = compressed_attention(q, k, v, config, q_start=6)
    assert o[0, :, 0, 0].tolist() == [0.0, 3.0]
    assert lse[0, :, 0].tolist() == [-math.inf, 4.0]


def test_window_of_one_is_the_query_itself(small: Small) -> None:
    config = small(window_size=1)
    v = torch.arange(5.0)[None, :, None, None].expand(1, 5, 2, 16)
    o, _ = sliding_attention(torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16), v, config)
    assert o[0, :, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("function", [compressed_attention, sliding_attention])
def test_no_key_at_all(function: Callable[..., Any], small: Small) -> None:
    config = small(value_dim=8)
    q = torch.randn(2, 3, 4, 16, requires_grad=True)
    o, lse = function(q, torch.zeros(2, 0, 2, 16), torch.zeros(2, 0, 2, 8), config)
    assert o.shape == (2, 3, 4, 8)
    assert (o == 0).all()
    assert (lse == -math.inf).all()
    o.sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad, torch.zeros_like(q))
