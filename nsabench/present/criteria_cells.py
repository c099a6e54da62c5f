"""Criteria about cells, held against stored rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nsabench.plan import Cell
from nsabench.plan.criteria import percent
from nsabench.present.evidence import (
    Found,
    cell_evidence,
    cell_name,
    first_of,
    held,
    missing,
    several,
)
from nsabench.present.frame import Row, cell_rows, conditions_of, shape_key
from nsabench.present.material import Material
from nsabench.present.pairing import Rounds, rounds_of, shared_rounds
from nsabench.present.verdicts import findings_of
from nsabench.present.wording import arm_text, digits, range_text, ratio_text, tokens_text
from nsabench.stats import Interval, paired_ratio
from nsabench.store import Run

_NOBODY = "no run of cells was given"


def rows_of(material: Material) -> list[Row]:
    """The rows of all runs."""
    return [row for part in material.parts for row in cell_rows(part.cells)]


def unmeasured_cells(run: Run) -> list[Mapping[str, Any]]:
    """The cells that the run was to have and has not."""
    known, plan = set(run.cells["cell_id"]), run.info.get("plan") or ()
    return [cell for cell in plan if "route" in cell and Cell.from_dict(cell).cell_id not in known]


def interval_width(row: Row) -> float | None:
    """The width of the 95 % interval of a cell's time as a part of that time."""
    if row["ms_lo"] is None or row["ms_hi"] is None or not row["ms_total"]:
        return None
    return float(row["ms_hi"] - row["ms_lo"]) / float(row["ms_total"])


def _require_ok(wanted: bool, own: Material) -> Found:
    rows = rows_of(own)
    bad = [row for row in rows if row["status"] != "ok"]
    left = sum(len(unmeasured_cells(run)) for run in own.cells)
    said = f"{len(rows) - len(bad)} of {several(len(rows) + left, 'cell')} ok"
    if left and not bad:
        return missing(f"{said}; {several(left, 'planned cell')} not measured", _resumes(own))
    return held(not bad, said, _failures(bad)) if rows else missing(_none(own))


def _max_failures(most: int, own: Material) -> Found:
    rows = rows_of(own)
    ran = [row for row in rows if row["status"] != "unsupported"]
    bad = [row for row in ran if row["status"] != "ok"]
    if not ran:
        refused = f": {several(len(rows), 'cell')} unsupported" if rows else ""
        return missing(f"{_none(own)}{refused}", _failures(rows))
    unsupported = len(rows) - len(ran)
    said = f"{len(bad)} of {several(len(ran), 'cell')} failed" if bad else f"{several(len(ran), 'cell')} ok"
    return held(
        len(bad) <= most, said + (f", {unsupported} unsupported" if unsupported else ""), _failures(bad)
    )


def _correct(wanted: bool, own: Material) -> Found:
    rows = rows_of(own)
    wrong = [row for row in rows if row["status"] in ("wrong", "nan")]
    good = [row for row in rows if row["status"] == "ok"]
    if wrong:
        return held(False, f"{several(len(wrong), 'cell')} wrong", _failures(wrong))
    unchecked = [row for row in good if row["max_abs_err"] is None or row["err_budget"] is None]
    if unchecked or not good:
        what = f"{several(len(unchecked), 'ok cell')} without an error against the reference"
        return missing(what if good else _none(own), first_of([cell_evidence(row) for row in unchecked]))
    over = [row for row in good if not row["max_abs_err"] <= row["err_budget"]]
    worst = max(over or good, key=lambda row: row["max_abs_err"] / max(row["err_budget"], 1e-300))
    said = f"the largest error is {worst['max_abs_err']:.2g} of {worst['err_budget']:.2g} allowed"
    return held(not over, f"{said}, over {several(len(good), 'cell')}", [cell_evidence(worst)])


def _max_rel_interval(most: float, own: Material) -> Found:
    good = [row for row in rows_of(own) if row["status"] == "ok"]
    widths = [interval_width(row) for row in good]
    bare = [row for row, width in zip(good, widths, strict=True) if width is None]
    if bare or not good:
        what = f"{several(len(bare), 'time')} without an interval, which takes 6 rounds"
        return missing(what if good else _none(own), first_of([cell_evidence(row) for row in bare]))
    width, place = max((width or 0.0, -place) for place, width in enumerate(widths))
    said = f"the widest is {percent(round(width, 4))}, over {several(len(good), 'cell')}"
    return held(width <= most, said, [cell_evidence(good[-place])])


def _comparisons(wanted: str, own: Material) -> Found:
    runs = [run for run in own.parts if "comparison" in run.info]
    findings = [(run, finding) for run in runs for finding in findings_of(run).findings]
    if not findings:
        return missing("no comparison was given; nsabench compare A B makes one")
    refused = {"INVALID"} | ({"INCONCLUSIVE"} if wanted == "conclusive" else set())
    bad = [f"{run.run_id}: {f.shape}: {f.said}" for run, f in findings if f.verdict in refused]
    words: dict[str, int] = {}
    for _, finding in findings:
        words[finding.verdict] = words.get(finding.verdict, 0) + 1
    said = ", ".join(f"{count} {word}" for word, count in words.items())
    return held(not bad, said, first_of(bad) if bad else [run.run_id for run in runs])


def _speedup(wanted: Mapping[str, Any], everything: Material) -> Found:
    route, against = wanted.get("route", "auto"), wanted["against"]
    tried: list[tuple[float, Found]] = []
    lacking: list[str] = []
    for run in everything.parts:
        found = _ratios(run, wanted, route, against, lacking)
        if not found:
            continue
        row, ratio = min(found, key=lambda item: item[1].point)
        ends = range_text(ratio.lo, ratio.hi, ratio_text)
        said = f"{ratio_text(ratio.point)} x" + (
            f" (95 %: {ends})" if ends != "-" else ", without an interval"
        )
        doubts = []
        if ratio.lo is None:
            doubts.append(f"{said}: no interval stands behind {ratio_text(ratio.point)} x")
        elif ratio.point >= wanted["ratio"] > ratio.lo:
            doubts.append(f"the interval {ends} x reaches below {wanted['ratio']:g} x")
        good = ratio.point >= wanted["ratio"]
        tried.append((ratio.point, held(good, said, [cell_evidence(row)], doubts)))
    what = f"{route} beside {against}, {_where(wanted)}"
    return _best(tried, lambda point: -point, f"no run has {what}", lacking, "x", ratio_text)


def _ratios(
    run: Run, wanted: Mapping[str, Any], route: str, against: str, lacking: list[str]
) -> list[tuple[Row, Interval]]:
    """For every shape of a run that has both arms, the row of `route` and its speed over `against`."""
    rows = [row for row in _matching(run, wanted) if arm_text(row) in (route, against)]
    shapes: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault(shape_key(row), {}).setdefault(arm_text(row), row)
    found = []
    rounds: dict[tuple[str, str], Rounds] | None = None
    for arms in shapes.values():
        if len(arms) < 2:
            continue
        failed = [
            f"{cell_evidence(row)} is {row['status']}" for row in arms.values() if row["status"] != "ok"
        ]
        mine, other = arms[route], arms[against]
        if not failed and conditions_of(mine) != conditions_of(other):
            failed = [f"{cell_evidence(mine)} was timed otherwise than {against}"]
        if failed:
            lacking += failed
            return []
        rounds = rounds_of(rows, run.samples) if rounds is None else rounds
        found.append((mine, _ratio(other, mine, rounds)))
    return found


def _ratio(other: Row, mine: Row, rounds: Mapping[tuple[str, str], Rounds]) -> Interval:
    pair = shared_rounds(*(rounds.get((row["run_id"], row["cell_id"])) for row in (other, mine)))
    if pair is None:
        return Interval(other["ms_total"] / mine["ms_total"], None, None, 0)
    return paired_ratio(pair.a, pair.b, processes=pair.processes)


def _max_ms(wanted: Mapping[str, Any], everything: Material) -> Found:
    route = wanted.get("route", "auto")
    tried: list[tuple[float, Found]] = []
    lacking: list[str] = []
    for run in everything.parts:
        rows = [row for row in _matching(run, wanted) if arm_text(row) == route]
        failed = [f"{cell_evidence(row)} is {row['status']}" for row in rows if row["status"] != "ok"]
        lacking += failed
        if failed or not rows:
            continue
        row = max(rows, key=lambda row: row["ms_total"])
        ends = range_text(row["ms_lo"], row["ms_hi"], digits)
        said = f"{digits(row['ms_total'])} ms" + (f" (95 %: {ends})" if ends != "-" else "")
        doubts = []
        if row["ms_hi"] is None:
            doubts.append(f"no interval stands behind {digits(row['ms_total'])} ms")
        elif row["ms_total"] <= wanted["ms"] < row["ms_hi"]:
            doubts.append(f"the interval {ends} ms reaches above {wanted['ms']:g} ms")
        good = row["ms_total"] <= wanted["ms"]
        tried.append((row["ms_total"], held(good, said, [cell_evidence(row)], doubts)))
    what = f"no run has {route}, {_where(wanted)}"
    return _best(tried, lambda ms: ms, what, lacking, "ms", digits)


def _best(
    tried: Sequence[tuple[float, Found]],
    order: Callable[[float], float],
    nowhere: str,
    lacking: Sequence[str],
    unit: str,
    text: Callable[[float], str],
) -> Found:
    """The run that comes nearest; that others of the runs given fall short is a limit."""
    if not tried:
        return missing("no valid measurement" if lacking else nowhere, first_of(list(dict.fromkeys(lacking))))
    _, best = min(tried, key=lambda item: order(item[0]))
    others = [
        f"{found.evidence[0]} has {text(other)} {unit}, which falls short"
        for other, found in tried
        if found is not best and found.outcome != best.outcome
    ]
    return held(best.outcome == "met", best.measured, best.evidence, [*best.limits, *others])


def _matching(run: Run, wanted: Mapping[str, Any]) -> list[Row]:
    fields = {
        "S": wanted["S"],
        "phase": wanted["phase"],
        "passes": wanted.get("passes", "fwd"),
        "scope": wanted.get("scope", "module"),
        "twin": 0,
    }
    return [
        row
        for row in cell_rows(run.cells)
        if all((row[name] or 0) == value for name, value in fields.items())
    ]


def _where(wanted: Mapping[str, Any]) -> str:
    scope = wanted.get("scope", "module")
    return f"{wanted['phase']} {wanted.get('passes', 'fwd')} of the {scope} at S={tokens_text(wanted['S'])}"


def _none(own: Material) -> str:
    return "no cell is ok" if own.cells else _NOBODY


def _failures(rows: Iterable[Row]) -> list[str]:
    return first_of([f"{cell_evidence(row)} is {row['status']}: {row['reason']}" for row in rows])


def _resumes(own: Material) -> list[str]:
    return [f"nsabench resume {run.path}" for run in own.cells if unmeasured_cells(run)]


def failed_cells(material: Material) -> list[str]:
    """Cells that were tried and are not ok, in words."""
    return [
        f"{cell_name(row)} is {row['status']}: {row['reason']}"
        for row in rows_of(material)
        if row["status"] not in ("ok", "unsupported")
    ]


CELL_RULES: dict[str, Callable[[Any, Material], Found]] = {
    "require_ok": _require_ok,
    "max_failures": _max_failures,
    "correct": _correct,
    "max_rel_interval": _max_rel_interval,
    "comparisons": _comparisons,
    "speedup": _speedup,
    "max_ms": _max_ms,
}
