"""Every row of the route table that selects blocks gives the specification's sets, up to ties by rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nsa.reference as reference
from nsa.config import NSAConfig
from nsa.routes import TABLE, Row
from tests.nsa.selections import assert_chosen, assert_well_formed

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
Runnable = Callable[..., Callable[..., Any]]

score_row = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.backend) for row in TABLE if row.branch == "score"],
)


def assert_same_choice(
    row: Row,
    tensors: dict[str, Any],
    config: NSAConfig,
    runnable: Runnable,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
) -> None:
    """What the row chooses, put to the judge; a refusal skips the test."""
    where: dict[str, Any] = {"config": config, "q_start": q_start, "kv_len": kv_len}
    assert_chosen(runnable(row, tensors, config)(**tensors, **where), tensors, **where)


@score_row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 16])
def test_same_sets(
    row: Row, group: int, dtype: torch.dtype, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small(num_heads=2 * group)
    assert_same_choice(row, draw("score", config, 300, dtype=dtype, device=device), config, runnable)


@score_row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_scores_are_not_rounded_to_16_bits(
    row: Row, dtype: torch.dtype, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """Rule 6: with logits of about a hundred, 16 bits leave whole units of rounding, and other sets."""
    config = small(num_kv_heads=4)
    tensors = draw("score", config, 300, dtype=dtype, device=device)
    tensors = {name: t * 10 if name == "q" else 8 + t for name, t in tensors.items()}
    assert_same_choice(row, tensors, config, runnable)


@score_row
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129])
def test_lengths(row: Row, length: int, small: Small, draw: Draw, runnable: Runnable, device: str) -> None:
    config = small()
    assert_same_choice(row, draw("score", config, length, device=device), config, runnable)


@score_row
@pytest.mark.parametrize(
    "shape",
    [
        {"num_initial_blocks": 0, "num_local_blocks": 0},
        {"num_initial_blocks": 0, "num_local_blocks": 1},
        {"num_initial_blocks": 2, "num_local_blocks": 2},
        {"num_initial_blocks": 4, "num_local_blocks": 0},
        {"num_initial_blocks": 0, "num_local_blocks": 4},
        {"num_selected_blocks": 1, "num_initial_blocks": 1, "num_local_blocks": 0},
        {"num_selected_blocks": 30},
        {"compression_block_size": 16, "compression_stride": 16},
        {"compression_block_size": 4, "selection_block_size": 32},
        {"compression_block_size": 6, "compression_stride": 2, "selection_block_size": 10},
        {"compression_block_size": 32, "compression_stride": 16, "selection_block_size": 64},
        {"compression_block_size": 1, "compression_stride": 1, "selection_block_size": 1},
    ],
    ids=lambda shape: ",".join(map(str, shape.values())),
)
def test_geometries(
    row: Row, shape: dict[str, int], small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small(**shape)
    dtype = torch.float64 if device == "cpu" else torch.float32
    tensors = draw("score", config, 333, batch=1, dtype=dtype, device=device)
    assert_same_choice(row, tensors, config, runnable)


@score_row
@pytest.mark.parametrize(("q_start", "rows"), [(1, 1), (7, 1), (62, 5), (200, 1), (200, 130)])
@pytest.mark.parametrize("later", [0, 50])
def test_queries_that_start_later(
    row: Row, q_start: int, rows: int, later: int, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small()
    keys = q_start + rows + later
    tensors = draw("score", config, rows, keys=keys, q_start=q_start, device=device)
    assert_same_choice(row, tensors, config, runnable, q_start=q_start, kv_len=keys)


@score_row
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("later", [None, 50])
def test_queries_that_start_anywhere_per_sequence(
    row: Row, rows: int, later: int | None, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small()
    q_start = torch.tensor([0, 141, 6, 62])
    keys = None if later is None else 141 + rows + later
    tensors = draw("score", config, rows, batch=4, keys=keys, q_start=q_start, device=device)
    assert_same_choice(row, tensors, config, runnable, q_start=q_start.to(device), kv_len=keys)


@score_row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ties_go_to_the_lower_index(
    row: Row, dtype: torch.dtype, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """Queries of zero: every compressed block is as likely, so all inner blocks score exactly the same."""
    config = small(num_initial_blocks=1, num_local_blocks=1)
    tensors = draw("score", config, 300, dtype=dtype, device=device)
    tensors["q"].zero_()
    chosen = runnable(row, tensors, config)(**tensors, config=config)
    # Block 0 is forced, block 1 is the first of the full score; own block 18 starts at token 288.
    assert chosen[0, 295, 0].tolist() == [0, 1, 2, 18]
    assert chosen[1, 255, 1].tolist() == [0, 1, 2, 15]
    assert_well_formed(chosen, config)
    expected = reference.select_blocks(tensors["q"].double().cpu(), tensors["k_cmp"].double().cpu(), config)
    assert torch.equal(chosen.cpu(), expected)


@score_row
def test_a_tie_between_two_planted_blocks(
    row: Row, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """Compressed keys repeat every block: blocks j and j + 3 score the same up to the ends of the stencil."""
    config = small(
        compression_block_size=16,
        compression_stride=16,  # no overlap: a block's score is one probability
        num_initial_blocks=0,
        num_local_blocks=1,
        num_selected_blocks=3,
    )
    tensors = draw("score", config, 1, batch=1, q_start=199, device=device)
    k = tensors["k_cmp"]
    for block in (2, 5, 8, 11):
        k[:, block] = 2 * tensors["q"][:, 0, ::2]
    tensors["q"] = tensors["q"][:, :, ::2].repeat_interleave(2, 2).contiguous()
    chosen = runnable(row, tensors, config)(**tensors, config=config, q_start=199)
    assert chosen.tolist() == [[[[2, 5, 12]] * 2]]


@score_row
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
def test_scores_too_small_for_16_bits_still_rank(
    row: Row, dtype: torch.dtype, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """One block holds all the weight; the others, at 1e-11 and less, are ranked all the same."""
    config = small(
        num_heads=1,
        num_kv_heads=1,
        compression_block_size=16,
        compression_stride=16,
        num_initial_blocks=0,
        num_local_blocks=1,
    )
    logit = torch.tensor([-60.0, -26.0, -70.0, -27.0, 0.0, -28.0, -65.0, -25.0, -62.0, -90.0])
    tensors = draw("score", config, 1, batch=1, q_start=163, dtype=dtype, device=device)
    tensors["q"].fill_(1.0)
    tensors["k_cmp"] = (logit / 4)[None, :, None, None].expand(1, 10, 1, 16).to(device, dtype).contiguous()
    chosen = runnable(row, tensors, config)(**tensors, config=config, q_start=163)
    assert chosen.tolist() == [[[[1, 4, 7, 10]]]]


@score_row
def test_logits_far_apart_in_one_group(
    row: Row, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """Each head has its own softmax: a head with logits of hundreds does not silence its neighbours."""
    config = small(num_heads=8, num_kv_heads=2)
    tensors = draw("score", config, 300, device=device)
    tensors["q"] *= torch.tensor([300.0, 1.0, 0.01, -300.0] * 2, device=device)[:, None]
    assert_same_choice(row, tensors, config, runnable)


@score_row
@pytest.mark.parametrize("logit", [-200.0, -4000.0])
def test_all_logits_very_negative(
    row: Row, logit: float, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small()
    place = (abs(logit) / 4) ** 0.5
    tensors = draw(
        "score", config, 300, dtype=torch.float64 if device == "cpu" else torch.float32, device=device
    )
    tensors["q"] = tensors["q"] / place + place
    tensors["k_cmp"] = tensors["k_cmp"] / place - place
    assert_same_choice(row, tensors, config, runnable)


@score_row
def test_batch_composition_changes_no_choice(
    row: Row, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small()
    tensors = draw("score", config, 300, batch=3, device=device)
    function = runnable(row, tensors, config)
    together = function(**tensors, config=config)
    for b in range(3):
        alone = function(**{name: t[b : b + 1] for name, t in tensors.items()}, config=config)
        assert torch.equal(alone, together[b : b + 1])


@score_row
def test_later_blocks_change_no_earlier_choice(
    row: Row, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small()
    tensors = draw("score", config, 300, device=device)
    function = runnable(row, tensors, config)
    before = function(**tensors, config=config)
    later = {"q": tensors["q"].clone(), "k_cmp": tensors["k_cmp"].clone()}
    later["q"][:, 200:] *= -50
    later["k_cmp"][:, 49:] *= 50  # block 49 ends with token 203
    after = function(**later, config=config)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


@score_row
def test_selection_is_outside_the_graph(row: Row, small: Small, draw: Draw, runnable: Runnable) -> None:
    """Rule 11."""
    config = small()
    tensors = {name: t.requires_grad_() for name, t in draw("score", config, 100).items()}
    chosen = runnable(row, tensors, config, gradients=True)(**tensors, config=config)
    assert not chosen.requires_grad


@score_row
def test_non_contiguous_inputs(row: Row, small: Small, draw: Draw, runnable: Runnable, device: str) -> None:
    config = small()
    tensors = draw("score", config, 200, dtype=torch.float32, device=device)
    heads_first = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors.items()}
    assert_same_choice(row, heads_first, config, runnable)
    sliced = {name: torch.cat([t, t], -1)[..., : t.shape[-1]] for name, t in tensors.items()}
    assert_same_choice(row, sliced, config, runnable)
