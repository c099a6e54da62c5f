"""The tolerance policy bites: no NaN passes, and mistakes once found in public code are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import nsa.reference as reference
from nsa.config import NSAConfig
from nsa.testing import HEADROOM, Check, against_spec, assert_matches, check, error_budget

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_budget_is_twice_what_eager_errs() -> None:
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    exact_eager = exact.float()
    floor = error_budget(exact, exact_eager)
    assert 0 < floor <= 32 * torch.finfo(torch.float32).eps * 4
    assert error_budget(exact, exact_eager + torch.tensor([0.0, 0.25])) == pytest.approx(
        HEADROOM * 0.25 + floor
    )


def test_floor_is_a_few_roundings_of_what_went_in() -> None:
    exact = torch.zeros(3, dtype=torch.float64)
    assert error_budget(exact, exact.float()) == 0
    for dtype in DTYPES:
        budget = error_budget(exact, exact.to(dtype), magnitude=8.0)
        assert (
            0
            < budget
            <= 8 * 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            + 8 * 4 * torch.finfo(dtype).eps
        )


def test_eager_that_overflows_buys_no_budget() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for wrong in (NAN, INF, -INF):
        eager = torch.tensor([1.0, wrong])
        budget = error_budget(exact, eager)
        assert budget < 1e-4
        assert not check(eager, exact, budget).ok


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("budget", [0.0, 1e30, INF, NAN])
def test_nan_and_misplaced_infinity_never_pass(wrong: float, budget: float) -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    outcome = check(torch.tensor([1.0, wrong]), exact, budget)
    assert outcome.max_abs_err == INF
    assert not outcome.ok
    with pytest.raises(AssertionError, match=r"lse differs by inf at \(1,\)"):
        assert_matches(torch.tensor([1.0, wrong]), exact, budget, "lse")


def test_nan_in_the_specification_passes_nothing() -> None:
    exact = torch.tensor([1.0, NAN], dtype=torch.float64)
    assert not check(torch.tensor([1.0, 2.0]), exact, 1.0).ok
    assert not check(torch.tensor([1.0, NAN]), exact, 1.0).ok


def test_equal_infinities_pass_and_opposite_ones_do_not() -> None:
    exact = torch.tensor([-INF, 0.5], dtype=torch.float64)
    assert check(torch.tensor([-INF, 0.5]), exact, 0.0) == Check(0.0, 0.0, 0.0)
    assert not check(torch.tensor([INF, 0.5]), exact, 1.0).ok
    assert not check(torch.tensor([0.0, 0.5]), exact, 1.0).ok


def test_check_measures_absolute_and_relative_error() -> None:
    outcome = check(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0], dtype=torch.float64), 0.4)
    assert outcome == Check(max_abs_err=0.5, rel_err=0.1, budget=0.4)
    assert not outcome.ok
    assert replace(outcome, budget=0.5).ok
    assert check(torch.zeros(0), torch.zeros(0), 0.0).ok


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: got \(2, 1\), the specification gives \(2,\)"):
        check(torch.zeros(2, 1), torch.zeros(2), 1.0)


def test_assert_matches_names_the_place() -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64)
    actual = torch.zeros(2, 3)
    actual[1, 2] = 0.5
    assert_matches(actual, exact, 0.5)
    with pytest.raises(AssertionError, match=r"o differs by 5\.000e-01 at \(1, 2\), budget 1\.000e-01"):
        assert_matches(actual, exact, 0.1, "o")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, config: NSAConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(B,H,G,T,S)`` in fp32, -inf where not allowed, and v in fp32: what the mutants start from."""
    grouped = q.float().unflatten(2, (config.num_kv_heads, -1))
    logits = torch.einsum("bthgd,bshd->bhgts", grouped, k.float()) * config.scale
    return logits.masked_fill(~allowed, -INF), v.float()


def finish(p: torch.Tensor, v: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhgts,bshd->bthgd", p, v).flatten(2, 3).to(like.dtype)


def window_mask(rows: int, width: int) -> torch.Tensor:
    t, s = torch.arange(rows)[:, None], torch.arange(rows)
    return (s <= t) & (s > t - width)


def correct(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    logits, values = attend(q, k, v, window_mask(q.shape[1], config.window_size), config)
    return finish(logits.softmax(-1), values, q)


def wide_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    logits, values = attend(q, k, v, window_mask(q.shape[1], config.window_size + 1), config)
    return finish(logits.softmax(-1), values, q)


def narrow_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    logits, values = attend(q, k, v, window_mask(q.shape[1], config.window_size - 1), config)
    return finish(logits.softmax(-1), values, q)


def attends_the_future(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    """A boolean mask of what is hidden, given to a function that reads it as what is allowed."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    hidden = ~window_mask(q.shape[2], config.window_size)
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)
    return o.transpose(1, 2)


def shared_maximum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
    logits, values = attend(q, k, v, window_mask(q.shape[1], config.window_size), config)
    p = (logits - logits.amax(-1, keepdim=True)[:, :, :, :1].detach()).exp()
    return finish(p / p.sum(-1, keepdim=True), values, q)


WINDOW_MUTANTS = [wide_window, narrow_window, attends_the_future, shared_maximum]


def far_apart(tensors: dict[str, Any]) -> dict[str, Any]:
    """Token 0 scores its key at 0, later ones at up to 200."""
    dtype = tensors["q"].dtype
    size = torch.linspace(0, 50, tensors["q"].shape[1])[:, None, None]
    return {
        "q": (tensors["q"] * 0.1 + size).to(dtype),
        "k": (tensors["k"] * 0.1 + 1).to(dtype),
        "v": tensors["v"],
    }


def judge(
    function: Callable[..., torch.Tensor],
    tensors: dict[str, Any],
    config: NSAConfig,
    specification: Any,
) -> dict[str, Check]:
    return against_spec(
        lambda **given: function(**given, config=config),
        lambda **given: specification(**given, config=config)[0],
        tensors,
        gradients=True,
    )


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("mutant", WINDOW_MUTANTS)
def test_planted_window_mistakes_are_caught(
    mutant: Any, dtype: torch.dtype, small: Small, draw: Draw
) -> None:
    config = small()
    tensors = draw("win", config, 60, dtype=dtype)
    if mutant is shared_maximum:
        assert all(c.ok for c in judge(mutant, tensors, config, reference.sliding_attention).values())
        tensors = far_apart(tensors)
    assert all(c.ok for c in judge(correct, tensors, config, reference.sliding_attention).values())
    outcome = judge(mutant, tensors, config, reference.sliding_attention)
    assert not outcome["out"].ok
    assert not outcome["d_v"].ok


def online(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    guarded: bool,
) -> torch.Tensor:
    """Selected attention as an online softmax over the slots, with or without care for a slot of -1."""
    size, group = config.selection_block_size, config.group_size
    rows = []
    for t in range(q.shape[1]):
        heads = []
        for head in range(config.num_heads):
            lists = block_indices[:, t, head // group]
            best = torch.full((q.shape[0],), -INF)
            total, weight = torch.zeros(q.shape[0], v.shape[-1]), torch.zeros(q.shape[0])
            for slot in range(lists.shape[1]):
                token = lists[:, slot, None] * size + torch.arange(size)
                allowed = (token >= 0) & (token <= t)
                token = token.clamp(0, k.shape[1] - 1)
                b = torch.arange(q.shape[0])[:, None]
                keys, values = k[b, token, head // group].float(), v[b, token, head // group].float()
                logits = (keys @ q[:, t, head].float().unsqueeze(-1)).squeeze(-1) * config.scale
                logits = logits.masked_fill(~allowed, -INF)
                new = torch.maximum(best, logits.amax(-1))
                shift = new.masked_fill(new == -INF, 0.0) if guarded else new
                decay, p = (best - shift).exp(), (logits - shift[:, None]).exp()
                weight = weight * decay + p.sum(-1)
                total = total * decay[:, None] + (p[:, None] @ values).squeeze(1)
                best = new
            heads.append(total / weight[:, None])
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows, 1).to(q.dtype)


def test_planted_poison_of_a_leading_empty_slot_is_caught(small: Small, draw: Draw) -> None:
    config = small()
    tensors = draw("sel", config, 20)
    spec = reference.selected_attention

    def careless(**given: Any) -> torch.Tensor:
        return online(**given, guarded=False)

    def careful(**given: Any) -> torch.Tensor:
        return online(**given, guarded=True)

    assert judge(careless, tensors, config, spec)["out"].ok
    tensors["block_indices"] = torch.nn.functional.pad(tensors["block_indices"], (1, 0), value=-1)
    assert judge(careful, tensors, config, spec)["out"].ok
    assert judge(careless, tensors, config, spec)["out"].max_abs_err == INF
    assert not judge(careless, tensors, config, spec)["out"].ok


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_planted_wrong_gradient_is_caught(dtype: torch.dtype, small: Small, draw: Draw) -> None:
    """The value is right, and the gradient leaves one of the group's heads out."""
    config = small()

    def mutant(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        o = correct(q, k, v, config)
        return torch.cat([o[:, :, :1].detach(), o[:, :, 1:]], 2)

    outcome = judge(mutant, draw("win", config, 60, dtype=dtype), config, reference.sliding_attention)
    assert [name for name, c in outcome.items() if not c.ok] == ["d_q", "d_k", "d_v"]


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_planted_accumulation_in_the_inputs_dtype_is_caught(
    dtype: torch.dtype, small: Small, draw: Draw
) -> None:
    """dV summed over queries in 16 bits loses small terms; eager code sums in fp32."""
    config = small(window_size=600, num_heads=8, num_kv_heads=1)
    tensors = draw("win", config, 600, batch=1, dtype=dtype)

    class SumInDtype(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: torch.Tensor, parts: int) -> torch.Tensor:
            return v.expand(parts, *v.shape)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            total = grad[0]
            for part in grad[1:]:
                total = total + part
            return total, None

    def mutant(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        copies = SumInDtype.apply(v, q.shape[1])
        logits, _ = attend(q, k, v, window_mask(q.shape[1], config.window_size), config)
        p = logits.softmax(-1)
        return torch.einsum("bhgts,tbshd->bthgd", p, copies.float()).flatten(2, 3).to(q.dtype)

    outcome = judge(mutant, tensors, config, reference.sliding_attention)
    assert outcome["out"].ok
    assert outcome["d_v"].ok == (dtype == torch.float32)


def test_gradients_are_checked_for_every_floating_input(small: Small, draw: Draw) -> None:
    config = small()
    tensors = draw("sel", config, 20)

    def specification(**given: Any) -> torch.Tensor:
        return reference.selected_attention(**given, config=config)[0]

    assert list(against_spec(specification, specification, tensors)) == ["out"]
    outcome = against_spec(specification, specification, tensors, gradients=True)
    assert list(outcome) == ["out", "d_q", "d_k", "d_v"]
    assert all(c.ok for c in outcome.values())
    assert all(t.grad is None for t in tensors.values())


def test_an_input_without_gradient_counts_as_zero() -> None:
    x, y = torch.ones(3), torch.full((3,), 2.0)
    outcome = against_spec(lambda x, y: x * 1, lambda x, y: x * y, {"x": x, "y": y}, gradients=True)
    assert not outcome["out"].ok
    assert not outcome["d_y"].ok


def test_the_upstream_gradient_follows_the_seed(small: Small) -> None:
    seen: list[float] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(grad.double().sum().item()))
        return y

    x = torch.randn(5, dtype=torch.bfloat16)
    for seed in (0, 0, 1):
        against_spec(double, double, {"x": x}, gradients=True, seed=seed)
    first, again, other = seen[:3], seen[3:6], seen[6:]
    assert first == again != other
    assert len(set(first)) == 1  # the implementation and both runs of the specification get the same one
