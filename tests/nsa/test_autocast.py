"""The layer under torch.autocast: parameters in fp32, the attention in the dtype that autocast gives it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa import KVCache, NativeSparseAttention, NSAConfig, nsa_attention
from nsa.testing import check, error_budget

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    value_dim=8,
    compression_block_size=8,
    compression_stride=4,
    selection_block_size=8,
    num_selected_blocks=6,  # all of them: another rounding of a score must not choose another block
    window_size=12,
)


def layer_of(compress: str, shared_kv: bool) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(CONFIG, 32, compress=compress, shared_kv=shared_kv)


@pytest.mark.parametrize("compress", ["mean", "conv", "mlp"])
@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("routing", ["auto", "sdpa", "reference", "sel=gather"])
def test_values_and_gradients_are_those_of_the_dtype(compress: str, shared_kv: bool, routing: str) -> None:
    layer = layer_of(compress, shared_kv)
    exact = layer_of(compress, shared_kv).double()
    low = layer_of(compress, shared_kv).bfloat16()
    x = torch.randn(2, 45, 32)
    upstream = torch.randn(2, 45, 32)

    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, routing=routing)
    truth, eager = exact(x.double(), routing="reference"), low(x.bfloat16(), routing="reference")
    assert y.dtype == torch.bfloat16
    for out, given in ((y, upstream), (truth, upstream.double()), (eager, upstream.bfloat16())):
        out.backward(given.to(out.dtype))
    assert check(y, truth, error_budget(truth, eager)).ok
    parameters = zip(layer.parameters(), exact.parameters(), low.parameters(), strict=True)
    for mine, right, rounded in parameters:
        assert mine.grad is not None
        assert mine.grad.dtype == torch.float32
        budget = error_budget(right.grad, rounded.grad, magnitude=float(upstream.abs().max()))
        assert check(mine.grad, right.grad, budget).ok


@pytest.mark.parametrize("routing", ["auto", "sdpa", "reference", "sel=gather:keys", "sel=gather:queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_bit_for_bit_what_it_is_without(routing: str, dtype: torch.dtype) -> None:
    """Long enough for every part of a backend: rows before all blocks are selected, and rows after."""
    config = replace(CONFIG, num_selected_blocks=6)
    with torch.no_grad():
        every = NativeSparseAttention(config, 32).attention_inputs(torch.randn(2, 200, 32))
    given = {name: value for name, value in every.items() if isinstance(value, torch.Tensor)}
    upstream = torch.randn(2, 200, 4, 8).to(dtype)

    def attended(autocast: bool) -> list[torch.Tensor]:
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in given.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = nsa_attention(**leaves, config=config, routing=routing)
        out.backward(upstream)
        return [out, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]

    without, inside = attended(False), attended(True)
    assert len(inside) == len(without) == 1 + len(given)
    for mine, right in zip(inside, without, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, right)


def test_steps_through_a_cache_are_the_prefill() -> None:
    layer = layer_of("mean", False).eval()
    x = torch.randn(1, 21, 32)
    cache = KVCache(CONFIG, 1, 21, dtype=torch.bfloat16, device="cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = layer(x)
        steps = torch.cat([layer(x[:, t : t + 1], cache) for t in range(21)], 1)
    with torch.no_grad():
        truth = layer_of("mean", False).double()(x.double())
        eager = layer_of("mean", False).bfloat16()(x.bfloat16())
    assert check(steps, truth, error_budget(truth, eager)).ok
    assert check(whole, truth, error_budget(truth, eager)).ok
