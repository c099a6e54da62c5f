"""Other implementations in tables and figures: named, no route of NSA, and never taken for dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from nsabench.plan import Cell
from nsabench.present.cell_text import last_line
from nsabench.present.figures import dense_figure, speed_figure, time_figure
from nsabench.present.frame import planned_routes
from nsabench.present.live import _group_text
from nsabench.present.panels import make_panels
from nsabench.present.style import figure_style, route_styles
from nsabench.present.tables import cells_table
from nsabench.store import Run
from tests.nsabench.present.conftest import MakeRun
from tests.nsabench.present.test_present_dense import compared, show

LESS = {"routes": ("cmp=sdpa,win=off", "win=off"), "scope": "core", "phase": "prefill"}
PEERS = ("peer:sfnsa", "peer:xunhaolai")
NAMES = [f"{peer} win=off" for peer in PEERS]


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return make_run(**LESS, impls=("nsa", *PEERS), baselines=("dense",))


def test_they_are_named_beside_the_routes(run: Run) -> None:
    text = "\n".join(show(cells_table(run.cells, run.samples, width=200), 200))
    for name in NAMES:
        assert name in text
    assert "x dense: time of dense attention of that shape" in text  # of one dense attention, not of three
    assert planned_routes(run.info) == list(LESS["routes"])


def test_the_first_route_is_what_they_are_compared_with_and_dense_is_dense(run: Run) -> None:
    found = compared(run)
    for size in (1024, 2048, 4096):
        for name in NAMES:
            cell = found[name, size]
            assert cell.base is not None
            assert cell.base["impl"] == "nsa"
            assert cell.base["route"] == LESS["routes"][0]
            assert cell.dense_name == "dense"
            assert cell.speed is not None
            assert cell.x_dense is not None


def test_without_a_dense_attention_a_peer_does_not_stand_in(make_run: MakeRun) -> None:
    run = make_run(**LESS, impls=("nsa", *PEERS))
    assert all(cell.dense is None and cell.x_dense is None for cell in compared(run).values())


def test_figures_have_a_line_for_each(run: Run) -> None:
    (panel,) = make_panels([run])[0]
    assert [series.arm for series in panel.series] == [*LESS["routes"], *NAMES, "dense"]
    draw: Callable[..., object]
    for draw in (time_figure, speed_figure, dense_figure):
        with figure_style():
            assert draw(panel, route_styles(series.arm for series in panel.series)) is not None


def test_what_is_measured_together_is_told(run: Run) -> None:
    cells = [Cell.from_dict(cell) for cell in run.info["plan"]][:5]
    assert _group_text(cells).endswith(f"core, 2 routes, {', '.join(NAMES)}, dense")


def test_the_last_line_of_dense_names_them(run: Run) -> None:
    shape = [cell for (_, size), cell in compared(run).items() if size == 1024]
    said = last_line(shape)
    assert "relative to it: " in said
    assert all(f"{name} " in said for name in NAMES)


def test_a_peer_whose_row_came_first_is_not_the_first_route(make_run: MakeRun) -> None:
    run = make_run(**{**LESS, "routes": ("win=off",)}, S=(1024,), impls=("nsa", *PEERS))
    early = replace(run, cells=run.cells.iloc[::-1].reset_index(drop=True))
    for cell in compared(early).values():
        assert cell.base is not None
        assert cell.base["impl"] == "nsa"
