"""What the figures hold: the artists' data, the words around them, the files."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from nsabench.present.figures import (
    dense_cache_bytes,
    memory_figure,
    shares_figure,
    speed_figure,
    time_figure,
)
from nsabench.present.frame import PresentError, cell_rows
from nsabench.present.pairing import compare
from nsabench.present.panels import Panel
from nsabench.present.panels import make_panels as panels_and_notes
from nsabench.present.plots import plot_run
from nsabench.present.style import STAGE_COLOURS, figure_style, route_styles
from nsabench.store import Run, RunDir, load_run
from nsabench.store.schema import STAGES

MakeRun = Callable[..., Run]

ROOT = Path(__file__).resolve().parents[3]
ROUTES = ("sdpa", "gather", "auto")
SIZES = (512, 1024, 2048, 65536)


def make_panels(runs: list[Run]) -> list[Panel]:
    return panels_and_notes(runs)[0]


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with figure_style():
        yield


def draw(figure: Callable[..., Figure | None], run: Run | list[Run]) -> tuple[Figure, Panel]:
    (panel,) = make_panels(run if isinstance(run, list) else [run])
    drawn = figure(panel, route_styles(s.arm for s in panel.series))
    assert drawn is not None
    return drawn, panel


def bars_of(axes: Axes) -> dict[str, ErrorbarContainer]:
    return {str(c.get_label()): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def values_of(bar: ErrorbarContainer) -> dict[float, float]:
    line = bar.lines[0]
    assert line is not None
    return dict(zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True))


def intervals_of(bar: ErrorbarContainer) -> dict[float, tuple[float, float]]:
    (segments,) = bar.lines[2]
    ends = [np.asarray(s) for s in segments.get_segments()]
    return {s[0, 0]: (s[0, 1], s[1, 1]) for s in ends if len(s) and not np.isnan(s).any()}


def texts_of(figure: Figure) -> str:
    figure.draw_without_rendering()
    labels = [t for axes in figure.axes for t in [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]]
    legend = [t.get_text() for drawn in figure.legends for t in drawn.get_texts()]
    return "\n".join([t.get_text() for t in figure.texts] + labels + legend)


def column(run: Run, route: str, name: str) -> dict[int, Any]:
    rows = run.cells[run.cells["route"] == route]
    return dict(zip(rows["S"], rows[name], strict=True))


def test_time_lines_and_intervals_are_the_stored_ones(make_run: MakeRun) -> None:
    run = make_run(S=SIZES, routes=ROUTES)
    figure, _ = draw(time_figure, run)
    bars = bars_of(figure.axes[0])
    assert list(bars) == list(ROUTES)
    for route, bar in bars.items():
        assert values_of(bar) == pytest.approx(column(run, route, "ms_total"))
        lo, hi = column(run, route, "ms_lo"), column(run, route, "ms_hi")
        for size, ends in intervals_of(bar).items():
            assert ends == pytest.approx((lo[int(size)], hi[int(size)]))
        assert len(intervals_of(bar)) == len(SIZES)
    assert figure.axes[0].get_ylabel() == "time of one step, ms"


def test_short_times_are_in_microseconds(make_run: MakeRun) -> None:
    run = make_run(routes=("auto",), gpu=True)
    figure, _ = draw(time_figure, run)
    in_us = {s: ms * 1000 for s, ms in column(run, "auto", "ms_total").items()}
    assert values_of(bars_of(figure.axes[0])["auto"]) == pytest.approx(in_us)
    assert figure.axes[0].get_ylabel() == "time of one step, µs"


def test_too_few_rounds_draw_no_interval(make_run: MakeRun) -> None:
    figure, _ = draw(time_figure, make_run(rounds=3))
    for bar in bars_of(figure.axes[0]).values():
        assert not bar.has_yerr
        assert not any(math.isnan(v) for v in values_of(bar).values())


def test_some_intervals_missing(make_run: MakeRun) -> None:
    run = make_run(routes=("auto",), changes={("auto", 2048): {"ms_lo": None, "ms_hi": None}})
    figure, _ = draw(time_figure, run)
    assert sorted(intervals_of(bars_of(figure.axes[0])["auto"])) == [1024, 4096]


def test_a_failed_cell_breaks_the_line_and_is_named(make_run: MakeRun) -> None:
    failed = {("gather", 1024): ("oom", "x"), ("gather", 65536): ("timeout", "x")}
    failed |= {("auto", s): ("unsupported", "x") for s in SIZES}
    figure, _ = draw(time_figure, make_run(S=SIZES, routes=ROUTES, failed=failed))
    axes = figure.axes[0]
    bars = bars_of(axes)
    assert list(bars) == ["sdpa", "gather"]
    assert [math.isnan(v) for v in values_of(bars["gather"]).values()] == [False, True, False, True]
    crosses = {str(line.get_label()): line for line in axes.lines if line.get_marker() == "x"}
    places = {label: list(np.asarray(line.get_xdata())) for label, line in crosses.items()}
    assert places == {
        "gather: oom at 1k": [1024],
        "gather: timeout at 64k": [65536],
        "auto: unsupported at 4 sizes, 512 to 64k": list(SIZES),
    }
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["sdpa", "gather", *crosses]
    low = min(np.asarray(line.get_ydata())[0] for line in crosses.values())
    figure.draw_without_rendering()
    top = axes.transAxes.inverted().transform(
        axes.transData.transform((65536, max(values_of(bars["sdpa"]).values())))
    )
    assert top[1] < low, "crosses stand above every value"


def test_ticks_are_the_sizes(make_run: MakeRun) -> None:
    figure, _ = draw(time_figure, make_run(S=[512 * 2**i for i in range(8)]))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert labels == ["512", "1k", "2k", "4k", "8k", "16k", "32k", "64k"]


def test_crowded_sizes_keep_the_round_ones(make_run: MakeRun) -> None:
    figure, _ = draw(time_figure, make_run(S=[1024 * i for i in range(1, 17)]))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert {"1k", "2k", "4k", "8k", "16k"} <= set(labels)
    boxes = [t.get_window_extent() for t in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_titles_say_what_was_measured_where(make_run: MakeRun) -> None:
    run = make_run(gpu=True, phase="prefill", passes=("fwd_bwd",), B=(2,), dirty=True)
    for make in (time_figure, shares_figure, memory_figure, speed_figure):
        figure, _ = draw(make, run)
        text = texts_of(figure)
        for part in (
            *(
                "Prefill fwd + bwd",
                "B=2",
                "heads=64",
                "groups=4",
                "dk=192",
                "dv=128",
                "l=32",
                "d=16",
                "l'=64",
            ),
            *("n=16", "w=512", "bf16", "cuda (NVIDIA H200)", "1a2b3c4-dirty", "graph timer", "latency"),
            *("warm cache", "selection=natural", "seed=7", "S, tokens"),
        ):
            assert part in text
        assert "/tmp" not in text
        assert run.run_id not in text


def test_unknown_machine_and_commit(make_run: MakeRun) -> None:
    run = make_run(device="cuda:3", commit="")
    run.info["environment"] = {"cpu": None, "gpus": []}
    figure, _ = draw(time_figure, run)
    assert "cuda:3, commit unknown" in texts_of(figure)


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "Intel Xeon Platinum 8488C"),
        ("AMD EPYC 7B13 64-Core Processor", "AMD EPYC 7B13"),
        (None, "cpu"),
    ],
)
def test_names_of_cpus(make_run: MakeRun, model: str | None, shown: str) -> None:
    run = make_run()
    run.info["environment"]["cpu"] = {"model": model}
    figure, _ = draw(time_figure, run)
    assert f"cpu ({shown}), commit" in texts_of(figure) or f"{shown}, commit" in texts_of(figure)


def test_stacked_bars_total_100(make_run: MakeRun) -> None:
    missing = {f"share_{s}_pct": None for s in STAGES} | {"shares_note": "kernels could not be mapped"}
    run = make_run(S=SIZES, failed={("gather", 1024): ("oom", "x")}, changes={("sdpa", 512): missing})
    figure, panel = draw(shares_figure, run)
    assert [axes.get_title() for axes in figure.axes] == ["sdpa", "gather"]
    for axes, series in zip(figure.axes, panel.series, strict=True):
        rows = {i: c.row for i, c in enumerate(series.cells)}
        found: dict[int, dict[str, tuple[float, float]]] = {}
        for boxes in axes.collections:
            stage = str(boxes.get_label())
            for box in boxes.get_paths():
                (left, bottom), (right, top) = box.get_extents().get_points()
                found.setdefault(round((left + right) / 2), {})[stage] = (bottom, top - bottom)
            assert to_hex(boxes.get_facecolor()).upper() == STAGE_COLOURS[stage]
        assert sorted(found) == ([1, 2, 3] if series.arm == "sdpa" else [0, 2, 3])
        for place, stages in found.items():
            assert list(stages) == list(STAGES)
            assert sum(height for _, height in stages.values()) == pytest.approx(100, abs=1e-9)
            for stage, (bottom, height) in stages.items():
                assert height == pytest.approx(rows[place][f"share_{stage}_pct"])
                below = STAGES[: STAGES.index(stage)]
                assert bottom == pytest.approx(sum(stages[s][1] for s in below))
    words = [{t.get_text() for t in axes.texts} for axes in figure.axes]
    assert "no shares" in words[0]
    assert "oom" in words[1]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(STAGES)


def test_no_shares_no_figure(make_run: MakeRun) -> None:
    missing = {f"share_{s}_pct": None for s in STAGES}
    run = make_run(routes=("auto",), changes={("auto", s): missing for s in (1024, 2048, 4096)})
    (panel,) = make_panels([run])
    assert shares_figure(panel, route_styles(["auto"])) is None


def test_memory_has_peaks_cache_and_dense_line(make_run: MakeRun) -> None:
    run = make_run(S=SIZES, routes=("sdpa", "auto"), changes={("sdpa", 512): {"peak_alloc_bytes": None}})
    figure, _ = draw(memory_figure, run)
    bars = {label: values_of(bar) for label, bar in bars_of(figure.axes[0]).items()}
    assert list(bars) == ["sdpa", "auto", "KV cache", "KV cache of dense attention, computed"]
    assert bars["auto"] == column(run, "auto", "peak_alloc_bytes")
    assert math.isnan(bars["sdpa"][512])
    assert bars["KV cache"] == column(run, "auto", "kv_cache_bytes")
    assert list(bars.values())[-1] == {
        s: s * 2 * (32 + 32) * 4 for s in SIZES
    }  # S x groups x (dk + dv) x fp32
    figure.draw_without_rendering()
    assert all(t.get_text().endswith("iB") for t in figure.axes[0].get_yticklabels())


def test_dense_cache_of_the_paper(make_run: MakeRun) -> None:
    (row,) = cell_rows(make_run(S=(65536,), B=(2,), routes=("auto",), gpu=True).cells)
    assert dense_cache_bytes(row) == 2 * 65536 * 4 * (192 + 128) * 2


def test_no_memory_known_no_figure(make_run: MakeRun) -> None:
    run = make_run(
        phase="prefill", routes=("auto",), S=(1024,), changes={("auto", 1024): {"peak_alloc_bytes": None}}
    )
    (panel,) = make_panels([run])
    assert memory_figure(panel, route_styles(["auto"])) is None


def test_speed_is_the_paired_ratio(make_run: MakeRun) -> None:
    run = make_run(S=SIZES, routes=ROUTES)
    figure, _ = draw(speed_figure, run)
    axes = figure.axes[0]
    bars = bars_of(axes)
    assert list(bars) == ["gather", "auto"]
    for cell in compare(cell_rows(run.cells), run.samples):
        if cell.speed is not None:
            bar, size = bars[cell.row["route"]], cell.row["S"]
            assert values_of(bar)[size] == cell.speed.point
            assert intervals_of(bar)[size] == pytest.approx((cell.speed.lo, cell.speed.hi))
    assert axes.get_ylabel() == "speed, sdpa = 1"
    assert [line for line in axes.lines if list(np.asarray(line.get_ydata())) == [1.0, 1.0]]


@pytest.mark.parametrize(
    "shape",
    [{"routes": ("auto",)}, {"failed": {("sdpa", s): ("oom", "x") for s in (1024, 2048, 4096)}}],
)
def test_no_baseline_no_speed_figure(make_run: MakeRun, shape: dict[str, Any]) -> None:
    (panel,) = make_panels([make_run(**shape)])
    assert speed_figure(panel, route_styles(s.arm for s in panel.series)) is None


def test_a_single_size_has_a_row_per_route(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), routes=ROUTES, failed={("auto", 1024): ("oom", "x")})
    figure, _ = draw(time_figure, run)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == list(ROUTES)
    for place, route in enumerate(ROUTES[:2]):
        row = run.cells[run.cells["route"] == route].iloc[0]
        bar = bars_of(axes)[route]
        assert values_of(bar) == {row["ms_total"]: place}
        (segments,) = bar.lines[2]
        assert np.asarray(segments.get_segments()[0])[:, 0] == pytest.approx([row["ms_lo"], row["ms_hi"]])
    assert "auto" not in bars_of(axes)
    assert axes.texts[2].get_text() == "oom"
    assert axes.texts[0].get_text() == (
        f"{run.cells['ms_total'][0]:.2f} ({run.cells['ms_lo'][0]:.2f}-{run.cells['ms_hi'][0]:.2f})"
    )
    assert "S=1024" in texts_of(figure)
    for make in (shares_figure, memory_figure, speed_figure):
        draw(make, run)


def test_a_route_has_one_colour_everywhere(make_run: MakeRun) -> None:
    one = route_styles(["gather", "cmp=fa2,sel=triton", "auto"])
    other = route_styles(["auto", "sdpa", "cmp=fa2,sel=triton"])
    assert one["auto"] == other["auto"]
    assert one["cmp=fa2,sel=triton"] == other["cmp=fa2,sel=triton"]
    mixed = ["cmp=fa2,sel=triton", "win=sdpa"]
    assert route_styles(mixed) == route_styles(mixed[::-1])
    run = make_run(routes=ROUTES)
    for make in (time_figure, speed_figure, memory_figure):
        figure, _ = draw(make, run)
        for route, bar in bars_of(figure.axes[0]).items():
            if route in ROUTES:
                assert to_hex(bar.lines[0].get_color()).upper() == route_styles([route])[route].color


def test_routes_of_a_figure_differ_in_colour() -> None:
    routes = ["auto", "sdpa", "gather", "triton", "fa2", "flex", "reference"]
    routes += [f"cmp=sdpa,sel={name}" for name in "abcdefg"]
    styles = route_styles(routes)
    assert len({style.color for style in styles.values()}) == len(routes)
    assert len(route_styles([*routes, "one", "two"])) == len(routes) + 2


def test_runs_that_share_a_figure_differ_by_dashes(make_run: MakeRun) -> None:
    first = make_run()
    second = make_run(commit="ffe3b3c4" * 5, dirty=True, speed=0.5, run_id="second")
    figure, _ = draw(time_figure, [first, second])
    bars = bars_of(figure.axes[0])
    assert list(bars) == [
        *("sdpa @ 1a2b3c4", "sdpa @ ffe3b3c-dirty", "gather @ 1a2b3c4", "gather @ ffe3b3c-dirty")
    ]
    before, after = bars["sdpa @ 1a2b3c4"], bars["sdpa @ ffe3b3c-dirty"]
    assert before.lines[0].get_color() == after.lines[0].get_color()
    assert before.lines[0].get_linestyle() != after.lines[0].get_linestyle()
    assert values_of(after) == pytest.approx(column(second, "sdpa", "ms_total"))
    assert "commit 1a2b3c4, ffe3b3c-dirty" in texts_of(figure)


def test_runs_of_one_commit_are_told_apart_by_id(make_run: MakeRun) -> None:
    figure, _ = draw(time_figure, [make_run(routes=("auto",)), make_run(routes=("auto",), run_id="second")])
    assert list(bars_of(figure.axes[0])) == ["auto @ 20250102T030405Z-decode-1a2b3c4", "auto @ second"]


def test_implementations_share_a_figure_under_their_names(make_run: MakeRun) -> None:
    run = make_run(routes=("auto", "sdpa"), baselines=("dense",))
    figure, _ = draw(time_figure, run)
    assert list(bars_of(figure.axes[0])) == ["auto", "sdpa", "dense"]


def test_module_and_core_are_different_figures(make_run: MakeRun) -> None:
    module, core = make_panels([make_run(), make_run(scope="core")])
    assert (module.name, core.name) == ("decode", "decode-core")
    assert (module.title, core.title) == ("Decode fwd", "Decode fwd core")
    assert "module" in module.subtitle[0]
    assert "core" in core.subtitle[0]


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_files(make_run: MakeRun, tmp_path: Path) -> None:
    written = plot_run(make_run(), tmp_path / "new" / "folder")
    assert names(written) == [
        f"{what}.{suffix}"
        for what in ("decode-time", "decode-shares", "decode-memory", "decode-speed", "telemetry")
        for suffix in ("png", "svg")
    ]
    assert all(path.is_file() for path in written)
    image = imread(written[0])
    assert image.shape[1] == 1200
    assert np.all(image[0, 0] == 1)
    assert np.all(image[-1, -1] == 1)


def test_file_names_tell_shapes_apart(make_run: MakeRun, tmp_path: Path) -> None:
    def time_names(*runs: Run) -> list[str]:
        return [panel.name for panel in make_panels(list(runs))]

    prefill = {"phase": "prefill", "routes": ("auto",), "S": (1024,)}
    assert time_names(make_run(**prefill, passes=("fwd", "fwd_bwd"), B=(1, 4))) == [
        *("prefill", "prefill-fwd_bwd", "prefill-b4", "prefill-fwd_bwd-b4")
    ]
    assert time_names(make_run(**prefill, mode="chunked=256")) == ["prefill-chunked-256"]
    assert time_names(make_run(), make_run(gpu=True)) == ["decode-cpu", "decode-cuda"]
    assert time_names(make_run(), make_run(**prefill)) == ["decode", "prefill"]
    assert time_names(make_run(w=256), make_run(w=512)) == ["decode-w256", "decode-w512"]
    elsewhere = make_run()
    elsewhere.info["environment"]["cpu"] = {"model": "Another (C) CPU"}
    assert time_names(make_run(), elsewhere) == ["decode-amd-epyc-7b13", "decode-another-c"]
    warm = make_run(run_id="warm")
    warm.cells["cache"] = "warm"
    assert time_names(make_run(), warm) == ["decode-cold", "decode-warm"]


def test_cold_and_warm_never_share_a_figure(make_run: MakeRun) -> None:
    run = make_run(S=SIZES, failed={("sdpa", 65536): ("oom", "x")})
    run.cells.loc[run.cells["S"] == 512, "cache"] = "warm"
    warm, cold = make_panels([run])
    assert warm.sizes == [512, 65536]
    assert cold.sizes == [1024, 2048, 65536]


def test_the_route_asked_for_first_is_the_baseline(make_run: MakeRun) -> None:
    run = make_run()
    late = Run(
        info=run.info,
        cells=run.cells.iloc[::-1],
        samples=run.samples,
        telemetry=run.telemetry,
        kernels=run.kernels,
        path=run.path,
    )
    figure, panel = draw(speed_figure, late)
    assert list(bars_of(figure.axes[0])) == ["gather"]
    assert [s.arm for s in panel.series] == ["sdpa", "gather"]


def test_nothing_to_plot_is_said(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    every = {(route, s): ("oom", "x") for route in ("sdpa", "gather") for s in (1024, 2048, 4096)}
    every["gather", 4096] = ("unsupported", "x")
    run = make_run(failed=every)
    with pytest.raises(
        PresentError, match=r"1a2b3c4: no cell is ok \(5 oom, 1 unsupported\), so there is nothing"
    ):
        plot_run(run, out)
    with pytest.raises(PresentError, match="no cell is finished"):
        plot_run(_emptied(run), out)
    with pytest.raises(PresentError, match="there is no run to plot"):
        plot_run([], out)
    for formats in (("gif",), ("png", "pdf"), ()):
        with pytest.raises(PresentError, match="allowed: png, svg"):
            plot_run(make_run(), out, formats)
    assert not out.exists()


def _emptied(run: Run) -> Run:
    return Run(
        info=run.info,
        cells=run.cells.iloc[:0],
        samples=run.samples.iloc[:0],
        telemetry=run.telemetry,
        kernels=run.kernels,
        path=run.path,
    )


def test_shapes_without_an_ok_cell_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    broken = make_run(phase="prefill", S=(1024,), routes=("auto",), failed={("auto", 1024): ("oom", "x")})
    written = plot_run([make_run(routes=("auto",)), broken], tmp_path, ["svg"])
    assert names(written) == ["decode-time.svg", "decode-shares.svg", "decode-memory.svg"]


def test_a_folder_that_cannot_be_written_is_one_line(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PresentError, match="cannot write") as caught:
        plot_run(make_run(), tmp_path / "file" / "plots")
    assert "\n" not in str(caught.value)


def test_users_own_settings_change_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    import matplotlib

    run = make_run(S=(512, 1024))
    plain = plot_run(run, tmp_path / "a", ["svg"])
    with matplotlib.rc_context({"axes.linewidth": 9, "xtick.color": "red", "font.size": 30}):
        changed = plot_run(run, tmp_path / "b", ["svg"])
        assert matplotlib.rcParams["font.size"] == 30
    assert [p.read_bytes() for p in plain] == [p.read_bytes() for p in changed]


_PLOT = """
import sys
from pathlib import Path
from nsabench.present import live, plots, tables
from nsabench.store import load_run
run = load_run(sys.argv[1])
plots.plot_run(run, Path(sys.argv[2]))
tables.cells_json(run.cells, run.samples)
assert "torch" not in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""


def test_from_stored_files_alone_the_same_bytes_anywhere(make_run: MakeRun, tmp_path: Path) -> None:
    """In another process: no display, no torch, no cache folder, another hash seed, warnings as errors."""
    made = make_run(S=(512, 1024), failed={("gather", 512): ("oom", "x")})
    info = {"argv": ["nsabench"], "repro": "nsabench", "policy": {}, "seed": 7}
    with RunDir.create(
        tmp_path / "results",
        name="decode",
        plan=made.info["plan"],
        environment=made.info["environment"],
        **info,
    ) as store:
        for row in cell_rows(made.cells):
            mine = made.samples[made.samples["cell_id"] == row["cell_id"]]
            samples = mine.drop(columns="run_id").to_dict("records")
            store.append(row | {"run_id": ""}, samples)
    here = plot_run(load_run(store.path), tmp_path / "here")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    }
    environment |= {"PYTHONHASHSEED": "123", "MPLCONFIGDIR": str(tmp_path / "results" / "none")}
    (tmp_path / "results" / "none").write_text("a file where matplotlib would like a folder")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _PLOT, str(store.path), str(tmp_path / "there")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(here) == 10
    for path in here:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name
