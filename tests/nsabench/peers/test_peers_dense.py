"""The dense baseline: right by the specification, and without work that nobody would put up with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa import NSAConfig, sliding_attention
from nsa.testing import against_spec
from nsabench.measure import peak_memory
from nsabench.peers.dense import DenseAttention, DenseCache, dense_attention

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def qkv(
    tokens: int, length: int, heads: int, kv_heads: int, dk: int, dv: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    return {
        "q": torch.randn(2, tokens, heads, dk).to(dtype),
        "k": torch.randn(2, length, kv_heads, dk).to(dtype),
        "v": torch.randn(2, length, kv_heads, dv).to(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 37), (37, 37), (5, 37), (36, 37)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dk", "dv"), [(4, 2, 8, 8), (3, 1, 8, 4), (5, 5, 4, 8), (6, 1, 6, 6)]
)
def test_values_and_gradients_are_those_of_causal_attention(
    tokens: int, length: int, heads: int, kv_heads: int, dk: int, dv: int, dtype: str
) -> None:
    config = NSAConfig(heads, kv_heads, dk, dv, window_size=length)

    def specification(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sliding_attention(q, k, v, config, q_start=length - tokens)[0]

    given = qkv(tokens, length, heads, kv_heads, dk, dv, DTYPES[dtype])
    found = against_spec(dense_attention, specification, given, gradients=True)
    assert {name: check for name, check in found.items() if not check.ok} == {}


def test_a_decode_step_copies_neither_keys_nor_values() -> None:
    given = qkv(1, 4096, 8, 2, 16, 16, torch.float32)
    peak = peak_memory(lambda: dense_attention(**given), "cpu").alloc_bytes
    assert peak < given["k"].nbytes / 8


@pytest.mark.parametrize("dv", [8, 16, 24])
def test_no_prompt_makes_a_matrix_of_scores(dv: int) -> None:
    given = qkv(1024, 1024, 8, 2, 16, dv, torch.float32)
    scores = 2 * 8 * 1024 * 1024 * 4
    assert peak_memory(lambda: dense_attention(**given), "cpu").alloc_bytes < scores / 4


def layer(**more: Any) -> DenseAttention:
    return DenseAttention(24, 6, 2, 8, 4, **{"max_seq_len": 40, "dtype": torch.float64, **more})


def eager(made: DenseAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer written out: rotation by complex numbers, the whole score matrix."""
    q, k, v = made.qkv(x).split([6 * 8, 2 * 8, 2 * 4], -1)
    q, k, v = q.unflatten(-1, (6, 8)), k.unflatten(-1, (2, 8)), v.unflatten(-1, (2, 4))
    angle = torch.outer(torch.arange(x.shape[1]).double(), 10000.0 ** -(torch.arange(4).double() / 4))

    def rotate(t: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(t[..., :4], t[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    q, k = rotate(q), rotate(k)
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(3, 2)) / 8**0.5
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    p = logits.masked_fill(future, float("-inf")).softmax(-1)
    o = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(3, 2))
    y: torch.Tensor = made.out(o.flatten(2))
    return y


def test_the_layer_is_attention_with_rotary_positions() -> None:
    made, x = layer(), torch.randn(2, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(made(x), eager(made, x), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in made.parameters()) == 24 * (6 * 8 + 2 * 8 + 2 * 4) + 6 * 4 * 24


def test_tables_are_made_in_parts_and_rounded_once() -> None:
    made = layer(max_seq_len=5000, dtype=torch.bfloat16)
    angle = torch.outer(torch.arange(5000).double(), 10000.0 ** -(torch.arange(4).double() / 4))
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    assert torch.equal(made.cos[:, 0], torch.cat([cos, cos], -1))
    assert torch.equal(made.sin[:, 0], torch.cat([-sin, sin], -1))


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_cache_changes_nothing(size: int, keep_graph: bool, tokens_first: bool) -> None:
    made, x = layer(), torch.randn(2, 40, 24, dtype=torch.float64, requires_grad=keep_graph)
    order = {"keep_graph": keep_graph, "tokens_first": tokens_first}
    cache = DenseCache(2, 40, 2, 8, 4, dtype=torch.float64, **order)
    with torch.set_grad_enabled(keep_graph):
        y = torch.cat([made(x[:, a : a + size], cache) for a in range(0, 40, size)], 1)
    truth = made(x)
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-12)
    if keep_graph:
        upstream = torch.randn_like(y)
        leaves = [x, *made.parameters()]
        through, whole = (torch.autograd.grad(out, leaves, upstream) for out in (y, truth))
        for mine, its in zip(through, whole, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


def test_a_full_cache_of_tokens_is_read_as_packed_sequences_without_a_copy() -> None:
    cache = DenseCache(2, 6, 3, 8, 4, tokens_first=True)
    keys, values = cache.append(torch.randn(2, 6, 3, 8), torch.randn(2, 6, 3, 4))
    assert keys.flatten(0, 1).data_ptr() == keys.data_ptr()
    assert values.is_contiguous()


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_cache_is_counted_rolled_back_and_full(tokens_first: bool) -> None:
    cache = DenseCache(2, 10, 3, 8, 4, tokens_first=tokens_first)
    assert cache.bytes() == 2 * 10 * 3 * (8 + 4) * 4
    k, v = torch.randn(2, 6, 3, 8), torch.randn(2, 6, 3, 4)
    cache.append(k, v)
    before = cache.checkpoint()
    cache.append(k[:, :2], v[:, :2])
    cache.rollback(before)
    keys, values = cache.append(k[:, 3:4], v[:, 3:4])
    assert torch.equal(keys, torch.cat([k, k[:, 3:4]], 1))
    assert torch.equal(values, torch.cat([v, v[:, 3:4]], 1))
    with pytest.raises(ValueError, match=r"the cache is full: 7 \+ 6 tokens, max_seq_len is 10"):
        cache.append(k, v)
    assert cache.length == 7
    cache.reset()
    with pytest.raises(ValueError, match="cannot roll back from 0 tokens forward to 6"):
        cache.rollback(before)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((24, 6, 4, 8, 4), "kv_heads must divide heads=6, got 4"), ((24, 6, 2, 7, 4), "even key_dim, got 7")],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseAttention(*sizes, max_seq_len=4)  # type: ignore[misc,arg-type]
