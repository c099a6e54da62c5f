"""Options that sweeps share, and what they mean where they are not given."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nsabench.plan import BASELINES, PEERS, PlanError, parse_ints


@dataclass(frozen=True)
class Model:
    """A layer to measure where none is asked for."""

    what: str
    dim: int
    heads: int
    groups: int
    dk: int
    dv: int
    dtype: str


ON_CPU = Model("a small model for a CPU", dim=256, heads=8, groups=2, dk=32, dv=32, dtype="fp32")
ON_GPU = Model("the size of a 27B model's layer", dim=2560, heads=64, groups=4, dk=128, dv=128, dtype="bf16")

SHAPE, HOW, WHERE = "Shape", "Measuring", "Output"


def _by_device(name: str) -> str:
    return f"{getattr(ON_CPU, name)} on a CPU, {getattr(ON_GPU, name)} on a GPU"


def _axis(
    *names: str, help: str, default: str | bool, metavar: str = "INTS", panel: str | None = SHAPE
) -> typer.models.OptionInfo:
    return typer.Option(*names, metavar=metavar, help=help, show_default=default, rich_help_panel=panel)


Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=HOW)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="fp32, bf16, fp16 or fp64.",
        show_default=_by_device("dtype"),
        rich_help_panel=SHAPE,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where the run's folder goes.", rich_help_panel=WHERE)
]
Plots = Annotated[
    Path,
    typer.Option("--plots", metavar="FOLDER", help="Where the run's figures go.", rich_help_panel=WHERE),
]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Draw no figures.", rich_help_panel=WHERE)]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="One JSON object a cell on stdout, the rest on stderr.", rich_help_panel=WHERE
    ),
]
InProcess = Annotated[
    bool,
    typer.Option(
        "--in-process",
        help="Measure in this process, with no worker: a crash or a hang then ends the run.",
        rich_help_panel=HOW,
    ),
]


# Axes are text here; the declaration of suites reads them: one grammar and one kind of error for both.
@dataclass(frozen=True)
class AxisOptions:
    """What to measure. None is what is not given."""

    S: Annotated[
        str | None,
        _axis("--S", help="Sequence lengths: 512,1024 or 1k:64k:x2.", default="512,1024,2048", panel=None),
    ] = None
    routes: Annotated[
        str | None,
        _axis(
            "--routes",
            "--route",
            metavar="ROUTES",
            help="Routes to measure side by side, separated by ';': auto, a backend, cmp=..,sel=..,win=.. "
            "(a branch may be off), or env. `nsabench routes` lists the backends.",
            default="auto",
            panel=None,
        ),
    ] = None
    impl: Annotated[
        str | None,
        _axis(
            "--impl",
            metavar="NAMES",
            help="What to measure: nsa, by its routes, dense attention as dense, dense:flash, ... or all, or "
            f"another's NSA as {', '.join(PEERS)}; several with commas between.",
            default="nsa",
            panel=None,
        ),
    ] = None
    baselines: Annotated[
        str | None,
        _axis(
            "--baseline",
            "--baselines",
            metavar="NAMES",
            help="Dense attention to measure beside it, in the same rounds: dense (what torch picks), "
            f"{', '.join(BASELINES[1:])}, all of them, or none.",
            default="none",
            panel=None,
        ),
    ] = None
    scope: Annotated[
        str | None,
        _axis(
            "--scope",
            metavar="SCOPES",
            help="What is timed: module (the layer), core (the attention alone) or both: module,core.",
            default="module",
            panel=None,
        ),
    ] = None
    B: Annotated[str | None, _axis("--B", help="Batch sizes; as all sizes, a list as --S.", default="1")] = (
        None
    )
    dim: Annotated[str | None, _axis("--dim", help="Model width.", default=_by_device("dim"))] = None
    heads: Annotated[str | None, _axis("--heads", help="Query heads.", default=_by_device("heads"))] = None
    groups: Annotated[
        str | None, _axis("--groups", help="KV heads; they divide --heads.", default=_by_device("groups"))
    ] = None
    dk: Annotated[str | None, _axis("--dk", help="Key dim of a head.", default=_by_device("dk"))] = None
    dv: Annotated[str | None, _axis("--dv", help="Value dim of a head.", default="as --dk")] = None
    l: Annotated[str | None, _axis("--l", help="Compression block size, tokens.", default="32")] = None
    d: Annotated[str | None, _axis("--d", help="Compression stride, tokens.", default="16")] = None
    l_sel: Annotated[str | None, _axis("--l-sel", help="Selection block size, tokens.", default="64")] = None
    n_sel: Annotated[str | None, _axis("--n-sel", help="Selected blocks per query.", default="16")] = None
    w: Annotated[str | None, _axis("--w", help="Sliding window, tokens.", default="512")] = None
    dtype: Annotated[
        str | None,
        _axis("--dtype", metavar="DTYPES", help="fp32, bf16, fp16 or fp64.", default=_by_device("dtype")),
    ] = None
    selection: Annotated[
        str | None,
        _axis(
            "--selection",
            metavar="KINDS",
            help="How blocks come to be selected: natural, by the layer's own scores; random; overlap=X, in "
            "which neighbouring queries share that part, 0 to 0.95; file=PATH, as --save-selection wrote. "
            "The scores are computed and timed in each.",
            default="natural",
        ),
    ] = None
    device: Annotated[
        str | None,
        _axis("--device", metavar="DEVICES", help="auto, cpu, cuda or cuda:N.", default="auto", panel=HOW),
    ] = None
    seed: Annotated[
        str | None,
        _axis("--seed", help="Seed of weights, inputs and the order in a round.", default="0", panel=HOW),
    ] = None


@dataclass(frozen=True)
class PromptOptions:
    """What else to measure of a prefill."""

    passes: Annotated[
        str | None,
        _axis(
            "--passes",
            metavar="PASSES",
            help="fwd, bwd, fwd_bwd, or several: fwd,bwd.",
            default="fwd",
            panel=None,
        ),
    ] = None
    mode: Annotated[
        str | None,
        _axis(
            "--mode",
            metavar="MODES",
            help="How the prompt goes in: batched (at once), chunked=N (N tokens a call), stepwise or env.",
            default="batched",
            panel=None,
        ),
    ] = None


@dataclass(frozen=True)
class CaptureOptions:
    """What a prefill can be captured for."""

    save_selection: Annotated[
        Path | None,
        typer.Option(
            "--save-selection",
            metavar="FILE",
            help="Time nothing: write the blocks that one cell of NSA selects to a new file, for "
            "--selection file=FILE.",
            show_default=False,
            rich_help_panel=WHERE,
        ),
    ] = None


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure. None is what is not given."""

    rounds: Annotated[
        str | None,
        _axis(
            "--rounds",
            metavar="INT",
            help="Rounds, each of which times every arm once; an interval needs 6.",
            default="15",
            panel=HOW,
        ),
    ] = None
    sample_ms: Annotated[
        float | None,
        _axis(
            "--sample-ms",
            metavar="MS",
            help="Steps are repeated to fill this many ms a sample.",
            default="20",
            panel=HOW,
        ),
    ] = None
    timer: Annotated[
        str | None,
        _axis(
            "--timer",
            metavar="TIMER",
            help="auto, cpu, host, event or graph. auto: on a GPU graph for decode, event for prefill.",
            default="auto",
            panel=HOW,
        ),
    ] = None
    regime: Annotated[
        str | None,
        _axis(
            "--regime",
            metavar="REGIME",
            help="latency (one step at a time) or sustained (back to back, warm).",
            default="latency",
            panel=HOW,
        ),
    ] = None
    cache: Annotated[
        str | None,
        _axis(
            "--cache",
            metavar="STATE",
            help="cold or warm: the last-level cache before each step. auto: cold for decode, else warm.",
            default="auto",
            panel=HOW,
        ),
    ] = None
    shares: Annotated[
        bool | None,
        typer.Option(
            "--shares/--no-shares",
            help="Measure each stage inside the step.",
            show_default="shares",
            rich_help_panel=HOW,
        ),
    ] = None
    share_runs: Annotated[
        str | None,
        _axis(
            "--share-runs", metavar="INT", help="Steps in which stages are measured.", default="20", panel=HOW
        ),
    ] = None
    alone: Annotated[
        bool | None,
        typer.Option(
            "--alone/--no-alone",
            help="Measure each branch run by itself.",
            show_default="alone",
            rich_help_panel=HOW,
        ),
    ] = None
    timeout: Annotated[
        str | None,
        _axis(
            "--timeout",
            metavar="TIME",
            help="Longest a cell may take, as 90s or 10m; one that takes longer is a row that says so.",
            default="10m",
            panel=HOW,
        ),
    ] = None
    budget: Annotated[
        str | None,
        _axis(
            "--budget",
            metavar="TIME",
            help="Time for the whole run, as 9m: what tells most comes first, what does not fit is left for "
            "`nsabench resume`.",
            default="none",
            panel=HOW,
        ),
    ] = None
    in_process: InProcess = False


@dataclass(frozen=True)
class OutputOptions:
    """What is left behind."""

    out: Out = Path("results")
    plots: Plots = Path("plots")
    no_plots: NoPlots = False
    json: Json = False
    tag: Annotated[
        list[str] | None,
        typer.Option(
            "--tag", metavar="WORD", help="A word to find the run by; may be repeated.", rich_help_panel=WHERE
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be measured, in which order, what it would take and what cannot run here.",
            rich_help_panel=WHERE,
        ),
    ] = False


@dataclass(frozen=True)
class SweepOptions:
    """What else a command of one sweep can do."""

    find_max_S: Annotated[
        bool,
        typer.Option(
            "--find-max-S",
            help="Time nothing: find each arm's longest S that fits into memory, from the smallest --S on.",
            rich_help_panel=HOW,
        ),
    ] = False
    memory_limit: Annotated[
        str | None,
        _axis(
            "--memory-limit",
            metavar="SIZE",
            help="With --find-max-S: the memory to fit into, as 2GiB.",
            default="what is free",
            panel=HOW,
        ),
    ] = None
    save_suite: Annotated[
        Path | None,
        typer.Option(
            "--save-suite",
            metavar="FILE",
            help="Write this sweep as a suite to a new file, and go on.",
            show_default=False,
            rich_help_panel=WHERE,
        ),
    ] = None


def axes_given(*options: object) -> dict[str, str]:
    """The axes that were given, by name, as text."""
    given = {name: value for part in options for name, value in vars(part).items() if value is not None}
    if "mode" in given:
        given["mode"] = ",".join(mode_of(mode.strip(), os.environ) for mode in given["mode"].split(","))
    return given


def mode_of(mode: str, environ: Mapping[str, str]) -> str:
    """`env` settled as an earlier code did: batched where NSA_PREFILL_BATCHED is on, else token by token."""
    if mode != "env":
        return mode
    on = environ.get("NSA_PREFILL_BATCHED", "").strip().lower() in ("1", "true", "yes", "on")
    return "batched" if on else "stepwise"


def option_of(axis: str) -> str:
    """The option of an axis: ``--l-sel``, ``--baseline``."""
    return "--baseline" if axis == "baselines" else f"--{axis.replace('_', '-')}"


def size(text: str, name: str, minimum: int = 1) -> int:
    """The number that option ``name`` gives, as ``512`` or ``4k``; PlanError for anything else."""
    if re.fullmatch(r"-?[0-9]+[kKmM]?", text.strip()) is None:
        raise PlanError(f"{name}: {text!r} is not a whole number")
    return parse_ints(text, name=name, minimum=minimum)[0]
