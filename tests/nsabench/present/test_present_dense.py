"""NSA beside dense attention of the same shape: in ratios, tables, lines and figures."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer
from rich.console import Console
from rich.table import Table

from nsabench.present.cell_text import cell_line, last_line
from nsabench.present.figures import dense_figure, memory_figure, speed_figure, time_figure
from nsabench.present.frame import cell_rows, planned_routes
from nsabench.present.pairing import Compared, compare
from nsabench.present.panels import make_panels
from nsabench.present.style import figure_style, route_styles
from nsabench.present.tables import cells_json, cells_table
from nsabench.present.wording import arm_text
from nsabench.stats import paired_ratio
from nsabench.store import Run

MakeRun = Callable[..., Run]

DENSE = {"routes": ("sdpa", "gather"), "baselines": ("dense",)}


def compared(run: Run) -> dict[tuple[str, int], Compared]:
    cells = compare(cell_rows(run.cells), run.samples, planned_routes(run.info))
    return {(arm_text(cell.row), cell.row["S"]): cell for cell in cells}


def rounds_of(run: Run, cell: Compared, variant: str) -> np.ndarray:
    mine = run.samples[(run.samples["cell_id"] == cell.row["cell_id"]) & (run.samples["variant"] == variant)]
    return mine.sort_values("round")["ms"].to_numpy()


def show(table: Table, width: int = 100) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_x_dense_is_the_paired_ratio_and_above_1_nsa_is_faster(make_run: MakeRun) -> None:
    run = make_run(phase="prefill", S=(1024, 4096), **DENSE)
    cells = compared(run)
    for size, faster in ((1024, False), (4096, True)):
        base = cells["dense", size]
        for route in ("sdpa", "gather"):
            cell = cells[route, size]
            assert cell.x_dense == paired_ratio(rounds_of(run, base, ""), rounds_of(run, cell, ""))
            assert cell.x_dense.n == 15
            assert cell.x_dense.lo is not None
            assert (cell.x_dense.lo > 1) == (cell.x_dense.point > 1) == (faster and route == "gather")
            assert cell.dense is base.row
        assert (base.base, base.speed, base.x_dense) == (None, None, None)
        assert base.dense is base.row


def test_decode_pairs_mixed_steps_of_nsa_with_the_one_kind_of_dense(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), **DENSE)
    cells = compared(run)
    cell = cells["gather", 1024]
    mixed = rounds_of(run, cell, "emit") / 16 + rounds_of(run, cell, "plain") * 15 / 16
    expected = paired_ratio(rounds_of(run, cells["dense", 1024], ""), mixed)
    assert cell.x_dense is not None
    found = (cell.x_dense.point, cell.x_dense.lo, cell.x_dense.hi)
    assert found == pytest.approx((expected.point, expected.lo, expected.hi))


def test_dense_is_never_the_baseline_of_speed(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), **DENSE)
    backwards = dataclasses.replace(run, cells=run.cells.iloc[::-1])
    cells = compared(backwards)
    assert cells["gather", 1024].base is cells["sdpa", 1024].row
    assert planned_routes(run.info) == ["sdpa", "gather"]


@pytest.mark.parametrize("status", ["oom", "wrong", "invalid"])
def test_a_dense_cell_that_is_not_ok_compares_with_nothing(make_run: MakeRun, status: str) -> None:
    run = make_run(S=(1024, 2048), failed={("dense", 1024): (status, "x")}, **DENSE)
    cells = compared(run)
    assert cells["sdpa", 1024].x_dense is None
    assert cells["sdpa", 2048].x_dense is not None
    assert cells["gather", 1024].speed is not None


def test_a_later_dense_variant_does_not_take_the_first_ones_place(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), failed={("dense", 1024): ("oom", "x")}, **DENSE)
    rows = cell_rows(run.cells)
    other = {**rows[0], "impl": "dense:flash", "route": "auto", "cell_id": "f" * 12}
    cells = compare([*rows, other])
    assert cells[0].dense is not None
    assert cells[0].dense["impl"] == "dense"
    assert cells[0].x_dense is None


def test_cells_of_another_scope_shape_or_run_are_not_compared(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), routes=("auto",))
    for other in (
        make_run(S=(1024,), routes=("auto",), impl="dense", scope="core"),
        make_run(S=(2048,), routes=("auto",), impl="dense"),
        make_run(S=(1024,), routes=("auto",), impl="dense", run_id="another"),
    ):
        cells = compare(
            cell_rows(pd.concat([run.cells, other.cells])), pd.concat([run.samples, other.samples])
        )
        assert [cell.x_dense for cell in cells] == [None, None]
        assert cells[0].dense is None


def test_rounds_that_were_not_shared_give_a_point_alone(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), phase="prefill", **DENSE)
    dense_id = run.cells["cell_id"].iloc[-1]
    apart = run.samples.assign(process=run.samples["process"].where(run.samples["cell_id"] != dense_id, 1))
    cells = compared(dataclasses.replace(run, samples=apart))
    speed = cells["sdpa", 1024].x_dense
    assert speed is not None
    assert (speed.lo, speed.hi, speed.n) == (None, None, 0)
    assert speed.point == cells["dense", 1024].row["ms_total"] / cells["sdpa", 1024].row["ms_total"]


def test_the_order_may_differ_by_run(make_run: MakeRun) -> None:
    runs = [make_run(S=(1024,), run_id=name) for name in ("first", "second")]
    rows = cell_rows(pd.concat([run.cells for run in runs]))
    cells = compare(rows, None, {"first": ["sdpa"], "second": ["gather"]})
    assert [cell.base["route"] for cell in cells if cell.base] == ["sdpa", "sdpa", "gather", "gather"]


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_table_has_a_column_for_it_and_nothing_is_cut(make_run: MakeRun, width: int, phase: str) -> None:
    run = make_run(S=(1024, 65536), phase=phase, failed={("dense", 1024): ("oom", "too little")}, **DENSE)
    cells = compared(run)
    lines = show(cells_table(run.cells, run.samples, width=width), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "x dense" in text
    assert "x dense: time of dense attention of that shape over this one's; above 1 is faster" in " ".join(
        text.split()
    )
    gather = cells["gather", 65536].x_dense
    assert gather is not None
    assert f"{gather.point:.3g}" in text
    assert f"{gather.lo:.3g}-{gather.hi:.3g}" in text.replace(" ", "")
    (dense,) = [line.split() for line in lines if line.split()[:2] == ["64k", "dense"]]
    assert "1" in dense
    assert "…" not in text
    (failed,) = [line for line in lines if line.split()[:2] == ["1k", "dense"]]
    assert "oom" in failed


def test_a_narrow_table_leaves_out_the_tokens_read_before_it_cuts(make_run: MakeRun) -> None:
    run = make_run(S=(1024, 65536), **DENSE)
    assert "reads" in "\n".join(show(cells_table(run.cells, run.samples, width=100)))
    narrow = "\n".join(show(cells_table(run.cells, run.samples, width=80), 80))
    assert "reads" not in narrow
    assert "peak" in narrow


def test_without_dense_there_is_no_column(make_run: MakeRun) -> None:
    assert "dense:" not in "\n".join(show(cells_table(make_run().cells)))
    alone = make_run(routes=("auto",), impl="dense")
    lines = show(cells_table(alone.cells))
    assert "x dense" not in "\n".join(lines)
    assert "decode fwd batched dense module" in lines[0]


def test_json_says_what_it_is_compared_with(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), **DENSE)
    sdpa, gather, dense = cells_json(run.cells, run.samples)
    assert sdpa["speed"] is None
    assert (sdpa["x_dense"]["baseline"], sdpa["x_dense"]["n"]) == ("dense", 15)
    assert gather["speed"]["baseline"] == "sdpa"
    assert gather["x_dense"]["lo"] < gather["x_dense"]["point"] < gather["x_dense"]["hi"]
    assert (dense["speed"], dense["x_dense"], dense["scope"]) == (None, None, "module")


def test_the_plain_line_of_dense_compares_all_routes(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), scope="core", **DENSE)
    cells = list(compared(run).values())
    assert cells[0].x_dense is not None
    assert "decode fwd S=1024 B=1 core sdpa: ok" in cell_line(cells[0])
    assert "the speed of dense" in cell_line(cells[0])
    last = last_line(cells)
    assert "core dense: ok" in last
    points = [f"{cell.x_dense.point:.3f}x" for cell in cells if cell.x_dense]
    assert last.endswith(f"; relative to it: sdpa {points[0]}, gather {points[1]}")
    assert "cmp/score/sel/win" not in last
    assert last_line(cells[:1]) == cell_line(cells[0])


def drawn(figure: Callable[..., Any], run: Run) -> Any:
    (panel,) = make_panels([run])[0]
    with figure_style():
        return figure(panel, route_styles(series.arm for series in panel.series))


def lines_of(figure: Any) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)}


def test_the_figure_has_a_line_for_each_route_around_1(make_run: MakeRun) -> None:
    run = make_run(S=(1024, 4096, 16384), failed={("dense", 4096): ("oom", "x")}, **DENSE)
    figure = drawn(dense_figure, run)
    cells = compared(run)
    assert list(lines_of(figure)) == ["sdpa", "gather"]
    for route, bar in lines_of(figure).items():
        assert bar.lines[0] is not None
        values = dict(zip(bar.lines[0].get_xdata(), bar.lines[0].get_ydata(), strict=True))
        for size in (1024, 16384):
            speed = cells[route, size].x_dense
            assert speed is not None
            assert values[size] == speed.point
        assert np.isnan(values[4096])
    axes = figure.axes[0]
    assert axes.get_ylabel() == "speed, dense = 1"
    assert [line for line in axes.lines if list(np.asarray(line.get_ydata())) == [1.0, 1.0]]
    assert list(lines_of(drawn(time_figure, run))) == ["sdpa", "gather", "dense"]
    assert list(lines_of(drawn(speed_figure, run))) == ["gather"]


def test_no_figure_without_dense(make_run: MakeRun) -> None:
    assert drawn(dense_figure, make_run()) is None
    every = {("dense", s): ("oom", "x") for s in (1024, 2048, 4096)}
    assert drawn(dense_figure, make_run(failed=every, **DENSE)) is None


def test_the_cache_in_the_memory_figure_is_nsas(make_run: MakeRun) -> None:
    run = make_run(**DENSE)
    run.cells.loc[run.cells["impl"] == "dense", "kv_cache_bytes"] = 1
    cache = lines_of(drawn(memory_figure, run))["KV cache"]
    assert cache.lines[0] is not None
    assert min(cache.lines[0].get_ydata()) > 1
