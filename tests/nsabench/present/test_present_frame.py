"""Baselines, paired speeds and shares, computed here a second time from the samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nsabench.present.frame import (
    baselines,
    cell_rows,
    planned_routes,
    shares_of,
    varying,
    why_no_shares,
)
from nsabench.present.pairing import compare
from nsabench.stats import Interval, paired_ratio
from nsabench.store import Run
from nsabench.store.schema import CELL_COLUMNS, STAGES

MakeRun = Callable[..., Run]


def speeds(*arguments: Any) -> list[Interval | None]:
    return [cell.speed for cell in compare(*arguments)]


def test_rows_are_plain_values_with_every_column(make_run: MakeRun) -> None:
    frame = make_run(failed={("gather", 1024): ("oom", "too little")}).cells
    frame["S"] = frame["S"].astype("Int64")
    frame.loc[1, "dim"] = pd.NA
    frame["from_a_later_version"] = 1
    rows = cell_rows(frame)
    assert [list(row) for row in rows] == [[c.name for c in CELL_COLUMNS]] * len(frame)
    failed = rows[1]
    assert failed["status"] == "oom"
    assert failed["ms_total"] is None
    assert failed["timer"] == ""
    assert failed["dim"] is None
    assert type(rows[0]["S"]) is int
    assert cell_rows(rows) == rows


def test_varying(make_run: MakeRun) -> None:
    rows = cell_rows(make_run(B=(1, 2), passes=("fwd", "bwd"), phase="prefill").cells)
    assert varying(rows) == ["passes", "S", "B"]
    assert varying(rows[:1]) == []


def test_baseline_is_the_first_route_of_the_shape_even_if_failed(make_run: MakeRun) -> None:
    run = make_run(routes=("sdpa", "gather", "auto"), failed={("sdpa", 1024): ("oom", "too little")})
    rows = cell_rows(run.cells)
    assert {(base["route"], base["S"]) for base in baselines(rows)} == {
        ("sdpa", s) for s in (1024, 2048, 4096)
    }
    by_size = {(row["route"], row["S"]): speed for row, speed in zip(rows, speeds(rows), strict=True)}
    assert by_size["gather", 1024] is None
    assert by_size["gather", 2048] is not None
    assert by_size["sdpa", 2048] is None


@pytest.mark.parametrize("refused", [0, 1])
def test_a_refused_cell_has_no_speed_even_where_a_time_was_left_in(make_run: MakeRun, refused: int) -> None:
    rows = cell_rows(make_run(S=(1024,)).cells)
    rows[refused] |= {"status": "invalid", "reason": "fell back"}
    assert speeds(rows) == [None, None]


def test_order_decides_the_baseline_whatever_was_finished_first(make_run: MakeRun) -> None:
    run = make_run(routes=("sdpa", "gather"), S=(1024,))
    late = cell_rows(run.cells)[::-1]
    assert {base["route"] for base in baselines(late)} == {"gather"}
    assert {base["route"] for base in baselines(late, planned_routes(run.info))} == {"sdpa"}
    assert {base["route"] for base in baselines(late, ["gather", "sdpa"])} == {"gather"}


def test_planned_routes_without_a_plan() -> None:
    assert planned_routes({}) == []
    assert planned_routes({"plan": None}) == []


def _round_ms(run: Run, cell_id: str, variant: str) -> np.ndarray:
    mine = run.samples[(run.samples["cell_id"] == cell_id) & (run.samples["variant"] == variant)]
    return mine.groupby("round")["ms"].median().to_numpy()


def test_prefill_speed_is_the_paired_ratio(make_run: MakeRun) -> None:
    run = make_run(phase="prefill", S=(1024,))
    base, row = cell_rows(run.cells)
    _, speed = speeds([base, row], run.samples)
    assert speed == paired_ratio(_round_ms(run, base["cell_id"], ""), _round_ms(run, row["cell_id"], ""))
    assert speed.n == 15
    assert speed.lo is not None
    assert 1.4 < speed.lo < speed.point < 1.55  # sdpa 1.9 over gather 1.3, as the fixture has it


def test_decode_speed_weighs_the_two_kinds_of_step(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), d=16)
    emits = run.samples["variant"] == "emit"
    run.samples.loc[emits & (run.samples["cell_id"] == run.cells["cell_id"][0]), "ms"] *= 10
    base, row = cell_rows(run.cells)
    whole = [
        _round_ms(run, r["cell_id"], "emit") / 16 + _round_ms(run, r["cell_id"], "plain") * 15 / 16
        for r in (base, row)
    ]
    speed = speeds([base, row], run.samples)[1]
    assert speed is not None
    expected = paired_ratio(*whole)
    assert (speed.point, speed.lo, speed.hi) == pytest.approx((expected.point, expected.lo, expected.hi))


def test_decode_where_every_step_emits_needs_no_plain_sample(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), d=1)
    only = run.samples[run.samples["variant"] == "emit"]
    speed = speeds(cell_rows(run.cells), only)[1]
    assert speed is not None
    assert speed.n == 15


def test_a_round_without_one_kind_of_step_is_no_pair(make_run: MakeRun) -> None:
    run = make_run(S=(1024,))
    gone = (run.samples["round"] < 4) & (run.samples["variant"] == "plain")
    speed = speeds(cell_rows(run.cells), run.samples[~gone])[1]
    assert speed is not None
    assert speed.n == 11


def test_several_samples_of_a_round_count_once(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), phase="prefill")
    twice = pd.concat([run.samples, run.samples.assign(ms=run.samples["ms"] * 1.01)])
    speed = speeds(cell_rows(run.cells), twice)[1]
    assert speed is not None
    assert speed.n == 15


def test_a_sample_without_its_round_is_left_out_and_one_without_its_place_is_not(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), routes=("sdpa", "gather"), phase="prefill")
    whole = compare(run.rows, run.samples)[1].speed
    first = run.samples["round"] == 0
    half = run.samples[first].assign(position=np.nan)
    twice = compare(run.rows, pd.concat([half, run.samples], ignore_index=True))[1].speed
    assert twice == whole
    lost = compare(run.rows, run.samples.assign(round=run.samples["round"].where(~first)))[1].speed
    assert whole is not None
    assert lost is not None
    assert lost.n == whole.n - 1


def test_rounds_of_different_processes_are_different_pairs(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), phase="prefill")
    both = pd.concat([run.samples, run.samples.assign(process=1)])
    speed = speeds(cell_rows(run.cells), both)[1]
    assert speed is not None
    assert speed.n == 30


def test_samples_of_another_run_are_left_alone(make_run: MakeRun) -> None:
    run = make_run(S=(1024,), phase="prefill")
    other = run.samples.assign(run_id="another", ms=1000.0, process=7)
    rows = cell_rows(run.cells)
    assert speeds(rows, pd.concat([run.samples, other])) == speeds(rows, run.samples)


def test_without_samples_a_speed_has_no_interval(make_run: MakeRun) -> None:
    rows = cell_rows(make_run(S=(1024,)).cells)
    speed = speeds(rows)[1]
    assert speed is not None
    assert speed.point == rows[0]["ms_total"] / rows[1]["ms_total"]
    assert (speed.lo, speed.hi, speed.n) == (None, None, 0)


def test_arms_that_were_not_interleaved_have_no_interval(make_run: MakeRun) -> None:
    run = make_run(S=(1024,))
    speed = speeds(cell_rows(run.cells), run.samples.assign(position=0))[1]
    assert speed is not None
    assert (speed.lo, speed.hi, speed.n) == (None, None, 0)


def test_cells_of_different_shapes_are_never_compared(make_run: MakeRun) -> None:
    first = make_run(S=(1024,), routes=("sdpa",))
    second = make_run(S=(1024,), routes=("gather",), dk=64)
    rows = cell_rows(pd.concat([first.cells, second.cells]))
    assert speeds(rows) == [None, None]


@pytest.mark.parametrize(
    ("column", "value"), [("regime", "sustained"), ("cache", "warm"), ("timer", "graph")]
)
def test_times_of_two_regimes_caches_or_timers_make_no_ratio(
    make_run: MakeRun, column: str, value: str
) -> None:
    run = make_run()
    rows = cell_rows(run.cells)
    changed = next(row for row in rows if row["route"] != rows[0]["route"] and row["S"] == rows[0]["S"])
    assert speed_of(rows, run.samples, changed) is not None
    changed[column] = value
    assert speed_of(rows, run.samples, changed) is None


def speed_of(rows: list[Any], samples: Any, row: Any) -> Any:
    return next(found.speed for found in compare(rows, samples) if found.row["cell_id"] == row["cell_id"])


def test_shares_are_scaled_to_100(make_run: MakeRun) -> None:
    (row,) = cell_rows(make_run(S=(1024,), routes=("auto",)).cells)
    row |= {f"share_{s}_pct": row[f"share_{s}_pct"] * 1.008 for s in STAGES}
    shares = shares_of(row)
    assert shares is not None
    assert math.fsum(shares.values()) == pytest.approx(100, abs=1e-9)
    assert shares["sel"] / shares["win"] == pytest.approx(row["share_sel_pct"] / row["share_win_pct"])


def test_shares_that_are_not_there_say_why(make_run: MakeRun) -> None:
    (row,) = cell_rows(make_run(S=(1024,), routes=("auto",)).cells)
    none = {f"share_{s}_pct": None for s in STAGES}
    assert why_no_shares(row) == ""
    assert why_no_shares(row | none | {"shares_note": "fused"}) == "fused"
    assert why_no_shares(row | none) == "no shares were measured"
    assert (
        why_no_shares(row | {"share_sel_pct": row["share_sel_pct"] + 5})
        == "the stored shares add up to 105.0 %"
    )
    assert why_no_shares(row | {"status": "oom", "reason": "x"}) == "oom: x"
    assert shares_of(row | none) is None
