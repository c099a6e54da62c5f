"""Assembles the commands; no logic of its own."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nsabench import __version__
from nsabench.commands._flat import flat
from nsabench.commands.compare import compare
from nsabench.commands.decode import decode
from nsabench.commands.doctor import doctor
from nsabench.commands.merge import merge
from nsabench.commands.peers import peers
from nsabench.commands.plot import plot
from nsabench.commands.prefill import prefill
from nsabench.commands.profile import profile
from nsabench.commands.report import report
from nsabench.commands.results import results
from nsabench.commands.resume import resume
from nsabench.commands.routes import routes
from nsabench.commands.suite import suite
from nsabench.commands.train import train
from nsabench.commands.verify import verify

INTERRUPTED = 130

app = typer.Typer(
    name="nsabench",
    help="Measure Native Sparse Attention: how fast, through which backend, and whether it was right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nsabench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


for command in (
    flat(decode),
    flat(prefill),
    flat(compare),
    flat(profile),
    flat(train),
    verify,
    resume,
    results,
    merge,
    plot,
    report,
    routes,
    doctor,
    peers,
):
    app.command()(command)
app.add_typer(suite)


def main() -> None:
    """The `nsabench` command. What the parser refuses ends like any bad usage: one line, exit code 2."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        code = _exit_code(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _exit_code(error: Exception) -> int:
    """Say what the parser's own errors mean, whichever copy of click typer has; others are raised."""
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    if not hasattr(error, "format_message"):
        raise error
    message = " ".join(error.format_message().split()).rstrip(".")
    sys.stderr.write(f"nsabench: {message or 'no command given'}; see nsabench --help\n")
    return 2
