"""nsa_attention: the composition of equation 5, its routes, and the shapes it accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nsa.reference as reference
from nsa import NSAConfig, UnsupportedRoute, nsa_attention
from nsa.blocks import num_compressed_blocks
from nsa.routes import Request, backends, resolve
from nsa.testing import against_spec, check, error_budget

Small = Callable[..., NSAConfig]

NAMES = ("q", "k_cmp", "v_cmp", "k_sel", "v_sel", "k_win", "v_win", "gates")


def inputs(
    config: NSAConfig,
    rows: int,
    *,
    q_start: int = 0,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device, dtype)

    length, heads = q_start + rows, config.num_kv_heads
    tensors = {"q": normal(rows, config.num_heads, config.head_dim)}
    for branch, count in (("cmp", num_compressed_blocks(length, config)), ("sel", length), ("win", length)):
        tensors[f"k_{branch}"] = normal(count, heads, config.head_dim)
        tensors[f"v_{branch}"] = normal(count, heads, config.v_dim)
    tensors["gates"] = normal(rows, config.num_heads, 3).sigmoid()
    return tensors


def gated_sum(
    config: NSAConfig, q_start: Any = 0, branches: str = "cmp sel win", **t: torch.Tensor
) -> torch.Tensor:
    """Equation 5, from the specification of each branch."""
    chosen = reference.select_blocks(t["q"], t["k_cmp"], config, q_start=q_start, kv_len=t["k_sel"].shape[1])
    parts = (
        reference.compressed_attention(t["q"], t["k_cmp"], t["v_cmp"], config, q_start=q_start)[0],
        reference.selected_attention(t["q"], t["k_sel"], t["v_sel"], chosen, config, q_start=q_start)[0],
        reference.sliding_attention(t["q"], t["k_win"], t["v_win"], config, q_start=q_start)[0],
    )
    named = zip(("cmp", "sel", "win"), parts, t["gates"].unbind(-1), strict=True)
    return torch.stack([o * gate.unsqueeze(-1) for name, o, gate in named if name in branches.split()]).sum(0)


def skip_if_refused(routing: str, tensors: dict[str, Any], config: NSAConfig) -> None:
    q = tensors["q"]
    request = Request(
        device=q.device.type,
        dtype=q.dtype,
        num_queries=q.shape[1],
        kv_len=tensors["k_sel"].shape[1],
        needs_grad=True,
        config=config,
    )
    try:
        resolve(routing, request)
    except UnsupportedRoute as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("routing", ["auto", *backends()])
@pytest.mark.parametrize(("rows", "q_start"), [(1, 0), (40, 0), (150, 0), (1, 90), (9, 90)])
def test_every_route_is_the_gated_sum(
    routing: str, rows: int, q_start: int, small: Small, device: str
) -> None:
    config = small(value_dim=8)
    # On a GPU no library takes fp64; scores are fp32 there, which leaves the selection of these inputs alone.
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    tensors = inputs(config, rows, q_start=q_start, dtype=dtype, device=device)
    skip_if_refused(routing, tensors, config)
    outcome = against_spec(
        lambda **given: nsa_attention(**given, config=config, routing=routing, q_start=q_start),
        lambda **given: gated_sum(config, q_start, **given),
        tensors,
        gradients=True,
    )
    assert set(outcome) == {"out", *(f"d_{name}" for name in NAMES)}
    for name, result in outcome.items():
        assert result.ok, f"{name}: {result}"


@pytest.mark.parametrize("branches", ["cmp", "sel", "win", "cmp sel", "cmp win", "sel win"])
def test_off_does_no_work_and_adds_nothing(branches: str, small: Small) -> None:
    config = small()
    tensors = inputs(config, 60)
    expected = gated_sum(config, branches=branches, **tensors)
    off = [name for name in ("cmp", "sel", "win") if name not in branches.split()]
    for name in off:  # were it computed and weighed with 0, it would still be NaN
        tensors[f"v_{name}"].fill_(float("nan"))
        tensors["gates"][..., ("cmp", "sel", "win").index(name)] = float("nan")
    out = nsa_attention(**tensors, config=config, routing=",".join(f"{name}=off" for name in off))
    assert check(out, expected, error_budget(expected, expected)).ok


def test_q_start_per_sequence(small: Small) -> None:
    config = small()
    q_start = torch.tensor([90, 13])
    tensors = inputs(config, 5, q_start=90)
    out = nsa_attention(**tensors, config=config, q_start=q_start)
    expected = gated_sum(config, q_start, **tensors)
    assert check(out, expected, error_budget(expected, expected)).ok
    alone = nsa_attention(**{n: t[1:] for n, t in tensors.items()}, config=config, q_start=13)
    assert check(out[1:], alone, error_budget(alone, alone)).ok


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_only_the_window_of_keys_is_needed(spare: int, small: Small) -> None:
    """k_win may begin at win_start, at most max(0, q_start - w + 1)."""
    config = small()
    tensors = inputs(config, 7, q_start=90)
    whole = nsa_attention(**tensors, config=config, q_start=90)
    win_start = 90 - config.window_size + 1 - spare
    for name in ("k_win", "v_win"):
        tensors[name] = tensors[name][:, win_start:]
    part = nsa_attention(**tensors, config=config, q_start=90, win_start=win_start)
    assert check(part, whole, error_budget(whole, whole)).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_has_the_dtype_of_q(dtype: torch.dtype, small: Small, device: str) -> None:
    config = small(value_dim=8)
    out = nsa_attention(**inputs(config, 40, dtype=dtype, device=device), config=config)
    assert (out.dtype, out.shape) == (dtype, (2, 40, 4, 8))
    assert torch.isfinite(out).all()


def test_gates_in_fp32_weigh_a_16_bit_output(small: Small) -> None:
    config = small()
    tensors = inputs(config, 40, dtype=torch.bfloat16)
    tensors["gates"] = tensors["gates"].float()
    assert nsa_attention(**tensors, config=config).dtype == torch.bfloat16


def test_selection_is_not_differentiated(small: Small) -> None:
    """Rule 11: with the compressed branch off, its keys choose blocks and get no gradient."""
    config = small()
    tensors = {name: t.requires_grad_() for name, t in inputs(config, 100).items()}
    nsa_attention(**tensors, config=config, routing="cmp=off").sum().backward()
    assert tensors["k_cmp"].grad is None
    assert tensors["v_cmp"].grad is None
    assert (tensors["k_sel"].grad != 0).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [2, 3])
def test_shapes_must_fit(name: str, dim: int, small: Small) -> None:
    config = small()
    tensors = inputs(config, 20)
    good = tuple(tensors[name].shape)
    tensors[name] = torch.cat([tensors[name]] * 2, dim)
    bad = tuple(tensors[name].shape)
    with pytest.raises(ValueError, match=r"^" + name) as caught:
        nsa_attention(**tensors, config=config)
    assert str(caught.value) == f"{name} must be {good}, got {bad}"


@pytest.mark.parametrize("name", ["k_cmp", "v_win", "gates"])
def test_batches_must_agree(name: str, small: Small) -> None:
    config = small()
    tensors = inputs(config, 20)
    tensors[name] = tensors[name][:1]
    with pytest.raises(ValueError, match=rf"^{name} must be \(2, .*\), got \(1, "):
        nsa_attention(**tensors, config=config)


@pytest.mark.parametrize("name", ["v_cmp", "v_sel", "v_win"])
def test_keys_and_values_must_be_as_many(name: str, small: Small) -> None:
    config = small()
    tensors = inputs(config, 20)
    tensors[name] = tensors[name][:, 1:]
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        nsa_attention(**tensors, config=config)


def test_wrong_routing_is_refused_before_anything_runs(small: Small) -> None:
    config = small()
    with pytest.raises(ValueError, match=r"^unknown route 'nothing'; allowed: auto, "):
        nsa_attention(**inputs(config, 4), config=config, routing="nothing")
