"""Work counts against brute force over every query and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nsabench.plan import Cell
from nsabench.run.work import Part, config_of, count_work, stage_work

MakeCell = Callable[..., Cell]


def brute_pairs(cell: Cell, first: int) -> dict[str, int]:
    """Keys that each query in [first, S) attends, counted key by key."""
    total = {"cmp": 0, "sel": 0, "win": 0}
    for t in range(first, cell.S):
        ends = [i * cell.d + cell.l - 1 for i in range(cell.S)]
        total["cmp"] += sum(end <= t for end in ends)
        own = t // cell.l_sel
        wanted = min(own + 1, cell.n_sel)
        blocks = [own, *range(own)][:wanted]  # the own block is always one; the others are whole, whichever
        total["sel"] += sum(key // cell.l_sel in blocks for key in range(t + 1))
        total["win"] += sum(t - cell.w < key <= t for key in range(t + 1))
    return total


@pytest.mark.parametrize(
    ("S", "reads"), [(8 * 1024, 2047), (16 * 1024, 2559), (32 * 1024, 3583), (64 * 1024, 5631)]
)
def test_a_decode_step_reads_what_the_paper_counts(make_cell: MakeCell, S: int, reads: int) -> None:
    cell = make_cell(phase="decode", S=S, l=32, d=16, l_sel=64, n_sel=16, w=512)
    work = count_work(cell, ("cmp", "sel", "win"), 0)
    assert (work.reads_tokens, work.reads_tokens_dense) == (reads, S)


@pytest.mark.parametrize("S", [1, 7, 8, 9, 31, 32, 33, 40])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_flops_are_those_of_every_allowed_pair(make_cell: MakeCell, phase: str, S: int) -> None:
    cell = make_cell(phase=phase, S=S, B=3)
    queries = 1 if phase == "decode" else S
    pairs = sum(brute_pairs(cell, S - queries).values())
    expected = 3 * pairs * 4 * (8 + 4) * 2 + 2 * 3 * queries * 1000
    assert count_work(cell, ("cmp", "sel", "win"), 1000).flops == expected


def test_flops_and_bytes_of_one_tiny_decode_step_by_hand(make_cell: MakeCell) -> None:
    # 9 tokens, l = 8, d = 4: one compressed block; two selection blocks, both selected; a window of 4.
    cell = make_cell(phase="decode", S=9, B=2, heads=2, groups=1, dk=8, dv=4, dim=16, w=4, dtype="bf16")
    work = count_work(cell, ("cmp", "sel", "win"), 100)
    assert work.reads_tokens == 1 + 9 + 4
    assert work.flops == 2 * (14 * 2 * 2 * (8 + 4)) + 2 * 2 * 100
    keys_and_values = 2 * 1 * 14 * (8 + 4)
    assert work.bytes == 2 * (keys_and_values + 100 + 2 * 2 * 16)


@pytest.mark.parametrize(
    ("branches", "scored"),
    [
        (("cmp",), False),
        (("win",), False),
        (("sel",), True),  # the scores read the compressed keys, which no branch has read yet
        (("sel", "win"), True),
        (("cmp", "sel"), False),
    ],
)
def test_a_branch_that_is_off_is_not_counted(
    make_cell: MakeCell, branches: tuple[str, ...], scored: bool
) -> None:
    cell = make_cell(S=40)
    pairs = brute_pairs(cell, 0)
    flops = sum(pairs[b] for b in branches) * 4 * (8 + 4) * 2 + scored * pairs["cmp"] * 4 * 8 * 2
    work = count_work(cell, branches, 0)
    assert work.flops == flops
    last = brute_pairs(cell, 39)
    assert work.reads_tokens == sum(last[b] for b in branches)
    stored = {"cmp": last["cmp"], "sel": 40, "win": 40}
    elements = 2 * sum(stored[b] for b in branches) * (8 + 4) + scored * 2 * last["cmp"] * 8
    assert work.bytes == 4 * (elements + 2 * 40 * 16)


@pytest.mark.parametrize("branches", [("cmp", "sel", "win"), ("sel",)])
def test_a_backward_is_two_and_a_half_forwards_but_selects_nothing(
    make_cell: MakeCell, branches: tuple[str, ...]
) -> None:
    def work(**changes: Any) -> Any:
        return count_work(make_cell(**changes), branches, 1000)

    projections = 2 * 40 * 1000
    attention = sum(brute_pairs(make_cell(), 0)[b] for b in branches) * 4 * (8 + 4) * 2
    backward = attention * 5 // 2 + 2 * projections
    forward = work(passes="fwd").flops
    assert work(passes="bwd").flops == backward
    assert work(passes="fwd_bwd").flops == forward + backward
    assert [work(passes=p).bytes // work().bytes for p in ("fwd", "bwd", "fwd_bwd")] == [1, 2, 3]


def test_without_forced_local_blocks_nothing_breaks(make_cell: MakeCell) -> None:
    assert config_of(make_cell()).num_local_blocks == 2
    assert config_of(make_cell(n_sel=3)).num_selected_blocks == 3
    with pytest.raises(ValueError, match="num_selected_blocks must hold the 3 forced blocks"):
        config_of(make_cell(n_sel=2))


BRANCHES = ("cmp", "sel", "win")


@pytest.mark.parametrize("branches", [BRANCHES, ("sel",), ("win",), ("cmp", "sel"), ("sel", "win"), ()])
@pytest.mark.parametrize("scope", ["module", "core"])
@pytest.mark.parametrize("passes", ["fwd", "bwd", "fwd_bwd"])
def test_the_stages_add_up_to_the_whole(
    make_cell: MakeCell, branches: tuple[str, ...], scope: str, passes: str
) -> None:
    cell = make_cell(scope=scope, passes=passes, B=2)
    parameters = 777 if scope == "module" else 0
    whole, parts = count_work(cell, branches, parameters), stage_work(cell, branches, parameters)
    assert sum(part.flops for part in parts.values()) == whole.flops
    assert sum(part.bytes for part in parts.values()) == whole.bytes
    assert set(parts) >= set(branches)


def test_stages_of_one_tiny_decode_step_by_hand(make_cell: MakeCell) -> None:
    # 9 tokens, l = 8, d = 4: one compressed block; two selection blocks, both selected; a window of 4.
    cell = make_cell(phase="decode", S=9, B=2, heads=2, groups=1, dk=8, dv=4, dim=16, w=4, dtype="bf16")
    pair, token = 2 * 2 * 2 * (8 + 4), 2 * 1 * (8 + 4) * 2
    assert stage_work(cell, BRANCHES, 100) == {
        "proj": Part(2 * 2 * 100, 2 * (100 + 2 * 2 * 16)),
        "cmp": Part(1 * pair, 1 * token),
        "sel": Part(9 * pair, 9 * token),
        "win": Part(4 * pair, 4 * token),
    }


def test_a_core_reads_queries_first_and_writes_with_its_gate(make_cell: MakeCell) -> None:
    cell = make_cell(phase="decode", S=9, heads=2, groups=1, dk=8, dv=4, w=4, scope="core")
    parts = stage_work(cell, ("sel",), 0)
    assert list(parts) == ["score", "sel", "gate"]
    assert parts["score"] == Part(2 * 2 * 8 * 1, 4 * (1 * 8 + 2 * 8))  # one block's key, and the queries
    assert parts["gate"] == Part(0, 4 * (2 * 4 + 3 * 2))
