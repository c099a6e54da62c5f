"""`nsabench report`: GO, NO-GO or CONDITIONAL over stored runs, as Markdown and as one HTML file."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsabench.commands import _stored as s
from nsabench.commands._console import CHECK_FAILED, GOOD, complain, console, one_line_errors

if TYPE_CHECKING:
    from nsabench.present.criteria import Verdict
    from nsabench.present.page import Page

Paths = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Runs of any kind, or folders of runs: one report over all."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE|FOLDER",
        help="One file, by its ending .html or .md, or a folder for both.",
        show_default="reports/<runs>",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="FORMATS", help="html, markdown, or both.", show_default="html,markdown"
    ),
]
Criteria = Annotated[
    Path | None,
    typer.Option(
        "--criteria",
        metavar="FILE",
        help="[criteria] of this TOML file, a suite's or its own, in place of those the runs declare.",
    ),
]
Reports = Annotated[
    bool | None,
    typer.Option(
        "--field-reports/--no-field-reports",
        help="The figures of five field reports beside ours.",
        show_default="where a run answers one",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The verdict as JSON on stdout.")]


def report(
    runs: Paths,
    out: Out = None,
    format: Formats = None,
    criteria: Criteria = None,
    field_reports: Reports = None,
    tag: s.Tag = None,
    since: s.Since = None,
    json: Json = False,
) -> None:
    """Judge stored runs: GO, CONDITIONAL or NO-GO by declared criteria, and the page that says why.

    It needs their files alone. Ends with 0 for GO and CONDITIONAL, with 1 for NO-GO.
    """
    with one_line_errors():
        from nsabench.plan.criteria import load_criteria
        from nsabench.present.material import collected, load_any
        from nsabench.present.plots import set_name
        from nsabench.present.report import make_page

        wanted = None if criteria is None else load_criteria(criteria)
        found = s.stored_runs(runs, load_any, tag or (), since)
        material = collected(found)
        names = [str(run.info["run_id"]) for run in found]
        if not names:
            complain("no run is as asked for")
            raise typer.Exit(2)
        targets = _targets(out or Path("reports") / set_name(names), format)
        page, verdict, beside = make_page(
            material,
            criteria=wanted,
            origin=criteria.name if criteria else "",
            reports=field_reports,
            command=shlex.join(["nsabench", *sys.argv[1:]]),
            note=complain,
        )
        files = [file for kind, path in targets.items() for file in _write(page, kind, path)]
        if json:
            said = {
                "verdict": verdict.word,
                "why": page.why,
                "runs": names,
                "criteria": [check.to_dict() for check in verdict.checks],
                "limits": [limit.to_dict() for limit in verdict.limits],
                "field_reports": [one.to_dict() for one in beside],
                "files": list(map(str, files)),
            }
            typer.echo(json_module.dumps(said, indent=2))
        else:
            _show(page, verdict, files)
    raise typer.Exit(CHECK_FAILED if verdict.word == "NO-GO" else GOOD)


_SUFFIXES = {"html": (".html", ".htm"), "markdown": (".md", ".markdown")}


def _targets(out: Path, formats: str | None) -> dict[str, Path]:
    """The file of each format."""
    from nsabench.plan import PlanError, nearest

    words = [word.strip() for word in (formats or "html,markdown").split(",")]
    for word in words:
        if word not in _SUFFIXES:
            raise PlanError(f"--format: {word!r} is unknown; {nearest(word, _SUFFIXES)}")
    named = next((kind for kind, endings in _SUFFIXES.items() if out.suffix.lower() in endings), None)
    if named is None:
        if out.is_file():
            raise PlanError(f"--out: {out} is a file; allowed: a folder, or a file that ends in .html or .md")
        return {kind: out / f"report{_SUFFIXES[kind][0]}" for kind in dict.fromkeys(words)}
    if formats is not None and words != [named]:
        raise PlanError(f"--format: {formats!r}, but {out.name} is {named}; name a folder for several")
    return {named: out}


def _write(page: Page, kind: str, path: Path) -> Sequence[Path]:
    """The files of one format: Markdown has its figures beside it."""
    from nsabench.present.export import write
    from nsabench.present.report_text import pictures_of, to_html, to_markdown

    if kind == "html":
        write(path, to_html(page).encode())
        return [path]
    folder = path.with_name(f"{path.stem}-figures")
    figures = {picture.name: f"{folder.name}/{picture.name}.png" for picture in pictures_of(page)}
    for picture in pictures_of(page):
        write(path.parent / figures[picture.name], picture.png)
    write(path, to_markdown(page, figures).encode())
    return [path]


def _show(page: Page, verdict: Verdict, files: Sequence[Path]) -> None:
    from rich.text import Text

    styles = {"GO": "bold green", "CONDITIONAL": "bold yellow", "NO-GO": "bold red"}
    talk = console()
    talk.print(
        Text(page.word, style=styles[page.word]).append(f": {page.why}", style="default"), soft_wrap=True
    )
    for check in verdict.checks:
        style = "green" if check.met else "red"
        line = Text(f"  {check.found.outcome}", style=style)
        talk.print(
            line.append(f": {check.wanted.words}: {check.found.measured}", style="default"), soft_wrap=True
        )
    for limit in verdict.limits:
        talk.print(Text("  limit", style="yellow").append(f": {limit.text}", style="default"), soft_wrap=True)
    for file in files:
        talk.print(f"report: {file}", soft_wrap=True, markup=False)
