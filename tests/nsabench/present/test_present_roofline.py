"""Rooflines by hand, what the figures hold, and the tables of a profiled cell."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from nsabench.present.frame import cell_rows
from nsabench.present.panels import make_panels
from nsabench.present.plots import plot_run
from nsabench.present.profile_tables import (
    declared_table,
    kernel_objects,
    kernel_table,
    stage_objects,
    stage_table,
)
from nsabench.present.roofline import (
    Roofs,
    Source,
    Spot,
    roofline_figure,
    sources_of,
    spot_of,
    stage_spots,
)
from nsabench.present.style import figure_style, route_styles
from nsabench.store import Run, StoreError
from nsabench.store.profile import load_profile, save_profile

MakeRun = Callable[..., Run]

PEAKS = {"copy_gbps": 50.0, "matmul_tflops": {"fp32": 0.1, "bf16": 0.02, "fp64": 0.05}}
ROOFS = Roofs(50.0, 0.1, "fp32")
WORK = {"flops": 4_000_000, "bytes": 20_000}
STAGES = {"sel": {"flops": 3_000_000, "bytes": 10_000}, "gate": {"flops": 0, "bytes": 10_000}}


def profile_of(run: Run, **changes: Any) -> dict[str, Any]:
    told = {
        "cell_id": run.cells["cell_id"][0],
        "failed": "",
        "step_ms": 10.0,
        "idle_ms": 1.0,
        "note": "",
        "stages": STAGES,
        "files": {"trace": "trace.json.gz", "memory": "memory.json"},
    }
    return told | changes


def with_work(run: Run, **info: Any) -> Run:
    cells = run.cells.assign(flops=WORK["flops"], bytes=WORK["bytes"])
    return dataclasses.replace(run, info={**run.info, **info}, cells=cells)


def drawn(run: Run, sources: dict[str, Source]) -> Figure | None:
    (panel,), _ = make_panels([run])
    with figure_style():
        return roofline_figure(panel, route_styles(s.arm for s in panel.series), sources)


def test_a_spot_by_hand() -> None:
    spot = Spot("sel", flops=6e9, bytes=3e8, ms=2.0)
    assert (spot.intensity, spot.tflops, spot.gbps) == (20.0, 3.0, 150.0)


def test_under_the_ridge_memory_is_the_roof_and_above_it_the_product() -> None:
    # The ridge lies at 100 GFLOP/s over 50 GB/s: 2 FLOPs a byte.
    assert ROOFS.tflops_at(1.0) == pytest.approx(0.05)
    assert ROOFS.tflops_at(2.0) == pytest.approx(0.1)
    assert ROOFS.tflops_at(200.0) == 0.1
    assert Roofs(50.0, None, "fp32").tflops_at(200.0) == pytest.approx(10.0)


def test_sixteen_bits_may_be_computed_in_fp32(make_run: MakeRun) -> None:
    (row,) = cell_rows(make_run(S=[1024], routes=["auto"]).cells)
    source = Source({"cpu": PEAKS})
    assert source.roofs(row) == ROOFS
    assert source.roofs({**row, "dtype": "bf16"}) == Roofs(50.0, 0.1, "bf16")
    assert source.roofs({**row, "dtype": "fp16"}) == Roofs(50.0, 0.1, "fp16")
    assert source.roofs({**row, "dtype": "fp64"}) == Roofs(50.0, 0.05, "fp64")
    assert source.roofs({**row, "device": "cuda"}) is None


def test_a_sweep_without_peaks_has_no_roofline(make_run: MakeRun) -> None:
    run = with_work(make_run())
    assert drawn(run, sources_of([run])) is None
    known = with_work(make_run(), peaks={"cpu": PEAKS})
    assert drawn(known, sources_of([known])) is not None
    assert drawn(make_run(), {run.run_id: Source({"cpu": PEAKS})}) is None  # no work was counted


def test_the_steps_of_a_sweep_stand_where_they_reached(make_run: MakeRun) -> None:
    run = with_work(make_run(), peaks={"cpu": PEAKS})
    figure = drawn(run, sources_of([run]))
    assert figure is not None
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("counted FLOP per byte", "GFLOP/s")
    (line,) = [line for line in axes.lines if line.get_label() == "sdpa"]
    times = [row["ms_total"] for row in cell_rows(run.cells) if row["route"] == "sdpa"]
    assert list(line.get_xdata()) == [200.0] * 3  # type: ignore[arg-type]
    assert list(line.get_ydata()) == pytest.approx([4e6 / ms * 1e-6 for ms in times])
    words = [text.get_text() for text in axes.texts]
    assert "memory, 50.0 GB/s copied" in words
    assert "matrix product, fp32, 100 GFLOP/s" in words
    assert {"S=1k", "S=4k"} <= set(words)
    memory, matrix = axes.lines[:2]
    assert list(matrix.get_ydata()) == [100.0, 100.0]
    assert [y / x for x, y in zip(memory.get_xdata(), memory.get_ydata(), strict=True)] == pytest.approx(  # type: ignore[arg-type]
        [50.0, 50.0]
    )


def test_a_profiled_cell_shows_its_stages_with_and_without_roofs(make_run: MakeRun) -> None:
    for peaks in ({}, {"cpu": PEAKS}):
        run = with_work(make_run(S=[1024], routes=["auto"]))
        figure = drawn(run, {run.run_id: Source(peaks, profile_of(run))})
        assert figure is not None
        (axes,) = figure.axes
        (row,) = cell_rows(run.cells)
        places = {str(line.get_label()).partition(",")[0]: line.get_xydata()[0] for line in axes.lines}  # type: ignore[index]
        assert places["sel"] == pytest.approx((300.0, 3e6 / row["ms_sel"] * 1e-6))
        assert places["whole step"] == pytest.approx((200.0, 4e6 / row["ms_total"] * 1e-6))
        assert "gate" not in places
        head = " ".join(text.get_text() for text in figure.texts)
        assert f"gate {row['ms_gate']:.3}" in head
        assert ("so there are no roofs: nsabench doctor --calibrate" in head) == (not peaks)
        assert any("memory" in text.get_text() for text in axes.texts) == bool(peaks)


def test_a_step_without_shares_says_why(make_run: MakeRun) -> None:
    (row,) = cell_rows(with_work(make_run(S=[1024], routes=["auto"])).cells)
    none = {name: None for name in row if name.startswith("ms_") and name != "ms_total"}
    spots, note = stage_spots({**row, **none, "shares_note": "too short"}, {"stages": STAGES})
    assert (spots, note) == ([], "no stages: too short")


def test_a_failed_or_uncounted_row_has_no_spot(make_run: MakeRun) -> None:
    (row,) = cell_rows(make_run(S=[1024], routes=["auto"]).cells)
    assert spot_of(row) is None
    assert spot_of({**row, **WORK, "status": "wrong"}) is None
    assert spot_of({**row, **WORK}) == Spot("whole step", 4e6, 2e4, row["ms_total"])


def test_the_file_is_drawn_from_what_is_stored(make_run: MakeRun, tmp_path: Path) -> None:
    run = with_work(make_run(S=[1024], routes=["auto"]))
    run = dataclasses.replace(run, path=tmp_path)
    save_profile(tmp_path, profile_of(run))
    names = {path.name for path in plot_run(run, tmp_path / "plots", ["png"])}
    assert "decode-roofline.png" in names
    (tmp_path / "profile.json").write_text("{")
    with pytest.raises(StoreError, match=r"profile.json is damaged: profile the cell anew"):
        load_profile(tmp_path)


KERNELS = [
    {"kernel": "short", "branch": "sel", "calls": 2.0, "ms": 1.5},
    {"kernel": "k" * 70, "branch": "cmp", "calls": 0.25, "ms": 6.0},
    {"kernel": "tiny", "branch": "other", "calls": 1.0, "ms": 0.5},
    {"kernel": "small", "branch": "gate", "calls": 1.0, "ms": 1.0},
]


def printed(parts: list[Any]) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=100)
    for part in parts:
        console.print(part)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_kernels_by_time_the_others_summed_and_idle_time_shown(make_run: MakeRun) -> None:
    profile = profile_of(make_run(S=[1024], routes=["auto"]))
    lines = printed(kernel_table(KERNELS, profile, top=2))
    assert lines[0] == "kernels of a profiled step of 10.0 ms"
    body = [line.split() for line in lines[3:]]
    assert body[0] == ["cmp", "k" * 21 + "…" + "k" * 21, "0.25", "6.00", "60.0"]
    assert body[1] == ["sel", "short", "2", "1.50", "15.0"]
    assert body[2] == ["(2", "more)", "2", "1.50", "15.0"]
    assert body[3] == ["(nothing", "runs)", "1.00", "10.0"]
    assert body[4] == ["together", "4.25", "10.0", "100.0"]


def test_kernels_without_stages_say_why(make_run: MakeRun) -> None:
    profile = profile_of(make_run(S=[1024], routes=["auto"]), note="kernels overlap", idle_ms=0.0)
    lines = printed(kernel_table([{**one, "branch": ""} for one in KERNELS], profile, top=9))
    assert lines[-1] == "no stages: kernels overlap"
    assert lines[3].split()[0] == "-"
    assert not any("nothing runs" in line or "more)" in line for line in lines)


# 2 GFLOP, 100 MB from L2 and 10 MB of memory; lists, without a product; in two stages.
WORK_OF_KERNELS = [
    {"branch": "sel", "kernel": "union", "flops": 2e9, "l2_bytes": 1e8, "dram_bytes": 1e7},
    {"branch": "sel", "kernel": "mark", "flops": 0.0, "l2_bytes": 2e6, "dram_bytes": 4e6},
    {"branch": "cmp", "kernel": "both", "flops": 1e9, "l2_bytes": 1e6, "dram_bytes": 1e6},
    {"branch": "win", "kernel": "both", "flops": 3e9, "l2_bytes": 1e6, "dram_bytes": 1e6},
]


def test_kernels_that_declare_their_work_show_what_they_reached(make_run: MakeRun) -> None:
    profile = profile_of(make_run(S=[1024], routes=["auto"]), kernels=WORK_OF_KERNELS)
    rows = [("union", "sel", 4.0), ("mark", "sel", 0.4), ("both", "win", 3.0), ("copy", "other", 1.0)]
    kernels = [{"kernel": name, "branch": stage, "calls": 1.0, "ms": ms} for name, stage, ms in rows]
    roofs = Roofs(50.0, 1.0, "fp32")
    lines = printed(declared_table(kernels, profile, roofs))
    assert lines[0] == "what kernels reached, by the work that they declare"
    assert [line.split() for line in lines[3:]] == [
        ["sel", "union", "4.00", "0.500", "25.0", "2.50", "50.0", "matrix"],
        ["win", "both", "3.00", "1.00", "0.333", "0.333", "100", "matrix"],
        ["sel", "mark", "0.400", "0", "5.00", "10.0", "20.0", "memory"],
    ]
    without = printed(declared_table(kernels, profile, None))
    assert without[3].split() == ["sel", "union", "4.00", "0.500", "25.0", "2.50"]
    objects = {one["kernel"]: one for one in kernel_objects(kernels, profile, roofs)}
    assert (objects["mark"]["dram_bytes"], objects["copy"]["dram_bytes"]) == (4e6, None)
    assert objects["copy"]["pct_of_roof"] is None
    # Where stages cannot be told, a kernel's row is of all of them.
    (both,) = kernel_objects([{"kernel": "both", "branch": "", "calls": 2.0, "ms": 4.0}], profile)
    assert (both["flops"], both["tflops"], both["pct_of_roof"]) == (4e9, 1.0, None)


def test_without_declared_work_there_is_no_such_table(make_run: MakeRun) -> None:
    run = make_run(S=[1024], routes=["auto"])
    for profile in (profile_of(run), profile_of(run, kernels=[])):
        assert declared_table(KERNELS, profile, ROOFS) == []


def test_each_stage_and_the_part_of_its_roof(make_run: MakeRun) -> None:
    (row,) = cell_rows(with_work(make_run(S=[1024], routes=["auto"])).cells)
    row |= {"ms_total": 0.1, "ms_sel": 0.06}
    profile = profile_of(make_run(S=[1024], routes=["auto"]))
    whole, sel = stage_objects(row, profile, ROOFS)
    assert whole["stage"] == "whole step"
    assert (whole["tflops"], whole["gbps"]) == (pytest.approx(0.04), pytest.approx(0.2))
    assert whole["pct_of_roof"] == pytest.approx(40.0)
    assert (sel["flop_per_byte"], sel["pct_of_roof"], sel["roof"]) == (300.0, pytest.approx(50.0), "matrix")
    low = Roofs(0.1, 0.1, "fp32")  # 200 FLOPs a byte reach 0.02 TFLOP/s
    assert stage_objects(row, profile, low)[0]["pct_of_roof"] == pytest.approx(200.0)
    assert stage_objects(row, profile, low)[0]["roof"] == "memory"
    lines = printed(stage_table(row, profile, None))
    assert "roof" not in lines[1]
    assert lines[-1] == "peaks of cpu are not measured, so there are no roofs: nsabench doctor --calibrate"
    assert "% of roof" in printed(stage_table(row, profile, ROOFS))[1]
