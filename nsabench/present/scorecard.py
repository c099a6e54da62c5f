"""A scorecard for people: rules as rows, subjects as columns, branch by branch; then what failed, what could
not run, and what field reports saw of the same.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nsabench.plan.checks import RULES
from nsabench.store.scorecard import CHECK_STATUSES

Row = Mapping[str, Any]

BRANCHES = {
    "cmp": "compressed",
    "score": "scores and top-n",
    "sel": "selected",
    "win": "sliding window",
    "layer": "whole layer",
}
NOTHING = "–"
PARTLY = "*"
LEGEND = (
    f"{NOTHING} cannot run, {PARTLY} part of it cannot: reasons below; empty: the rule asks nothing of it"
)

_STYLES = {"pass": "green", "fail": "bold red", "differs": "yellow", "unsupported": "dim"}
_SOME_REFUSED = re.compile(r"^\d+ cases? refused: ")
_OF_BRANCH = re.compile(r"(?:^|; )(?:cmp|score|sel|win)=[^ ]+: ")
_MOST_NAMED = 6
_GAP = 2


@dataclass(frozen=True)
class Cell:
    """One place of the matrix: all dtypes of a rule and a subject together. ``row`` is the worst of them."""

    status: str
    partly: bool
    row: Row

    @property
    def lines(self) -> list[str]:
        """What stands there: a word, and for a failure its dtype and error against budget."""
        if self.status == "unsupported":
            return [NOTHING]
        if self.status == "fail":
            return [f"FAIL {self.row['dtype']}".strip(), error_text(self.row)]
        return [self.status + (PARTLY if self.partly else "")]


@dataclass(frozen=True)
class Part:
    """The matrix of one branch. ``cells`` are by rule and subject; ``nowhere`` are the subjects that refuse
    every rule.
    """

    branch: str
    rules: list[str]
    subjects: list[str]
    cells: dict[tuple[str, str], Cell]
    nowhere: list[str]


def parts_of(rows: Iterable[Row]) -> list[Part]:
    """The matrices of the branches that have rows, in the order of ``BRANCHES``."""
    found = []
    rows = list(rows)
    for branch in BRANCHES:
        mine = [row for row in rows if row["branch"] == branch]
        if not mine:
            continue
        grouped: dict[tuple[str, str], list[Row]] = {}
        for row in mine:
            grouped.setdefault((row["rule"], row["subject"]), []).append(row)
        cells = {key: _cell(some) for key, some in grouped.items()}
        subjects = list(dict.fromkeys(row["subject"] for row in mine))
        nowhere = [
            subject
            for subject in subjects
            if all(cell.status == "unsupported" for (_, name), cell in cells.items() if name == subject)
        ]
        kept = [subject for subject in subjects if subject not in nowhere]
        rules = ordered({row["rule"] for row in mine if row["subject"] in kept})
        found.append(Part(branch, rules, kept, cells, nowhere))
    return found


def ordered(rules: Collection[str]) -> list[str]:
    """Rules in the scorecard's order; those it does not know last, by name."""
    return [name for name in RULES if name in rules] + sorted(name for name in rules if name not in RULES)


def counts_text(rows: Iterable[Row], peers: Collection[str] = ()) -> str:
    """``120 pass, 3 unsupported; peers: 4 pass, 1 fail``."""
    rows = list(rows)
    ours = [row["status"] for row in rows if row["subject"] not in peers]
    theirs = [row["status"] for row in rows if row["subject"] in peers]

    def counted(statuses: list[str]) -> str:
        return ", ".join(f"{statuses.count(name)} {name}" for name in CHECK_STATUSES if name in statuses)

    said = counted(ours) or "nothing checked"
    return f"{said}; peers: {counted(theirs)}" if theirs else said


def error_text(row: Row) -> str:
    """``0.15 > 1.9e-05``: the error against its budget; in words where it is no number."""
    if row["max_abs_err"] is None:
        return "not finite" if row["cases"] else "crashed"
    if not row["budget"]:
        return f"{row['max_abs_err']:.3g} > 0"
    return f"{row['max_abs_err']:.2g} > {row['budget']:.2g}"


def row_line(row: Row) -> str:
    """A row in one plain line."""
    where = " ".join(filter(None, (row["rule"], row["subject"], row["dtype"])))
    said = f"{row['status'].upper() if row['status'] == 'fail' else row['status']}"
    return f"{where}: {said}" + (f": {row['reason']}" if row["reason"] else "")


def failure_lines(rows: Iterable[Row], status: str = "fail") -> list[str]:
    """A line for each row of that status: how many cases, the error against the budget, the worst case."""
    lines = []
    for row in rows:
        if row["status"] != status:
            continue
        where = " ".join(filter(None, (row["rule"], row["subject"], row["dtype"], row["passes"])))
        some = f"{row['failed']} of {row['cases']} cases" if row["cases"] else ""
        case = row["worst"].rpartition(": ")[0]
        worst = f"worst: {row['worst']}" if row["worst"] and case not in row["reason"] else ""
        lines.append(f"{where}: " + "; ".join(filter(None, (some, error_text(row), row["reason"], worst))))
    return lines


def refusal_lines(rows: Iterable[Row]) -> list[str]:
    """Each reason for which something could not run, once, with the subjects it holds for."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["status"] in ("unsupported", "pass") and row["reason"]:
            reason = _without_branches(_SOME_REFUSED.sub("", row["reason"]))
            found.setdefault(reason, {})[row["subject"]] = None
    return [f"{_some(list(subjects))}: {reason}" for reason, subjects in found.items()]


def _without_branches(reason: str) -> str:
    """A layer's reason, ``cmp=fa2: ...; sel=fa2: ...``, with each branch's own words once."""
    return "; ".join(dict.fromkeys(part for part in _OF_BRANCH.split(reason) if part))


def differing_lines(rows: Iterable[Row]) -> list[str]:
    """How each subject differs by declaration, once, and in which rules it shows."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if row["status"] == "differs":
            found.setdefault((row["subject"], _declared(row["reason"])), {})[row["rule"]] = None
    return [f"{subject}: {said} (seen in {_some(list(rules))})" for (subject, said), rules in found.items()]


def _declared(reason: str) -> str:
    """A reason without what was measured, which stands in brackets at its end."""
    depth = 0
    for place in range(len(reason) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(reason[place], 0)
        if not depth:
            return reason[:place].rstrip() if reason[place] == "(" else reason
    return reason


@dataclass(frozen=True)
class Named:
    """A check that answers a field report."""

    rule: str
    reported: float | None
    report: str
    mistake: str
    ours: str
    passed: bool


def named_checks(rows: Iterable[Row], peers: Collection[str] = ()) -> list[Named]:
    """What field reports saw, what the mistake behind it gives here, and what ours gives."""
    rows = [row for row in rows if row["reported_note"] and row["subject"] not in peers]
    found = []
    for rule in ordered({row["rule"] for row in rows}):
        mine = [row for row in rows if row["rule"] == rule]
        ran = [row for row in mine if row["status"] in ("pass", "fail")]
        report, notes = _report_of(mine)
        mistake, _, own = f"; {notes}".partition("; ours: ")
        found.append(
            Named(
                rule,
                next((row["reported"] for row in mine if row["reported"] is not None), None),
                report,
                mistake.removeprefix("; "),
                "; ".join(filter(None, (own, _outcome(ran)))),
                bool(ran) and all(row["status"] == "pass" for row in ran),
            )
        )
    return found


def _report_of(rows: Sequence[Row]) -> tuple[str, str]:
    """The report's own words, and what was noted beside them, in fp32 where there is that."""
    known = RULES.get(rows[0]["rule"])
    report = known.report if known else ""
    told = sorted((row for row in rows), key=lambda row: row["dtype"] != "fp32")
    for row in told:
        note = str(row["reported_note"])
        if not report:
            return note, ""
        if note.startswith(report) and note != report:
            return report, note[len(report) :].lstrip("; ")
    return report, ""


def _outcome(ran: Sequence[Row]) -> str:
    if not ran:
        return "cannot run here"
    errors: dict[str, float] = {}
    for row in ran:
        if row["max_abs_err"] is not None:
            errors[row["dtype"]] = max(errors.get(row["dtype"], 0.0), row["max_abs_err"])
    failed = sum(row["failed"] or 0 for row in ran)
    cases = sum(row["cases"] or 0 for row in ran)
    said = f"{failed} of {cases} cases wrong" if failed else f"all {cases} cases right"
    worst = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items())
    return f"{said}; largest error: {worst}" if worst else said


def scorecard_view(
    rows: Sequence[Row], *, peers: Collection[str] = (), width: int = 80
) -> list[RenderableType]:
    """The whole scorecard for a terminal of so many columns."""
    shown: list[RenderableType] = []
    for part in parts_of(rows):
        tables = _tables(part, width)
        for number, table in enumerate(tables, 1):
            more = f", {number} of {len(tables)}" if len(tables) > 1 else ""
            shown += [Text(f"{BRANCHES[part.branch]} ({part.branch}){more}", style="bold"), table, Text()]
    if shown:
        shown += [Text(LEGEND, style="dim"), Text()]
    for title, lines, style in lists_of(rows, peers):
        shown += [Text(title, style="bold"), *(_hanging(line, style) for line in lines), Text()]
    named = named_checks(rows, peers)
    if named:
        shown += [Text("what field reports saw", style="bold"), *_named_lines(named), Text()]
    return shown


def lists_of(rows: Sequence[Row], peers: Collection[str]) -> list[tuple[str, list[str], str]]:
    """What stands below the matrices: a title, lines and a style each; none that is empty."""
    ours = [row for row in rows if row["subject"] not in peers]
    theirs = [row for row in rows if row["subject"] in peers]
    found = [
        ("failed", failure_lines(ours), "red"),
        ("peers that failed", failure_lines(theirs), "red"),
        ("differ by declaration", differing_lines(rows), "yellow"),
        ("could not run, and why", refusal_lines(rows), ""),
    ]
    return [one for one in found if one[1]]


def _tables(part: Part, width: int) -> list[Table]:
    """The matrix of a branch in tables that fit into ``width`` columns, at least one subject each."""
    first = max((len(rule) for rule in part.rules), default=0)
    tables: list[Table] = []
    left = list(part.subjects)
    while left:
        taken: list[str] = []
        room = width - first
        while left and (not taken or room >= _wide(part, left[0]) + _GAP):
            room -= _wide(part, left[0]) + _GAP
            taken.append(left.pop(0))
        tables.append(_table(part, taken, first))
    return tables


def _table(part: Part, subjects: Sequence[str], first: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("rule", width=first, no_wrap=True)
    for subject in subjects:
        table.add_column(Text("\n".join(head_of(part.branch, subject))), no_wrap=True)
    for rule in part.rules:
        cells = [part.cells.get((rule, subject)) for subject in subjects]
        if any(cells):
            texts = [
                Text() if cell is None else Text("\n".join(cell.lines), style=_STYLES[cell.status])
                for cell in cells
            ]
            table.add_row(rule, *texts)
    return table


def _wide(part: Part, subject: str) -> int:
    """The width of a subject's column."""
    lines = [line for (_, name), cell in part.cells.items() if name == subject for line in cell.lines]
    return max(len(line) for line in [*head_of(part.branch, subject), *lines])


def head_of(branch: str, subject: str) -> list[str]:
    """A column's heading without its branch, in lines: ``sel:gather:keys`` is ``gather``, ``:keys``."""
    name = subject.removeprefix(f"{branch}:").removesuffix(f" {branch}")
    return [part for word in name.split(" ") for part in re.split(r"(?=:)", word) if part]


def _named_lines(named: Sequence[Named]) -> list[Padding]:
    lines = []
    for one in named:
        lines.append(_hanging(one.rule, "green" if one.passed else "yellow"))
        said = {"report": one.report, "that mistake, here": one.mistake, "ours": one.ours}
        lines += [_hanging(f"{what}: {text}", step=4) for what, text in said.items() if text]
    return lines


def _hanging(line: str, style: str = "", step: int = 2) -> Padding:
    """A line set in, and what is left of it in further lines set in as far."""
    return Padding(Text(line, style=style), (0, 0, 0, step))


def _cell(rows: Sequence[Row]) -> Cell:
    """The dtypes of one rule and subject together: the worst status, unsupported only where all are."""
    statuses = {row["status"] for row in rows}
    status = next(name for name in ("fail", "differs", "pass", "unsupported") if name in statuses)
    partly = status == "pass" and any(row["status"] == "unsupported" or row["reason"] for row in rows)
    return Cell(status, partly, max((row for row in rows if row["status"] == status), key=_part))


def _part(row: Row) -> float:
    """The error over its budget; an error that is no number is the largest."""
    if row["max_abs_err"] is None:
        return float("inf") if row["status"] == "fail" else 0.0
    return float(row["max_abs_err"] / row["budget"]) if row["budget"] else float(row["max_abs_err"]) * 1e30


def _some(names: Sequence[str]) -> str:
    """All of a few names, the first of many and how many more."""
    if len(names) <= _MOST_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMED])} and {len(names) - _MOST_NAMED} more"
