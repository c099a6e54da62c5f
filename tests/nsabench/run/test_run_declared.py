"""The declared work of this project's kernels beside what cells count and what made-up selections share."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nsa import NSAConfig, Routing
from nsa.kernels.work import Call, declared, expected_union
from nsabench.plan import Cell
from nsabench.run import declared as declaring
from nsabench.run.selection import TILE, sharing, synthetic
from nsabench.run.steps import steps_of
from nsabench.run.work import stage_work

MakeCell = Callable[..., Cell]

LONG = {"S": 8192, "heads": 64, "groups": 4, "dk": 128, "dv": 128, "dtype": "bf16"}
PAPER = {"l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512}
CONFIG = NSAConfig(64, 4, 128)


@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("span", [(1024, 1536), (1064, 1300), (6000, 7024)])
def test_the_union_expected_of_neighbours_is_that_of_made_up_selections(
    span: tuple[int, int], keep: float | None
) -> None:
    blocks = np.concatenate([synthetic(CONFIG, 64, span, seed, keep) for seed in range(4)], 1)
    found = sharing(torch.from_numpy(blocks)[None], span[0], CONFIG).union_blocks
    tiles = [range(at, at + TILE) for at in range(*span, TILE)]
    expected = np.mean([expected_union(tile, CONFIG, keep) for tile in tiles])
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("keep", [None, 0.7])
def test_tiles_may_cross_into_another_block(keep: float | None) -> None:
    config = NSAConfig(2, 1, 8, compression_block_size=3, compression_stride=3, selection_block_size=6)
    tile = range(250, 266)
    blocks = synthetic(config, 20000, (tile.start - 100, tile.stop), 3, keep)[100:]
    found = np.mean([np.unique(lane).size for lane in blocks.transpose(1, 0, 2)])
    assert found == pytest.approx(expected_union(tile, config, keep), rel=0.005)


def test_while_all_blocks_are_taken_a_tile_takes_them_once() -> None:
    assert [expected_union(range(at, at + 4), CONFIG) for at in (0, 62, 64, 1020)] == [1, 2, 2, 16]
    assert expected_union(range(1022, 1026), CONFIG) == 17


@pytest.mark.parametrize(
    ("branch", "backend", "passes", "most"),
    [
        ("cmp", "triton", 1, 1.15),
        ("score", "triton", 2, 1.2),
        ("win", "triton", 1, 1.2),
        ("sel", "triton:union", 1, 3.0),
        ("sel", "triton:kv_outer", 1, 1.5),
        ("sel", "triton:query_major", 1, 1.2),
    ],
)
def test_kernels_declare_no_less_than_their_branch_needs(
    make_cell: MakeCell, branch: str, backend: str, passes: int, most: float
) -> None:
    pytest.importorskip("triton")
    cell = make_cell(**LONG, **PAPER)
    branches = ("sel",) if branch == "score" else (branch,)
    part = stage_work(cell, branches, 0)[branch]
    works = declared(branch, backend, Call(CONFIG, cell.S, cell.S))
    flops, moved = (sum(getattr(one, name) for one in works) for name in ("flops", "dram_bytes"))
    assert 1 <= flops / (passes * part.flops) <= most
    # What goes in and out counts with the first and the last stage there.
    assert moved >= part.bytes
    assert all(one.l2_bytes > 0 for one in works)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU where a route's backends are those it names."""
    pytest.importorskip("triton")

    def route_at(cell: Cell, span: tuple[int, int]) -> SimpleNamespace:
        routing = Routing.parse(cell.route)
        shares = routing.cmp == routing.score == "triton"
        return SimpleNamespace(backend=lambda branch: getattr(routing, branch), shares_lse=shares)

    monkeypatch.setattr(declaring, "route_at", route_at)
    monkeypatch.setattr(declaring, "_arch", lambda device: (9, 0))


def works_of(cell: Cell, **row: float) -> dict[tuple[str, str], float]:
    return {
        (one["branch"], one["kernel"]): one["flops"]
        for one in declaring.declared_work(cell, steps_of(cell), row)
    }


def test_the_kernels_of_a_step_by_branch(make_cell: MakeCell, hopper: None) -> None:
    cell = make_cell(**LONG, **PAPER, device="cuda:0", route="cmp=triton,sel=triton,win=fa2", scope="core")
    found = works_of(cell, union_blocks=20.0)
    names = {"cmp": ["attention"], "sel": ["mark", "compact", "union"]}
    assert set(found) == {(branch, f"_{name}_kernel") for branch, held in names.items() for name in held}
    assert found["sel", "_union_kernel"] > 1.5 * works_of(cell, union_blocks=12.0)["sel", "_union_kernel"]
    assert found["sel", "_union_kernel"] < works_of(cell)["sel", "_union_kernel"]
    assert works_of(make_cell(impl="dense", device="cuda:0")) == {}


def test_scores_that_are_handed_an_lse_declare_none(make_cell: MakeCell, hopper: None) -> None:
    def scoring(route: str) -> set[str]:
        cell = make_cell(**LONG, **PAPER, device="cuda:0", route=route, scope="core")
        return {kernel for branch, kernel in works_of(cell) if branch == "score"}

    assert scoring("cmp=fa2,score=triton") == {"_lse_kernel", "_scores_kernel", "_top_n_kernel"}
    assert scoring("cmp=triton,score=triton") == {"_scores_kernel", "_top_n_kernel"}


def test_the_calls_of_a_step_add_up(make_cell: MakeCell, hopper: None) -> None:
    chunked = make_cell(**LONG, **PAPER, device="cuda:0", route="win=triton", mode="chunked=2048")
    whole = make_cell(**LONG, **PAPER, device="cuda:0", route="win=triton")
    assert works_of(chunked) == pytest.approx(works_of(whole))
    decode = make_cell(**LONG, **PAPER, device="cuda:0", route="sel=triton", phase="decode")
    ((key, flops),) = works_of(decode).items()
    assert key == ("sel", "_query_kernel")
    assert flops == 4 * 16 * 2 * 16 * 64 * (128 + 128)
