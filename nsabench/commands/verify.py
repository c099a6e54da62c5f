"""`nsabench verify`: the rules of the attention put to every route, the whole layer and installed peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsabench.commands import _options as o
from nsabench.commands._console import one_line_errors

FORMATS = ("table", "markdown", "csv")

Quick = Annotated[
    bool,
    typer.Option(
        "--quick/--full",
        help="Every rule, each dtype where it matters: under a minute on a CPU; or every rule in every dtype "
        "over every shape.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPES",
        help="Dtypes to check in: fp32, fp16, bf16, fp64.",
        show_default="fp32,fp16,bf16; with --full also fp64",
    ),
]
Subjects = Annotated[
    str | None,
    typer.Option(
        "--subjects",
        metavar="NAMES",
        help="What to check, with commas between: a row of the route table as sel:gather, a branch as cmp, a "
        "backend as fa2, layer, layer:ROUTE, or a peer as fla-core.",
        show_default="all",
    ),
]
Rules = Annotated[
    str | None,
    typer.Option("--rules", metavar="NAMES", help="Rules to check, with commas between.", show_default="all"),
]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="Check installed peers too.")]
StrictPeers = Annotated[
    bool, typer.Option("--strict-peers", help="A peer that fails is a failure too: exit code 1.")
]
Format = Annotated[str, typer.Option("--format", metavar="FORMAT", help="table, markdown or csv.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a row on stdout, the rest on stderr.")]
Tag = Annotated[
    list[str] | None, typer.Option("--tag", metavar="TAG", help="Word to find the run by; may be repeated.")
]


def verify(
    quick: Quick = True,
    device: o.Device = "auto",
    dtype: Dtype = None,
    subjects: Subjects = None,
    rules: Rules = None,
    peers: Peers = True,
    strict_peers: StrictPeers = False,
    out: o.Out = Path("results"),
    format: Format = "table",
    json: Json = False,
    tag: Tag = None,
) -> None:
    """Check every route against the specification, rule by rule: values, gradients and what broke others.

    Exit code 1 where anything of ours fails. Peers are other implementations: `nsabench peers` lists them.
    """
    with one_line_errors():
        from nsabench.commands._verify import Shown, check_all
        from nsabench.commands._verify import choice_of as choose

        choice = choose(
            full=not quick, device=device, dtype=dtype, subjects=subjects, rules=rules, peers=peers
        )
        shown = Shown.of(format, json_lines=json)
        code = check_all(choice, shown, out=out, tags=tag or [], strict_peers=strict_peers)
    raise typer.Exit(code)
