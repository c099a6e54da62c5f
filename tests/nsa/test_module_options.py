"""The layer's options: what each does to the keys, values and gates it makes, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa import KVCache, NativeSparseAttention, NSAConfig, nsa_attention

Small = Callable[..., NSAConfig]

DIM = 24


def pair(
    config: NSAConfig, other: NSAConfig | None = None, **options: Any
) -> tuple[NativeSparseAttention, NativeSparseAttention]:
    """The layer with positions, and one of the same weights without, perhaps with other block sizes."""
    rotating = NativeSparseAttention(config, DIM, **options).double()
    still = NativeSparseAttention(other or config, DIM, rope=None, **options).double()
    still.load_state_dict(rotating.state_dict())
    return rotating, still


def tokens(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64).to(dtype)


def rotate(x: torch.Tensor, position: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """RoPE over ``x (B,T,H,D)`` as complex numbers: channel j pairs with channel j + D/2."""
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), position[:, None] * frequency)[:, None]
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def block_means(x: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    size, stride = config.compression_block_size, config.compression_stride
    starts = range(0, x.shape[1] - size + 1, stride)
    return torch.stack([x[:, start : start + size].mean(1) for start in starts], 1)


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-10)


def of_single_tokens(small: Small) -> NSAConfig:
    """A configuration whose compressed keys are the raw keys themselves."""
    return small(compression_block_size=1, compression_stride=1)


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rope_turns_queries_and_keys_by_their_position(base: float, small: Small) -> None:
    """Rule 10: q, k_sel and k_win are rotated, values and gates are not."""
    rotating, still = pair(small())
    rotating.rope = base
    x = tokens(40)
    given, plain = rotating.attention_inputs(x), still.attention_inputs(x)
    position = torch.arange(40)
    for name in ("q", "k_sel", "k_win"):
        close(given[name], rotate(plain[name], position, base))
    for name in ("v_cmp", "v_sel", "v_win", "gates"):
        assert torch.equal(given[name], plain[name])


def test_rope_beyond_any_table_size(small: Small) -> None:
    """Positions past a thousand, first met after short sequences, in a chunk that begins there."""
    config = small()
    rotating, still = pair(config)
    x = tokens(2100, batch=1)
    with torch.no_grad():
        rotating.attention_inputs(x[:, :5])
        cache = KVCache(config, 1, 2100, dtype=torch.float64)
        rotating.attention_inputs(x[:, :1020], cache)
        given = rotating.attention_inputs(x[:, 1020:], cache)
        plain = still.attention_inputs(x)
    position = torch.arange(2100)
    close(given["q"], rotate(plain["q"][:, 1020:], position[1020:]))
    close(given["k_sel"], rotate(plain["k_sel"], position))
    close(given["k_cmp"], rotate(plain["k_cmp"], torch.arange(given["k_cmp"].shape[1]) * 4))
    close(given["k_win"], rotate(plain["k_win"], position)[:, given["win_start"] :])


def test_a_compressed_key_is_rotated_at_its_blocks_first_position(small: Small) -> None:
    """Rule 10: compression sees un-rotated keys; block i then stands at position i d."""
    config = small()
    rotating, raw = pair(config, of_single_tokens(small))
    x = tokens(40)
    key = block_means(raw.attention_inputs(x)["k_cmp"], config)
    close(rotating.attention_inputs(x)["k_cmp"], rotate(key, torch.arange(key.shape[1]) * 4))


def test_compress_rotated_compresses_keys_at_their_own_positions(small: Small) -> None:
    config = small()
    rotating, raw = pair(config, of_single_tokens(small), compress_rotated=True)
    x = tokens(40)
    key = rotate(raw.attention_inputs(x)["k_cmp"], torch.arange(40))
    close(rotating.attention_inputs(x)["k_cmp"], block_means(key, config))


@pytest.mark.parametrize("compress_rotated", [False, True])
def test_values_are_compressed_without_positions(compress_rotated: bool, small: Small) -> None:
    config = small(value_dim=6)
    rotating, raw = pair(
        config,
        small(value_dim=6, compression_block_size=1, compression_stride=1),
        compress_rotated=compress_rotated,
    )
    x = tokens(40)
    close(rotating.attention_inputs(x)["v_cmp"], block_means(raw.attention_inputs(x)["v_cmp"], config))


def test_branches_have_their_own_keys_and_values(small: Small) -> None:
    """Rule 10, section 3.3.3."""
    given = NativeSparseAttention(of_single_tokens(small), DIM, rope=None).attention_inputs(tokens(9).float())
    for kind in ("k", "v"):
        cmp, sel, win = (given[f"{kind}_{branch}"] for branch in ("cmp", "sel", "win"))
        assert not torch.equal(cmp, sel)
        assert not torch.equal(sel, win)
        assert not torch.equal(cmp, win)


@pytest.mark.parametrize("compress_rotated", [False, True])
def test_shared_kv_is_one_key_and_value(compress_rotated: bool, small: Small) -> None:
    config = small(value_dim=6)
    rotating, still = pair(config, shared_kv=True, compress_rotated=compress_rotated)
    x = tokens(40)
    given, plain = rotating.attention_inputs(x), still.attention_inputs(x)
    assert torch.equal(given["k_sel"], given["k_win"])
    assert torch.equal(given["v_sel"], given["v_win"])
    close(given["v_cmp"], block_means(given["v_sel"], config))
    key, position = plain["k_sel"], torch.arange(40)
    close(given["k_sel"], rotate(key, position))
    if compress_rotated:
        close(given["k_cmp"], block_means(rotate(key, position), config))
    else:
        means = block_means(key, config)
        close(given["k_cmp"], rotate(means, torch.arange(means.shape[1]) * 4))


def test_shared_kv_has_fewer_parameters(small: Small) -> None:
    config = small()
    three, one = (NativeSparseAttention(config, DIM, shared_kv=shared) for shared in (False, True))
    saved = sum(p.numel() for p in three.parameters()) - sum(p.numel() for p in one.parameters())
    assert saved == 2 * config.num_kv_heads * (config.head_dim + config.v_dim) * DIM


def test_without_rope_an_odd_head_dim_is_fine(small: Small) -> None:
    config = small(head_dim=5)
    assert NativeSparseAttention(config, DIM, rope=None)(tokens(40).float()).shape == (2, 40, DIM)
    with pytest.raises(ValueError, match=r"^rope rotates pairs and needs an even head_dim, got 5$"):
        NativeSparseAttention(config, DIM)


def test_without_rope_the_window_forgets_the_order(small: Small) -> None:
    """What rope=None means: with only the window open and wide, earlier tokens may change places."""
    layer = NativeSparseAttention(small(window_size=100), DIM, rope=None).double()
    x = tokens(30)
    swapped = x.clone()
    swapped[:, [3, 17]] = x[:, [17, 3]]
    only = {"routing": "cmp=off,sel=off"}
    close(layer(swapped, **only)[:, 18:], layer(x, **only)[:, 18:])
    ordered = NativeSparseAttention(small(window_size=100), DIM).double()
    assert not torch.allclose(ordered(swapped, **only)[:, 18:], ordered(x, **only)[:, 18:])


def test_sigmoid_gates_are_independent(small: Small) -> None:
    layer = NativeSparseAttention(small(), DIM)
    gates = layer.attention_inputs(tokens(40).float())["gates"]
    assert gates.shape == (2, 40, 4, 3)
    assert ((gates > 0) & (gates < 1)).all()
    assert not torch.allclose(gates.sum(-1), torch.ones(2, 40, 4))
    # Per head and branch, and of the token.
    assert gates.flatten(0, 1).std(0).min() > 0
    assert gates.flatten(2).std(-1).min() > 0


def test_softmax_gates_share_one(small: Small) -> None:
    layer = NativeSparseAttention(small(), DIM, gate="softmax")
    gates = layer.attention_inputs(tokens(40).float())["gates"]
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 40, 4))
    assert gates.flatten(0, 1).std(0).min() > 0


def test_gates_come_from_one_order_of_branches(small: Small) -> None:
    """gate_out gives cmp, sel, win of head 0, then of head 1, and so on."""
    layer = NativeSparseAttention(small(), DIM)
    with torch.no_grad():
        layer.gate_out.weight.zero_()
        layer.gate_out.bias.fill_(-1e4)
        layer.gate_out.bias[3 * 2 + 1] = 1e4  # head 2, selected
    gates = layer.attention_inputs(tokens(5).float())["gates"]
    assert gates.nonzero().tolist() == [[b, t, 2, 1] for b in range(2) for t in range(5)]
    alone = layer(tokens(5).float(), routing="cmp=off,win=off")
    torch.testing.assert_close(layer(tokens(5).float()), alone)


@pytest.mark.parametrize(("dim", "given", "hidden"), [(24, None, 16), (256, None, 32), (24, 5, 5)])
def test_gate_hidden_width(dim: int, given: int | None, hidden: int, small: Small) -> None:
    assert NativeSparseAttention(small(), dim, gate_hidden=given).gate_out.in_features == hidden


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"compress": "conv"}, {"compress": "mlp"}])
def test_forward_is_the_attention_of_its_inputs(
    options: dict[str, Any], dtype: torch.dtype, small: Small
) -> None:
    layer = NativeSparseAttention(small(value_dim=8), DIM, **options).to(dtype)
    x = tokens(80, dtype=dtype)
    o = nsa_attention(**layer.attention_inputs(x), config=layer.config)
    assert (o.dtype, o.shape) == (dtype, (2, 80, 4, 8))
    assert torch.equal(layer(x), layer.out(o.flatten(2)))


def test_every_parameter_learns(small: Small) -> None:
    for options in ({}, {"compress": "conv"}, {"compress": "mlp"}, {"shared_kv": True}, {"gate": "softmax"}):
        layer = NativeSparseAttention(small(), DIM, **options)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):  # the mlp's first layer moves once its last has left zero
            optimizer.zero_grad()
            layer(tokens(80).float()).square().sum().backward()
            optimizer.step()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


def test_gradients_of_the_whole_layer(small: Small) -> None:
    """Finite differences through projections, rotation, compression, three branches and gates."""
    config = NSAConfig(
        2, 1, 2, compression_block_size=4, compression_stride=2, selection_block_size=4,
        num_selected_blocks=2, window_size=3, num_local_blocks=1,
    )  # fmt: skip
    layer = NativeSparseAttention(config, 3, compress="mlp", gate_hidden=2).double()
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_state_dict_round_trip(small: Small) -> None:
    layer, other = (NativeSparseAttention(small(), DIM, compress="mlp") for _ in range(2))
    x = tokens(80).float()
    expected = layer(x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_training_after_inference_mode(small: Small) -> None:
    """Whatever a layer keeps from an evaluation must be fit for training."""
    layer = NativeSparseAttention(small(), DIM)
    x = tokens(40).float()
    with torch.inference_mode():
        expected = layer(x).clone()
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.proj.weight.grad is not None


@pytest.mark.parametrize("shape", [(2, 0, DIM), (0, 5, DIM), (0, 0, DIM)])
def test_nothing_in_nothing_out(shape: tuple[int, ...], small: Small) -> None:
    y = NativeSparseAttention(small(), DIM)(torch.zeros(shape))
    assert y.shape == shape


@pytest.mark.parametrize("shape", [(2, 5), (5, DIM), (2, 5, DIM + 1), (1, 2, 5, DIM)])
def test_x_must_be_tokens(shape: tuple[int, ...], small: Small) -> None:
    with pytest.raises(ValueError, match=r"^x must be \(B, T, 24\), got \(") as caught:
        NativeSparseAttention(small(), DIM)(torch.zeros(shape))
    assert str(caught.value) == f"x must be (B, T, 24), got {shape}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, r"^dim must be an integer of at least 1, got 0$"),
        ({"dim": 2.0}, r"^dim must be an integer of at least 1, got 2\.0$"),
        ({"dim": True}, r"^dim must be an integer of at least 1, got True$"),
        ({"gate": "tanh"}, r"^gate must be sigmoid or softmax, got 'tanh'$"),
        ({"compress": "max"}, r"^compress must be one of mean, conv, mlp, got 'max'$"),
    ],
)
def test_wrong_options_are_one_clear_line(options: dict[str, Any], message: str, small: Small) -> None:
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(small(), **({"dim": DIM} | options))


def test_rotations_do_not_depend_on_how_their_table_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = NativeSparseAttention(NSAConfig(4, 2, 16), 32), torch.randn(1, 90, 32)
    with torch.no_grad():
        whole = layer(x)
        layer._rotations.clear()
        monkeypatch.setattr("nsa.module.TABLE_ROWS", 7)
        assert torch.equal(layer(x), whole)
