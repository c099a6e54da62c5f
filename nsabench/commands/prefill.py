"""`nsabench prefill`: a whole prompt of S tokens, forward and backward, at each S and route."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors
from nsabench.plan import PlanError

PASSES = ("fwd", "bwd", "fwd_bwd")

Passes = Annotated[
    str, typer.Option("--passes", metavar="PASSES", help="fwd, bwd, fwd_bwd, or several: fwd,bwd.")
]
Mode = Annotated[
    str,
    typer.Option(
        "--mode",
        metavar="MODE",
        help="How the prompt goes in: batched (at once), chunked=N (N tokens a call), stepwise or env.",
    ),
]


def mode_of(mode: str, environ: Mapping[str, str]) -> str:
    """`env` settled as an earlier code did: batched where NSA_PREFILL_BATCHED is on, else token by token."""
    if mode != "env":
        return mode
    on = environ.get("NSA_PREFILL_BATCHED", "").strip().lower() in ("1", "true", "yes", "on")
    return "batched" if on else "stepwise"


def prefill(
    S: o.Lengths = "512,1024,2048",
    B: o.Batches = "1",
    routes: o.Routes = "auto",
    passes: Passes = "fwd",
    mode: Mode = "batched",
    dim: o.Dim = None,
    heads: o.Heads = None,
    groups: o.Groups = None,
    dk: o.Dk = None,
    dv: o.Dv = None,
    l: o.BlockSize = "32",
    d: o.Stride = "16",
    l_sel: o.SelectionBlock = "64",
    n_sel: o.Selected = "16",
    w: o.Window = "512",
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    seed: o.Seed = "0",
    rounds: o.Rounds = "15",
    timer: o.Timer = "auto",
    cache: o.Cache = "warm",
    shares: o.SharesOn = True,
    alone: o.AloneOn = True,
    out: o.Out = Path("results"),
    plots: o.Plots = Path("plots"),
    no_plots: o.NoPlots = False,
    json: o.Json = False,
) -> None:
    """Time a whole prompt of S tokens: forward into a KV cache, backward, or both.

    Every mode gives the same result.
    """
    with one_line_errors():
        from nsabench.commands._sweep import plan_cells, start_sweep
        from nsabench.run import Policy

        wanted = [part.strip() for part in passes.split(",")]
        for name in wanted:
            if name not in PASSES:
                raise PlanError(f"--passes: {name!r} is unknown; allowed: {', '.join(PASSES)}")
        cells, model = plan_cells(
            phase="prefill",
            lengths=S,
            batches=B,
            routes=routes,
            passes=wanted,
            mode=mode_of(mode, os.environ),
            device=device,
            dtype=dtype,
            seed=seed,
            shape={"dim": dim, "heads": heads, "groups": groups, "dk": dk, "dv": dv},
            blocks={"l": l, "d": d, "l_sel": l_sel, "n_sel": n_sel, "w": w},
        )
        policy = Policy(
            rounds=o.size(rounds, "--rounds"), timer=timer, cache=cache, shares=shares, alone=alone
        )
        code = start_sweep(cells, model, policy, out=out, plots=None if no_plots else plots, json_lines=json)
    raise typer.Exit(code)
