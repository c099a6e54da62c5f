"""What the tables and the plain line say, read back from the text a terminal of 100 columns shows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from nsabench.present.cell_text import cell_line
from nsabench.present.frame import cell_rows
from nsabench.present.pairing import compare
from nsabench.present.tables import cells_json, cells_table, shares_table
from nsabench.stats import Interval
from nsabench.store import Run
from nsabench.store.schema import CELL_COLUMNS, STAGES

MakeRun = Callable[..., Run]


def speeds(*arguments: Any) -> list[Interval | None]:
    return [cell.speed for cell in compare(*arguments)]


SIZES = (512, 1024, 2048, 65536)


def show(table: Table, width: int = 100) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def line_of(lines: list[str], *words: str) -> str:
    (line,) = [line for line in lines if line.split()[: len(words)] == list(words)]
    return line


def test_a_line_says_time_speed_reads_memory_shares(make_run: MakeRun) -> None:
    run = make_run(S=SIZES, routes=("sdpa", "gather"))
    lines = show(cells_table(run.cells, run.samples))
    row = run.cells[(run.cells["route"] == "gather") & (run.cells["S"] == 65536)].iloc[0]
    speed = speeds(cell_rows(run.cells), run.samples)[-1]
    assert speed is not None
    assert line_of(lines, "64k", "gather").split() == [
        "64k",
        "gather",
        f"{row['ms_total']:.2f}",
        f"{row['ms_lo']:.2f}-{row['ms_hi']:.2f}",
        f"{speed.point:.2f}",
        f"{speed.lo:.2f}-{speed.hi:.2f}",
        "5632/64k",
        "0.0625",
        "ok",
        "8/52/14/6",
    ]
    assert "ms/step" in "".join(lines)
    assert line_of(lines, "64k", "sdpa").split()[4] == "1"


@pytest.mark.parametrize(
    "shape",
    [
        {"routes": ("sdpa", "gather")},
        {"routes": ("auto", "cmp=fa2,score=triton,sel=triton,win=sdpa"), "gpu": True},
        {"phase": "prefill", "gpu": True, "routes": ("sdpa", "reference")},
        {"phase": "prefill", "passes": ("fwd", "fwd_bwd"), "B": (1, 16), "gpu": True},
        {"phase": "train", "passes": ("fwd_bwd",), "B": (1, 16)},
    ],
)
def test_nothing_is_cut_off_in_100_columns(make_run: MakeRun, shape: dict[str, Any]) -> None:
    failed = {(shape.get("routes", ("sdpa", "gather"))[1], 2048): ("unsupported", "needs a CUDA device")}
    run = make_run(S=SIZES, failed=failed, **shape)
    for table in (cells_table(run.cells, run.samples), shares_table(run.cells)):
        narrow = show(table)
        assert max(map(len, narrow)) <= 100
        assert "…" not in "".join(narrow)
        wide = show(table, 1000)
        every = {part for line in wide for word in line.split() for part in word.split(",")}
        assert every - {part for line in narrow for word in line.split() for part in word.split(",")} <= {
            "─" * len(rule) for rule in wide
        }


def test_a_narrow_table_stands_intervals_below_values(make_run: MakeRun) -> None:
    run = make_run(
        S=(1024,), failed={("sdpa", 1024): ("oom", "too little")}, routes=("auto", "gather", "sdpa")
    )
    lines = show(cells_table(run.cells, run.samples, width=70), 70)
    assert max(map(len, lines)) <= 70
    place = lines.index(line_of(lines, "1k", "gather"))
    row = run.cells.iloc[1]
    assert lines[place].split()[2] == f"{row['ms_total']:.2f}"
    assert lines[place].split()[-1] == "ok"
    assert lines[place + 1].split()[0] == f"{row['ms_lo']:.2f}-{row['ms_hi']:.2f}"
    assert lines[place + 1].split()[-1] == "13/19/24/11"
    assert line_of(lines, "1k", "sdpa").split()[2:] == ["oom"]


def test_too_narrow_a_console_cuts_no_number_unmarked(make_run: MakeRun) -> None:
    run = make_run(S=(1024, 65536), routes=("sdpa", "gather"))
    text = "".join("".join(line.split()) for line in show(cells_table(run.cells, run.samples), 78))
    assert "13/19/24/11" in text
    assert "8/52/14/6" in text


def test_only_what_varies_has_a_column(make_run: MakeRun) -> None:
    one = show(cells_table(make_run(B=(4,)).cells))
    assert "B=4" in " ".join(one)
    assert not any(" B " in line for line in one)
    several = show(cells_table(make_run(B=(1, 4), passes=("fwd", "bwd"), phase="prefill").cells))
    header = next(line for line in several if "route" in line)
    assert header.split()[:4] == ["S", "passes", "B", "route"]
    assert line_of(several, "1k", "bwd", "4", "gather")


def test_a_failed_cell_shows_status_and_reason_and_no_number(make_run: MakeRun) -> None:
    failed = {
        ("gather", 1024): ("oom", "needs [3 GiB], has 1"),
        ("gather", 2048): ("oom", "needs [3 GiB], has 1"),
        ("sdpa", 4096): ("wrong", "rel_err 0.5 over the budget 0.01"),
    }
    lines = show(cells_table(make_run(failed=failed).cells))
    assert line_of(lines, "1k", "gather").split()[2:] == ["oom", "(1)"]
    assert line_of(lines, "2k", "gather").split()[2:] == ["oom", "(1)"]
    assert line_of(lines, "4k", "sdpa").split()[2:] == ["wrong", "(2)"]
    assert "(1) needs [3 GiB], has 1" in lines
    assert "(2) rel_err 0.5 over the budget 0.01" in lines
    assert line_of(lines, "4k", "gather").split()[4] == "-"  # its baseline failed: no speed


def test_timers_that_disagree_are_a_warning(make_run: MakeRun) -> None:
    run = make_run(routes=("sdpa", "gather"))
    said = "event 1 ms, graph 1.2 ms a step, 20 % apart"
    assert not any("warning" in line for line in show(cells_table(run.cells, run.samples)))
    run.cells["timers_note"] = [said if route == "gather" else "" for route in run.cells["route"]]
    shown = " ".join(show(cells_table(run.cells, run.samples)))
    count = int((run.cells["route"] == "gather").sum())
    assert f"warning: {said}" + (f" ({count} cells)" if count > 1 else "") in shown


def test_what_was_not_read_is_a_dash(make_run: MakeRun) -> None:
    nothing = {"peak_alloc_bytes": None, "reads_tokens": None, "ms_lo": None, "power_w": None}
    nothing |= {f"share_{s}_pct": None for s in STAGES}
    run = make_run(routes=("auto",), gpu=True, changes={("auto", 1024): nothing})
    lines = show(cells_table(run.cells))
    assert line_of(lines, "1k", "auto").split()[3:] == ["-", "-/1024", "-", "-", "1980", "ok", "-"]
    assert line_of(lines, "2k", "auto").split()[6:8] == ["412", "1980"]
    shares = show(shares_table(run.cells))
    assert line_of(shares, "1k", "auto").split()[2:] == ["-"] * 8 + ["(1)"]
    assert "(1) no shares were measured" in shares


def test_a_cpu_has_no_power_column(make_run: MakeRun) -> None:
    assert not any("MHz" in line for line in show(cells_table(make_run().cells)))


def test_short_times_are_in_microseconds(make_run: MakeRun) -> None:
    run = make_run(gpu=True, routes=("auto",), S=(1024,))
    lines = show(cells_table(run.cells))
    assert any("us/step" in line for line in lines)
    assert line_of(lines, "1k", "auto").split()[2] == f"{run.cells['ms_total'][0] * 1000:.2f}"


def test_a_single_route_has_no_speed(make_run: MakeRun) -> None:
    assert not any("speed" in line for line in show(cells_table(make_run(routes=("auto",)).cells)))


def test_last_keeps_the_speeds_of_the_whole(make_run: MakeRun) -> None:
    run = make_run(S=(1024,))
    lines = show(cells_table(run.cells, run.samples, last=1))
    assert not [line for line in lines if "sdpa" in line]
    assert line_of(lines, "1k", "gather").split()[4].startswith("1.4")


def test_no_cell_at_all() -> None:
    assert "no cell" in "".join(show(cells_table([])))
    assert "no cell" in "".join(show(shares_table([])))


def test_shares_add_up_as_printed(make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    run = make_run(S=[2**i for i in range(6, 20)])
    for i in run.cells.index:
        parts = rng.dirichlet(np.ones(len(STAGES))) * 100
        run.cells.loc[i, [f"share_{s}_pct" for s in STAGES]] = parts
    lines = show(shares_table(run.cells))
    assert next(line for line in lines if "route" in line).split()[2:] == [*STAGES, "total"]
    body = [line.split() for line in lines if line.split()[1:2] in (["sdpa"], ["gather"])]
    assert len(body) == len(run.cells)
    for words in body:
        assert sum(round(float(word) * 10) for word in words[2:-1]) == 1000
        assert words[-1] == "100.0"


def test_a_stage_that_was_not_told_apart_is_a_dash(make_run: MakeRun) -> None:
    run = make_run(routes=("auto",), S=(1024,))
    run.cells["share_score_pct"] = None
    run.cells["share_cmp_pct"] += 100 - run.cells[[f"share_{s}_pct" for s in STAGES]].astype(float).sum(
        axis=1
    )
    assert line_of(show(shares_table(run.cells)), "1k", "auto").split()[5] == "-"
    assert line_of(show(cells_table(run.cells)), "1k", "auto").split()[-1].split("/")[1] == "-"


def test_json_says_the_same(make_run: MakeRun) -> None:
    failed = {("gather", 2048): ("oom", "too little")}
    run = make_run(failed=failed)
    cells = json.loads(json.dumps(cells_json(run.cells, run.samples), allow_nan=False))
    assert [list(cell) for cell in cells] == [[*(c.name for c in CELL_COLUMNS), "speed", "x_dense"]] * len(
        run.cells
    )
    first, second, _, broken = cells[:4]
    speed = speeds(cell_rows(run.cells), run.samples)[1]
    assert speed is not None
    assert first["speed"] is None
    assert second["speed"] == {
        "baseline": "sdpa",
        "point": speed.point,
        "lo": speed.lo,
        "hi": speed.hi,
        "n": 15,
    }
    assert (broken["status"], broken["reason"], broken["ms_total"]) == ("oom", "too little", None)
    assert first["power_w"] is None
    assert first["reason"] is None
    assert first["S"] == 1024
    assert isinstance(first["S"], int)


def test_plain_line(make_run: MakeRun) -> None:
    run = make_run(
        S=(1024,), gpu=True, failed={("auto", 1024): ("oom", "too little")}, routes=("sdpa", "auto", "gather")
    )
    rows = cell_rows(run.cells)
    texts = [cell_line(cell) for cell in compare(rows, run.samples)]
    speed = speeds(rows, run.samples)[2]
    assert speed is not None
    assert texts[1] == "decode fwd S=1024 B=1 auto: oom: too little"
    assert texts[2] == (
        f"decode fwd S=1024 B=1 gather: ok, {rows[2]['ms_total']:.5f} ms"
        f" ({rows[2]['ms_lo']:.5f}-{rows[2]['ms_hi']:.5f}),"
        f" {speed.point:.2f}x ({speed.lo:.2f}-{speed.hi:.2f}) the speed of sdpa,"
        " reads 1024/1024, peak 2.00 MiB, 412 W, 1980 MHz, cmp/score/sel/win 13/19/24/11 %"
    )
    assert "the speed of" not in texts[0]
