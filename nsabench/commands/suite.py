"""`nsabench suite`: declared sweeps, listed, shown and run."""

from __future__ import annotations

import json as json_module
import shlex
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nsabench.commands import _options as o
from nsabench.commands._console import console, one_line_errors
from nsabench.commands._flat import flat

if TYPE_CHECKING:
    from nsabench.plan import Suite, Sweep

suite = typer.Typer(
    name="suite",
    help="Declared sweeps: list, show and run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A suite in ./suites or of nsabench itself, or the path of a TOML file."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


@suite.command("list")
def list_suites(json: Json = False) -> None:
    """List the suites in ./suites and those of nsabench itself."""
    with one_line_errors():
        from nsabench.plan import load_suite, suite_files

        found = [(path, load_suite(path)) for path in suite_files().values()]
        if json:
            for path, one in found:
                typer.echo(json_module.dumps({"name": one.name, "path": str(path), **one.to_dict()}))
            return
        table = Table()
        for header in ("suite", "about", "tags", "sweeps"):
            table.add_column(header, overflow="fold", justify="right" if header == "sweeps" else "left")
        for _, one in found:
            table.add_row(one.name, one.about, " ".join(one.tags), str(len(one.sweeps)))
        console().print(table)


@suite.command("show")
def show(name: Name, json: Json = False) -> None:
    """Show a suite: its sweeps, its criteria, and the command line that does the same as each sweep."""
    with one_line_errors():
        from nsabench.plan import find_suite, load_suite
        from nsabench.plan.criteria import wanted_of

        path = find_suite(name)
        one = load_suite(path)
        if json:
            typer.echo(json_module.dumps({"name": one.name, "path": str(path), **one.to_dict()}, indent=2))
            return
        talk = console()
        talk.print(f"{one.name}: {one.about}", soft_wrap=True, markup=False)
        talk.print(f"file: {path}", soft_wrap=True, markup=False)
        if one.tags:
            talk.print(f"tags: {' '.join(one.tags)}", soft_wrap=True, markup=False)
        if one.policy:
            settings = (f"{name} {value}" for name, value in one.policy.items())
            talk.print(f"policy: {', '.join(settings)}", soft_wrap=True, markup=False)
        talk.print(_sweeps(one))
        talk.print("each sweep by itself:")
        for sweep in one.resolved():
            talk.print(f"{sweep.number}: {command_line(one, sweep)}", soft_wrap=True, markup=False)
        for wanted in wanted_of(one.criteria):
            talk.print(f"wanted: {wanted.words}", soft_wrap=True, markup=False)


@suite.command("schema")
def schema() -> None:
    """Print the JSON Schema of a suite's file, for editors and other tools."""
    from nsabench.plan import json_schema

    typer.echo(json_module.dumps(json_schema(), indent=2))


def run(
    name: Name,
    axes: o.AxisOptions,
    prompt: o.PromptOptions,
    measure: o.MeasureOptions,
    output: o.OutputOptions,
) -> None:
    """Run a suite. An option replaces what the suite says, in each of its sweeps."""
    with one_line_errors():
        from nsabench.commands._planned import carry_out
        from nsabench.plan import find_suite, load_suite

        given = o.axes_given(axes, prompt)
        one = load_suite(find_suite(name)).overridden(given, o.option_of)
        code = carry_out(one, measure, output)
    raise typer.Exit(code)


suite.command("run")(flat(run, show_defaults=False))


def _sweeps(one: Suite) -> Table:
    """The sweeps in the order in which they are measured."""
    table = Table()
    for header in ("#", "phase", "S", "arms", "with"):
        table.add_column(header, overflow="fold", justify="right" if header == "#" else "left")
    for sweep in one.resolved():
        of_nsa = "nsa" in sweep.axes.get("impl", ("nsa",))
        others = ",".join(filter(None, (sweep.text("impl").removeprefix("nsa"), sweep.text("baselines"))))
        arms = [(sweep.text("routes") or "auto") if of_nsa else "", others.strip(",")]
        rest = (axis for axis in sweep.axes if axis not in ("S", "impl", "routes", "baselines"))
        table.add_row(
            str(sweep.number),
            sweep.phase + (", headline" if sweep.headline else ""),
            sweep.text("S"),
            "; ".join(arm for arm in arms if arm),
            ", ".join(f"{axis} {sweep.text(axis)}" for axis in rest),
        )
    return table


def command_line(one: Suite, sweep: Sweep) -> str:
    """The command that measures one sweep of a suite; a budget is the whole suite's and left out."""
    words = ["nsabench", sweep.phase]
    for axis in sweep.axes:
        words += [o.option_of(axis), sweep.text(axis)]
    for name, value in one.policy.items():
        words += _policy_words(name, value)
    return shlex.join(words)


def _policy_words(name: str, value: object) -> list[str]:
    match name, value:
        case "budget", _:
            return []
        case "timeout_s", _:
            return ["--timeout", f"{value:g}s"]
        case _, bool():
            return [f"--{name}" if value else f"--no-{name}"]
        case _:
            return [o.option_of(name), f"{value:g}" if isinstance(value, float) else str(value)]
