"""A scorecard from its options to what it says: checked, stored as it goes, shown."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from nsabench.commands._console import CHECK_FAILED, GOOD, INTERRUPTED, console, fail
from nsabench.commands._sweep import device_of
from nsabench.commands.verify import FORMATS
from nsabench.plan import PlanError, tags_of
from nsabench.plan.checks import Choice
from nsabench.present.scorecard import counts_text, row_line, scorecard_view
from nsabench.present.scorecard_markdown import scorecard_csv, scorecard_markdown
from nsabench.present.wording import duration_text
from nsabench.store import TableRun, capture_environment
from nsabench.store.scorecard import KIND, SCORECARD_TABLES, failed_rows, load_scorecard, store_scores
from nsabench.verify import run_scorecard
from nsabench.verify.ours import subjects_for
from nsabench.verify.peer_subjects import absent_rows, peer_subjects, spelled_out

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """What goes to stdout. Where that is for programs, people are told on stderr."""

    format: str
    json_lines: bool

    @classmethod
    def of(cls, format: str, *, json_lines: bool) -> Self:
        """PlanError for an unknown format, or two at once."""
        if format not in FORMATS:
            raise PlanError(f"--format: {format!r} is unknown; allowed: {', '.join(FORMATS)}")
        if json_lines and format != FORMATS[0]:
            raise PlanError(f"--json and --format {format} both want stdout; give one")
        return cls(format, json_lines)

    @property
    def for_people(self) -> bool:
        """Whether stdout is for people."""
        return self.format == "table" and not self.json_lines


def choice_of(
    *, full: bool, device: str, dtype: str | None, subjects: str | None, rules: str | None, peers: bool
) -> Choice:
    """What the options mean. PlanError in one line names the option, what was given and what is allowed."""
    names = _names(subjects, "--subjects")
    return Choice(
        level="full" if full else "quick",
        device=device_of(device),
        dtypes=_names(dtype, "--dtype"),
        subjects=spelled_out(names) if peers else names,
        rules=_names(rules, "--rules"),
        peers=peers,
    )


def _names(text: str | None, option: str) -> tuple[str, ...]:
    if text is None:
        return ()
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise PlanError(f"{option}: no name given")
    return found


def check_all(choice: Choice, shown: Shown, *, out: Path, tags: Sequence[str], strict_peers: bool) -> int:
    """Check, store and show; returns the exit code."""
    theirs = peer_subjects(choice)
    subjects_for(choice, theirs)  # an unknown name ends here, before there is a run
    peers = [subject.name for subject in theirs]
    absent = absent_rows() if choice.peers and not choice.subjects else []
    peers += [row["subject"] for row in absent]
    talk = console(stderr=not shown.for_people)
    with TableRun.create(
        out,
        kind=KIND,
        name="verify",
        argv=sys.argv[1:],
        repro=shlex.join(["nsabench", *sys.argv[1:]]),
        environment=capture_environment(),
        tables=SCORECARD_TABLES,
        tags=tags_of(tags, "--tag"),
        device=choice.device,
        level=choice.level,
        peers=peers,
        status="running",
    ) as run:
        rows = _check(choice, run, absent, ScorecardProgress(talk, json_lines=shown.json_lines))
    _show(rows, peers, shown, talk)
    failed = failed_rows(rows, () if strict_peers else peers)
    talk.print(f"results: {run.path}", soft_wrap=True, markup=False)
    return CHECK_FAILED if failed else GOOD


def _check(choice: Choice, run: TableRun, absent: Sequence[Row], view: ScorecardProgress) -> list[Row]:
    """Put the rules; every row is on disk before the next is asked for. Returns the rows as stored."""
    peers, began = run.info["peers"], time.monotonic()

    def keep(row: Row) -> None:
        store_scores(run, row)
        view.row({"run_id": run.run_id, **row})

    def close(status: str) -> list[Row]:
        rows = load_scorecard(run.path).rows
        run.note(status=status, summary=counts_text(rows, peers), seconds=time.monotonic() - began)
        return rows

    with view:
        try:
            run_scorecard(choice, keep, view.told)
            for row in absent:
                keep(row)
        except KeyboardInterrupt:
            close("interrupted")
            raise fail(f"interrupted; what was checked is in {run.path}", INTERRUPTED) from None
    rows = close("done")
    if not any(row["status"] != "unsupported" for row in rows):
        view.told("nothing of this could run here: see the reasons", stays=True)
    return rows


def _show(rows: Sequence[Row], peers: Sequence[str], shown: Shown, talk: Console) -> None:
    if shown.for_people:
        for part in scorecard_view(rows, peers=peers, width=talk.width):
            talk.print(part)
    elif shown.format == "markdown":
        typer.echo(scorecard_markdown(rows, peers=peers))
    elif shown.format == "csv":
        typer.echo(scorecard_csv(rows), nl=False)
    talk.print(counts_text(rows, peers), markup=False)


class ScorecardProgress:
    """What is seen of a scorecard as it is checked: on a terminal one line that changes, elsewhere a line for
    each rule; failures stay in either. With ``json_lines`` each row is an object on stdout.
    """

    def __init__(
        self, talk: Console, *, json_lines: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._talk, self._json, self._clock = talk, json_lines, clock
        self._began = clock()
        self._rows = self._failed = 0
        self._doing = ""
        self._rule: list[Row] = []
        drawn = talk.is_interactive and talk.file.isatty()
        self._live = Live(console=talk, auto_refresh=False, transient=True) if drawn else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live is not None:
            self._live.stop()
        self._end_rule()

    def told(self, text: str, stays: bool = False) -> None:
        """What is being done now; ``stays``: a line to keep."""
        if stays:
            self._print(text)
        self._doing = text
        self._draw()

    def row(self, row: Row) -> None:
        """A row is stored."""
        if self._rule and row["rule"] != self._rule[0]["rule"]:
            self._end_rule()
        self._rule.append(row)
        self._rows += 1
        if self._json:
            typer.echo(json.dumps({n: None if v == "" else v for n, v in row.items()}, allow_nan=False))
        if row["status"] == "fail":
            self._failed += 1
            self._print(row_line(row), style="red")
        self._draw()

    def _end_rule(self) -> None:
        if self._rule and self._live is None:
            took = duration_text(sum(row["seconds"] or 0.0 for row in self._rule))
            self._print(f"{self._rule[0]['rule']}: {counts_text(self._rule)} in {took}")
        self._rule = []

    def _print(self, text: str, style: str = "") -> None:
        self._talk.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def _draw(self) -> None:
        if self._live is None:
            return
        elapsed = duration_text(self._clock() - self._began)
        line = Text(f"{self._rows} rows, ", no_wrap=True, overflow="ellipsis")
        line.append(f"{self._failed} failed", style="red" if self._failed else "")
        line.append(f", {elapsed}: {self._doing}")
        self._live.update(line, refresh=True)
