"""Which tokens a step feeds, and what the route table answers for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nsa import UnsupportedRoute
from nsa.blocks import num_compressed_blocks
from nsabench.plan import Cell
from nsabench.run.gate import CHECKED_SPANS, _spread
from nsabench.run.steps import route_at, steps_of
from nsabench.run.work import config_of

MakeCell = Callable[..., Cell]


@pytest.mark.parametrize("S", range(1, 70))
@pytest.mark.parametrize(("l", "d"), [(8, 4), (8, 1), (8, 8), (1, 1), (32, 16)])
def test_decode_steps_emit_or_do_not_and_are_weighted_as_they_occur(
    make_cell: MakeCell, S: int, l: int, d: int
) -> None:
    cell = make_cell(phase="decode", S=S, l=l, d=d, l_sel=32)
    steps = {step.name: step for step in steps_of(cell)}
    assert sum(step.weight for step in steps.values()) == pytest.approx(1.0, abs=1e-12)
    ends = []
    for name, step in steps.items():
        ((start, end),) = step.spans
        assert 0 <= start == end - 1
        blocks = [num_compressed_blocks(length, config_of(cell)) for length in (start, end)]
        assert blocks[1] - blocks[0] == (name == "emit")
        ends.append(end)
    assert max(ends) == S
    assert min(ends) > S - d or min(ends) == S
    if l > S:
        assert {name: step.weight for name, step in steps.items()} == {"plain": 1.0}
    elif d == 1:
        assert {name: step.weight for name, step in steps.items()} == {"emit": 1.0}
    else:
        assert {name: step.weight for name, step in steps.items()} == {"emit": 1 / d, "plain": 1 - 1 / d}


@pytest.mark.parametrize(
    ("mode", "spans"),
    [
        ("batched", ((0, 10),)),
        ("stepwise", tuple((i, i + 1) for i in range(10))),
        ("chunked=4", ((0, 4), (4, 8), (8, 10))),
        ("chunked=5", ((0, 5), (5, 10))),
        ("chunked=99", ((0, 10),)),
    ],
)
def test_a_prompt_goes_in_whole_and_in_order(
    make_cell: MakeCell, mode: str, spans: tuple[tuple[int, int], ...]
) -> None:
    (step,) = steps_of(make_cell(S=10, mode=mode))
    assert (step.name, step.weight, step.spans) == ("", 1.0, spans)


def test_the_route_is_asked_for_with_the_facts_of_the_span(make_cell: MakeCell) -> None:
    cell = make_cell(S=1000, n_sel=4, l_sel=8, mode="chunked=20")
    assert route_at(cell, (0, 20)).backend("sel") == "sdpa"  # within n l' = 32 keys
    assert route_at(cell, (40, 60)).backend("sel") == "gather"
    with pytest.raises(UnsupportedRoute, match="needs a CUDA GPU"):
        route_at(make_cell(route="win=fa2"), (0, 20))


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 100])
def test_checked_spans_reach_from_the_first_to_the_last(count: int) -> None:
    spans = [(i, i + 1) for i in range(count)]
    picked = _spread(spans)
    assert len(picked) == len(set(picked)) == min(count, CHECKED_SPANS)
    assert (picked[0], picked[-1]) == (spans[0], spans[-1])
