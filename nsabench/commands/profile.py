"""`nsabench profile`: one cell looked into, or kernels compiled for GPUs that are not here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from nsabench.commands import _compare_options as c
from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors
from nsabench.plan import PlanError

PHASES = ("prefill", "decode")
ROUNDS = "6"
ARCHS = "sm_80,sm_90,sm_100,sm_120"
STATIC = "Static"

Phase = Annotated[
    str | None,
    typer.Argument(metavar="[PHASE]", help="prefill or decode; none with --static.", show_default=False),
]


@dataclass(frozen=True)
class BriefOptions:
    """How to measure, as sweeps do, but briefly. None is what is not given."""

    rounds: Annotated[
        str | None,
        typer.Option(
            "--rounds", metavar="INT", help="Rounds of timing.", show_default=ROUNDS, rich_help_panel=o.HOW
        ),
    ] = None
    sample_ms: Annotated[float | None, c.option_as(o.MeasureOptions, "sample_ms")] = None
    timer: Annotated[str | None, c.option_as(o.MeasureOptions, "timer")] = None
    cache: Annotated[str | None, c.option_as(o.MeasureOptions, "cache")] = None
    timeout: Annotated[str | None, c.option_as(o.MeasureOptions, "timeout")] = None
    in_process: o.InProcess = False


@dataclass(frozen=True)
class LookOptions:
    """What is shown and left behind."""

    top: Annotated[
        int,
        typer.Option(
            "--top",
            metavar="INT",
            min=1,
            help="Kernels to list; the others are summed. kernels.csv has all.",
            rich_help_panel=o.WHERE,
        ),
    ] = 12
    out: o.Out = Path("results")
    plots: o.Plots = Path("plots")
    no_plots: o.NoPlots = False
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="One JSON object on stdout, the rest on stderr.", rich_help_panel=o.WHERE
        ),
    ] = False
    tag: Annotated[list[str] | None, c.option_as(o.OutputOptions, "tag")] = None


@dataclass(frozen=True)
class StaticOptions:
    """Compiling instead of measuring. None is what is not given."""

    static: Annotated[
        bool,
        typer.Option(
            "--static",
            help="Measure nothing: compile Triton kernels, with no GPU, and show registers, spills, shared "
            "memory, occupancy and matrix instruction.",
            rich_help_panel=STATIC,
        ),
    ] = False
    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="ARCHS",
            help="With --static: GPU architectures to compile for.",
            show_default=ARCHS,
            rich_help_panel=STATIC,
        ),
    ] = None
    module: Annotated[
        list[str] | None,
        typer.Option(
            "--module",
            metavar="MODULE",
            help="With --static: compile what this module offers as STATIC; may be repeated.",
            show_default="this project's kernels",
            rich_help_panel=STATIC,
        ),
    ] = None


def profile(
    shared: o.AxisOptions,
    prompt: o.PromptOptions,
    brief: BriefOptions,
    look: LookOptions,
    compiling: StaticOptions,
    phase: Phase = None,
) -> None:
    """Look into one cell: its kernels by stage, a trace, its memory, its roofline, and what to give to ncu.

    The cell is checked and timed first, as in a sweep, and is a stored run like any other.

    With --static, kernels are compiled for GPUs that need not be here.
    """
    with one_line_errors():
        if compiling.static:
            _refuse_measuring(phase, shared, prompt, brief, look)
            from nsabench.commands._static import show_static

            code = show_static((compiling.arch or ARCHS).split(","), compiling.module, json_lines=look.json)
        else:
            for name in ("arch", "module"):
                if getattr(compiling, name) is not None:
                    raise PlanError(f"--{name}: only with --static")
            if phase is None:
                raise PlanError(f"profile takes a phase ({' or '.join(PHASES)}), or --static")
            c.one_of(phase, "phase", PHASES)
            from nsabench.commands._profile import look_into

            code = look_into(phase, o.axes_given(shared, prompt), brief, look)
    raise typer.Exit(code)


def _refuse_measuring(phase: str | None, *options: object) -> None:
    """PlanError for what only says how to measure, or what becomes of it."""
    given = [] if phase is None else [phase]
    for part in options:
        for one in fields(part):  # type: ignore[arg-type]
            if one.name != "json" and getattr(part, one.name) != one.default:
                given.append(o.option_of(one.name))
    for name in given:
        raise PlanError(f"{name}: not with --static, which measures nothing")
