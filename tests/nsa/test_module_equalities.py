"""Rule 12 on the layer: prefill, decode, packing and batching are one function, and the past is fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nsa import KVCache, NativeSparseAttention, NSAConfig, UnsupportedRoute
from nsa.routes import backends

Small = Callable[..., NSAConfig]

DIM = 24
# The differences that the rule allows, by dtype.
ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-10}

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "conv": {"compress": "conv"},
    "mlp": {"compress": "mlp"},
    "shared_kv": {"shared_kv": True},
    "compress_rotated": {"compress_rotated": True},
    "shared_kv, compress_rotated": {"shared_kv": True, "compress_rotated": True, "compress": "conv"},
    "no positions": {"rope": None},
    "softmax": {"gate": "softmax"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def build(
    config: NSAConfig,
    options: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> NativeSparseAttention:
    """A layer whose every parameter is away from its special starting value."""
    torch.manual_seed(3)
    layer = NativeSparseAttention(config, DIM, **(options or {}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer.to(device=device, dtype=dtype)


def tokens(
    length: int, batch: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64).to(device, dtype)


def spans(chunks: list[int]) -> Iterator[slice]:
    ends = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    return (slice(a, b) for a, b in pairwise(ends))


def cached(
    layer: NativeSparseAttention,
    x: torch.Tensor,
    chunks: list[int],
    *,
    keep_graph: bool,
    routing: str = "auto",
) -> torch.Tensor:
    cache = KVCache(
        layer.config, x.shape[0], x.shape[1],
        dtype=x.dtype, device=x.device, shared_kv=layer.shared_kv, keep_graph=keep_graph,
    )  # fmt: skip
    return torch.cat([layer(x[:, span], cache, routing) for span in spans(chunks)], 1)


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(expected).all()
    return (actual - expected).abs().nan_to_num(float("inf")).max().item()


def gradients(layer: NativeSparseAttention, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return list(torch.autograd.grad(y, [x, *layer.parameters()], upstream))


def assert_equal(
    layer: NativeSparseAttention,
    x: torch.Tensor,
    one: Callable[[torch.Tensor], torch.Tensor],
    other: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Values and all gradients of the two ways agree to 1e-10."""
    x = x.clone().requires_grad_()
    first, second = one(x), other(x)
    assert worst(first, second) <= ALLOWED[torch.float64]
    names = ["x", *(name for name, _ in layer.named_parameters())]
    both = zip(names, gradients(layer, x, first), gradients(layer, x, second), strict=True)
    for name, mine, theirs in both:
        assert worst(mine, theirs) <= ALLOWED[torch.float64], name
        assert (theirs != 0).any(), name


CHUNKS = {
    "token by token": [1] * 90,
    "even chunks": [5] * 18,
    "uneven chunks": [1, 6, 1, 15, 2, 65],
    "a prompt, then tokens": [79] + [1] * 11,
    "one chunk": [90],
}


@every_option
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=list(CHUNKS))
def test_chunked_prefill_and_decode_equal_batched_prefill(
    options: dict[str, Any], chunks: list[int], small: Small
) -> None:
    layer = build(small(value_dim=8), options)
    assert_equal(layer, tokens(90), layer, lambda x: cached(layer, x, chunks, keep_graph=True))


@every_option
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=list(CHUNKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@torch.no_grad()
def test_the_preallocated_cache_gives_the_same(
    options: dict[str, Any], chunks: list[int], dtype: torch.dtype, small: Small, device: str
) -> None:
    if (device, dtype) == ("cuda", torch.float64):
        pytest.skip("torch's fused CUDA kernels take no fp64")
    layer = build(small(value_dim=8), options, dtype, device)
    x = tokens(90, dtype=dtype, device=device)
    assert worst(cached(layer, x, chunks, keep_graph=False), layer(x)) <= ALLOWED[dtype]


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.sampled_from([1, 2, 5, 9, 24, 64]),
    st.sampled_from(sorted(OPTIONS)),
)
@torch.no_grad()
def test_any_chunks_equal_batched_prefill(chunks: list[int], window: int, options: str) -> None:
    config = NSAConfig(
        2, 1, 4, compression_block_size=4, compression_stride=2, selection_block_size=6,
        num_selected_blocks=4, window_size=window,
    )  # fmt: skip
    layer = build(config, OPTIONS[options])
    x = tokens(sum(chunks), batch=1)
    assert worst(cached(layer, x, chunks, keep_graph=False), layer(x)) <= ALLOWED[torch.float64]


@pytest.mark.parametrize("routing", ["auto", *backends()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@torch.no_grad()
def test_smallS_equivalence(routing: str, dtype: torch.dtype, small: Small, device: str) -> None:
    """Batched prefill, token by token, and the specification, at the lengths where borders lie."""
    layer = build(small(value_dim=8), dtype=dtype, device=device)
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 63, 64, 65, 80):
        x = tokens(length, dtype=dtype, device=device)
        try:
            batched = layer(x, routing=routing)
        except UnsupportedRoute as refused:
            pytest.skip(str(refused))
        expected = layer(x, routing="reference")
        assert worst(batched, expected) <= ALLOWED[dtype], f"batched prefill, S = {length}"
        stepwise = cached(layer, x, [1] * length, keep_graph=False, routing=routing)
        assert worst(stepwise, expected) <= ALLOWED[dtype], f"token by token, S = {length}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"compress": "mlp", "gate": "softmax"}], ids=["mean", "mlp"])
def test_no_nan_rows(options: dict[str, Any], dtype: torch.dtype, small: Small, device: str) -> None:
    """Rule 2 through the whole layer: most of these queries see no compressed block."""
    if (device, dtype) == ("cuda", torch.float64):
        pytest.skip("torch's fused CUDA kernels take no fp64")
    layer = build(small(), options, dtype, device)
    for length in (1, 7, 8, 70):
        x = tokens(length, dtype=dtype, device=device).requires_grad_()
        y = layer(x)
        assert torch.isfinite(y).all()
        y.sum().backward()
        for name, parameter in [("x", x), *layer.named_parameters()]:
            grad = parameter.grad
            assert grad is None or torch.isfinite(grad).all(), name


@every_option
def test_packed_sequences_equal_a_loop(options: dict[str, Any], small: Small) -> None:
    layer = build(small(), options)
    bounds = [0, 17, 17, 18, 84, 90]  # a sequence of no token, one of one token

    def loop(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x[:, a:b]) for a, b in pairwise(bounds)], 1)

    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor(bounds, dtype=dtype)
        assert_equal(layer, tokens(90, batch=1), loop, partial(layer, cu_seqlens=cu_seqlens))


def test_packed_sequences_take_the_route_they_are_given(small: Small) -> None:
    layer, x, cu_seqlens = build(small()), tokens(90, batch=1), torch.tensor([0, 90])
    for routing in ("reference", "cmp=off,sel=off", "win=off"):
        expected = layer(x, routing=routing)
        assert worst(layer(x, routing=routing, cu_seqlens=cu_seqlens), expected) <= ALLOWED[torch.float64]


def test_a_packed_sequence_does_not_see_its_neighbours(small: Small) -> None:
    layer = build(small())
    x, cu_seqlens = tokens(90, batch=1), torch.tensor([0, 40, 90])
    before = layer(x, cu_seqlens=cu_seqlens)
    x[:, :40] += 1
    assert torch.equal(layer(x, cu_seqlens=cu_seqlens)[:, 40:], before[:, 40:])
    assert worst(layer(x[:, 40:]), before[:, 40:]) <= ALLOWED[torch.float64]


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 5, 4, 20], r"^cu_seqlens must ascend from 0 to 20, got \[0, 5, 4, 20\]$"),
        ([0, 19], r"^cu_seqlens must ascend from 0 to 20, got \[0, 19\]$"),
        ([1, 20], r"^cu_seqlens must ascend from 0 to 20, got \[1, 20\]$"),
        ([20], r"^cu_seqlens must ascend from 0 to 20, got \[20\]$"),
        ([], r"^cu_seqlens must ascend from 0 to 20, got \[\]$"),
    ],
)
def test_cu_seqlens_must_cover_the_tokens(cu_seqlens: list[int], message: str, small: Small) -> None:
    with pytest.raises(ValueError, match=message):
        build(small())(tokens(20, batch=1), cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))


def test_cu_seqlens_need_one_row_and_no_cache(small: Small) -> None:
    config = small()
    layer, cu_seqlens = build(config), torch.tensor([0, 20])
    with pytest.raises(ValueError, match=r"^cu_seqlens needs B = 1 and no cache, got B = 2$"):
        layer(tokens(20), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"^cu_seqlens needs B = 1 and no cache, got "):
        layer(tokens(20, batch=1), KVCache(config, 1, 20, dtype=torch.float64), cu_seqlens=cu_seqlens)


def test_any_batch_composition_gives_the_same_rows(small: Small) -> None:
    layer = build(small())

    def alone(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x[b : b + 1]) for b in range(3)])

    assert_equal(layer, tokens(90, batch=3), alone, layer)
    x = tokens(90, batch=3)
    assert worst(layer(x[[2, 0]]), layer(x)[[2, 0]]) <= ALLOWED[torch.float64]


def open_only_the_window(layer: NativeSparseAttention) -> None:
    with torch.no_grad():
        layer.gate_out.weight.zero_()
        layer.gate_out.bias.view(-1, 3).copy_(torch.tensor([-1e4, -1e4, 1e4]))


def full_attention(layer: NativeSparseAttention, x: torch.Tensor) -> torch.Tensor:
    given = layer.attention_inputs(x)
    q, k, v = (given[name].transpose(1, 2) for name in ("q", "k_win", "v_win"))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return layer.out(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("routing", ["auto", "reference", "cmp=off,sel=off"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("spare", [0, 1, 400])
@pytest.mark.parametrize("length", [1, 30, 150])
def test_a_window_over_everything_is_full_attention(
    length: int, spare: int, gate: str, routing: str, small: Small
) -> None:
    layer = build(small(window_size=length + spare), {"gate": gate})
    open_only_the_window(layer)
    x = tokens(length).requires_grad_()
    y, full = layer(x, routing=routing), full_attention(layer, x)
    assert worst(y, full) <= ALLOWED[torch.float64]
    for mine, theirs in zip(
        torch.autograd.grad(y.square().sum(), [x, layer.proj.weight, layer.out.weight]),
        torch.autograd.grad(full.square().sum(), [x, layer.proj.weight, layer.out.weight]),
        strict=True,
    ):
        assert worst(mine, theirs) <= ALLOWED[torch.float64]


def test_a_window_one_short_is_not_full_attention(small: Small) -> None:
    layer = build(small(window_size=149))
    open_only_the_window(layer)
    x = tokens(150)
    differs = (layer(x) - full_attention(layer, x)).abs().amax((0, 2))
    assert (differs[:149] <= ALLOWED[torch.float64]).all()
    assert differs[149] > 1e-6


@pytest.mark.parametrize("phi", ["conv", "mlp"])
@pytest.mark.parametrize("options", [{}, {"shared_kv": True}, {"compress_rotated": True}])
def test_learned_compression_begins_as_the_mean(phi: str, options: dict[str, Any], small: Small) -> None:
    config = small()
    mean = NativeSparseAttention(config, DIM, **options).double()
    learned = NativeSparseAttention(config, DIM, compress=phi, **options).double()
    missing, unexpected = learned.load_state_dict(mean.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("compress_") for name in missing)
    x = tokens(150).requires_grad_()
    y, expected = learned(x), mean(x)
    assert worst(y, expected) <= ALLOWED[torch.float64]
    assert worst(gradients(learned, x, y)[0], gradients(mean, x, expected)[0]) <= ALLOWED[torch.float64]


@every_option
@pytest.mark.parametrize("routing", ["auto", "reference"])
@pytest.mark.parametrize("size", [1.0, 1e3], ids=["same-size", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_later_tokens_change_nothing_bit_for_bit(
    options: dict[str, Any], routing: str, size: float, dtype: torch.dtype, small: Small, device: str
) -> None:
    layer = build(small(), options, dtype, device)
    x = tokens(150, dtype=dtype, device=device)
    before = layer(x, routing=routing)
    for changed in (1, 8, 70, 143, 149):
        later = x.clone()
        later[:, changed:] = size * (later[:, changed:] + 1)
        after = layer(later, routing=routing)
        moved = (after != before).any(-1).any(0).nonzero().flatten().tolist()
        assert moved == list(range(changed, 150)), f"rows {moved} moved when tokens from {changed} on changed"


@every_option
def test_later_tokens_get_no_gradient(options: dict[str, Any], small: Small) -> None:
    layer = build(small(), options)
    x = tokens(100).requires_grad_()
    y = layer(x)
    for t in (0, 8, 63, 98):
        (grad,) = torch.autograd.grad(y[:, : t + 1].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, : t + 1] != 0).any(-1).all()
