"""What a figure shows of many runs, routes and shapes, and that it says what it leaves out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from nsabench.present.figures import shares_figure, time_figure
from nsabench.present.frame import PresentError
from nsabench.present.panels import MOST_LINES, MOST_RUNS, make_panels
from nsabench.present.plots import plot_run, second_process, set_name
from nsabench.present.style import figure_style, route_styles
from nsabench.store import Run, RunCells

MakeRun = Callable[..., Run]

ROUTES = ("sdpa", "gather", "auto")
SIZES = (512, 1024, 2048, 65536)


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with figure_style():
        yield


def many(make_run: MakeRun, n: int, **settings: Any) -> list[Run]:
    return [
        make_run(
            run_id=f"run-{i:02}", commit=f"{i:07d}" * 6, created=f"2025-01-{i + 1:02}T00:00:00Z", **settings
        )
        for i in range(n)
    ]


def test_of_a_long_history_the_latest_runs_are_shown_and_the_rest_is_counted(make_run: MakeRun) -> None:
    runs = many(make_run, 9, routes=ROUTES, S=(1024, 2048))
    (panel,), left_out = make_panels(runs[::-1])
    assert {series.label.split(" @ ")[1] for series in panel.series} == {
        "0000005",
        "0000006",
        "0000007",
        "0000008",
    }
    assert len(panel.series) == MOST_LINES
    assert panel.left_out == "left out: 5 earlier runs"
    assert left_out == [f"decode: {panel.left_out}"]
    assert panel.subtitle[-1] == panel.left_out
    figure = time_figure(panel, route_styles(s.arm for s in panel.series))
    assert figure is not None
    assert "left out: 5 earlier runs" in [text.get_text() for text in figure.texts]
    bars = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    dashes = {bar.lines[0].get_linestyle() for bar in bars if bar.lines[0]}
    assert len(dashes) == MOST_RUNS


def test_with_many_routes_fewer_runs_are_shown(make_run: MakeRun) -> None:
    routes = ("auto", "sdpa", "gather", "triton", "reference")
    runs = many(make_run, 6, routes=routes, baselines=("dense",), S=(1024, 2048))
    (panel,), _ = make_panels(runs)
    assert {series.run for series in panel.series} == {0, 1}
    assert list(panel.runs) == ["0000004", "0000005"]
    assert panel.left_out == "left out: 4 earlier runs"


def test_a_few_runs_are_all_shown_with_fewer_routes_but_never_without_dense(make_run: MakeRun) -> None:
    routes = ("auto", "sdpa", "gather", "triton", "reference")
    runs = many(make_run, 3, routes=routes, baselines=("dense",), S=(1024, 2048))
    (panel,), _ = make_panels(runs)
    assert list(panel.runs) == ["0000000", "0000001", "0000002"]
    assert list(dict.fromkeys(s.arm for s in panel.series)) == ["auto", "sdpa", "gather", "dense"]
    assert panel.left_out == "left out: 2 of 6 routes (triton; reference)"


def test_one_run_with_too_many_routes_shows_the_first(make_run: MakeRun) -> None:
    routes = [f"cmp=sdpa,sel=r{i}" for i in range(20)]
    (panel,), _ = make_panels([make_run(routes=routes, baselines=("dense",))])
    assert [s.arm for s in panel.series] == [*routes[: MOST_LINES - 1], "dense"]
    names = "; ".join(routes[MOST_LINES - 1 : MOST_LINES + 2])
    assert panel.left_out == f"left out: 9 of 21 routes ({names} and 6 more)"


def test_runs_that_hold_nothing_good_do_not_push_out_those_that_do(make_run: MakeRun) -> None:
    broken = {("auto", s): ("oom", "x") for s in (1024, 2048)}
    good = make_run(routes=("auto",), S=(1024, 2048), run_id="good", created="2020-01-01T00:00:00Z")
    runs = [good, *many(make_run, 30, routes=("auto",), S=(1024, 2048), failed=broken)]
    (panel,), _ = make_panels(runs)
    assert any(c.row["run_id"] == "good" for s in panel.series for c in s.cells)
    assert time_figure(panel, route_styles(["auto"])) is not None


def test_of_many_shapes_those_with_the_most_sizes_are_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(routes=("auto",), w=2**i, S=SIZES[: 1 + i % 3]) for i in range(4, 14)]
    panels, left_out = make_panels(runs, most=3)
    assert [panel.name for panel in panels] == ["decode-w32", "decode-w256", "decode-w2048"]
    assert left_out == ["7 of 10 shapes: --most and --where choose others"]
    notes: list[str] = []
    written = plot_run(runs, tmp_path, ["svg"], most=1, note=notes.append)
    assert [path.name for path in written] == [f"decode-{what}.svg" for what in ("time", "shares", "memory")]
    assert notes == ["9 of 10 shapes: --most and --where choose others"]
    assert len(make_panels(runs, most=20)[0]) == 10


def test_two_processes_draw_what_one_does(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(routes=("auto", "sdpa"), w=2**i, S=SIZES[:2]) for i in range(4, 12)]
    one = plot_run(runs, tmp_path / "one")
    with second_process() as helper:
        two = plot_run(runs, tmp_path / "two", helper=helper)
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    (tmp_path / "file").touch()
    with second_process() as helper, pytest.raises(PresentError, match="cannot write"):
        plot_run(runs, tmp_path / "file" / "plots", helper=helper)


def test_a_process_that_helps_to_draw_imports_no_more_than_that_takes() -> None:
    code = "import sys, nsabench.present.sharing; print({'pandas', 'scipy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_only_what_is_kept_is_drawn_but_compared_with_all(make_run: MakeRun) -> None:
    run = make_run(routes=("sdpa", "gather"), baselines=("dense",))
    (panel,), _ = make_panels([run], lambda cells: (cells["route"] == "gather") & (cells["S"] > 1024))
    (series,) = panel.series
    assert panel.sizes == [2048, 4096]
    assert all(cell.speed and cell.x_dense for cell in series.cells)
    with pytest.raises(PresentError, match="no cell is as asked for"):
        make_panels([run], lambda cells: cells["S"] < 0)


def test_shares_of_many_series_are_those_of_the_latest_run(make_run: MakeRun) -> None:
    (panel,), _ = make_panels(many(make_run, 4, routes=ROUTES))
    figure = shares_figure(panel, {})
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"{route} @ 0000003" for route in ROUTES]
    assert figure.texts[0].get_text().endswith("of one step, the last run")


def test_shares_of_too_many_routes_say_how_many_they_are(make_run: MakeRun) -> None:
    (panel,), _ = make_panels([make_run(routes=[f"sel=r{i}" for i in range(9)])])
    figure = shares_figure(panel, {})
    assert figure is not None
    assert len([axes for axes in figure.axes if axes.get_title()]) == 6
    assert figure.texts[0].get_text().endswith("in the time of one step, 6 of 9 routes")


def test_a_merged_run_is_drawn_as_its_sources(make_run: MakeRun) -> None:
    first, second = make_run(run_id="a"), make_run(run_id="b", commit="b" * 40)
    second.info["environment"]["cpu"] = {"model": "Another (C) CPU"}
    merged = Run(
        info={"run_id": "m", "plan": first.info["plan"], "sources": [first.info, second.info]},
        cells=pd.concat([first.cells, second.cells]),
        samples=pd.concat([first.samples, second.samples]),
        telemetry=first.telemetry,
        kernels=first.kernels,
        path=first.path,
    )
    (one, two), _ = make_panels([merged])
    assert "AMD EPYC 7B13" in one.subtitle[1]
    assert "Another (C)" in two.subtitle[1]
    assert "commit bbbbbbb" in two.subtitle[1]


def test_a_set_of_runs_has_a_folder_name_that_fits() -> None:
    ids = [f"20250102T0304{i:02}Z-decode-1a2b3c4" for i in range(60)]
    assert set_name(ids[:1]) == ids[0]
    assert set_name(ids[:2]) == f"{ids[0]}+{ids[1]}"
    assert set_name(ids).startswith(f"{ids[0]}+59-")
    assert len(set_name(ids)) < 100
    assert set_name(ids) != set_name([*ids[:-1], "other"])


def test_the_legend_of_several_runs_names_each_route_and_each_run_once(make_run: MakeRun) -> None:
    runs = many(make_run, 4, routes=ROUTES, failed={("sdpa", 1024): ("oom", "x")})
    (panel,), _ = make_panels(runs)
    figure = time_figure(panel, route_styles(ROUTES))
    assert figure is not None
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    names = ["0000000", "0000001", "0000002", "0000003"]
    assert texts == [*ROUTES, *names, *(f"sdpa @ {name}: oom at 1k" for name in names)]
    dashes = [handle.get_linestyle() for handle in figure.legends[0].legend_handles[3:7]]
    assert len(set(dashes)) == 4


@pytest.mark.parametrize("runs", [1, 2, 4])
@pytest.mark.parametrize(
    "routes", [ROUTES, tuple(f"cmp=sdpa,score=sdpa,sel=gather:r{i},win=sdpa" for i in range(12))]
)
def test_a_legend_takes_no_room_from_the_axes_and_fits_the_figure(
    make_run: MakeRun, runs: int, routes: tuple[str, ...]
) -> None:
    failed = {(route, 1024): ("oom", "x") for route in routes}
    (panel,), _ = make_panels(many(make_run, runs, routes=routes, failed=failed))
    figure = time_figure(panel, route_styles(routes))
    assert figure is not None
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= width
    assert figure.axes[0].get_window_extent().height > 2.3 * figure.dpi
    assert height < 12 * figure.dpi


def test_samples_of_runs_that_are_not_drawn_are_not_read(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {run.run_id: run for run in many(make_run, 7, routes=("auto", "sdpa"))}
    read: list[str] = []

    def whole(cells: RunCells) -> Run:
        read.append(cells.run_id)
        return runs[cells.run_id]

    monkeypatch.setattr(RunCells, "whole", whole)
    (panel,), _ = make_panels([RunCells(info=r.info, cells=r.cells, path=r.path) for r in runs.values()])
    assert sorted(read) == ["run-03", "run-04", "run-05", "run-06"]
    assert any(cell.speed and cell.speed.lo for series in panel.series for cell in series.cells)
