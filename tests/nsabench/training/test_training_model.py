"""The decoder: causal, the same batched, cached and stepwise, and with or without checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa import UnsupportedRoute
from nsa.testing import assert_matches, error_budget
from nsabench.plan import PlanError
from nsabench.plan.training import COMPRESSIONS, ModelSettings
from nsabench.training.model import MODES, ByteLM, token_loss

SMALL: dict[str, Any] = {
    "dim": 32, "layers": 2, "heads": 4, "groups": 2, "dk": 8, "dv": 6,
    "l": 8, "d": 4, "l_sel": 8, "n_sel": 3, "w": 9,
}  # fmt: skip
S = 34

OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"compress": "mean", "gate": "sigmoid"},
        {"compress": "conv", "gate": "softmax"},
        {"compress": "mlp", "gate": "sigmoid"},
        {"rope": 0.0, "tied": True},
        {"shared_kv": True, "embedding_std": 0.02},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> ByteLM:
    """A model whose every weight is away from its special starting value."""
    checkpointing = changes.pop("grad_checkpoint", False)
    torch.manual_seed(5)
    model = ByteLM(ModelSettings(**(SMALL | changes)), grad_checkpoint=checkpointing)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(dtype)


def draw(length: int = S, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(256, (batch, length), generator=generator)


def results(model: ByteLM, run: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of `run` on the tokens, and the gradient of every weight of their loss."""
    tokens = draw(S + 1)
    logits = run(tokens[:, :-1])
    model.zero_grad()
    token_loss(logits, tokens[:, 1:], torch.ones(2, S, dtype=torch.bool)).backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {"logits": logits.detach()} | {
        name: grad.clone() for name, grad in grads.items() if grad is not None
    }


def assert_within_budget(
    mine: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], eager: dict[str, torch.Tensor]
) -> None:
    assert mine.keys() == exact.keys()
    for name in exact:
        assert_matches(mine[name], exact[name], error_budget(exact[name], eager[name]), name)


def spec(model: ByteLM) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tokens: model(tokens, "reference")


@OPTIONS
def test_stepwise_equals_batched_in_values_and_gradients(options: dict[str, Any]) -> None:
    exact, eager = (build(dtype, **options) for dtype in (torch.float64, torch.float32))
    outcome = {
        mode: results(eager, lambda tokens, mode=mode: eager(tokens, mode=mode))  # type: ignore[misc]
        for mode in MODES
    }
    judge = results(exact, spec(exact)), results(eager, spec(eager))
    for mode in MODES:
        assert_within_budget(outcome[mode], *judge)


def test_checkpointing_changes_nothing() -> None:
    plain, again = build(), build(grad_checkpoint=True)
    kept, computed = results(plain, plain), results(again, again)
    for name in kept:
        assert torch.equal(kept[name], computed[name]), name


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_checkpointing_computes_every_layer_again_going_back(checkpointing: bool, times: int) -> None:
    model = build(grad_checkpoint=checkpointing)
    calls: list[int] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    results(model, model)
    assert len(calls) == times * len(model.layers)


@OPTIONS
@pytest.mark.parametrize(
    "chunks", [[1] * S, [22] + [1] * 12, [7, 1, 20, 6]], ids=["decode", "prompt", "chunks"]
)
@torch.no_grad()
def test_a_cache_gives_the_logits_of_prefill(options: dict[str, Any], chunks: list[int]) -> None:
    exact, eager = (build(dtype, **options) for dtype in (torch.float64, torch.float32))
    tokens = draw()
    budget = error_budget(exact(tokens, "reference"), eager(tokens, "reference"))
    cache = eager.new_cache(2, S)
    cached = torch.cat([eager(part, cache=cache) for part in tokens.split(chunks, 1)], 1)
    assert [one.length for one in cache] == [S, S]
    assert_matches(cached, exact(tokens, "reference"), budget, "cached")
    assert_matches(eager(tokens), exact(tokens, "reference"), budget, "prefill")


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_later_bytes_change_no_earlier_logits_bit_for_bit(mode: str) -> None:
    model, tokens = build(torch.float32), draw()
    before = model(tokens, mode=mode)
    for changed in (1, 8, 23, 33):
        other = tokens.clone()
        other[:, changed:] = (other[:, changed:] + 1) % 256
        moved = (model(other, mode=mode) != before).any(-1).any(0).nonzero().flatten().tolist()
        assert moved == list(range(changed, S))


@OPTIONS
@pytest.mark.parametrize("mode", MODES)
def test_every_weight_gets_a_finite_gradient(options: dict[str, Any], mode: str) -> None:
    model = build(torch.float32, **options)
    for name, value in results(model, lambda tokens: model(tokens, mode=mode)).items():
        assert torch.isfinite(value).all(), name
        assert (value != 0).any(), name


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_in_bf16_is_near(compress: str, mode: str) -> None:
    """Products in bf16 err as bf16 does: far less than the logits are large."""
    model, tokens = build(torch.float32, compress=compress), draw()
    exact = model(tokens).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, mode=mode)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()


@torch.no_grad()
def test_an_untrained_model_keeps_the_signal_s_size() -> None:
    """The stream stays of the embedding's size at any depth, and no byte is far likelier than others."""
    for layers in (1, 8):
        torch.manual_seed(0)
        model = ByteLM(ModelSettings(dim=64, layers=layers))
        x = model.embedding(draw(200))
        assert 0.8 < x.std() < 1.2
        for layer in model.layers:
            x = layer(x)
        assert 0.8 < x.std() < 2.5
        tokens = draw(201)
        loss = token_loss(model(tokens[:, :-1]), tokens[:, 1:], torch.ones(2, 200, dtype=torch.bool))
        assert loss < math.log(256) + 1.0


def test_the_loss_counts_what_the_mask_holds() -> None:
    logits, targets = torch.randn(2, 5, 256), draw(5)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    assert token_loss(logits, targets, mask) == 0
    mask[0, 3] = mask[1, 1] = True
    by_hand = [-logits[b, t].log_softmax(0)[targets[b, t]] for b, t in ((0, 3), (1, 1))]
    torch.testing.assert_close(token_loss(logits, targets, mask), torch.stack(by_hand).mean())


def test_a_tied_head_is_the_embedding() -> None:
    tied, own = build(tied=True), build()
    assert tied.head.weight is tied.embedding.weight
    assert own.num_parameters() - tied.num_parameters() == 256 * 32


def test_a_routing_reaches_every_layer() -> None:
    model, tokens = build(), draw()
    assert not torch.equal(model(tokens, "sel=off"), model(tokens))
    with pytest.raises(UnsupportedRoute, match="sel=fa2"):
        model(tokens, "sel=fa2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "backwards"}, r"^mode must be one of batched, stepwise, got 'backwards'$"),
        ({"mode": "stepwise", "cache": []}, r"^mode stepwise .* it goes without a cache$"),
    ],
)
def test_modes_that_do_not_go(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(draw(), **given)


def test_stepwise_does_not_go_with_checkpointing() -> None:
    with pytest.raises(ValueError, match=r"goes without grad_checkpoint$"):
        build(grad_checkpoint=True)(draw(), mode="stepwise")


def test_a_geometry_that_nsa_refuses_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match=r"^compression_stride must divide compression_block_size=8, got 3$"):
        ByteLM(ModelSettings(**(SMALL | {"d": 3})))


@pytest.mark.parametrize("mode", MODES)
def test_no_bytes_give_no_logits(mode: str) -> None:
    assert build()(draw()[:, :0], mode=mode).shape == (2, 0, 256)
