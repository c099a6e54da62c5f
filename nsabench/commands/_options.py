"""Options that sweeps share, and what they mean where they are not given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

SHAPE, HOW, WHERE = "Shape", "Measuring", "Output"

Lengths = Annotated[str, typer.Option("--S", help="Sequence lengths: 512,1024 or 1k:64k:x2.")]
Batches = Annotated[str, typer.Option("--B", help="Batch sizes, as --S.", rich_help_panel=SHAPE)]
Routes = Annotated[
    str,
    typer.Option(
        "--routes", "--route", help="Routes separated by ';': auto | BACKEND | cmp=..,sel=..,win=.. | env."
    ),
]
Dim = Annotated[int | None, typer.Option("--dim", help="Model width.", rich_help_panel=SHAPE)]
Heads = Annotated[int | None, typer.Option("--heads", help="Query heads.", rich_help_panel=SHAPE)]
Groups = Annotated[
    int | None, typer.Option("--groups", help="KV heads; divides --heads.", rich_help_panel=SHAPE)
]
Dk = Annotated[int | None, typer.Option("--dk", help="Key dim of a head.", rich_help_panel=SHAPE)]
Dv = Annotated[
    int | None, typer.Option("--dv", help="Value dim of a head; --dk if not given.", rich_help_panel=SHAPE)
]
BlockSize = Annotated[int, typer.Option("--l", help="Compression block size, tokens.", rich_help_panel=SHAPE)]
Stride = Annotated[int, typer.Option("--d", help="Compression stride, tokens.", rich_help_panel=SHAPE)]
SelectionBlock = Annotated[
    int, typer.Option("--l-sel", help="Selection block size, tokens.", rich_help_panel=SHAPE)
]
Selected = Annotated[int, typer.Option("--n-sel", help="Selected blocks per query.", rich_help_panel=SHAPE)]
Window = Annotated[int, typer.Option("--w", help="Sliding window, tokens.", rich_help_panel=SHAPE)]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="fp32, bf16, fp16 or fp64.", rich_help_panel=SHAPE)
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=HOW)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of weights, inputs and order.", rich_help_panel=HOW)]
Rounds = Annotated[int, typer.Option("--rounds", help="Rounds; an interval needs 6.", rich_help_panel=HOW)]
Timer = Annotated[str, typer.Option("--timer", help="auto, cpu, event or graph.", rich_help_panel=HOW)]
Cache = Annotated[
    str | None,
    typer.Option("--cache", help="cold or warm last-level cache before a step.", rich_help_panel=HOW),
]
SharesOn = Annotated[
    bool, typer.Option("--shares/--no-shares", help="Measure the stages.", rich_help_panel=HOW)
]
AloneOn = Annotated[
    bool,
    typer.Option("--alone/--no-alone", help="Measure each branch by itself.", rich_help_panel=HOW),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the run's folder.", rich_help_panel=WHERE)]
Plots = Annotated[Path, typer.Option("--plots", help="Folder for the run's figures.", rich_help_panel=WHERE)]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="Draw no figures.", rich_help_panel=WHERE)]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object a cell on stdout.", rich_help_panel=WHERE)
]


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
