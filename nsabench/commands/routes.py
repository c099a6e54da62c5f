"""`nsabench routes`: the table branch x backend, and what refuses here."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from nsabench.commands import _options as o
from nsabench.commands._console import console, one_line_errors

Length = Annotated[str, typer.Option("--S", metavar="INT", help="Sequence length asked about.")]
Markdown = Annotated[
    bool, typer.Option("--markdown", help="The machine-independent matrix, as in the README.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a row on stdout.")]


def routes(
    S: Length = "2048",
    device: o.Device = "auto",
    dtype: o.Dtype = None,
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Show every branch x backend: whether it runs here, and why not; what `auto` takes."""
    with one_line_errors():
        from nsabench.commands._route_table import matrix_markdown, survey
        from nsabench.commands._sweep import device_of

        if markdown:
            typer.echo(matrix_markdown())
            return
        length = o.size(S, "--S")
        found = survey(S=length, device=device_of(device), dtype=dtype)
        if json:
            for line in found:
                typer.echo(json_module.dumps(line))
            return
        talk = console()
        table = Table(
            title=f"routes on {found[0]['device']}, {found[0]['dtype']}, S = {length}", title_justify="left"
        )
        for header in ("branch", "backend", "passes", "here"):
            table.add_column(header, overflow="fold")
        for line in found:
            here = line["refuses"] or (
                "runs, auto takes it" if line["auto"] else f"runs; auto: {line['passed_over']}"
            )
            table.add_row(line["branch"], line["backend"], " ".join(line["passes"]), Text(here))
        talk.print(table)
        for backend, provider in sorted(
            {(row["backend"], row["provider"]) for row in found if row["provider"]}
        ):
            talk.print(f"{backend} runs through {provider}", markup=False)
