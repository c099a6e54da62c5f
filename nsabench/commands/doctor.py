"""`nsabench doctor`: the machine as a benchmark sees it."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from nsabench.commands._console import (
    CHECK_FAILED,
    GOOD,
    INTERRUPTED,
    MACHINE_FAILED,
    complain,
    console,
    one_line_errors,
)
from nsabench.plan import PlanError, parse_duration

Json = Annotated[bool, typer.Option("--json", help="The same as one JSON object on stdout.")]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Measure this machine's peaks first (copy bandwidth, matrix rates, overheads) and keep them: "
        "later runs say what part of them a step reaches, and refuse what is beyond.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", help="What to calibrate or test on: auto, cpu, cuda or cuda:N."
    ),
]
SelfTest = Annotated[
    bool,
    typer.Option(
        "--self-test",
        help="Plant truths on this machine and count what is found: equal work, steps 1, 2 and 5 % slower, "
        "a wrong result, a fallback, a neighbour, a hang, a crash. A few minutes; exit code 1 where too "
        "little is found.",
    ),
]
Runs = Annotated[
    int | None,
    typer.Option(
        "--runs",
        metavar="INT",
        help="Comparisons of equal work in a self-test, half as many of 5 % and of 2 % slower; 200 take "
        "hours.",
        show_default="4",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="TIME",
        help="Time for each comparison of a self-test.",
        show_default="20s for 5 % and equal work, else 1m",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Where a self-test keeps what it found, and goes on if it was interrupted.",
        show_default="results/self-test-<time>-<commit>.jsonl",
    ),
]


def doctor(
    calibrate: Calibrate = False,
    self_test: SelfTest = False,
    runs: Runs = None,
    budget: Budget = None,
    out: Out = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show this machine, its libraries, its peaks, and what stands in the way of good numbers."""
    with one_line_errors():
        if self_test:
            if calibrate:
                raise PlanError("--self-test: not together with --calibrate; calibrate first")
            raise typer.Exit(_tested(device, runs, budget, out, json))
        for name, value in (("--runs", runs), ("--budget", budget), ("--out", out)):
            if value is not None:
                raise PlanError(f"{name}: only with --self-test")
        from nsabench.commands._diagnosis import calibrate_device, diagnose

        if calibrate:
            calibrate_device(device, tell=console(stderr=True).print)
        found = diagnose()
        if json:
            typer.echo(json_module.dumps(found, indent=1))
            return
        talk = console()
        table = Table(title="this machine", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in found["machine"].items():
            table.add_row(name, Text(_text(value)))
        talk.print(table)
        for finding in found["findings"]:
            talk.print(f"{finding['level']:>4}  {finding['text']}", markup=False, soft_wrap=True)


def _tested(device: str, runs: int | None, budget: str | None, out: Path | None, json: bool) -> int:
    """Test the bench itself; the exit code."""
    from nsabench.commands import _self_test as s

    count = s.QUICK if runs is None else runs
    if not 1 <= count <= 10_000:
        raise PlanError(f"--runs: {count} is not allowed; allowed: 1 to 10000")
    limit_s = None if budget is None else parse_duration(budget, name="--budget")
    talk = console(stderr=json)
    try:
        found, whole = s.self_test(
            device, count, limit_s, out, lambda text: talk.print(text, markup=False, soft_wrap=True)
        )
    except (s.WorkerError, s.NoNeighbour) as error:
        complain(f"{error}; what was found so far is kept")
        return MACHINE_FAILED
    talk.print(s.table_of(found))
    talk.print(f"{found['seconds'] / 60:.1f} min in all; kept in {found['file']}", markup=False)
    if json:
        typer.echo(json_module.dumps(found, indent=1))
    if not whole:
        complain(f"interrupted; --self-test --out {found['file']} goes on")
        return INTERRUPTED
    return CHECK_FAILED if s.broken(found) else GOOD


def _text(value: Any) -> str:
    return "-" if value in (None, "", []) else str(value)
