"""A run in time order: where each sample stands, what is crossed, what the GPU did meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nsabench.present.plots import plot_run
from nsabench.present.style import figure_style, route_styles
from nsabench.present.telemetry import MOST_ARMS, telemetry_figure
from nsabench.store import Run
from nsabench.store.schema import TELEMETRY_COLUMNS
from tests.nsabench.present.conftest import make_run
from tests.nsabench.present.contests import make_contest


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with figure_style():
        yield


def drawn(run: Run, **more: Any) -> Figure:
    figure = telemetry_figure(run, **more)
    assert figure is not None
    return figure


def points(axes: Axes, label: str) -> dict[float, float]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return dict(zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True))


def words(figure: Figure) -> str:
    legend = [text.get_text() for one in figure.legends for text in one.get_texts()]
    return "\n".join([text.get_text() for text in figure.texts] + legend)


def dropping(run: Run, rounds: tuple[int, ...], why: str = "hw_thermal", factor: float = 1.5) -> Run:
    samples = run.samples.copy()
    bad = samples["round"].isin(rounds)
    samples["dropped"] = np.where(bad, why, "")
    samples.loc[bad, "ms"] *= factor
    return replace(run, samples=samples)


def with_gpu(run: Run, **columns: Any) -> Run:
    """Readings every half second, from 0 on, and again from 10 s on."""
    times = np.concatenate([np.arange(0, 5, 0.5), np.arange(10, 15, 0.5)])
    known = {"run_id": run.run_id, "cell_id": run.cells["cell_id"][0], "gpu_uuid": "GPU-1", "t_s": times}
    read = {"sm_clock_mhz": 1980.0, "power_w": 500.0 + times, "temp_c": 40.0, "throttle_reasons": "none"}
    frame = pd.DataFrame({**known, **read, **columns}, columns=[c.name for c in TELEMETRY_COLUMNS])
    return replace(run, telemetry=frame)


def test_every_sample_stands_over_its_cells_median_at_its_time() -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.4}, S=(512, 1024), processes=1)
    (axes,) = drawn(run).axes
    mine = run.samples.merge(run.cells[["cell_id", "route", "twin", "S"]], on="cell_id")
    sdpa = mine[mine["route"] == "sdpa"]
    expected = sdpa["ms"] / sdpa.groupby("cell_id")["ms"].transform("median")
    (line,) = [line for line in axes.lines if line.get_label() == "sdpa"]
    assert sorted(np.asarray(line.get_ydata())) == pytest.approx(sorted(expected))
    assert set(np.asarray(line.get_xdata())) == set(sdpa["t_s"])
    assert to_hex(line.get_color()) == route_styles(["sdpa"])["sdpa"].color.lower()
    assert axes.get_ylabel() == "time of a step\nover its arm's median"
    assert axes.get_xlabel() == "time since the run began, s"


def test_the_kinds_of_decode_steps_have_medians_of_their_own() -> None:
    run = make_run(S=(1024,), routes=("auto",))
    (axes,) = drawn(run).axes
    values = np.asarray(next(line for line in axes.lines if line.get_label() == "auto").get_ydata())
    assert len(values) == 2 * 15
    assert 0.9 < values.min() < values.max() < 1.1


def test_what_is_dropped_is_crossed_and_moves_no_median() -> None:
    run = dropping(make_contest({"auto": 1.0, "sdpa": 1.4}, processes=1), (3, 4))
    figure = drawn(run)
    (axes,) = figure.axes
    (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert set(np.asarray(crosses.get_xdata())) == {3.0, 4.0}
    assert np.asarray(crosses.get_ydata()) == pytest.approx(1.5, rel=0.02)
    assert "round does not count" in words(figure)
    assert "2 of 15 rounds dropped for hw_thermal" in words(figure)


def test_a_cell_whose_every_round_was_dropped_is_drawn_too() -> None:
    run = dropping(make_contest({"auto": 1.0, "sdpa": 1.4}, processes=1), tuple(range(15)))
    values = points(drawn(run).axes[0], "sdpa").values()
    assert list(values) == pytest.approx([1.0] * 15, rel=0.02)


def test_a_cpu_has_no_lower_panels_and_fresh_processes_are_marked() -> None:
    figure = drawn(make_contest({"auto": 1.0, "sdpa": 1.4}, processes=3))
    assert len(figure.axes) == 1
    marks = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in marks] == [100.0, 200.0]
    assert "a fresh process" in words(figure)
    assert "a fresh process" not in words(drawn(make_contest({"auto": 1.0, "sdpa": 1.4}, processes=1)))


def test_what_the_gpu_did_stands_below_with_units() -> None:
    run = with_gpu(make_run(gpu=True))
    figure = drawn(run)
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == [
        "SM clock\nMHz",
        "power\nW",
        "temperature\n°C",
    ]
    assert "NVIDIA H200" in words(figure)
    power = figure.axes[2].lines[0]
    times, values = np.asarray(power.get_xdata()), np.asarray(power.get_ydata())
    assert np.isnan(times).sum() == 1, "the line breaks where nothing was read"
    known = ~np.isnan(times)
    assert values[known] == pytest.approx(500 + times[known])
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_a_reading_that_the_gpu_does_not_offer_has_no_panel() -> None:
    figure = drawn(with_gpu(make_run(gpu=True), power_w=None))
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes[1:]] == ["SM clock", "temperature"]


def test_slow_downs_and_power_caps_are_shaded_until_the_next_reading() -> None:
    reasons = ["none"] * 2 + ["hw_thermal+hw_slowdown"] * 3 + ["none"] * 13 + ["sw_power_cap"] * 2
    figure = drawn(with_gpu(make_run(gpu=True), throttle_reasons=reasons))
    for axes in figure.axes:
        ends = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
        assert [(round(e.x0, 6), round(e.x1, 6)) for e in ends] == [(1.0, 2.5), (14.0, 14.5)]
    assert "slowed down\npower capped" in words(figure)


def test_two_gpus_are_told_apart() -> None:
    run = with_gpu(make_run(gpu=True))
    other = run.telemetry.assign(gpu_uuid="GPU-2", temp_c=55.0)
    figure = drawn(replace(run, telemetry=pd.concat([run.telemetry, other])))
    assert [line.get_linestyle() for line in figure.axes[3].lines] == ["-", "--"]
    assert words(figure).endswith("GPU 1\nGPU 2")


def test_of_many_routes_some_are_left_out_and_it_says_so() -> None:
    routes = [f"sel=sdpa,win={letter}" for letter in "abcdefghijklmn"]
    figure = drawn(make_run(routes=routes, S=(1024,)))
    labels = {str(line.get_label()) for line in figure.axes[0].lines}
    assert set(routes[:MOST_ARMS]) <= labels
    assert not set(routes[MOST_ARMS:]) & labels
    assert "left out: 2 of 14 routes (sel=sdpa,win=m; sel=sdpa,win=n)" in words(figure)


def test_only_what_is_asked_for_is_drawn() -> None:
    figure = drawn(make_run(), keep=lambda cells: cells["route"] == "gather")
    assert "sdpa" not in {line.get_label() for line in figure.axes[0].lines}
    assert telemetry_figure(make_run(), keep=lambda cells: cells["S"] == 7) is None


def test_a_run_without_samples_has_no_such_figure(tmp_path: Path) -> None:
    run = make_run()
    bare = replace(run, samples=run.samples[:0])
    assert telemetry_figure(bare) is None
    assert "telemetry.png" not in [file.name for file in plot_run(bare, tmp_path, ["png"])]


def test_runs_drawn_together_have_no_common_clock(tmp_path: Path) -> None:
    other = make_run(run_id="20250103T030405Z-decode-feedbee")
    names = [file.name for file in plot_run([make_run(), other], tmp_path, ["svg"])]
    assert "telemetry.svg" not in names


def test_many_samples_are_drawn_as_pixels(tmp_path: Path) -> None:
    run = make_run(S=range(1024, 1024 * 60, 1024), rounds=15)
    assert len(run.samples) > 3000
    file = next(f for f in plot_run(run, tmp_path, ["svg"]) if f.name == "telemetry.svg")
    assert file.stat().st_size < 500_000
