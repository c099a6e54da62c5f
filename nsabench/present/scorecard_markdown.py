"""A scorecard in files and for programs: Markdown, as in a README, and CSV, as it is stored."""

from collections.abc import Collection, Iterable, Sequence

from nsabench.present.scorecard import (
    BRANCHES,
    LEGEND,
    PARTLY,
    Part,
    Row,
    counts_text,
    head_of,
    lists_of,
    named_checks,
    ordered,
    parts_of,
)
from nsabench.store.files import csv_rows, header
from nsabench.store.schema import clean_row
from nsabench.store.scorecard import SCORECARD_COLUMNS


def scorecard_markdown(rows: Sequence[Row], *, peers: Collection[str] = ()) -> str:
    """The whole scorecard as Markdown: a table a branch, then lists, the reports, and what the rules ask."""
    blocks = [f"{counts_text(rows, peers)}."]
    parts = parts_of(rows)
    for part in parts:
        if not part.subjects:
            continue
        heads = [
            "rule",
            *(f"`{' '.join(head_of(part.branch, s)).replace(' :', ':')}`" for s in part.subjects),
        ]
        lines = [[f"`{rule}`", *_marked(part, rule)] for rule in part.rules]
        blocks += [f"**{BRANCHES[part.branch].capitalize()}** (`{part.branch}`)", _markdown(heads, lines)]
    if parts:
        blocks.append(LEGEND.replace(PARTLY, f"\\{PARTLY}") + ".")
    for title, listed, _ in lists_of(rows, peers):
        blocks.append(f"{title.capitalize()}:\n\n" + "\n".join(f"- {_escaped(line)}" for line in listed))
    named = named_checks(rows, peers)
    if named:
        heads = ["check", "the report", "that mistake, here", "ours"]
        lines = [[f"`{n.rule}`", _escaped(n.report), _escaped(n.mistake), _escaped(n.ours)] for n in named]
        blocks += ["What field reports saw:", _markdown(heads, lines)]
    asked = {row["rule"]: row for row in rows if row["branch"] in BRANCHES}
    if asked:
        lines = [
            [f"`{name}`", _escaped(asked[name]["title"]), _escaped(asked[name]["source"])]
            for name in ordered(asked)
        ]
        blocks += ["What the rules ask:", _markdown(["rule", "in words", "source"], lines)]
    return "\n\n".join(blocks)


def _marked(part: Part, rule: str) -> list[str]:
    found = []
    for subject in part.subjects:
        cell = part.cells.get((rule, subject))
        text = "" if cell is None else " ".join(cell.lines)
        if cell is not None and cell.status == "fail":
            text = f"**{text}**"
        found.append(_escaped(text))
    return found


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace(PARTLY, f"\\{PARTLY}") if "**" not in text else text


def scorecard_csv(rows: Iterable[Row]) -> str:
    """The rows as scorecard.csv has them."""
    clean = [clean_row(row, SCORECARD_COLUMNS) for row in rows]
    return (header(SCORECARD_COLUMNS) + csv_rows(clean)).decode()
