"""phi: what each compression makes of a block's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nsa.compress import COMPRESSIONS
from nsa.config import NSAConfig

Small = Callable[..., NSAConfig]

every_phi = pytest.mark.parametrize("phi", list(COMPRESSIONS))
LENGTHS = [0, 1, 7, 8, 9, 11, 12, 40]


def build(phi: str, config: NSAConfig, dim: int = 6, *, trained: bool = False) -> Any:
    torch.set_default_dtype(torch.float64)  # an average of 6 tokens is exact to 1 / 6 in fp64
    try:
        module = COMPRESSIONS[phi](config, dim)
    finally:
        torch.set_default_dtype(torch.float32)
    if trained:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def tokens(config: NSAConfig, length: int, dim: int = 6) -> torch.Tensor:
    return torch.randn(2, length, config.num_kv_heads, dim, dtype=torch.float64)


def blocks(x: torch.Tensor, config: NSAConfig) -> list[torch.Tensor]:
    """Each complete block ``(B, l, H, D)``."""
    size, stride = config.compression_block_size, config.compression_stride
    return [x[:, i : i + size] for i in range(0, x.shape[1] - size + 1, stride)]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_phi
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("size", "stride"), [(8, 4), (4, 4), (6, 2), (1, 1)])
def test_begins_as_the_average(phi: str, length: int, size: int, stride: int, small: Small) -> None:
    config = small(compression_block_size=size, compression_stride=stride, selection_block_size=12)
    x = tokens(config, length)
    out = build(phi, config)(x)
    means = [block.mean(1) for block in blocks(x, config)]
    close(out, torch.stack(means, 1) if means else x.new_zeros(2, 0, 2, 6))


def test_conv_weighs_each_place_of_each_head(small: Small) -> None:
    config = small()
    module = build("conv", config, trained=True)
    x = tokens(config, 21)
    weight, position = module.weight, module.position  # (H, l, D), (l, D)
    expected = [
        sum((block[:, place] + position[place]) * weight[:, place] for place in range(8))
        for block in blocks(x, config)
    ]
    close(module(x), torch.stack(expected, 1))


def test_mlp_adds_to_the_average(small: Small) -> None:
    config = small()
    module = build("mlp", config, trained=True)
    x = tokens(config, 21)
    expected = []
    for block in blocks(x, config):
        inside = block + module.position[:, None]  # (B, l, H, D)
        flat = inside.transpose(1, 2).flatten(2)
        expected.append(inside.mean(1) + module.down(nn.functional.silu(module.up(flat))))
    close(module(x), torch.stack(expected, 1))


@pytest.mark.parametrize("phi", ["conv", "mlp"])
def test_position_inside_the_block_is_learned(phi: str, small: Small) -> None:
    """Rule 10: the order of a block's tokens matters, and the position term gets a gradient."""
    config = small()
    module = build(phi, config, trained=True)
    x = tokens(config, 8)
    assert not torch.allclose(module(x), module(x.flip(1)))
    module(x).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad != 0).any(), name


@every_phi
def test_gradients(phi: str, small: Small) -> None:
    config = small(compression_block_size=4, compression_stride=2)
    module = build(phi, config, dim=2, trained=True)
    assert torch.autograd.gradcheck(module, tokens(config, 9, dim=2).requires_grad_())


@every_phi
def test_a_token_reaches_only_its_blocks(phi: str, small: Small) -> None:
    """Rule 1, bit for bit: block i is made of tokens [i d, i d + l - 1] and nothing else."""
    config = small()
    module = build(phi, config, trained=True)
    x = tokens(config, 40)
    before = module(x)
    for token in (0, 3, 4, 7, 8, 20, 39):
        changed = x.clone()
        changed[:, token] += 1
        moved = (module(changed) != before).flatten(2).any(-1).any(0)
        holding = [i for i in range(before.shape[1]) if i * 4 <= token <= i * 4 + 7]
        assert moved.nonzero().flatten().tolist() == holding


@every_phi
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype(phi: str, dtype: torch.dtype, small: Small) -> None:
    config = small()
    module = COMPRESSIONS[phi](config, 6).to(dtype)
    for length in (3, 20):
        assert module(tokens(config, length).to(dtype)).dtype == dtype
