"""Under torch.compile a layer gives what it gives without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nsa import KVCache, NativeSparseAttention, NSAConfig

Small = Callable[..., NSAConfig]

# What torch says of itself while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute")


@pytest.fixture
def compiled(small: Small) -> tuple[NativeSparseAttention, Callable[..., torch.Tensor]]:
    """A layer, and the same one compiled; nothing is generated, all is traced."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = NativeSparseAttention(small(), dim=32)
    return layer, torch.compile(layer, backend="aot_eager")


@pytest.mark.parametrize("routing", ["auto", "sdpa", "sel=gather", "reference"])
def test_values_and_gradients(
    routing: str, compiled: tuple[NativeSparseAttention, Callable[..., torch.Tensor]]
) -> None:
    layer, fast = compiled
    for rows in (90, 91):
        x = torch.randn(2, rows, 32)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, routing=routing), layer(x, routing=routing))
        found = []
        for function in (layer, fast):
            given = x.clone().requires_grad_()
            layer.zero_grad()
            function(given, routing=routing).square().sum().backward()
            found.append([given.grad, *(parameter.grad for parameter in layer.parameters())])
        torch.testing.assert_close(found[1], found[0])


def test_chunks_and_tokens_from_a_cache(
    compiled: tuple[NativeSparseAttention, Callable[..., torch.Tensor]],
) -> None:
    layer, fast = compiled
    x = torch.randn(2, 60, 32)
    cache = KVCache(layer.config, 2, 60)
    with torch.no_grad():
        parts = [fast(part, cache) for part in x.split([40, 15, 1, 1, 1, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x))


def test_packed_sequences(compiled: tuple[NativeSparseAttention, Callable[..., torch.Tensor]]) -> None:
    layer, fast = compiled
    x, bounds = torch.randn(1, 90, 32), torch.tensor([0, 17, 17, 90])
    with torch.no_grad():
        torch.testing.assert_close(fast(x, cu_seqlens=bounds), layer(x, cu_seqlens=bounds))


def test_only_the_attention_is_left_out_of_the_graphs(
    compiled: tuple[NativeSparseAttention, Callable[..., torch.Tensor]],
) -> None:
    layer, _ = compiled
    found = torch._dynamo.explain(layer)(torch.randn(2, 60, 32))
    assert (found.graph_count, found.graph_break_count) == (2, 1)
