"""Made-up selections: what each must be, how far neighbours agree, and that they are what is attended."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa.attention
from nsa import NSAConfig, reference
from nsabench.plan import Cell
from nsabench.run import Policy, selection
from nsabench.run.gate import judge
from nsabench.run.selection import blocks_of, sharing, synthetic
from nsabench.run.session import measure_group
from nsabench.run.steps import steps_of
from nsabench.run.workload import workload_for

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]


def config_of(n: int, initial: int, local: int, size: int) -> NSAConfig:
    return NSAConfig(
        2,
        1,
        8,
        compression_block_size=1,
        compression_stride=1,
        selection_block_size=size,
        num_selected_blocks=n,
        num_initial_blocks=initial,
        num_local_blocks=local,
    )


@st.composite
def configs(draw: st.DrawFn) -> NSAConfig:
    initial, local = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    n = draw(st.integers(max(1, initial + local), 8))
    return config_of(n, initial, local, draw(st.sampled_from([1, 2, 4])))


KEEPS = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 0.95]))


@settings(deadline=None, max_examples=60)
@given(configs(), st.integers(0, 60), st.integers(1, 50), KEEPS, st.integers(0, 2**63 - 1))
def test_every_row_is_a_selection(
    config: NSAConfig, first: int, rows: int, keep: float | None, seed: int
) -> None:
    found = synthetic(config, 3, (first, first + rows), seed, keep)
    assert (found.shape, found.dtype) == ((rows, 3, config.num_selected_blocks), np.int32)
    for row, position in zip(found, range(first, first + rows), strict=True):
        own = position // config.selection_block_size
        forced = {*range(config.num_initial_blocks), *range(own - config.num_local_blocks + 1, own + 1)}
        forced = {block for block in forced if 0 <= block <= own}
        count = min(config.num_selected_blocks, own + 1)
        for lane in row.tolist():
            taken, empty = lane[:count], lane[count:]
            assert taken == sorted(set(taken))
            assert empty == [-1] * len(empty)
            assert forced <= set(taken)
            assert set(taken) <= set(range(own + 1))
    assert np.array_equal(found, synthetic(config, 3, (first, first + rows), seed, keep))


def test_seeds_lanes_and_rows_differ() -> None:
    config = config_of(6, 1, 2, 2)
    one, other = (synthetic(config, 2, (0, 400), seed, None) for seed in (1, 2))
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[:, 0], one[:, 1])
    assert len(np.unique(one[300:, 0], axis=0)) > 90


@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 0.9])
def test_every_free_block_is_as_likely_as_any_other(keep: float | None) -> None:
    """Of 4000 independent chains, how many have each of the 17 free blocks in the last row."""
    config, lanes = config_of(8, 1, 2, 100), 4000
    last = synthetic(config, lanes, (1900, 1912), 5, keep)[-1]
    counts = np.bincount(last.ravel(), minlength=20)
    assert counts[[0, 18, 19]].tolist() == [lanes] * 3
    likely = 5 / 17
    # Six standard deviations of a binomial count, for each of 17 blocks: a false alarm in 10^7 runs.
    allowed = 6 * math.sqrt(lanes * likely * (1 - likely))
    assert np.abs(counts[1:18] - lanes * likely).max() < allowed


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("part", [selection.DRAWN, 7])
def test_neighbours_share_what_was_asked(keep: float, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A free block is kept with probability X, whole parts drawn apart or not."""
    monkeypatch.setattr(selection, "DRAWN", part)
    config = config_of(8, 1, 2, 500)  # all rows in one block: nothing else becomes free meanwhile
    rows = synthetic(config, 4, (500 * 30, 500 * 31), 3, keep)
    blocks = torch.from_numpy(rows)[None]
    before, after = (set_of(blocks[0, a:b]) for a, b in ((0, -1), (1, None)))
    shared = float((before & after).sum()) / float(after.sum())
    found = sharing(blocks, 500 * 30, config)
    assert found.neighbour_overlap == pytest.approx(shared, abs=1e-12)
    assert found.free == 4 * 499 * 5
    # Six standard deviations of independent keeps; of 0 there are none at all.
    assert abs(shared - keep) <= 6 * math.sqrt(keep * (1 - keep) / found.free)


def set_of(rows: torch.Tensor) -> torch.Tensor:
    """Free blocks of ``(rows, lanes, n)`` as a mask over 40 blocks; of forced ones there are three."""
    return torch.zeros(*rows.shape[:2], 40).scatter(-1, rows[..., 1:-2].long(), 1).bool()


def test_random_neighbours_share_by_chance() -> None:
    config = config_of(8, 1, 2, 500)
    blocks = torch.from_numpy(synthetic(config, 4, (500 * 30, 500 * 31), 3, None))[None]
    found = sharing(blocks, 500 * 30, config).neighbour_overlap
    likely = 5 / 28
    assert found is not None
    # What two draws without replacement share scatters less than a binomial count does.
    assert abs(found - likely) <= 6 * math.sqrt(likely * (1 - likely) / (4 * 499 * 5))


def counted(blocks: torch.Tensor, start: int, config: NSAConfig) -> tuple[float | None, float | None]:
    """The two measures, by sets of python."""
    (lanes, rows), n = (blocks.shape[0] * blocks.shape[2], blocks.shape[1]), config.num_selected_blocks
    shared = free = union = tiles = 0
    lists = blocks.transpose(1, 2).flatten(0, 1).tolist()
    own = [(start + t) // config.selection_block_size for t in range(rows)]
    chooses = [o + 1 > n for o in own]
    begin = chooses.index(True) if any(chooses) else rows
    for lane in range(lanes):
        sets = [{b for b in row if b >= 0} for row in lists[lane]]
        for t in range(begin + 1, rows):
            forced = {*range(config.num_initial_blocks)}
            forced |= {*range(own[t] - config.num_local_blocks + 1, own[t] + 1)}
            shared += len((sets[t] - forced) & sets[t - 1])
            free += len(sets[t] - forced)
        for t in range(min(rows, begin + -(start + begin) % 4), rows - 3, 4):
            union += len(set().union(*sets[t : t + 4]))
            tiles += 1
    return shared / free if free else None, union / tiles if tiles else None


@settings(deadline=None, max_examples=40)
@given(configs(), st.integers(0, 40), st.integers(1, 40), KEEPS, st.integers(0, 99))
def test_what_neighbours_share_is_counted(
    config: NSAConfig, first: int, rows: int, keep: float | None, seed: int
) -> None:
    blocks = torch.from_numpy(synthetic(config, 4, (first, first + rows), seed, keep))
    blocks = blocks.unflatten(1, (2, 2)).transpose(0, 1)
    found = sharing(blocks, first, config)
    assert (found.neighbour_overlap, found.union_blocks) == pytest.approx(counted(blocks, first, config))


def test_of_many_rows_a_spread_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(8, 1, 2, 4)
    blocks = torch.from_numpy(synthetic(config, 2, (0, 6000), 1, 0.8))[None]
    whole = selection._shared(blocks[:, 32:], 32, config)
    found = sharing(blocks, 0, config)
    assert found.free < whole.free
    assert found.neighbour_overlap == pytest.approx(whole.neighbour_overlap, abs=0.02)
    assert found.union_blocks == pytest.approx(whole.union_blocks, abs=0.5)
    monkeypatch.setattr(selection, "SEQUENCES", 1)
    twice = torch.cat([blocks, blocks.flip(1)])
    assert sharing(twice, 0, config) == found


def test_one_query_and_queries_without_a_choice_share_nothing_that_counts() -> None:
    config = config_of(8, 1, 2, 4)
    blocks = torch.from_numpy(synthetic(config, 2, (0, 40), 1, None))[None]
    for some, start in ((blocks[:, :32], 0), (blocks[:, 39:], 39)):
        found = sharing(some, start, config)
        assert (found.neighbour_overlap, found.union_blocks) == (None, None)


@pytest.mark.parametrize("kind", ["random", "overlap=0.5"])
@pytest.mark.parametrize("mode", ["batched", "chunked=7", "stepwise"])
def test_the_blocks_of_a_cell_do_not_depend_on_how_it_is_fed(
    make_cell: MakeCell, kind: str, mode: str
) -> None:
    whole = blocks_of(make_cell(S=60, B=2, selection=kind), [(0, 60)])[0]
    cell = make_cell(S=60, B=2, selection=kind, mode=mode)
    parts = blocks_of(cell, [span for step in steps_of(cell) for span in step.spans])
    assert torch.equal(torch.cat([parts[start] for start in sorted(parts)], 1), whole)
    assert whole.shape == (2, 60, 2, 4)
    assert all(part.is_contiguous() and part.dtype == torch.int32 for part in parts.values())
    assert not torch.equal(whole[0], whole[1])
    assert blocks_of(make_cell(S=60), [(0, 60)]) == {}


EVERY = [
    *({"phase": "prefill", "mode": mode} for mode in ("batched", "chunked=16", "stepwise")),
    {"phase": "decode"},
]
ONCE = Policy(rounds=1, sample_ms=0.01, shares=False, alone=False)


@pytest.mark.parametrize(
    ("way", "passes"),
    [(way, p) for way in EVERY for p in ("fwd", "bwd")[: 1 if way["phase"] == "decode" else 2]],
    ids=str,
)
@pytest.mark.parametrize("scope", ["module", "core"])
def test_a_given_selection_is_attended_and_right_in_every_cell(
    make_cell: MakeCell, way: dict[str, str], passes: str, scope: str
) -> None:
    cell = make_cell(S=44, B=2, scope=scope, passes=passes, **way, selection="random")
    rows = measured([cell], ONCE)
    assert [row["status"] for row in rows] == ["ok"]
    assert rows[0]["selection_overlap"] > 0.9
    alone = way["phase"] == "decode" or way["mode"] == "stepwise"
    assert (rows[0]["neighbour_overlap"] is None) == alone
    assert (rows[0]["union_blocks"] is None) == alone


class _Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: Any, *more: Any) -> None:
        self.rows.append(dict(row))


def measured(cells: list[Cell], policy: Policy) -> list[dict[str, Any]]:
    sink = _Rows()
    measure_group(cells, policy, sink)
    return sink.rows


def ignored(blocks: torch.Tensor, q_start: Any) -> torch.Tensor:
    return blocks


@pytest.mark.parametrize("way", EVERY, ids=str)
@pytest.mark.parametrize("scope", ["module", "core"])
def test_an_attention_that_ignores_the_given_blocks_is_wrong(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, way: dict[str, str], scope: str
) -> None:
    monkeypatch.setattr(nsa.attention, "settled_blocks", ignored)
    (row,) = measured([make_cell(S=44, scope=scope, **way, selection="random")], ONCE)
    assert row["status"] == "wrong"
    assert row["reason"].startswith("output differs from the specification by ")


@pytest.mark.parametrize("scope", ["module", "core"])
def test_a_step_that_forgets_the_given_blocks_is_wrong(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    """Although the attention that was checked took them."""
    from contextlib import nullcontext

    from nsabench.run import impl_nsa

    monkeypatch.setattr(impl_nsa, "attending", lambda blocks: nullcontext())
    (row,) = measured([make_cell(S=60, scope=scope, selection="random")], ONCE)
    assert row["status"] == "wrong"
    assert "outside the timer" in row["reason"]


def worst_free_block(true: Any, q: Any, k_cmp: Any, config: NSAConfig, **more: Any) -> Any:
    chosen = true(q, k_cmp, config, **more)
    scores = reference.block_scores(q, k_cmp, config, **more)
    own = 50 // config.selection_block_size
    pick = min(range(1, own - 1), key=lambda block: float(scores[0, 50, 0, block]))
    chosen[0, 50, 0] = torch.tensor(sorted({0, pick, own - 1, own}), dtype=chosen.dtype)
    return chosen


def test_scores_that_choose_wrong_are_found_though_nothing_attends_their_choice(
    make_cell: MakeCell, plant: Plant
) -> None:
    cell = make_cell(S=60, selection="random", route="score=chunked")
    with plant("backends.chunked:select_blocks", worst_free_block):
        verdict, _ = judge(workload_for(cell), cell.route)
    assert verdict.reason.startswith("a query selects a block whose score is lower by ")
    assert verdict.error.ok
    assert verdict.overlap is not None
    assert verdict.overlap < 1


def test_selections_side_by_side_are_timed_with_their_own_blocks(make_cell: MakeCell) -> None:
    cells = [make_cell(S=200, selection=s) for s in ("natural", "random", "overlap=0.9")]
    rows = measured(cells, ONCE)
    assert [row["status"] for row in rows] == ["ok"] * 3
    shared = {row["selection"]: row["neighbour_overlap"] for row in rows}
    assert shared["overlap=0.9"] > 0.8 > shared["random"]
    unions = {row["selection"]: row["union_blocks"] for row in rows}
    assert unions["overlap=0.9"] < unions["random"]


def test_a_given_selection_counts_as_memory(make_cell: MakeCell) -> None:
    held = workload_for(make_cell(S=60, B=2, selection="random")).held_bytes()
    assert held["selection"] == 2 * 60 * 2 * 4 * 4
    assert workload_for(make_cell(S=60)).held_bytes()["selection"] == 0
