"""The options of `nsabench compare`, most of them those of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import typer

from nsabench.commands import _options as o
from nsabench.plan import PlanError


def option_as(options: type, name: str) -> typer.models.OptionInfo:
    """The option that sweeps have by that name."""
    found: typer.models.OptionInfo = get_args(get_type_hints(options, include_extras=True)[name])[1]
    return found


def _axis(name: str) -> typer.models.OptionInfo:
    return option_as(o.PromptOptions if name in ("passes", "mode") else o.AxisOptions, name)


def _how(*names: str, metavar: str, help: str, default: str) -> typer.models.OptionInfo:
    return typer.Option(*names, metavar=metavar, help=help, show_default=default, rich_help_panel=o.HOW)


@dataclass(frozen=True)
class SharedOptions:
    """What the sides have in common unless they say otherwise. None is what is not given."""

    S: Annotated[str | None, _axis("S")] = None
    passes: Annotated[str | None, _axis("passes")] = None
    mode: Annotated[str | None, _axis("mode")] = None
    scope: Annotated[str | None, _axis("scope")] = None
    B: Annotated[str | None, _axis("B")] = None
    dim: Annotated[str | None, _axis("dim")] = None
    heads: Annotated[str | None, _axis("heads")] = None
    groups: Annotated[str | None, _axis("groups")] = None
    dk: Annotated[str | None, _axis("dk")] = None
    dv: Annotated[str | None, _axis("dv")] = None
    l: Annotated[str | None, _axis("l")] = None
    d: Annotated[str | None, _axis("d")] = None
    l_sel: Annotated[str | None, _axis("l_sel")] = None
    n_sel: Annotated[str | None, _axis("n_sel")] = None
    w: Annotated[str | None, _axis("w")] = None
    dtype: Annotated[str | None, _axis("dtype")] = None
    selection: Annotated[str | None, _axis("selection")] = None
    device: Annotated[str | None, _axis("device")] = None
    seed: Annotated[str | None, _axis("seed")] = None


@dataclass(frozen=True)
class EffortOptions:
    """How to measure, and when it is enough. None is what is not given."""

    rounds: Annotated[
        str | None,
        _how("--rounds", metavar="INT", help="Rounds of a process; an interval needs 6.", default="15"),
    ] = None
    processes: Annotated[
        str | None,
        _how("--processes", metavar="INT", help="Fresh processes at least, 1 to 20.", default="3"),
    ] = None
    width: Annotated[
        str | None,
        _how(
            "--width",
            metavar="PERCENT",
            help="Enough is measured when the interval of every ratio is no wider.",
            default="0.5%",
        ),
    ] = None
    budget: Annotated[
        str | None,
        _how(
            "--budget",
            metavar="TIME",
            help="Time for processes beyond --processes, those included, all shapes together.",
            default="2m",
        ),
    ] = None
    sample_ms: Annotated[float | None, option_as(o.MeasureOptions, "sample_ms")] = None
    timer: Annotated[str | None, option_as(o.MeasureOptions, "timer")] = None
    cache: Annotated[str | None, option_as(o.MeasureOptions, "cache")] = None
    regime: Annotated[str | None, option_as(o.MeasureOptions, "regime")] = None
    timeout: Annotated[str | None, option_as(o.MeasureOptions, "timeout")] = None
    shares: Annotated[
        bool,
        typer.Option(
            "--shares/--no-shares", help="Measure each stage inside the step, too.", rich_help_panel=o.HOW
        ),
    ] = False
    alone: Annotated[
        bool,
        typer.Option(
            "--alone/--no-alone", help="Measure each branch run by itself, too.", rich_help_panel=o.HOW
        ),
    ] = False


@dataclass(frozen=True)
class VerdictOptions:
    """How to judge, and what comes of it."""

    delta: Annotated[
        str,
        typer.Option(
            "--delta",
            metavar="PERCENT",
            help="Margin: a difference in time no larger counts as none.",
            rich_help_panel="Verdicts",
        ),
    ] = "1%"
    correct: Annotated[
        str,
        typer.Option(
            "--correct",
            metavar="METHOD",
            help="How several verdicts are corrected for their number: holm (no false alarm among them) or "
            "bh (few of the alarms false).",
            rich_help_panel="Verdicts",
        ),
    ] = "bh"
    fail_if: Annotated[
        str | None,
        typer.Option(
            "--fail-if",
            metavar="WORD",
            help="Exit code 1 if any side is slower, faster or different.",
            show_default=False,
            rich_help_panel="Verdicts",
        ),
    ] = None


@dataclass(frozen=True)
class ResultOptions:
    """What is left behind."""

    out: o.Out = Path("results")
    plots: o.Plots = Path("plots")
    no_plots: o.NoPlots = False
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="One JSON object a verdict on stdout, the rest on stderr.", rich_help_panel=o.WHERE
        ),
    ] = False
    tag: Annotated[list[str] | None, option_as(o.OutputOptions, "tag")] = None


def given(*options: object) -> list[str]:
    """The names of the options that were given."""
    names = [(one.name, getattr(part, one.name)) for part in options for one in fields(part)]  # type: ignore[arg-type]
    return [o.option_of(name) for name, value in names if value not in (None, False)]


def part_of_one(text: str, name: str) -> float:
    """The fraction that ``text`` says, as ``1%`` or ``0.01``; PlanError for what is not between 0 and 1."""
    number = text.strip()
    percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise PlanError(f"{name}: {text!r} is not allowed; allowed: 1% or 0.01, above 0 and below 100%")
    return value


def one_of(word: str, name: str, words: tuple[str, ...]) -> str:
    """``word``; PlanError unless it is one of ``words``."""
    if word not in words:
        raise PlanError(f"{name}: {word!r} is unknown; allowed: {', '.join(words)}")
    return word
