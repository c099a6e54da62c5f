"""What limits a verdict though every criterion is met: noise, doubts, and what was left out.

Each of these makes a GO a CONDITIONAL. What no criterion asks for and went wrong is among them, so that
criteria cannot be chosen around a failure in silence.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from nsabench.plan.checks import LEVELS, RULES
from nsabench.present.criteria_cells import failed_cells, interval_width, rows_of, unmeasured_cells
from nsabench.present.disturbances import load_text, run_notes
from nsabench.present.evidence import cell_name, first_of, several
from nsabench.present.frame import Row
from nsabench.present.material import (
    Material,
    id_of,
    is_finished,
    is_ours,
    last_gates,
    training_line,
    training_status,
)
from nsabench.present.naming import commit_of
from nsabench.present.verdicts import STEADY_PCT, findings_of
from nsabench.stats.neighbours import LOUD_PCT
from nsabench.store import Run

NOISY = 0.10
"""A 95 % interval wider than this part of its time is noise to speak of."""

COLDEST = 1.15
"""A flushed marker that is read at more than this times memory's rate was still in the cache."""

_COLD_NOTE = re.compile(r"(; )?the cache may not be cold: .*?allowed [\d.]+(; )?")


@dataclass(frozen=True)
class Limit:
    """One thing that limits the verdict: what kind of thing, and what it is."""

    kind: str
    text: str

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"kind": self.kind, "text": self.text}


def limits_of(material: Material, judged: Collection[str], trainings: Collection[str] = ()) -> list[Limit]:
    """All that limits a verdict on these runs; `judged` are the keys of the criteria that were judged, and
    `trainings` the run ids of those that each had to meet one.
    """
    good = [row for row in rows_of(material) if row["status"] == "ok"]
    found = [Limit(kind, text) for kind, look in _OF_ROWS.items() for text in look(good)]
    found += [Limit("left out", text) for run in material.cells for text in _left_out(run)]
    found += [Limit("disturbed", f"{id_of(p)}: {text}") for p in material.parts for text in run_notes(p)]
    found += [Limit("comparison", text) for text in _undecided(material, judged)]
    found += [Limit("scorecard", text) for text in _narrow_scorecards(material)]
    found += [Limit("not asked for", text) for text in _unasked(material, judged, trainings)]
    found += [Limit("code", text) for text in _code(material)]
    return found


def _noise(good: Sequence[Row]) -> Iterable[str]:
    widths = [(interval_width(row), row) for row in good]
    wide = [(width, row) for width, row in widths if width is not None and width > NOISY]
    if wide:
        width, row = max(wide, key=lambda item: item[0])
        yield (
            f"{len(wide)} of {several(len(good), 'time')} have a 95 % interval wider than "
            f"{100 * NOISY:.0f} %; the widest, {100 * width:.0f} %, is {cell_name(row)}"
        )
    bare = [row for width, row in widths if width is None]
    if bare:
        yield f"{several(len(bare), 'time')} without an interval, as {cell_name(bare[0])}: it takes 6 rounds"


def _cold(good: Sequence[Row]) -> Iterable[str]:
    cold = [row for row in good if row["cache"] == "cold"]
    doubtful = [row for row in cold if row["cold_probe"] is None or row["cold_probe"] > COLDEST]
    if doubtful:
        probes = [row["cold_probe"] for row in doubtful if row["cold_probe"] is not None]
        seen = f": a flushed marker is read at {max(probes):.2f} times memory's rate" if probes else ""
        yield f"a cold cache is not proved for {several(len(doubtful), 'cell')}{seen}, allowed {COLDEST:g}"


def _clock(good: Sequence[Row]) -> Iterable[str]:
    # The note of a cache that may not be cold stands in the same column, and has its own line.
    notes = [note for row in good if (note := _COLD_NOTE.sub("", row["timers_note"]))]
    for note, count in Counter(notes).items():
        yield f"{note} ({several(count, 'cell')})"


def _disturbed(good: Sequence[Row]) -> Iterable[str]:
    loud = [row for row in good if (row["neighbour_load_pct"] or 0.0) > LOUD_PCT]
    if loud:
        worst = max(loud, key=lambda row: row["neighbour_load_pct"])
        yield f"{load_text(worst['neighbour_load_pct'], worst['device'])} beside {several(len(loud), 'cell')}"
    spreads = [row["canary_spread_pct"] or 0.0 for row in good]
    if max(spreads, default=0.0) > STEADY_PCT:
        yield f"the device was not steady: fixed work varied by {max(spreads):.1f} %"
    capped = [row for row in good if row["power_capped_pct"]]
    if capped:
        most = max(row["power_capped_pct"] for row in capped)
        yield f"{several(len(capped), 'cell')} under a power cap, up to {most:.0f} % of the readings"


_OF_ROWS: dict[str, Callable[[Sequence[Row]], Iterable[str]]] = {
    "noise": _noise,
    "cache": _cold,
    "clock": _clock,
    "disturbed": _disturbed,
}


def _left_out(run: Run) -> list[str]:
    left = unmeasured_cells(run)
    if not left:
        return []
    budget = ((run.info.get("suite") or {}).get("policy") or {}).get("budget")
    why = f" within its budget of {budget:g} s" if isinstance(budget, int | float) else ""
    return [f"{run.run_id}: {len(left)} of {len(run.info['plan'])} planned cells were not measured{why}"]


def _undecided(material: Material, judged: Collection[str]) -> list[str]:
    doubtful = {"INCONCLUSIVE"} | (set() if "comparisons" in judged else {"INVALID"})
    runs = [part for part in material.parts if "comparison" in part.info]
    findings = [(run, finding) for run in runs for finding in findings_of(run).findings]
    return first_of([f"{run.run_id}: {f.shape}: {f.said}" for run, f in findings if f.verdict in doubtful])


def _narrow_scorecards(material: Material) -> Iterable[str]:
    for card in material.scorecards:
        if not is_finished(card):
            yield f"{id_of(card)} is not finished: {card.info.get('status') or 'status unknown'}"
        full = card.info.get("level") != LEVELS[0]
        if not full:
            yield f"{id_of(card)} is quick: nsabench verify --full checks more"
        asked = {row["rule"] for row in card.rows}
        left = [
            name for name, rule in RULES.items() if name not in asked and (full or rule.level == LEVELS[0])
        ]
        if left:
            yield f"{id_of(card)}: {several(len(left), 'rule')} not checked: {', '.join(first_of(left))}"
        if any(word.partition("=")[0] == "--subjects" for word in card.info.get("argv") or ()):
            yield f"{id_of(card)} checked some subjects only: {card.info.get('repro')}"


def _unasked(material: Material, judged: Collection[str], trainings: Collection[str]) -> Iterable[str]:
    """What went wrong, where no criterion looks."""
    if "require_ok" not in judged:
        yield from first_of(failed_cells(material))
    if "verify" not in judged:
        for card in material.scorecards:
            failed = [r for r in card.rows if r["status"] == "fail" and is_ours(r, card.info)]
            if failed:
                yield f"{id_of(card)}: {several(len(failed), 'check')} failed, as {failed[0]['rule']}"
    for training in material.trainings:
        status = training_status(training)
        if id_of(training) in trainings:
            continue
        if status != "ok":
            yield f"{id_of(training)}: status {status or 'unknown'}, {training_line(training)}"
        elif any(row["collapsed"] for row in last_gates(training)):
            yield f"{id_of(training)}: gates had collapsed at its end"


def _code(material: Material) -> Iterable[str]:
    dirty = [i for i in material.infos if (i.get("environment") or {}).get("dirty")]
    if dirty:
        yield f"measured with changes that no commit holds: {', '.join(str(i['run_id']) for i in dirty)}"
    unknown = [i for i in material.infos if not (i.get("environment") or {}).get("commit")]
    if unknown:
        yield f"commit unknown: {', '.join(str(i['run_id']) for i in unknown)}"
    commits = dict.fromkeys(commit_of(i).removesuffix("-dirty") for i in material.infos if i not in unknown)
    if len(commits) > 1:
        yield f"the runs are of different commits: {', '.join(commits)}"
