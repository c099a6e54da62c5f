"""`nsabench peers`: other implementations, which of them are installed, and how they differ."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from nsabench.commands._console import console, fail, one_line_errors

Markdown = Annotated[
    bool, typer.Option("--markdown", help="A Markdown table, the same on every machine but for versions.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a peer on stdout.")]


def peers(markdown: Markdown = False, json: Json = False) -> None:
    """List the other implementations that are known: installed or how to get them, what they offer, how
    they differ from the rules here, which of them `nsabench verify` asks, and the names by which `--impl`
    times them.

    Nothing of theirs is imported.
    """
    with one_line_errors():
        if markdown and json:
            raise fail("--json and --markdown both want stdout; give one")
        found = survey()
        if json:
            for line in found:
                typer.echo(json_module.dumps(line))
        elif markdown:
            typer.echo(peers_markdown(found))
        else:
            talk = console()
            talk.print(_table(found))
            talk.print("nsabench verify asks those marked *, where they are installed", markup=False)
            names = ", ".join(name for one in found for name in one["timed"])
            talk.print(f"timed beside NSA by --impl: {names}", markup=False)


def survey() -> list[dict[str, Any]]:
    """Each known peer with its version here, None where it is not installed."""
    from nsabench.peers.registry import PEERS

    return [
        {
            "peer": peer.name,
            "version": peer.version(),
            "get": peer.get,
            "offers": peer.offers,
            "differs": peer.differs,
            "verified": bool(peer.adapter),
            "timed": list(peer.impls),
            "source": peer.source,
        }
        for peer in PEERS
    ]


def peers_markdown(found: list[dict[str, Any]]) -> str:
    """A Markdown table of :func:`survey`."""
    lines = [
        "| peer | installed | get it | offers | differs | `verify` asks it | `--impl` |",
        "|---" * 7 + "|",
    ]
    for one in found:
        cells = [
            f"[{one['peer']}]({one['source']})",
            str(one["version"] or "no"),
            _command(str(one["get"])),
            str(one["offers"]),
            str(one["differs"]),
            "yes" if one["verified"] else "",
            ", ".join(f"`{name}`" for name in one["timed"]),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |")
    return "\n".join(lines)


def _command(get: str) -> str:
    """A line for a shell, marked as such; what follows it in words is not."""
    if not get.startswith("pip") and "&&" not in get:
        return get
    line, needs, words = get.partition(" (")
    return f"`{line}`{needs}{words}"


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 1, 0), pad_edge=False)
    for header, share in (("peer", 2), ("installed, or how to get it", 3), ("offers", 4), ("differs", 4)):
        table.add_column(header, overflow="fold", ratio=share)
    for one in found:
        name = Text(f"{one['peer']}{' *' if one['verified'] else ''}")
        here = Text(str(one["version"]), style="green") if one["version"] else Text(str(one["get"]))
        table.add_row(name, here, Text(str(one["offers"])), Text(str(one["differs"])))
    return table
