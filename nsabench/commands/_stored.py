"""Which stored runs a command is about: folders or roots, narrowed by tag and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from nsabench.commands._console import complain


class Told(Protocol):
    """A loaded run, of whatever kind."""

    @property
    def info(self) -> dict[str, Any]: ...


AnyRun = TypeVar("AnyRun", bound=Told)

Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITIONS",
        help="Only cells like S=1k,2k,route=auto,status!=ok: any column, with = != < <= > >=.",
    ),
]
Tag = Annotated[
    list[str] | None,
    typer.Option("--tag", metavar="TAG", help="Only runs with this tag. Repeat it: with all of them."),
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since", metavar="WHEN", help="Only runs since 2026-11-20 (UTC), or of the last 36h or 7d."
    ),
]


def stored_runs(
    paths: Sequence[Path], load: Callable[[Path], AnyRun], tags: Sequence[str], since: str | None
) -> list[AnyRun]:
    """The runs that are, or lie in, `paths` and have all `tags`, each once, in order.

    A run named itself must load; one that is found in a folder and does not is left out with a complaint.
    """
    from nsabench.present.selecting import has_tags, in_time, parse_since
    from nsabench.store import StoreError, find_runs

    moment = None if since is None else parse_since(since)
    found: dict[Path, AnyRun] = {}
    for path in paths:
        for folder in find_runs(path):
            try:
                run = load(folder)
            except StoreError as error:
                if folder == path:
                    raise
                complain(f"left out: {error}")
                continue
            if in_time(run.info, moment) and has_tags(run.info, tags):
                found.setdefault(folder.resolve(), run)
    return list(found.values())
