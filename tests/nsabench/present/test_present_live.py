"""The live view: what it writes to a pipe, as JSON, to a terminal, and after Ctrl-C."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from nsabench.plan.cells import Cell
from nsabench.present import live
from nsabench.present.frame import PLANNED, cell_rows
from nsabench.present.live import SweepView
from nsabench.store import Run

MakeRun = Callable[..., Run]

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal(height: int = 40, **settings: Any) -> tuple[Console, Tty]:
    file = Tty()
    environment = {"TERM": "xterm-256color"} | settings
    return Console(file=file, width=100, height=height, _environ=environment), file


def rows_of(run: Run) -> list[dict[str, Any]]:
    return cell_rows(run.cells)


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell.from_dict({name: row[name] for name in (*PLANNED, "route")})


def test_a_pipe_gets_one_plain_line_per_cell(make_run: MakeRun) -> None:
    file, clock = io.StringIO(), Clock()
    rows = rows_of(make_run(S=(1024,), failed={("gather", 1024): ("oom", "[red]too[/red] little")}))
    with SweepView(Console(file=file, width=40), total=2, clock=clock) as view:
        view.note("results in [here]")
        view.begin([cell_of(r) for r in rows], "checking")
        view.activity("round 3")
        for row in rows:
            view.row(row)
        clock.now += 65
    lines = file.getvalue().splitlines()
    assert lines[0] == "results in [here]"
    assert lines[1].startswith("[1/2] decode fwd S=1024 B=1 sdpa: ok, 1.")
    assert lines[2:] == [
        "[2/2] decode fwd S=1024 B=1 gather: oom: [red]too[/red] little",
        "2 of 2 cells (1 ok, 1 oom) in 1m05s",
    ]


def test_forced_colours_do_not_make_a_pipe_a_terminal(make_run: MakeRun) -> None:
    file = io.StringIO()
    with SweepView(Console(file=file, force_terminal=True, width=100), total=2) as view:
        for row in rows_of(make_run(S=(1024,))):
            view.row(row)
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().count("\n") == 3


def test_a_dumb_terminal_gets_plain_lines(make_run: MakeRun) -> None:
    console, file = terminal(TERM="dumb")
    with SweepView(console, total=1) as view:
        view.row(rows_of(make_run(S=(1024,)))[0])
    assert "\x1b" not in file.getvalue()


def test_json_goes_to_stdout_and_all_else_to_stderr(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(make_run(S=(1024,), failed={("gather", 1024): ("oom", "too\x1blittle")}))
    rows[0]["power_w"] = float("nan")
    with SweepView(Console(), total=2, json_lines=True) as view:
        view.note("a note")
        view.begin([cell_of(r) for r in rows], "checking")
        for number, row in enumerate(rows, 1):
            view.row(row)
            assert capsys.readouterr().out.count("\n") == 1, f"cell {number} is printed when it is finished"
    with SweepView(Console(), total=2, json_lines=True) as view:
        view.note("a note")
        for row in rows:
            view.row(row)
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["route"] == "sdpa"
    assert first["power_w"] is None
    assert first["reason"] is None
    assert (second["status"], second["ms_total"]) == ("oom", None)
    assert "a note" in err
    assert "[2/2]" in err
    assert "2 of 2 cells" in err


def test_json_on_a_terminal_is_not_torn_by_a_table(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (console, file), error = terminal(), Tty()
    monkeypatch.setattr("sys.stderr", error)
    monkeypatch.setenv("TERM", "xterm")
    with SweepView(console, total=1, json_lines=True) as view:
        view.row(rows_of(make_run(S=(1024,)))[0])
    assert json.loads(file.getvalue())["route"] == "sdpa"
    assert "\x1b" not in error.getvalue()
    with SweepView(Console(file=io.StringIO()), total=1, json_lines=True) as view:
        view.row(rows_of(make_run(S=(1024,)))[0])
    assert HIDE in error.getvalue(), "with JSON in a pipe the table may be drawn on stderr"


def test_json_is_flushed_with_every_cell(make_run: MakeRun) -> None:
    class Buffered(io.StringIO):
        seen = ""

        def flush(self) -> None:
            self.seen = self.getvalue()

    file = Buffered()
    view = SweepView(Console(file=file), total=2, json_lines=True)
    for number, row in enumerate(rows_of(make_run(S=(1024,))), 1):
        view.row(row)
        assert file.seen.count("\n") == number


def test_a_terminal_shows_table_progress_and_time_left(make_run: MakeRun) -> None:
    console, file = terminal()
    clock = Clock()
    rows = rows_of(make_run(S=(1024, 2048)))
    with SweepView(console, total=4, clock=clock) as view:
        view.begin([cell_of(r) for r in rows[:2]], "checking")
        assert "decode fwd S=1024 B=1, 2 routes: checking" in file.getvalue()
        assert "0s, about - left" in file.getvalue()
        clock.now += 30
        view.row(rows[0])
        assert "1/4" in file.getvalue()
        assert "30s, about 1m30s left" in file.getvalue()
        view.activity("round 3 of 15")
        assert "2 routes: round 3 of 15" in file.getvalue()
        view.note("careful")
    text = file.getvalue()
    assert "careful" in text
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert "\x1b[2K" in text[text.rindex("left") :], "the progress is wiped out before the last table"
    assert "1 of 4 cells (1 ok) in 30s" in text
    assert "\x1b[32mok" in text


def test_the_last_table_is_whole_and_has_the_intervals(make_run: MakeRun) -> None:
    console, file = terminal(height=12)
    run = make_run(S=[2**i for i in range(7, 17)])
    view = SweepView(console, total=20)
    for row in rows_of(run):
        start = file.tell()
        view.row(row)
        file.seek(start)
        frame = file.read()
        assert frame.count("\n") < 12, "a frame taller than the terminal cannot be drawn over"
        assert row["route"] in frame
        assert "left" in frame
    start = file.tell()
    view.close(run.samples)
    file.seek(start)
    final = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.read().split(SHOW)[1])
    for route in ("sdpa", "gather"):
        assert len(re.findall(rf"(?m)^ *\d+k? +{route} ", final)) == 10
    assert re.search(r"64k +gather +\S+ \S+ +1\.4\d 1\.4\d-1\.4\d", final)


def test_no_color_is_respected(make_run: MakeRun) -> None:
    console, file = terminal(NO_COLOR="1")
    with SweepView(console, total=1) as view:
        view.row(rows_of(make_run(S=(1024,)))[0])
    assert "ok" in file.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9|10)[0-9]m", file.getvalue())


def test_ctrl_c_leaves_the_finished_cells_and_the_cursor(make_run: MakeRun) -> None:
    console, file = terminal()
    rows = rows_of(make_run(S=(1024,)))

    def interrupted() -> None:
        with SweepView(console, total=2) as view:
            view.begin([cell_of(r) for r in rows], "measuring")
            view.row(rows[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = file.getvalue()
    assert text.rindex(SHOW) > text.rindex(HIDE)
    after = text[text.rindex(SHOW) :]
    assert "sdpa" in after
    assert "1 of 2 cells (1 ok)" in after


def test_closing_twice_says_nothing_more(make_run: MakeRun) -> None:
    for console, file in (terminal(), (Console(file=(pipe := io.StringIO())), pipe)):
        view = SweepView(console, total=1)
        view.row(rows_of(make_run(S=(1024,)))[0])
        view.close()
        before = file.getvalue()
        view.close()
        view.activity("late")
        assert file.getvalue() == before


def test_nothing_finished(make_run: MakeRun) -> None:
    console, file = terminal()
    with SweepView(console, total=3):
        pass
    assert file.getvalue().startswith("0 of 3 cells in 0s")


def test_order_names_the_baseline(make_run: MakeRun) -> None:
    file = io.StringIO()
    with SweepView(Console(file=file), total=2, order=["sdpa", "gather"]) as view:
        for row in rows_of(make_run(S=(1024,)))[::-1]:
            view.row(row)
    assert "speed of gather" not in file.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def last_frame(file: Tty, start: int) -> str:
    file.seek(start)
    return plain(file.read())


def groups_of(run: Run) -> list[list[dict[str, Any]]]:
    by_size: dict[int, list[dict[str, Any]]] = {}
    for row in rows_of(run):
        by_size.setdefault(row["S"], []).append(row)
    return list(by_size.values())


def test_each_worker_has_a_line_and_is_idle_when_its_cells_are_finished(make_run: MakeRun) -> None:
    console, file = terminal()
    first, second, third = groups_of(make_run(baselines=("dense",)))
    with SweepView(console, total=9) as view:
        view.begin([cell_of(r) for r in first], "building")
        assert "worker" not in file.getvalue()
        view.begin([cell_of(r) for r in second], "checking", worker=1)
        view.activity("round 3 of 15", worker=0)
        start = file.tell()
        view.activity("measuring", worker=1)
        frame = last_frame(file, start)
        assert "worker 0: decode fwd S=1024 B=1, 2 routes, dense: round 3 of 15" in frame
        assert "worker 1: decode fwd S=2048 B=1, 2 routes, dense: measuring" in frame
        for row in first:
            start = file.tell()
            view.row(row)
        frame = last_frame(file, start)
        assert "worker 0: idle" in frame
        assert "worker 1: decode fwd S=2048" in frame
        start = file.tell()
        view.begin([cell_of(r) for r in third], "building", worker=0)
        assert "worker 0: decode fwd S=4096" in last_frame(file, start)
        start = file.tell()
        view.activity("", worker=1)
        assert "worker 1: idle" in last_frame(file, start)


def test_more_workers_than_lines_are_counted(make_run: MakeRun) -> None:
    console, file = terminal(height=8)
    (group,) = groups_of(make_run(S=(1024,)))
    with SweepView(console, total=20) as view:
        for worker in range(12):
            start = file.tell()
            view.begin([cell_of(r) for r in group], "building", worker=worker)
        frame = last_frame(file, start)
        assert frame.count("\n") < 8
        assert "worker 4:" in frame
        assert "and 7 workers more" in frame


def test_speed_of_the_sweep_and_failures_by_status(make_run: MakeRun) -> None:
    console, file = terminal()
    clock = Clock()
    failed = {("sdpa", 1024): ("oom", "x"), ("gather", 1024): ("oom", "x"), ("sdpa", 2048): ("hang", "x")}
    rows = rows_of(make_run(S=(1024, 2048), failed=failed))
    with SweepView(console, total=8, clock=clock) as view:
        for row in rows:
            clock.now += 7.5
            start = file.tell()
            view.row(row)
        frame = last_frame(file, start)
        assert "4/8  30s, about 30s left, 8.0 cells/min, 2 oom, 1 hang" in frame
        assert "2 oom, 1 hang" in frame


def test_a_group_of_the_core_says_so(make_run: MakeRun) -> None:
    console, file = terminal()
    rows = rows_of(make_run(S=(1024,), routes=("auto",), scope="core"))
    with SweepView(console, total=1) as view:
        view.begin([cell_of(r) for r in rows], "checking")
        assert "decode fwd S=1024 B=1 core, auto: checking" in plain(file.getvalue())


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("height", [14, 24])
def test_a_frame_fits_its_terminal_and_shows_the_last_cell(
    make_run: MakeRun, width: int, height: int
) -> None:
    file = Tty()
    console = Console(file=file, width=width, height=height, _environ={"TERM": "xterm-256color"})
    routes = ("auto", "cmp=fa2,score=sdpa,sel=triton,win=sdpa")
    run = make_run(S=(1024, 65536), routes=routes, baselines=("dense",), gpu=True)
    with SweepView(console, total=20) as view:
        for worker in range(2):
            view.begin([cell_of(r) for r in rows_of(run)[:3]], "measuring", worker=worker)
        for row in rows_of(run):
            start = file.tell()
            view.row(row, worker=1)
            frame = last_frame(file, start)
            assert frame.count("\n") < height
            assert max(map(len, re.split(r"[\r\n]+", frame))) <= width
        assert "cells/min" in frame
        if height == 24:
            assert "64k" in frame


def test_a_row_is_compared_with_its_own_shape_alone(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the sweep: the work for one row does not grow with the rows before it."""
    sizes: list[int] = []

    def spy(rows: Any, *more: Any, **named: Any) -> Any:
        sizes.append(len(rows))
        return true(rows, *more, **named)

    true = live.compare
    monkeypatch.setattr(live, "compare", spy)
    run = make_run(S=[2**i for i in range(7, 17)])
    with SweepView(Console(file=io.StringIO()), total=20) as view:
        for row in rows_of(run):
            view.row(row)
    assert max(sizes) == 2


def test_the_last_table_of_a_very_long_sweep_is_cut_and_says_so(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MOST_LISTED", 4)
    console, file = terminal()
    with SweepView(console, total=20) as view:
        for row in rows_of(make_run(S=[2**i for i in range(7, 17)])):
            view.row(row)
    final = plain(file.getvalue().split(SHOW)[-1])
    assert len(re.findall(r"(?m)^ *\d+k? +(sdpa|gather) ", final)) == 4
    assert "these are the last 4 cells; nsabench results shows all" in final
