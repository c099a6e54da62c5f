"""Steps that do the same work at every call, and the same result however the tokens go in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsabench.measure import peak_memory
from nsabench.plan import Cell
from nsabench.run.steps import steps_of
from nsabench.run.workload import LayerWorkload, least_bytes, workload_for

MakeCell = Callable[..., Cell]

SHAPES: list[dict[str, Any]] = [
    {"S": 40},
    {"S": 41},
    {"S": 43, "B": 2},
    {"S": 40, "d": 1},
    {"S": 40, "d": 8},
    {"S": 8},
    {"S": 7},
    {"S": 1},
    {"S": 1, "l": 1, "d": 1, "l_sel": 1},
    {"S": 2, "l": 2, "d": 2, "l_sel": 2},
    {"S": 90, "w": 16},  # long enough for the rows of window and open block to move
]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def whole(workload: LayerWorkload, length: int) -> torch.Tensor:
    """The layer on the first `length` tokens at once, without a cache, by the specification."""
    with torch.no_grad():
        y: torch.Tensor = workload.layer(workload.x[:, :length], None, "reference")
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ["auto", "sdpa", "reference", "cmp=off", "sel=off", "cmp=off,win=off"])
def test_a_decode_step_gives_the_last_row_of_the_whole_prompt_again_and_again(
    make_cell: MakeCell, shape: dict[str, Any], route: str
) -> None:
    cell = make_cell(phase="decode", dtype="fp64", route=route, **shape)
    workload = workload_for(cell)
    variants = workload.variants(route)
    steps = steps_of(cell)
    assert [(v.name, v.weight) for v in variants] == [(s.name, s.weight) for s in steps]
    first = [variant.step() for variant in variants]
    for _ in range(3):
        for variant, step, kept in zip(variants, steps, first, strict=True):
            y = variant.step()
            assert torch.equal(y, kept)
            with torch.no_grad():
                truth = workload.layer(workload.x[:, : step.spans[0][1]], None, route)
            same(y, truth[:, -1:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_emit_step_completes_a_compressed_block_and_the_plain_step_does_not(
    make_cell: MakeCell, shape: dict[str, Any]
) -> None:
    cell = make_cell(phase="decode", **shape)
    workload = workload_for(cell)
    for variant, step in zip(workload.variants("auto"), steps_of(cell), strict=True):
        cache, state = workload._frozen[step.spans[0][0]]
        for _ in range(2):
            cache.rollback(state)
            before = cache.num_blocks
            variant.step()
            assert cache.num_blocks - before == (variant.name == "emit")
            assert cache.length == step.spans[0][1]


@pytest.mark.parametrize(
    "mode", ["batched", "stepwise", "chunked=1", "chunked=7", "chunked=16", "chunked=99"]
)
@pytest.mark.parametrize("S", [1, 7, 8, 40, 61])
def test_every_mode_of_prefill_gives_the_same(make_cell: MakeCell, mode: str, S: int) -> None:
    cell = make_cell(mode=mode, S=S, B=2, dtype="fp64")
    workload = workload_for(cell)
    (variant,) = workload.variants("auto")
    y = variant.step()
    same(y, whole(workload, S))
    assert torch.equal(variant.step(), y)
    assert workload.cache is not None
    assert workload.cache.length == S


@pytest.mark.parametrize("mode", ["batched", "stepwise", "chunked=7"])
@pytest.mark.parametrize("route", ["auto", "sdpa", "win=off"])
def test_backward_steps_give_the_gradient_of_the_layer(make_cell: MakeCell, mode: str, route: str) -> None:
    def step(passes: str) -> tuple[LayerWorkload, Callable[[], torch.Tensor]]:
        workload = workload_for(make_cell(passes=passes, mode=mode, route=route, dtype="fp64", S=21))
        return workload, workload.variants(route)[0].step

    workload, backward = step("bwd")
    _, both = step("fwd_bwd")
    dx = backward()
    x = workload.x.detach().clone().requires_grad_()
    reference = "reference" if route != "win=off" else "cmp=reference,sel=reference,win=off"
    workload.layer(x, None, reference).backward(workload._upstream)
    assert x.grad is not None
    same(dx, x.grad)
    same(both(), dx)
    assert torch.equal(backward(), dx)  # the graph is kept: the next call does the same work
    same(both(), dx)


def test_a_layer_that_was_checked_can_be_trained(make_cell: MakeCell) -> None:
    for check in (lambda w, step: list(w.inputs(step, step.spans)), lambda w, step: w.inputs_without_cache()):
        workload = workload_for(make_cell(passes="fwd_bwd"))
        check(workload, steps_of(workload.cell)[0])
        assert torch.isfinite(workload.training_step("auto")()).all()


def test_the_seed_makes_the_layer_and_leaves_the_callers_generator_alone(make_cell: MakeCell) -> None:
    state = torch.get_rng_state()
    first, again, other = (workload_for(make_cell(seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    for mine, yours in zip(first.layer.parameters(), again.layer.parameters(), strict=True):
        assert torch.equal(mine, yours)
    assert not torch.equal(first.layer.proj.weight, other.layer.proj.weight)
    assert first.parameters == sum(p.numel() for p in first.layer.parameters())


@pytest.mark.parametrize("mode", ["batched", "stepwise", "chunked=6"])
@pytest.mark.parametrize("passes", ["fwd", "fwd_bwd"])
def test_inputs_are_those_of_the_tokens_asked_for(make_cell: MakeCell, mode: str, passes: str) -> None:
    workload = workload_for(make_cell(mode=mode, passes=passes, S=20))
    (step,) = steps_of(workload.cell)
    wanted = [step.spans[0], step.spans[-1]]
    truth = workload.inputs_without_cache()
    seen = []
    for (start, end), inputs in workload.inputs(step, wanted):
        seen.append((start, end))
        assert inputs["q_start"] == start
        assert not inputs["q"].requires_grad
        torch.testing.assert_close(inputs["q"], truth["q"][:, start:end])
        torch.testing.assert_close(inputs["k_sel"], truth["k_sel"][:, :end])
    assert seen == list(dict.fromkeys(wanted))


def test_the_cache_is_counted_to_the_byte(make_cell: MakeCell) -> None:
    sizes = workload_for(make_cell(phase="decode", S=60, B=2, dtype="bf16")).cache_bytes()
    row = 2 * 2 * (8 + 4) * 2  # B, KV heads, dk + dv, bytes
    blocks = (60 - 8) // 4 + 1
    assert sizes == {"cmp": (blocks + 16) * row, "sel": 60 * row, "win": 24 * row}
    assert workload_for(make_cell(passes="bwd")).cache_bytes() == {}


@pytest.mark.parametrize(
    "shape", [{"S": 9000}, {"S": 2000, "B": 4}, {"S": 5000, "dk": 32, "groups": 1}], ids=str
)
def test_least_bytes_never_refuses_what_fits(make_cell: MakeCell, shape: dict[str, Any]) -> None:
    peak = peak_memory(lambda: workload_for(make_cell(phase="decode", **shape)), "cpu").alloc_bytes
    assert peak / 8 < least_bytes(make_cell(phase="decode", **shape)) < peak
    assert least_bytes(make_cell(**shape)) == least_bytes(make_cell(phase="decode", **shape))
