"""Options that sweeps share, and what they mean where they are not given."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nsabench.plan import PlanError, parse_ints


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


def _size(name: str, help: str, default: str | bool = True) -> typer.models.OptionInfo:
    return typer.Option(name, metavar="INT", help=help, show_default=default, rich_help_panel=SHAPE)


# Sizes are text here and become numbers in `size`: one grammar and one kind of error for all of them.
Lengths = Annotated[str, typer.Option("--S", metavar="INTS", help="Sequence lengths: 512,1024 or 1k:64k:x2.")]
Routes = Annotated[
    str,
    typer.Option(
        "--routes",
        "--route",
        metavar="ROUTES",
        help="Routes to measure side by side, separated by ';': auto, a backend, cmp=..,sel=..,win=.. "
        "(a branch may be off), or env. `nsabench routes` lists the backends.",
    ),
]
Batches = Annotated[
    str, typer.Option("--B", metavar="INTS", help="Batch sizes, as --S.", rich_help_panel=SHAPE)
]
Dim = Annotated[str | None, _size("--dim", "Model width.", _by_device("dim"))]
Heads = Annotated[str | None, _size("--heads", "Query heads.", _by_device("heads"))]
Groups = Annotated[str | None, _size("--groups", "KV heads; they divide --heads.", _by_device("groups"))]
Dk = Annotated[str | None, _size("--dk", "Key dim of a head.", _by_device("dk"))]
Dv = Annotated[str | None, _size("--dv", "Value dim of a head.", "as --dk")]
BlockSize = Annotated[str, _size("--l", "Compression block size, tokens.")]
Stride = Annotated[str, _size("--d", "Compression stride, tokens.")]
SelectionBlock = Annotated[str, _size("--l-sel", "Selection block size, tokens.")]
Selected = Annotated[str, _size("--n-sel", "Selected blocks per query.")]
Window = Annotated[str, _size("--w", "Sliding window, tokens.")]
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
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", rich_help_panel=HOW)
]
Seed = Annotated[
    str,
    typer.Option(
        "--seed", metavar="INT", help="Seed of weights, inputs and the order in a round.", rich_help_panel=HOW
    ),
]
Rounds = Annotated[
    str,
    typer.Option(
        "--rounds",
        metavar="INT",
        help="Rounds, each of which times every route once; an interval needs 6.",
        rich_help_panel=HOW,
    ),
]
Timer = Annotated[
    str,
    typer.Option(
        "--timer",
        metavar="TIMER",
        help="auto, cpu, event or graph. auto: on a GPU graph for decode, event for prefill.",
        rich_help_panel=HOW,
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        metavar="STATE",
        help="cold or warm: the last-level cache before each step.",
        rich_help_panel=HOW,
    ),
]
SharesOn = Annotated[
    bool,
    typer.Option("--shares/--no-shares", help="Measure each stage inside the step.", rich_help_panel=HOW),
]
AloneOn = Annotated[
    bool,
    typer.Option("--alone/--no-alone", help="Measure each branch run by itself.", rich_help_panel=HOW),
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


def size(text: str, name: str, minimum: int = 1) -> int:
    """The number that option ``name`` gives, as ``512`` or ``4k``; PlanError for anything else."""
    if re.fullmatch(r"-?[0-9]+[kKmM]?", text.strip()) is None:
        raise PlanError(f"{name}: {text!r} is not a whole number")
    return parse_ints(text, name=name, minimum=minimum)[0]
