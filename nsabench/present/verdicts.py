"""What stored runs say of the sides of a comparison: verdicts, from their files alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nsabench.plan import Cell
from nsabench.present.disturbances import load_text, run_notes
from nsabench.present.frame import PLANNED, SHAPE, PresentError, Row, cell_rows, conditions_of
from nsabench.present.naming import commit_of
from nsabench.present.pairing import Rounds, rounds_of, shared_rounds
from nsabench.present.wording import arm_text, digits, field_text, fields_text, tokens_text
from nsabench.stats import (
    DELTA,
    Interval,
    Judgement,
    correct,
    geometric_mean,
    judge,
    judge_unpaired,
)
from nsabench.stats.neighbours import LOUD_PCT, SPOILT_PCT
from nsabench.store import Run

Correction = Literal["holm", "bh"]

STEADY_PCT = 1.0
"""A device whose fixed work took times further apart was not steady before the rounds."""

_RESAMPLED = 10**8
"""Pairwise means that a geometric mean's interval may cost."""

_Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """What is said of one side, held against the first side at one shape.

    `judgement` is None where there was nothing to judge; `verdict` and `why` always stand. `base`, `row` and
    `control` are the rows of the first side, of this one and of the first again, None where not measured.
    `times` are those of the first side and of this one, in ms: pairs of the same round where `paired`, and
    then `processes` says which process measured each.
    """

    shape: str
    first: str
    side: str
    base: Row | None
    row: Row | None
    control: Row | None
    verdict: str
    why: str
    judgement: Judgement | None = None
    times: tuple[_Times, _Times] | None = None
    processes: npt.NDArray[np.int64] | None = None
    paired: bool = True

    @property
    def ratio(self) -> Interval | None:
        """Time of this side over that of the first; None where there is none, or it is not to be shown."""
        return None if self.judgement is None else self.judgement.ratio

    @property
    def said(self) -> str:
        """The verdict as a sentence: "dense is SLOWER than auto by 41 %"."""
        if self.ratio is not None and self.verdict in ("FASTER", "SLOWER"):
            return f"{self.side} is {self.verdict} than {self.first} by {percent_text(self.ratio.point)}"
        if self.judgement is not None and self.verdict == "SAME":
            return f"{self.side} is the SAME as {self.first} within {100 * self.judgement.delta:.2g} %"
        return f"{self.side} beside {self.first}: {self.verdict}, {self.why}"


@dataclass(frozen=True)
class Comparison:
    """Findings shape by shape. `title` says what the shapes have in common, `notes` what else to know.

    `run_ids`: where it comes from. `machine` are run.json of these runs, for what says where it was measured.
    """

    title: str
    findings: list[Finding]
    notes: list[str]
    runs: list[Run]
    paired: bool


def percent_text(ratio: float) -> str:
    """How far a ratio of times is from 1: 1.414 -> "41 %"."""
    return f"{digits(abs(100 * (ratio - 1)), 2)} %"


def findings_of(run: Run) -> Comparison:
    """A comparison as `nsabench compare` stored it. PresentError for a run that is none, or a damaged one."""
    told = run.info.get("comparison")
    if not told:
        raise PresentError(f"{run.run_id} is no comparison")
    try:
        names, groups = list(told["sides"]), list(told["groups"])
        delta, method = float(told["delta"]), told["correct"]
        plan = {cell.cell_id: cell.to_dict() for cell in map(Cell.from_dict, run.info["plan"])}
        bases = [plan[ids[0]] for ids in groups]
    except (LookupError, TypeError, ValueError):
        raise PresentError(f"{run.run_id} is damaged: run.json does not say what was compared") from None
    rows = cell_rows(run.cells)
    rounds = rounds_of(rows, run.samples)
    by_id = {row["cell_id"]: row for row in rows}
    common, shapes = _shapes(bases)
    findings = []
    for ids, shape in zip(groups, shapes, strict=True):
        base, *others, control = (by_id.get(cell_id) for cell_id in ids)
        for name, row in zip(names[1:], others, strict=True):
            findings.append(_live(Finding(shape, names[0], name, base, row, control, "", ""), rounds, delta))
    title = f"{common}: {', '.join(names[1:])} beside {names[0]}"
    findings = _corrected(findings, method)
    return Comparison(title, findings, _notes(run, told, findings), [run], paired=True)


def findings_between(a: Run, b: Run, *, delta: float = DELTA, method: Correction = "bh") -> Comparison:
    """Run `b` beside run `a`: equal cells, or, of a shape that has one arm in each, those.

    The runs' rounds were never taken in turn: the statistics are unpaired, and say so. PresentError where
    the two have no cell in common, or nothing that was timed alike.
    """
    pairs, left_out = _counterparts(a, b)
    if not pairs:
        raise PresentError(f"{a.run_id} and {b.run_id} have no cell in common")
    _refuse_unlike(pairs, a, b)
    rounds = [rounds_of(cell_rows(run.cells), run.samples) for run in (a, b)]
    names = _short_names(a, b)
    common, shapes = _shapes([base for base, _ in pairs])
    findings = []
    for (base, row), shape in zip(pairs, shapes, strict=True):
        arms = [arm_text(base), arm_text(row)]
        same = arms[0] == arms[1]
        first, side = names if same else [f"{arm} @ {name}" for arm, name in zip(arms, names, strict=True)]
        place = f"{shape} {arms[0]}" if same else shape
        finding = Finding(place, first, side, base, row, None, "", "", paired=False)
        findings.append(_stored(finding, rounds, delta))
    title = f"UNPAIRED: {common}: {names[1]} beside {names[0]}"
    notes = [
        "UNPAIRED: the two runs were never measured in turn; what changed between them is in every ratio"
    ]
    notes += [f"{name}: {run.run_id}" for name, run in zip(names, (a, b), strict=True)]
    if left_out:
        notes.append(f"left out: {left_out} cells that only one of the runs has")
    return Comparison(title, _corrected(findings, method), notes, [a, b], paired=False)


def _short_names(a: Run, b: Run) -> list[str]:
    """Their commits, or their places where the commit is the same."""
    commits = [commit_of(run.info) for run in (a, b)]
    return commits if commits[0] != commits[1] else ["run 1", "run 2"]


def closing(comparison: Comparison) -> list[str]:
    """The last lines: for one shape the verdicts as sentences, for several each side's geometric mean."""
    findings = comparison.findings
    sides = list(dict.fromkeys((f.first, f.side) for f in findings))
    if len({f.shape for f in findings}) == 1:
        return [f.said for f in findings]
    return [text for first, side in sides if (text := _over_shapes(comparison, first, side))]


def _live(finding: Finding, rounds: Mapping[tuple[str, str], Rounds], delta: float) -> Finding:
    """A finding judged by paired rounds, the first side's two measurements beside it."""
    names = (finding.first, finding.side, f"{finding.first} again")
    rows = (finding.base, finding.row, finding.control)
    if why := _broken(names, rows) or _unlike(*rows):
        return replace(finding, verdict="INVALID", why=why)
    base, side, control = (rounds.get((row["run_id"], row["cell_id"])) for row in rows if row is not None)
    times, own = shared_rounds(base, side), shared_rounds(base, control)
    if times is None or own is None:
        return replace(finding, verdict="INVALID", why="no round measured both in turn")
    judgement = judge(
        times.a,
        times.b,
        aa=(own.a, own.b),
        delta=delta,
        processes=times.processes,
        aa_processes=own.processes,
    )
    finding = replace(finding, processes=times.processes)
    return _judged(finding, (times.a, times.b), judgement)


def _stored(finding: Finding, rounds: Sequence[Mapping[tuple[str, str], Rounds]], delta: float) -> Finding:
    """A finding judged by the rounds of two runs."""
    base, row = finding.base, finding.row
    why = _broken((finding.first, finding.side), (base, row))
    if why or base is None or row is None:
        return replace(finding, verdict="INVALID", why=f"UNPAIRED; {why}")
    if why := _unlike(base, row):
        return replace(finding, verdict="INVALID", why=f"UNPAIRED; {why}")
    found = [
        known.get((one["run_id"], one["cell_id"])) for known, one in zip(rounds, (base, row), strict=True)
    ]
    if found[0] is None or found[1] is None:
        return replace(finding, verdict="INVALID", why="UNPAIRED; a run has no samples of it")
    times = found[0].ms, found[1].ms
    return _judged(finding, times, judge_unpaired(*times, delta=delta))


def _unlike(*rows: Row | None) -> str:
    """Why the rows' times cannot be compared; empty where they can."""
    kinds = dict.fromkeys(conditions_of(row) for row in rows if row is not None)
    return f"{' and '.join(kinds)} cannot be compared" if len(kinds) > 1 else ""


def _refuse_unlike(pairs: Sequence[tuple[Row, Row]], a: Run, b: Run) -> None:
    """PresentError where all that was timed in both runs was timed in another regime, cache or way."""
    timed = [pair for pair in pairs if all(row["status"] == "ok" for row in pair)]
    whys = [_unlike(*pair) for pair in timed]
    if whys and all(whys):
        raise PresentError(f"{a.run_id} and {b.run_id}: {whys[0]}")


def _judged(finding: Finding, times: tuple[_Times, _Times], judgement: Judgement) -> Finding:
    load, said = _load(finding)
    if load > SPOILT_PCT:
        judgement = replace(judgement, verdict="INVALID", why=said)
    why = judgement.why if finding.paired else f"UNPAIRED; {judgement.why}"
    if LOUD_PCT < load <= SPOILT_PCT:
        why += f"; {said}"
    spreads = [row["canary_spread_pct"] or 0.0 for row in (finding.base, finding.row) if row is not None]
    if max(spreads) > STEADY_PCT:
        why += f"; the device was not steady: fixed work varied by {digits(max(spreads), 2)} %"
    return replace(
        finding, verdict=judgement.verdict, why=why, judgement=judgement, times=(times[0], times[1])
    )


def _load(finding: Finding) -> tuple[float, str]:
    """The most that other processes used beside what is compared, in percent, and in words."""
    rows = [row for row in (finding.base, finding.row, finding.control) if row is not None]
    loads = [(row["neighbour_load_pct"] or 0.0, str(row["device"])) for row in rows]
    return max(loads)[0], load_text(*max(loads))


def _broken(names: Sequence[str], rows: Sequence[Row | None]) -> str:
    """Why there is nothing to compare; empty where all is well."""
    for name, row in zip(names, rows, strict=True):
        if row is None:
            return f"{name} was not measured"
        if row["status"] != "ok":
            return f"{name} is {row['status']}: {row['reason']}"
    return ""


def _corrected(findings: list[Finding], method: Correction) -> list[Finding]:
    """The findings with what their number makes of their verdicts."""
    places = [i for i, finding in enumerate(findings) if finding.judgement is not None]
    judged = [j for f in findings if (j := f.judgement) is not None]
    for place, new in zip(places, correct(judged, method), strict=True):
        old = findings[place]
        changed = old.judgement is not None and new.verdict != old.judgement.verdict
        said = new.why if old.paired else f"UNPAIRED; {new.why}"
        findings[place] = replace(old, judgement=new, verdict=new.verdict, why=said if changed else old.why)
    return findings


def _shapes(cells: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """What the cells have in common, and what tells each from the others, S always."""
    fields = [name for name in SHAPE if name != "S"]
    vary = [name for name in fields if len({cell[name] for cell in cells}) > 1]
    common = fields_text(cells[0], [name for name in fields if name not in vary])
    texts = [
        " ".join([f"S={tokens_text(cell['S'])}", *(field_text(cell, name) for name in vary)])
        for cell in cells
    ]
    return common, texts


def _counterparts(a: Run, b: Run) -> tuple[list[tuple[Row, Row]], int]:
    """Cells of both runs that may be held against each other, and how many have no counterpart."""
    firsts, seconds = ([row for row in cell_rows(run.cells) if not row["twin"]] for run in (a, b))
    cells = [_by(rows, (*PLANNED, "route")) for rows in (firsts, seconds)]
    pairs = [(mine[0], cells[1][key][0]) for key, mine in cells[0].items() if key in cells[1]]
    if not pairs:
        shapes = [_by(rows, SHAPE) for rows in (firsts, seconds)]
        pairs = [
            (mine[0], other[0])
            for key, mine in shapes[0].items()
            if len(mine) == 1 and len(other := shapes[1].get(key, [])) == 1
        ]
    return pairs, len(firsts) + len(seconds) - 2 * len(pairs)


def _by(rows: Sequence[Row], fields: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in fields), []).append(row)
    return found


def _notes(run: Run, told: Mapping[str, Any], findings: Sequence[Finding]) -> list[str]:
    """How much was measured, and whether it was enough."""
    counts = sorted(set(run.samples.groupby("cell_id")["process"].nunique()))
    processes = " to ".join(str(count) for count in dict.fromkeys((*counts[:1], *counts[-1:]))) or "no"
    rounds = (run.info.get("policy") or {}).get("rounds")
    notes = [f"{processes} fresh process{'' if processes == '1' else 'es'} of {rounds} rounds each"]
    if counts == [1]:
        notes.append("what differs between processes is in no interval: it takes two, better three")
    notes += run_notes(run)
    ends = [(f.ratio.lo, f.ratio.hi) for f in findings if f.ratio is not None]
    widths = [hi / lo - 1 for lo, hi in ends if lo is not None and hi is not None]
    width = told.get("width")
    if widths and width and max(widths) > width:
        widest, wanted = (f"{100 * w:.2g}" for w in (max(widths), width))
        notes.append(
            f"the widest interval is {widest} %, {wanted} % was asked for; a larger --budget narrows it"
        )
    return notes


def _over_shapes(comparison: Comparison, first: str, side: str) -> str:
    """The geometric mean of one side's ratios over the shapes; of a single valid one the verdict, of none
    nothing.
    """
    mine = [f for f in comparison.findings if (f.first, f.side) == (first, side) and f.verdict != "INVALID"]
    times = [f.times for f in mine if f.times is not None]
    if len(times) < 2:
        return "".join(f"{finding.shape}: {finding.said}" for finding in mine)
    if comparison.paired:
        pairs = max(len(b) * (len(b) + 1) // 2 for _, b in times)
        resamples = max(200, min(2000, _RESAMPLED // (pairs * len(times))))
        processes = [f.processes for f in mine if f.processes is not None]
        mean = geometric_mean([(b, a) for a, b in times], processes=processes, resamples=resamples)
    else:
        points = [f.ratio.point for f in mine if f.ratio is not None]
        mean = Interval(math.exp(float(np.mean(np.log(points)))), None, None, len(points))
    ends = "" if mean.lo is None or mean.hi is None else f" ({ratio_digits(mean.lo)}-{ratio_digits(mean.hi)})"
    return (
        f"{side} over {len(times)} shapes: {ratio_digits(mean.point)}{ends} times the time of {first}, "
        "geometric mean"
    )


def ratio_digits(value: float) -> str:
    """A ratio of times with the digits that a margin of 1 % wants: "1.003", "0.958", "12.31", "0.0502"."""
    return f"{value:.3f}" if 0.1 <= value < 10 else digits(value, 4 if value > 1 else 3)
