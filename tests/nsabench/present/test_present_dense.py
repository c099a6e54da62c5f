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
from nsabench.present.tables import cells_json, cells_table, compared_grid
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


KINDS = {"routes": ("sdpa", "gather"), "baselines": ("dense", "dense:flash", "dense:math")}


def kinds(make_run: MakeRun, fastest: dict[int, str], **more: Any) -> Run:
    """A run in which one dense attention is the fastest by far at each S."""
    run = make_run(S=tuple(fastest), phase="prefill", **KINDS, **more)
    for size, name in fastest.items():
        mine = (run.cells["impl"] == name) & (run.cells["S"] == size) & (run.cells["status"] == "ok")
        run.cells.loc[mine, ["ms_total", "ms_lo", "ms_hi"]] /= 100
        run.samples.loc[run.samples["cell_id"].isin(run.cells.loc[mine, "cell_id"]), "ms"] /= 100
    return run


def test_the_fastest_dense_attention_of_a_shape_is_compared_with(make_run: MakeRun) -> None:
    run = kinds(make_run, {1024: "dense:math", 4096: "dense:flash"})
    cells = compared(run)
    for size, name in ((1024, "dense:math"), (4096, "dense:flash")):
        base = cells[name, size]
        assert base.x_dense is None
        for arm in ("sdpa", "gather", "dense"):
            cell = cells[arm, size]
            assert cell.dense is base.row
            assert cell.dense_name == name
            assert cell.x_dense == paired_ratio(rounds_of(run, base, ""), rounds_of(run, cell, ""))


@pytest.mark.parametrize("status", ["oom", "unsupported", "invalid", "wrong"])
def test_a_fast_one_that_is_not_ok_is_passed_over(make_run: MakeRun, status: str) -> None:
    run = kinds(make_run, {1024: "dense:math"}, failed={("dense:flash", 1024): (status, "x")})
    assert compared(run)["sdpa", 1024].dense_name == "dense:math"
    first = kinds(make_run, {1024: "dense:math"}, failed={("dense", 1024): (status, "x")})
    assert compared(first)["sdpa", 1024].dense_name == "dense:math"
    every = {(name, 1024): (status, "x") for name in KINDS["baselines"]}
    none = compared(kinds(make_run, {1024: "dense:math"}, failed=every))["sdpa", 1024]
    assert (none.dense_name, none.x_dense) == ("", None)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_names_the_fastest_of_each_shape(make_run: MakeRun, width: int) -> None:
    run = kinds(make_run, {1024: "dense:math", 65536: "dense:flash"})
    lines = show(cells_table(run.cells, run.samples, width=width), width)
    assert max(map(len, lines)) <= width
    text = " ".join("\n".join(lines).split())
    assert "…" not in text
    assert "x dense: time of the fastest of 3 dense attentions of that shape, named beside, over" in text
    assert "fastest" in text
    body = lines[: next(i for i, line in enumerate(lines) if line.startswith("speed: "))]
    starts = [i for i, line in enumerate(body) if line.split()[:1] in (["1k"], ["64k"])]
    for start, end in zip(starts, [*starts[1:], len(body)], strict=True):
        words = " ".join(body[start:end]).split()
        name = {"1k": "dense:math", "64k": "dense:flash"}[words[0]]
        assert words[2:].count(name) == (words[1] != name)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_header_names_it_where_it_is_the_same_everywhere(make_run: MakeRun, width: int) -> None:
    failed = {("dense", size): ("unsupported", "x") for size in (1024, 4096)}
    run = kinds(make_run, {1024: "dense:math", 4096: "dense:math"}, failed=failed)
    lines = show(cells_table(run.cells, run.samples, width=width), width)
    assert max(map(len, lines)) <= width
    text = " ".join("\n".join(lines).split())
    assert "x dense:math" in text
    assert "x dense:math: time of dense:math, the fastest of 2 dense attentions of that shape, over" in text
    _, headers, grid, notes = compared_grid(list(compared(run).values()))
    assert "x dense:math" in headers
    assert "fastest dense" not in headers
    assert notes[-1].startswith("x dense:math: ")
    assert all(len(line) == len(headers) for line in grid)


def test_one_dense_attention_of_a_name_is_named(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), routes=("auto",), baselines=("dense:fa3",))
    text = " ".join("\n".join(show(cells_table(run.cells, run.samples, width=140), 140)).split())
    assert "x dense:fa3: time of dense:fa3 of that shape over this one's; above 1 is faster" in text


def test_exports_name_it(make_run: MakeRun) -> None:
    run = kinds(make_run, {1024: "dense:math"})
    found = {cell["impl"]: cell["x_dense"] for cell in cells_json(run.cells, run.samples)}
    assert found["dense:math"] is None
    assert {found[impl]["baseline"] for impl in ("nsa", "dense", "dense:flash")} == {"dense:math"}


def test_the_plain_lines_name_the_fastest_once_all_are_known(make_run: MakeRun) -> None:
    cells = list(compared(kinds(make_run, {1024: "dense:flash"})).values())
    assert [arm_text(cell.row) for cell in cells][-1] == "dense:math"
    points = ", ".join(f"{arm_text(c.row)} {c.x_dense.point:.3f}x" for c in cells[:2] if c.x_dense)
    assert last_line(cells).endswith(f"; relative to dense:flash, the fastest dense: {points}")
    assert last_line(cells, complete=False) == cell_line(cells[-1])
    assert "the speed of dense:flash" in cell_line(cells[0])


def test_the_figure_says_which_was_the_fastest(make_run: MakeRun) -> None:
    run = kinds(make_run, {1024: "dense:math", 4096: "dense:flash", 16384: "dense:flash"})
    figure = drawn(dense_figure, run)
    written = [text.get_text() for text in figure.texts]
    assert written[0] == "Prefill fwd: speed relative to the fastest dense, with 95 % interval"
    assert "fastest dense attention: dense:math at 1k; dense:flash at 4k, 16k" in written
    assert figure.axes[0].get_ylabel() == "speed, the fastest dense = 1"
    bar = lines_of(figure)["dense:flash"]
    assert bar.lines[0] is not None
    values = dict(zip(bar.lines[0].get_xdata(), bar.lines[0].get_ydata(), strict=True))
    assert values[1024] < 1
    assert values[4096] == values[16384] == 1

    same = drawn(dense_figure, kinds(make_run, {1024: "dense:math", 4096: "dense:math"}))
    assert same.axes[0].get_ylabel() == "speed, dense:math = 1"
    assert "fastest dense attention: dense:math at 1k, 4k" in [text.get_text() for text in same.texts]
    assert "dense:math" not in lines_of(same)


def test_a_crowded_figure_keeps_the_fastest(make_run: MakeRun) -> None:
    routes = tuple(f"cmp=sdpa,sel=gather,win=b{n}" for n in range(14))
    run = make_run(S=(1024, 4096), routes=routes, baselines=KINDS["baselines"])
    mine = run.cells["impl"] == "dense:flash"
    run.cells.loc[mine, "ms_total"] /= 1000
    (panel,) = make_panels([run])[0]
    arms = [series.arm for series in panel.series]
    assert len(arms) == 12
    assert arms[-1] == "dense:flash"
