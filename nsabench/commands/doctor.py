"""`nsabench doctor`: the machine as a benchmark sees it."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from nsabench.commands._console import console, one_line_errors

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
    str, typer.Option("--device", metavar="DEVICE", help="What to calibrate: auto, cpu, cuda or cuda:N.")
]


def doctor(calibrate: Calibrate = False, device: Device = "auto", json: Json = False) -> None:
    """Show this machine, its libraries, its peaks, and what stands in the way of good numbers."""
    with one_line_errors():
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


def _text(value: Any) -> str:
    return "-" if value in (None, "", []) else str(value)
