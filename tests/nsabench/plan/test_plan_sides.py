"""The sides of a comparison: what a text changes, and which cells come of it."""

from __future__ import annotations

from typing import Any

import pytest

from nsabench.plan import Cell, PlanError
from nsabench.plan.sides import compared, parse_side

SIZES = {"S": 512, "B": 1, "dim": 256, "heads": 8, "groups": 2, "dk": 32, "dv": 32}
BLOCKS = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512}
WORDS = {"phase": "prefill", "passes": "fwd", "mode": "batched", "dtype": "fp32", "device": "cpu"}
SHARED: dict[str, Any] = {**WORDS, **SIZES, **BLOCKS, "seed": 0, "route": "auto"}


@pytest.fixture
def shared() -> Cell:
    return Cell(**SHARED)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("auto", {"route": "auto"}),
        ("sdpa", {"route": "sdpa"}),
        ("cmp=fa2, win=sdpa", {"route": "cmp=fa2,win=sdpa"}),
        ("dense", {"impl": "dense", "route": "auto"}),
        ("dense,dtype=bf16", {"impl": "dense", "route": "auto", "dtype": "bf16"}),
        ("dtype=fp16", {"dtype": "fp16"}),
        ("S=4k", {"S": 4096}),
        ("passes=bwd,sel=gather", {"passes": "bwd", "route": "sel=gather"}),
        ("dk=64", {"dk": 64, "dv": 64}),
        ("dk=64,dv=32", {"dk": 64, "dv": 32}),
        ("mode=chunked=128", {"mode": "chunked=128"}),
    ],
)
def test_what_a_side_changes(text: str, changes: dict[str, Any], shared: Cell) -> None:
    assert parse_side(text).of(shared) == Cell(**{**SHARED, **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has an empty part"),
        ("sdpa,", "has an empty part"),
        ("dtype=", "has an empty part"),
        ("dytpe=bf16", "'dytpe' cannot differ between sides; did you mean dtype?"),
        ("seed=3", "'seed' cannot differ between sides"),
        ("S=many", "S is 'many', not a whole number"),
        ("S=512,S=1k", "S is given twice"),
        ("sdpa,gather", "sdpa and gather are two routes; name one"),
        ("sdpa,win=fa2", "sdpa and win=fa2 are two routes; name one"),
        ("dense,sdpa", "dense has no routes"),
    ],
)
def test_what_is_no_side(text: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_side(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_no_cell_takes(shared: Cell) -> None:
    with pytest.raises(PlanError, match="dtype is 'int8'"):
        parse_side("dtype=int8").of(shared)


def test_the_first_side_is_its_own_control(shared: Cell) -> None:
    first, second, control = compared(shared, [parse_side("sdpa"), parse_side("dense")])
    assert (first.route, first.twin, second.impl, second.twin) == ("sdpa", 0, "dense", 0)
    assert (control.route, control.twin) == ("sdpa", 1)
    assert len({cell.cell_id for cell in (first, second, control)}) == 3
    assert len({cell.group_key for cell in (first, second, control)}) == 1


def test_a_side_beside_itself(shared: Cell) -> None:
    cells = compared(shared, [parse_side("auto"), parse_side("auto")])
    assert [cell.twin for cell in cells] == [0, 1, 2]


def test_one_side_is_no_comparison(shared: Cell) -> None:
    with pytest.raises(PlanError, match="at least two sides, got 1"):
        compared(shared, [parse_side("auto")])


@pytest.mark.parametrize(
    ("side", "what"), [("S=1k", "S is 512 and 1024"), ("passes=bwd", "passes is fwd and bwd")]
)
def test_different_work_must_be_wanted(side: str, what: str, shared: Cell) -> None:
    sides = [parse_side("auto"), parse_side(side)]
    with pytest.raises(PlanError, match=f"different work: {what}; --allow-different-work"):
        compared(shared, sides)
    assert len(compared(shared, sides, different_work=True)) == 3
    assert len(compared(shared, [parse_side("auto"), parse_side("dtype=bf16")])) == 3
