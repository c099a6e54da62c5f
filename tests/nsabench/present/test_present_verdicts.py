"""Verdicts from stored files: what is said of each side, and what is not."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from nsabench.present.forest import MOST_ROWS, forest_figure
from nsabench.present.frame import PresentError
from nsabench.present.plots import plot_comparison, plot_run
from nsabench.present.verdict_table import verdict_objects, verdict_table
from nsabench.present.verdicts import closing, findings_between, findings_of, percent_text, ratio_digits
from nsabench.stats import correct, judge, paired_ratio, unpaired_ratio
from nsabench.store import Run
from tests.nsabench.present.conftest import make_run
from tests.nsabench.present.contests import make_contest

ROOT = Path(__file__).resolve().parents[3]


def printed(comparison: Any, width: int = 140) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(verdict_table(comparison, width))
    return out.getvalue()


def times_of(run: Run, place: int) -> np.ndarray:
    mine = run.samples[run.samples["cell_id"] == run.cells["cell_id"][place]]
    return np.asarray(mine.sort_values(["process", "round"])["ms"])


@pytest.mark.parametrize(
    ("time", "verdict", "said"),
    [
        (1.41, "SLOWER", "sdpa is SLOWER than auto by 41 %"),
        (0.71, "FASTER", "sdpa is FASTER than auto by 29 %"),
        (1.0, "SAME", "sdpa is the SAME as auto within 1 %"),
        (1.0095, "INCONCLUSIVE", "sdpa beside auto: INCONCLUSIVE, a difference of +0.9"),
    ],
)
def test_a_verdict_is_that_of_the_pairs_of_all_processes(time: float, verdict: str, said: str) -> None:
    run = make_contest({"auto": 1.0, "sdpa": time}, noise=0.001)
    (finding,) = findings_of(run).findings
    assert finding.verdict == verdict
    assert finding.said.startswith(said)
    auto, sdpa, again = (times_of(run, place) for place in range(3))
    processes = np.repeat(np.arange(3), 15)
    nested = {"processes": processes, "aa_processes": processes}
    assert finding.judgement == judge(auto, sdpa, aa=(auto, again), delta=0.01, **nested)
    assert finding.ratio == paired_ratio(sdpa, auto, processes=processes)
    assert (finding.shape, finding.first, finding.side) == ("S=512", "auto", "sdpa")


def test_an_arm_that_differs_from_itself_makes_all_invalid() -> None:
    comparison = findings_of(make_contest({"auto": 1.0, "sdpa": 1.4, "dense": 0.5}, again=1.05))
    assert [finding.verdict for finding in comparison.findings] == ["INVALID"] * 2
    assert "an arm timed twice differs from itself by +5" in comparison.findings[0].why
    assert "slower" not in printed(comparison)
    assert [one["verdict"] for one in verdict_objects(comparison)] == ["INVALID"] * 2


@pytest.mark.parametrize(
    ("contest", "why"),
    [
        ({"times": {"auto": 1.0, "sdpa": "wrong"}}, "sdpa is wrong: wrong in the third round"),
        ({"times": {"auto": "oom", "sdpa": 1.0}}, "auto is oom: oom in the third round"),
        ({"times": {"auto": 1.0, "sdpa": 1.0}, "again": "nan"}, "auto again is nan: nan in the third round"),
        ({"times": {"auto": 1.0, "sdpa": 1.0}, "missing": ["sdpa"]}, "sdpa was not measured"),
        (
            {"times": {"auto": 1.0, "sdpa": 1.0}, "missing": ["auto", "sdpa", "again"]},
            "auto was not measured",
        ),
    ],
)
def test_without_a_time_there_is_no_verdict(contest: dict[str, Any], why: str) -> None:
    comparison = findings_of(make_contest(**contest))
    (finding,) = comparison.findings
    assert (finding.verdict, finding.why, finding.judgement) == ("INVALID", why, None)
    assert why.split(":")[0] in " ".join(printed(comparison).split())
    (one,) = verdict_objects(comparison)
    assert one["ratio"] is None
    json.dumps(one, allow_nan=False)
    assert closing(comparison) == [f"sdpa beside auto: INVALID, {why}"]
    assert forest_figure(comparison) is None


def test_rounds_without_samples_prove_nothing() -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.4})
    (finding,) = findings_of(replace(run, samples=run.samples[:0])).findings
    assert (finding.verdict, finding.why) == ("INVALID", "no round measured both in turn")


def test_fewer_than_six_rounds_give_no_interval_and_say_so() -> None:
    comparison = findings_of(make_contest({"auto": 1.0, "sdpa": 1.4}, rounds=5, processes=1))
    (finding,) = comparison.findings
    assert (finding.verdict, finding.why) == ("INCONCLUSIVE", "5 rounds give no interval; 6 do")
    assert finding.ratio is not None
    assert finding.ratio.lo is None
    assert "1.40" in printed(comparison)
    assert verdict_objects(comparison)[0]["ratio"]["lo"] is None


def test_a_device_that_was_not_steady_is_named() -> None:
    slower = {"auto": 1.0, "sdpa": 1.4}
    assert "steady" not in findings_of(make_contest(slower, spread=0.9)).findings[0].why
    why = findings_of(make_contest(slower, spread=3.14)).findings[0].why
    assert why.endswith("; the device was not steady: fixed work varied by 3.1 %")


@pytest.mark.parametrize("method", ["holm", "bh"])
def test_many_verdicts_are_corrected_for_their_number(method: Literal["holm", "bh"]) -> None:
    noisy: dict[str, Any] = {"rounds": 6, "processes": 1, "noise": 0.02, "correct": method}
    run = make_contest({"auto": 1.0, "sdpa": 1.05}, S=range(128, 128 * 9, 128), **noisy)
    findings = findings_of(run).findings
    single = []
    for first in range(0, 24, 3):
        auto, sdpa, again = (times_of(run, first + place) for place in range(3))
        single.append(judge(auto, sdpa, aa=(auto, again)))
    assert [finding.judgement for finding in findings] == correct(single, method)
    assert [f.verdict for f in findings] == [j.verdict for j in correct(single, method)]
    assert "SLOWER" in {judgement.verdict for judgement in single}
    if method == "holm":
        assert "SLOWER" not in {finding.verdict for finding in findings}
        assert any("among 8 comparisons" in finding.why for finding in findings)


def test_what_varies_names_the_shapes() -> None:
    comparison = findings_of(make_contest({"auto": 1.0, "sdpa": 1.4}, S=(512, 2048)))
    assert [finding.shape for finding in comparison.findings] == ["S=512", "S=2k"]
    assert "fp32 cpu" in comparison.title
    assert comparison.title.endswith(": sdpa beside auto")


def test_the_closing_line_of_several_shapes_is_a_geometric_mean() -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.5, "dense": 0.5}, S=(512, 1024, 2048))
    lines = closing(findings_of(run))
    assert [line.split(":")[0] for line in lines] == ["sdpa over 3 shapes", "dense over 3 shapes"]
    value, ends = lines[0].split(": ")[1].split(" ")[:2]
    lo, hi = ends.strip("()").split("-")
    assert float(lo) < float(value) < float(hi)
    assert math.isclose(float(value), 1.5, rel_tol=0.01)
    assert lines[0].endswith("times the time of auto, geometric mean")


def test_invalid_shapes_are_in_no_mean() -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.5}, S=(512, 1024, 2048))
    bad = run.cells["S"].eq(2048) & run.cells["route"].eq("sdpa")
    run.cells.loc[bad, ["status", "reason"]] = ["wrong", "differs"]
    assert closing(findings_of(run))[0].startswith("sdpa over 2 shapes")
    bad |= run.cells["S"].eq(1024) & run.cells["route"].eq("sdpa")
    run.cells.loc[bad, ["status", "reason"]] = ["wrong", "differs"]
    assert closing(findings_of(run))[0].startswith("S=512: sdpa is SLOWER than auto by")
    run.cells.loc[run.cells["route"].eq("sdpa"), ["status", "reason"]] = ["wrong", "differs"]
    assert closing(findings_of(run)) == []


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits_and_holds_everything(width: int) -> None:
    run = make_contest({"auto": 1.0, "cmp=sdpa,sel=gather,win=sdpa": 1.41, "dense": 0.5}, S=(512, 2048))
    comparison = findings_of(run)
    text = printed(comparison, width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    finding = comparison.findings[0]
    assert finding.ratio is not None
    for part in (
        f"{finding.ratio.point:.3f}",
        f"{finding.ratio.lo:.3f}-{finding.ratio.hi:.3f}",
        "41 % slower",
        "50 % faster",
        "SLOWER",
        "auto again",
        "A/A",
        "must pass 1 %",
        "3 fresh processes of 15 rounds each",
    ):
        assert part in words, part


def test_too_wide_an_interval_is_told() -> None:
    wide = findings_of(make_contest({"auto": 1.0, "sdpa": 1.4}, noise=0.05))
    assert wide.notes[1].endswith("0.5 % was asked for; a larger --budget narrows it")
    assert len(findings_of(make_contest({"auto": 1.0, "sdpa": 1.4}, width=0.2)).notes) == 1


def test_a_run_that_is_no_comparison_is_refused() -> None:
    with pytest.raises(PresentError, match="is no comparison"):
        findings_of(make_run())
    run = make_contest({"auto": 1.0, "sdpa": 1.4})
    del run.info["comparison"]["groups"]
    with pytest.raises(PresentError, match=r"is damaged: run\.json does not say what was compared"):
        findings_of(run)


def test_runs_are_compared_cell_by_cell_and_said_to_be_unpaired() -> None:
    old = make_run(phase="prefill")
    new = make_run(
        phase="prefill", speed=1.2, run_id="20250103T030405Z-prefill-feedbee", commit="feedbee" * 5
    )
    comparison = findings_between(old, new)
    assert comparison.title.startswith("UNPAIRED: ")
    assert [f.shape for f in comparison.findings][:2] == ["S=1k sdpa", "S=1k gather"]
    assert {(f.first, f.side) for f in comparison.findings} == {("1a2b3c4", "feedbee")}
    assert comparison.notes[1:] == [f"1a2b3c4: {old.run_id}", f"feedbee: {new.run_id}"]
    for place, finding in enumerate(comparison.findings):
        assert finding.verdict == "SLOWER"
        assert finding.why.startswith("UNPAIRED; ")
        assert finding.ratio == unpaired_ratio(times_of(new, place), times_of(old, place))
    assert "UNPAIRED" in printed(comparison).splitlines()[0]
    assert closing(comparison)[0].startswith("feedbee over 6 shapes: 1.2")
    assert "(" not in closing(comparison)[0]
    assert not any(one["paired"] for one in verdict_objects(comparison))


def test_other_routes_of_a_shape_are_paired_where_each_run_has_one() -> None:
    old, new = (
        make_run(routes=["sdpa"]),
        make_run(routes=["gather"], run_id="20250103T030405Z-decode-1a2b3c4"),
    )
    first = findings_between(old, new).findings[0]
    assert (first.shape, first.first, first.side) == (
        "S=1k",
        "sdpa @ run 1",
        "gather @ run 2",
    )
    assert first.verdict == "FASTER"
    with pytest.raises(PresentError, match="have no cell in common"):
        findings_between(old, make_run(routes=["gather", "auto"]))
    with pytest.raises(PresentError, match="have no cell in common"):
        findings_between(old, make_run(routes=["sdpa"], S=[4]))


def test_cells_of_one_run_only_are_counted() -> None:
    comparison = findings_between(
        make_run(), make_run(S=(1024, 8192), run_id="20250103T030405Z-decode-feedbee")
    )
    assert len(comparison.findings) == 2
    assert comparison.notes[-1] == "left out: 6 cells that only one of the runs has"


def test_regimes_are_never_compared() -> None:
    old, new = make_run(), make_run(run_id="20250103T030405Z-decode-feedbee")
    new.cells.loc[new.cells["S"] == new.cells["S"].iloc[0], "cache"] = "warm"
    finding = findings_between(old, new).findings[0]
    assert (finding.verdict, finding.judgement) == ("INVALID", None)
    assert finding.why == "UNPAIRED; latency cold cpu and latency warm cpu cannot be compared"


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [("cache", "warm", "latency warm cpu"), ("regime", "sustained", "sustained cold cpu")],
)
def test_runs_of_two_regimes_are_refused_in_a_line(column: str, value: str, said: str) -> None:
    old, new = make_run(), make_run(run_id="20250103T030405Z-decode-feedbee")
    new.cells[column] = value
    with pytest.raises(PresentError, match=f": latency cold cpu and {said} cannot be compared$"):
        findings_between(old, new)


def test_a_cell_that_failed_in_one_run_is_invalid() -> None:
    old = make_run(failed={("sdpa", 1024): ("oom", "24 GiB")})
    finding = findings_between(old, make_run(run_id="20250103T030405Z-decode-feedbee")).findings[0]
    assert finding.verdict == "INVALID"
    assert finding.why == "UNPAIRED; run 1 is oom: 24 GiB"


@pytest.mark.parametrize(
    ("ratio", "said"), [(1.414, "41 %"), (0.586, "41 %"), (1.0023, "0.23 %"), (3.5, "250 %"), (1.0, "0 %")]
)
def test_percent(ratio: float, said: str) -> None:
    assert percent_text(ratio) == said


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1.0031, "1.003"), (0.958, "0.958"), (12.314, "12.31"), (0.05021, "0.0502"), (163.2, "163.2")],
)
def test_ratios_keep_the_digits_that_count(ratio: float, said: str) -> None:
    assert ratio_digits(ratio) == said


def test_the_forest(tmp_path: Path) -> None:
    comparison = findings_of(make_contest({"auto": 1.0, "sdpa": 1.41, "dense": 0.5}, S=(512, 2048)))
    figure = forest_figure(comparison)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "S=512  sdpa",
        "S=512  dense",
        "S=2k  sdpa",
        "S=2k  dense",
    ]
    lo, hi = axes.get_xlim()
    for finding in comparison.findings:
        assert finding.ratio is not None
        assert finding.ratio.lo is not None
        assert finding.ratio.hi is not None
        assert lo < finding.ratio.lo
        assert finding.ratio.hi < hi
    assert 1.0 in axes.xaxis.get_ticklocs()
    assert any("SLOWER" in text.get_text() for text in axes.texts)
    assert len(axes.patches) == 2 * 4
    files = plot_comparison(comparison, tmp_path / comparison.runs[0].run_id)
    assert [file.name for file in files] == ["compare.png", "compare.svg"]


def test_a_long_forest_shows_what_has_room() -> None:
    run = make_contest(
        {"auto": 1.0, "sdpa": 1.4}, S=range(64, 64 * (MOST_ROWS + 4), 64), rounds=6, processes=1
    )
    figure = forest_figure(findings_of(run))
    assert figure is not None
    assert len(figure.axes[0].get_yticks()) == MOST_ROWS
    assert any("left out: 3 more ratios" in text.get_text() for text in figure.texts)


def test_plots_of_a_comparison_hold_its_forest(tmp_path: Path) -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.4}, S=(512, 1024))
    names = [file.name for file in plot_run(run, tmp_path / run.run_id, ["png"])]
    assert "compare.png" in names
    assert "prefill-time.png" in names
    other = make_contest({"auto": 1.0, "sdpa": 1.4}, S=(512, 1024), run_id="20250103T030405Z-compare-1a2b3c4")
    names = [file.name for file in plot_run([run, other], tmp_path / "both", ["png"])]
    assert names[-2:] == [f"compare-{run.run_id}.png", f"compare-{other.run_id}.png"]


def test_an_unpaired_forest_has_no_control(tmp_path: Path) -> None:
    comparison = findings_between(make_run(), make_run(speed=1.5, run_id="20250103T030405Z-decode-feedbee"))
    figure = forest_figure(comparison)
    assert figure is not None
    assert figure.texts[0].get_text().startswith("UNPAIRED: ")
    assert len(figure.axes[0].patches) == len(comparison.findings)


def test_verdicts_need_no_torch() -> None:
    modules = "nsabench.present.verdict_table, nsabench.present.forest"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_decode_steps_are_weighted_by_how_often_they_occur() -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.0}, phase="decode", noise=1e-6)
    emit = run.samples.assign(variant="emit", ms=run.samples["ms"] * 4)
    run = replace(run, samples=pd.concat([run.samples.assign(variant="plain"), emit]))
    (finding,) = findings_of(run).findings
    assert finding.times is not None
    d = run.cells["d"][0]
    assert finding.times[0][0] == pytest.approx(512 / 256 * (4 / d + 1 - 1 / d), rel=1e-3)


def test_decode_below_one_block_has_only_plain_steps() -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.4}, S=(20,), phase="decode")
    times = findings_of(run).findings[0].times
    plain = findings_of(replace(run, samples=run.samples.assign(variant="plain"))).findings[0]
    assert (plain.verdict, plain.times is not None) == ("SLOWER", True)
    assert np.array_equal(plain.times, times)  # type: ignore[arg-type]
