"""The gate's comparison with the specification: right rows pass, planted bugs do not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import nsa.routes
from nsa import NSAConfig, reference
from nsa.routes import TABLE, Request, Route, Row, refusal
from nsabench.plan import Cell
from nsabench.run.check import Verdict, _segments, check_arm, part_of_budget
from nsabench.run.steps import DTYPES, route_at, steps_of
from nsabench.run.workload import workload_for

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]

SLIDING, COMPRESSED = "backends.sdpa:sliding_attention", "backends.sdpa:compressed_attention"
SELECTED, SCORES = "backends.gather:selected_attention", "backends.chunked:select_blocks"


def verdict_of(cell: Cell, **more: Any) -> Verdict:
    workload = workload_for(cell)
    step = steps_of(cell)[-1]
    ((span, inputs),) = workload.inputs(step, step.spans[-1:])
    gradients = cell.passes != "fwd"
    return check_arm(inputs, route_at(cell, span), cell.route, workload.config, gradients=gradients, **more)


def on_cpu(row: Row, passes: str, dtype: str) -> bool:
    request = Request("cpu", DTYPES[dtype], 60, 60, passes != "fwd", NSAConfig(4, 2, 8))
    return refusal(row, request) is None


RUNNING = [
    pytest.param(row, passes, dtype, id=f"{row.branch}={row.backend}-{passes}-{dtype}")
    for row in TABLE
    for passes in ("fwd", "bwd")
    for dtype in DTYPES
    if on_cpu(row, passes, dtype)
]


@pytest.mark.parametrize(("row", "passes", "dtype"), RUNNING)
def test_every_row_that_runs_here_is_right(make_cell: MakeCell, row: Row, passes: str, dtype: str) -> None:
    cell = make_cell(S=60, B=2, passes=passes, dtype=dtype, route=f"{row.branch}={row.backend}")
    found = verdict_of(cell)
    assert found.reason == ""
    assert found.error.ok
    assert 0 <= part_of_budget(found.error) <= 1
    assert found.overlap is not None
    assert found.overlap >= (0.999 if dtype == "fp64" else 0.9)
    assert found.output.shape == (2, 60, 4, 4)
    assert not found.has_nan


@pytest.mark.parametrize("S", [1, 7, 8, 40])
@pytest.mark.parametrize("route", ["auto", "cmp=off", "sel=off", "win=off", "cmp=off,sel=off"])
def test_decode_and_branches_that_are_off_are_right(make_cell: MakeCell, S: int, route: str) -> None:
    found = verdict_of(make_cell(phase="decode", S=S, route=route))
    assert found.reason == ""
    assert (found.overlap is None) == ("sel=off" in route)


def window_one_longer(true: Any, q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Any:
    return true(q, k, v, replace(config, window_size=config.window_size + 1), q_start=q_start)


def window_one_shorter(true: Any, q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Any:
    return true(q, k, v, replace(config, window_size=config.window_size - 1), q_start=q_start)


def mask_inverted(true: Any, q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: int = 0) -> Any:
    position = torch.arange(q_start, q_start + q.shape[1]).unsqueeze(-1)
    key = torch.arange(k.shape[1])
    allowed = (key <= position) & (key > position - config.window_size)
    return reference._attend(q, k, v, ~allowed[None, None], config)


def sees_the_next_key(true: Any, *given: Any, q_start: int = 0) -> Any:
    return true(*given, q_start=q_start + 1)


def sees_no_own_key(true: Any, *given: Any, q_start: int = 0) -> Any:
    return true(*given, q_start=q_start - 1)


def one_nan(true: Any, *given: Any, **more: Any) -> Any:
    out, lse = true(*given, **more)
    out = out.clone()
    out.view(-1)[out.numel() // 2] = float("nan")
    return out, lse


def a_little_too_large(true: Any, *given: Any, **more: Any) -> Any:
    out, lse = true(*given, **more)
    return out * 1.0001, lse


def another_head(true: Any, q: Any, *given: Any, **more: Any) -> Any:
    out, lse = true(q, *given, **more)
    return out.roll(1, 2), lse


def without_scale(true: Any, q: Any, *given: Any, **more: Any) -> Any:
    return true(q * 1.01, *given, **more)


@pytest.mark.parametrize(
    ("target", "bug"),
    [
        (SLIDING, window_one_longer),
        (SLIDING, window_one_shorter),
        (SLIDING, mask_inverted),
        *((t, bug) for t in (SLIDING, COMPRESSED, SELECTED) for bug in (sees_the_next_key, sees_no_own_key)),
        *(
            (target, bug)
            for target in (SLIDING, COMPRESSED, SELECTED)
            for bug in (one_nan, a_little_too_large, another_head, without_scale)
        ),
    ],
)
def test_a_wrong_branch_is_found(make_cell: MakeCell, plant: Plant, target: str, bug: Any) -> None:
    cell = make_cell(S=60, B=2)
    assert verdict_of(cell).reason == ""
    with plant(target, bug):
        found = verdict_of(cell)
    if bug is one_nan:
        assert found.reason == "output is not finite"
        assert found.has_nan
    else:
        assert found.reason.startswith("output differs from the specification by ")
        assert f"; allowed {found.error.budget:.3g}" in found.reason
        assert not found.has_nan
    assert not found.error.ok


def exchanged(better: bool) -> Any:
    """Take another block in place of the free one (n = 4: one initial, two local, one free)."""

    def bug(true: Any, q: Any, k_cmp: Any, config: NSAConfig, **more: Any) -> Any:
        chosen = true(q, k_cmp, config, **more)
        scores = reference.block_scores(q, k_cmp, config, **more)
        t, own = 50, 50 // config.selection_block_size
        free = [b for b in range(1, own - 1) if b not in chosen[0, t, 0].tolist()]
        pick = max(free, key=lambda b: float(scores[0, t, 0, b]) * (1 if better else -1))
        chosen[0, t, 0] = torch.tensor(sorted([0, pick, own - 1, own]), dtype=chosen.dtype)
        return chosen

    return bug


def forgets_the_local_blocks(true: Any, q: Any, k_cmp: Any, config: NSAConfig, **more: Any) -> Any:
    return true(q, k_cmp, replace(config, num_local_blocks=1), **more)


def takes_one_less(true: Any, *given: Any, **more: Any) -> Any:
    chosen = true(*given, **more)
    chosen[..., -1] = -1
    return chosen


def takes_one_twice(true: Any, *given: Any, **more: Any) -> Any:
    chosen = true(*given, **more)
    chosen[0, 50, 0, 2] = chosen[0, 50, 0, 3]
    return chosen


def takes_the_future(true: Any, *given: Any, **more: Any) -> Any:
    chosen = true(*given, **more)
    chosen[0, 50, 0, 3] += 1
    return chosen


def takes_what_does_not_exist(true: Any, *given: Any, **more: Any) -> Any:
    chosen = true(*given, **more)
    chosen[0, 50, 0, 3] = 99
    return chosen


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (exchanged(better=False), "a query selects a block whose score is lower by"),
        (exchanged(better=True), "a query selects a block whose score is lower by"),
        (forgets_the_local_blocks, "a query selects a block past its own, or leaves out one that is always"),
        (takes_one_less, "a query selects another number of blocks than the specification"),
        (takes_one_twice, "a query selects another number of blocks than the specification"),
        (takes_the_future, "a query selects a block past its own, or leaves out one that is always selected"),
    ],
)
def test_a_wrong_selection_is_found(make_cell: MakeCell, plant: Plant, bug: Any, message: str) -> None:
    """Although the attention over the blocks taken is right."""
    with plant(SCORES, bug):
        found = verdict_of(make_cell(S=60, route="sel=reference"))
    assert found.reason.startswith(message)
    assert found.error.ok
    assert found.overlap is not None
    assert found.overlap < 1


def test_a_block_that_does_not_exist_is_found(make_cell: MakeCell, plant: Plant) -> None:
    """In an arm whose attention does not fall over it: here nothing attends the blocks."""
    with plant(SCORES, takes_what_does_not_exist):
        cell = make_cell(S=60)
        inputs = workload_for(cell).inputs_without_cache()
        route = replace(route_at(cell, (0, 60)), sel=None)
        found = check_arm(inputs, route, "sel=off", NSAConfig(4, 2, 8, 4, 8, 4, 8, 4, 12), gradients=False)
    assert found.reason == "a query selects another number of blocks than the specification"


def test_equal_scores_may_be_exchanged(make_cell: MakeCell, plant: Plant) -> None:
    """Two blocks with equal scores: the specification takes the lower, another may take the higher."""
    cell = make_cell(S=60, route="sel=reference")
    with plant(SCORES, takes_the_higher):
        found = check_arm(*with_equal_scores(cell), gradients=False)
    assert found.overlap is not None
    assert found.overlap < 1
    assert found.reason == ""


def takes_the_higher(true: Any, q: Any, k_cmp: Any, config: NSAConfig, **more: Any) -> Any:
    chosen = true(q, k_cmp, config, **more)
    own = (more["q_start"] + torch.arange(q.shape[1])) // config.selection_block_size
    free = (chosen > 0) & (chosen < own[:, None, None] - 1)
    return (chosen + free * (own[:, None, None] - 2 - chosen)).to(chosen.dtype)


def with_equal_scores(cell: Cell) -> tuple[dict[str, Any], Route, str, NSAConfig]:
    inputs = workload_for(cell).inputs_without_cache()
    inputs["k_cmp"] = torch.zeros_like(inputs["k_cmp"])
    return inputs, route_at(cell, (0, 60)), cell.route, NSAConfig(4, 2, 8, 4, 8, 4, 8, 4, 12)


def test_the_blocks_judged_are_those_chosen_from_the_lse_handed_on(
    make_cell: MakeCell, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal scores the step takes others with an lse than without one."""
    sharing = Row("score", "sdpa", f"nsa.{SCORES}", lambda request: None, takes=("lse",))
    monkeypatch.setattr(nsa.routes, "TABLE", (*nsa.routes.TABLE, sharing))
    handed: list[bool] = []

    def by_lse(true: Any, *given: Any, lse: Any = None, **more: Any) -> Any:
        handed.append(lse is not None)
        return true(*given, **more) if lse is None else takes_the_higher(true, *given, **more)

    cell = make_cell(S=60, route="cmp=sdpa,score=sdpa,sel=reference")
    with plant(SCORES, by_lse):
        found = check_arm(*with_equal_scores(cell), gradients=False)
    assert handed
    assert all(handed)
    assert found.overlap is not None
    assert found.overlap < 1
    assert found.reason == ""


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * 1.01


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("target", [SLIDING, COMPRESSED, SELECTED])
def test_a_gradient_one_percent_off_is_found(
    make_cell: MakeCell, plant: Plant, target: str, argument: int
) -> None:
    def bug(true: Any, *given: Any, **more: Any) -> Any:
        scaled = list(given)
        scaled[argument] = _ScaledGradient.apply(scaled[argument])
        return true(*scaled, **more)

    with plant(target, bug):
        assert verdict_of(make_cell(S=60)).reason == ""
        found = verdict_of(make_cell(S=60, passes="bwd"))
    branch = {SLIDING: "win", COMPRESSED: "cmp", SELECTED: "sel"}[target]
    wrong = "q" if argument == 0 else f"{'kv'[argument - 1]}_{branch}"
    assert found.reason.startswith(f"gradient of {wrong} differs from the specification by ")


def test_a_gradient_that_is_nan_is_found(make_cell: MakeCell, plant: Plant) -> None:
    def root(true: Any, q: Any, *given: Any, **more: Any) -> Any:
        out, lse = true(q, *given, **more)
        return out + (q * 0).sum().sqrt(), lse  # plus 0, but the gradient is 0 * inf

    with plant(SLIDING, root):
        assert verdict_of(make_cell(S=20)).reason == ""
        found = verdict_of(make_cell(S=20, passes="bwd"))
    assert found.has_nan
    assert found.reason == "gradient of q is not finite"


@pytest.mark.parametrize("rows", [17, 40, 64, 300])
@pytest.mark.parametrize("elements", [1, 4 * 300 * 30, 4 * 300 * 120])
def test_segments_are_apart_and_hold_every_border(rows: int, elements: int) -> None:
    config = NSAConfig(4, 2, 8, 4, 8, 4, 8, 4, 12)
    inputs = {"q": torch.empty(1, rows, 4, 8), "k_sel": torch.empty(1, 300, 2, 8)}
    segments = _segments(inputs, config, elements)
    assert all(a < b for a, b in segments)
    assert all(before[1] <= after[0] for before, after in pairwise(segments))
    checked = {row for a, b in segments for row in range(a, b)}
    assert {0, 7, 8, 11, 12, rows // 2, rows - 1} <= checked
    assert len(checked) <= max(16, elements // (4 * 300))
    if elements // (4 * 300) >= rows:
        assert segments == [(0, rows)]


@pytest.mark.parametrize("passes", ["fwd", "bwd"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_where_only_some_rows_are_checked_a_bug_in_them_is_found(
    make_cell: MakeCell, plant: Plant, passes: str, where: str
) -> None:
    row = {"first": 0, "middle": 100, "last": 199}[where]

    def bug(true: Any, *given: Any, **more: Any) -> Any:
        out, lse = true(*given, **more)
        keep = torch.ones_like(out)
        keep[:, row] = 0.99
        return out * keep, lse

    cell = make_cell(S=200, passes=passes)
    assert verdict_of(cell, elements=1).reason == ""
    with plant(SLIDING, bug):
        assert "differs from the specification" in verdict_of(cell, elements=1).reason
    with plant(SCORES, takes_one_less):
        found = verdict_of(cell, elements=1)
    assert found.reason == "a query selects another number of blocks than the specification"
