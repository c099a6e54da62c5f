"""`nsabench decode`: one token after S, at each S and route."""

from __future__ import annotations

from pathlib import Path

import typer

from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors


def decode(
    S: o.Lengths = "512,1024,2048",
    B: o.Batches = "1",
    routes: o.Routes = "auto",
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
    cache: o.Cache = "cold",
    shares: o.SharesOn = True,
    alone: o.AloneOn = True,
    out: o.Out = Path("results"),
    plots: o.Plots = Path("plots"),
    no_plots: o.NoPlots = False,
    json: o.Json = False,
) -> None:
    """Time one decode step at each length S: shares, memory, tokens read, route beside route.

    The KV cache is preallocated and one step is replayed at a frozen length.
    Steps that complete a compressed block and steps that do not are timed apart
    and combined by how often each happens.
    """
    with one_line_errors():
        from nsabench.commands._sweep import plan_cells, start_sweep
        from nsabench.run import Policy

        cells, model = plan_cells(
            phase="decode",
            lengths=S,
            batches=B,
            routes=routes,
            passes=["fwd"],
            mode="batched",
            device=device,
            dtype=dtype,
            seed=seed,
            shape={"dim": dim, "heads": heads, "groups": groups, "dk": dk, "dv": dv},
            blocks={"l": l, "d": d, "l_sel": l_sel, "n_sel": n_sel, "w": w},
        )
        # Between two decode steps of a layer the other layers evict the cache.
        policy = Policy(
            rounds=o.size(rounds, "--rounds"), timer=timer, cache=cache, shares=shares, alone=alone
        )
        code = start_sweep(cells, model, policy, out=out, plots=None if no_plots else plots, json_lines=json)
    raise typer.Exit(code)
