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
