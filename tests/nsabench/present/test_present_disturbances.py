"""What disturbed a measurement: in which numbers it is not, what it does to verdicts, where it is told."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nsabench.present.disturbances import readings_lost, row_notes, run_notes
from nsabench.present.frame import cell_rows
from nsabench.present.live import SweepView
from nsabench.present.pairing import compare, rounds_of
from nsabench.present.tables import cells_table
from nsabench.present.verdict_table import verdict_objects
from nsabench.present.verdicts import closing, findings_between, findings_of
from nsabench.stats.neighbours import LOUD_PCT, SPOILT_PCT
from nsabench.store import Run
from tests.nsabench.present.conftest import make_run
from tests.nsabench.present.contests import make_contest
from tests.nsabench.present.test_present_telemetry import dropping, with_gpu


def test_rounds_that_do_not_count_are_in_no_time_ratio_or_verdict() -> None:
    whole = make_contest({"auto": 1.0, "sdpa": 1.4}, processes=1)
    run = dropping(whole, (3, 4), factor=9.0)
    rows = cell_rows(run.cells)
    kept = whole.samples[~whole.samples["round"].isin((3, 4))]
    expected = rounds_of(rows, kept)
    for key, found in rounds_of(rows, run.samples).items():
        assert list(found.ms) == list(expected[key].ms)
        assert list(found.numbers) == list(expected[key].numbers)
    found, wanted = (compare(rows, samples) for samples in (run.samples, kept))
    assert [one.speed for one in found] == [one.speed for one in wanted]


def test_notes_of_cells() -> None:
    rows = cell_rows(make_run(S=(1024,)).cells)
    assert row_notes(rows) == []
    rows[0] |= {"neighbour_load_pct": 10.0, "dropped_rounds": 0}
    assert row_notes(rows) == []
    rows[0] |= {"neighbour_load_pct": 31.4, "dropped_rounds": 2}
    assert row_notes(rows) == [
        "other processes used 31 % of the cores: times may be too long",
        "2 rounds of 1 cell were dropped: the hardware slowed down",
    ]
    rows[1] |= {"neighbour_load_pct": 55.0, "device": "cuda:0", "dropped_rounds": 1}
    assert row_notes(rows) == [
        "other processes used 55 % of the GPU, the most of 2 disturbed cells: times may be too long",
        "3 rounds of 2 cells were dropped: the hardware slowed down",
    ]


def test_readings_that_ended_are_named() -> None:
    run = with_gpu(make_run(gpu=True), temp_c=[40.0] * 12 + [np.nan] * 8, util_pct=np.nan)
    assert readings_lost(run.telemetry) == ["temp_c"]
    assert run_notes(run) == ["NVML stopped answering: no more temp_c"]
    assert readings_lost(with_gpu(make_run(gpu=True), temp_c=[np.nan] * 8 + [40.0] * 12).telemetry) == []
    every = with_gpu(make_run(gpu=True), throttle_reasons=["none"] * 12 + [""] * 8)
    assert readings_lost(every.telemetry) == ["throttle_reasons"]


def beside(run: Run, load: float, place: int = 0) -> Run:
    run.cells["neighbour_load_pct"] = 0.0
    run.cells.loc[place, "neighbour_load_pct"] = load
    return run


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first side", "side", "control"])
def test_a_verdict_taken_beside_much_load_is_invalid(place: int) -> None:
    comparison = findings_of(beside(make_contest({"auto": 1.0, "sdpa": 0.39}), SPOILT_PCT + 1, place))
    (finding,) = comparison.findings
    assert (finding.verdict, finding.why) == ("INVALID", "other processes used 26 % of the cores")
    assert closing(comparison) == ["sdpa beside auto: INVALID, other processes used 26 % of the cores"]
    assert verdict_objects(comparison)[0]["verdict"] == "INVALID"


@pytest.mark.parametrize(("load", "said"), [(LOUD_PCT, False), (LOUD_PCT + 1, True), (SPOILT_PCT, True)])
def test_a_verdict_taken_beside_some_load_says_so(load: float, said: bool) -> None:
    (finding,) = findings_of(beside(make_contest({"auto": 1.0, "sdpa": 0.39}), load)).findings
    assert finding.verdict == "FASTER"
    assert finding.why.endswith(f"; other processes used {load:.0f} % of the cores") == said


def test_what_is_invalid_counts_for_no_correction_and_no_mean() -> None:
    run = make_contest({"auto": 1.0, "sdpa": 1.4}, S=(512, 1024, 2048))
    comparison = findings_of(beside(run, 80.0))
    assert [finding.verdict for finding in comparison.findings] == ["INVALID", "SLOWER", "SLOWER"]
    assert closing(comparison)[0].startswith("sdpa over 2 shapes")


def test_load_beside_a_stored_run_counts_too() -> None:
    new = beside(make_run(speed=1.5, run_id="20250103T030405Z-decode-feedbee"), 60.0)
    first, second = findings_between(make_run(), new).findings[:2]
    assert (first.verdict, first.why) == ("INVALID", "UNPAIRED; other processes used 60 % of the cores")
    assert second.verdict == "SLOWER"


def printed(what: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=100, color_system=None).print(what)
    return " ".join(out.getvalue().split())


def test_it_stands_under_the_table_and_below_plain_lines() -> None:
    run = beside(make_run(), 52.0)
    said = "other processes used 52 % of the cores: times may be too long"
    assert said in printed(cells_table(run.cells, run.samples))
    assert said not in printed(cells_table(make_run().cells))
    out = io.StringIO()
    with SweepView(Console(file=out, width=100), total=6) as view:
        for row in run.rows:
            view.row(row)
    assert out.getvalue().splitlines()[-2] == said


def test_a_comparison_tells_of_dropped_rounds() -> None:
    run = dropping(make_contest({"auto": 1.0, "sdpa": 1.4}), (3,))
    comparison = findings_of(run)
    assert "3 of 45 rounds dropped for hw_thermal" in comparison.notes
    assert comparison.findings[0].ratio is not None
    assert comparison.findings[0].ratio.n == 42
