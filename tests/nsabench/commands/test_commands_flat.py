"""Options as dataclasses: what the parser sees, and what the command gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from nsabench.commands._flat import flat


@dataclass(frozen=True)
class Sizes:
    S: Annotated[str | None, typer.Option("--S", help="Lengths.", show_default="512")] = None
    tag: Annotated[list[str] | None, typer.Option("--tag")] = None


@dataclass(frozen=True)
class Output:
    json: Annotated[bool, typer.Option("--json")] = False


seen: list[tuple[str, Sizes, Output]] = []


def measure(name: Annotated[str, typer.Argument()], sizes: Sizes, output: Output) -> None:
    """Measure something."""
    seen.append((name, sizes, output))


@pytest.fixture
def app() -> typer.Typer:
    seen.clear()
    app = typer.Typer()
    app.command()(flat(measure))
    app.command("quiet")(flat(measure, show_defaults=False))
    return app


def test_a_command_gets_its_dataclasses(app: typer.Typer) -> None:
    given = ["measure", "x", "--S", "1k", "--tag", "a", "--tag", "b", "--json"]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert CliRunner().invoke(app, ["quiet", "y"]).exit_code == 0
    assert seen == [("x", Sizes("1k", ["a", "b"]), Output(True)), ("y", Sizes(), Output())]


def test_help_shows_every_field_and_defaults_where_they_hold(app: typer.Typer) -> None:
    shown = CliRunner().invoke(app, ["measure", "--help"]).stdout
    assert "Measure something." in shown
    assert all(word in shown for word in ("--S", "Lengths.", "--tag", "--json", "512"))
    assert "512" not in CliRunner().invoke(app, ["quiet", "--help"]).stdout


def test_what_is_unknown_is_refused(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["measure", "x", "--sizes", "1"]).exit_code == 2
    assert seen == []
