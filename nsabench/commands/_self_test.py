"""`nsabench doctor --self-test`: planted truths, measured here as `compare` measures, and counted."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from scipy.stats import binom

from nsabench.commands._sweep import device_of
from nsabench.plan import Cell, PlanError
from nsabench.present.verdicts import Finding, findings_of
from nsabench.present.wording import digits
from nsabench.run.comparison import run_comparison
from nsabench.run.executor import Executor, LocalExecutor, WorkerError, local_slots
from nsabench.run.self_test import Plant, plants
from nsabench.run.spinner import NoNeighbour, neighbour
from nsabench.store import RunDir, capture_environment, load_run

QUICK = 4
"""Comparisons of equal work where no number is asked for."""

MANY = 100
"""From so many on a bound is held to the letter; below, chance may explain a share that misses it."""

CHANCE = 0.05

Outcome = dict[str, Any]
"""What became of one comparison: a line of the file."""

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Trial:
    """The ``number``-th comparison of its kind."""

    plant: Plant
    number: int


def trials(kinds: Sequence[Plant], runs: int) -> list[Trial]:
    """All comparisons, the kinds spread over the whole time alike: what is interrupted says of each."""
    found = [
        (Trial(plant, n), (n + 0.5) / plant.runs(runs)) for plant in kinds for n in range(plant.runs(runs))
    ]
    return [trial for trial, _ in sorted(found, key=lambda one: one[1])]


def self_test(
    device: str, runs: int, limit_s: float | None, file: Path | None, tell: Tell
) -> tuple[dict[str, Any], bool]:
    """Run what ``file`` does not hold yet, each outcome kept there at once; the summary and whether all of it
    was done. The table stands beside the file, in Markdown. ``limit_s``: of every comparison that ends in a
    ratio, in place of its own.

    Raises:
        PlanError: the file is of another self-test.
        WorkerError, NoNeighbour: the machine fails; what was done is kept.
    """
    device, environment = device_of(device), capture_environment()
    kinds = [
        plant if limit_s is None or plant.is_fault else replace(plant, limit_s=limit_s)
        for plant in plants(device)
    ]
    planned = trials(kinds, runs)
    head = _head(device, limit_s, environment)
    kept = _Kept(file or _file(environment), head)
    left = [trial for trial in planned if (trial.plant.name, trial.number) not in kept.done]
    tell(
        f"self-test on {device}: {len(left)} of {len(planned)} comparisons to do, at most "
        f"{sum(trial.plant.limit_s for trial in left) / 60:.0f} min; kept in {kept.file}"
    )
    interrupted = False
    try:
        for count, trial in enumerate(left, 1):
            outcome = attempt(trial, device, environment)
            kept.keep(outcome)
            tell(f"[{count}/{len(left)}] {_said(outcome)}")
    except KeyboardInterrupt:
        interrupted = True
    wanted = {(trial.plant.name, trial.number) for trial in planned}
    outcomes = [outcome for key, outcome in kept.done.items() if key in wanted]
    summary = {**head, "file": str(kept.file), "plants": [_counted(plant, outcomes) for plant in kinds]}
    summary["seconds"] = round(sum(outcome["seconds"] for outcome in outcomes), 1)
    kept.file.with_suffix(".md").write_text(markdown_of(summary) + "\n", encoding="utf-8")
    return summary | {"outcomes": outcomes}, not interrupted


def attempt(
    trial: Trial,
    device: str,
    environment: dict[str, Any],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """One comparison as `nsabench compare` makes it, from the first process to the verdict."""
    plant, cells = trial.plant, trial.plant.cells(device, trial.number)
    with (
        neighbour(device) if plant.neighbour else nullcontext(),
        tempfile.TemporaryDirectory() as folder,
    ):
        began = clock()
        path = _compared(plant, cells, Path(folder), environment)
        (finding,) = findings_of(load_run(path)).findings
        seconds = clock() - began
        processes = load_run(path).samples["process"].nunique()
    return _outcome(trial, finding, seconds, int(processes))


def _compared(plant: Plant, cells: list[Cell], folder: Path, environment: dict[str, Any]) -> Path:
    told = {
        "sides": ["base", plant.name],
        "delta": plant.delta,
        "correct": "bh",
        "width": plant.width,
        "processes": plant.processes,
        "budget_s": plant.effort.budget_s,
        "groups": [[cell.cell_id for cell in cells]],
    }
    with RunDir.create(
        folder,
        name="self-test",
        argv=["doctor", "--self-test"],
        repro="nsabench doctor --self-test",
        plan=[cell.to_dict() for cell in cells],
        environment=environment,
        policy=plant.policy.to_dict(),
        seed=cells[0].seed,
        comparison=told,
    ) as run:

        def hire(living: Sequence[Cell], process: int) -> Executor:
            return hired(living, process, plant.measure)

        run_comparison([cells], plant.policy, plant.effort, run, _Nobody(), hire=hire)
        return run.path


def hired(cells: Sequence[Cell], process: int, measure: str) -> Executor:
    """Who measures: workers that know what is planted."""
    return LocalExecutor(local_slots(cells), measure=measure, process=process)


class _Nobody:
    """Watches nothing."""

    def activity(self, text: str) -> None: ...

    def finished(self, group: Sequence[Cell], rows: Sequence[Mapping[str, Any]], processes: int) -> None: ...


def _outcome(trial: Trial, finding: Finding, seconds: float, processes: int) -> Outcome:
    """A fault is caught when the planted side's row has its status and the base lives; else the verdict is
    what counts. Late is not caught.
    """
    plant = trial.plant
    rows = {"base": finding.base, "side": finding.row, "again": finding.control}
    statuses = {name: None if row is None else row["status"] for name, row in rows.items()}
    fault = statuses["side"] not in (None, "ok") and statuses["base"] == statuses["again"] == "ok"
    came = str(statuses["side"]) if fault else finding.verdict
    caught = came in plant.expected and plant.says in finding.why and seconds <= plant.limit_s
    ratio, own = finding.ratio, None if finding.judgement is None else finding.judgement.aa
    base = finding.base or {}
    return {
        "plant": plant.name,
        "number": trial.number,
        "came": came,
        "caught": caught,
        "seconds": round(seconds, 2),
        "limit_s": plant.limit_s,
        "processes": processes,
        "ratio": None if ratio is None else [ratio.point, ratio.lo, ratio.hi],
        "aa": None if own is None else [own.point, own.lo, own.hi],
        "canary_spread_pct": base.get("canary_spread_pct"),
        "neighbour_load_pct": base.get("neighbour_load_pct"),
        "why": finding.why,
    }


def _said(outcome: Outcome) -> str:
    ratio = outcome["ratio"]
    ends = "" if ratio is None or ratio[1] is None else f" ({ratio[1]:.3f}-{ratio[2]:.3f})"
    number = "" if ratio is None else f", {ratio[0]:.3f}{ends}"
    processes = "1 process" if outcome["processes"] == 1 else f"{outcome['processes']} processes"
    late = f"later than {outcome['limit_s']:g} s; " if outcome["seconds"] > outcome["limit_s"] else ""
    missed = "" if outcome["caught"] else f"; NOT as it should be: {late}{outcome['why']}"
    return f"{outcome['plant']}: {outcome['came']} in {outcome['seconds']:.1f} s, {processes}{number}{missed}"


def _counted(plant: Plant, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How often it came out as it should, in which time, and whether its bound holds."""
    mine = [outcome for outcome in outcomes if outcome["plant"] == plant.name]
    caught, seconds = sum(outcome["caught"] for outcome in mine), [outcome["seconds"] for outcome in mine]
    return {
        "plant": plant.name,
        "expected": " or ".join(plant.expected),
        "runs": len(mine),
        "caught": caught,
        "least": plant.least,
        "holds": holds(caught, len(mine), plant.least),
        "limit_s": plant.limit_s,
        "median_s": round(median(seconds), 1) if seconds else None,
        "max_s": max(seconds, default=None),
        "came": dict(Counter(outcome["came"] for outcome in mine).most_common()),
    }


def holds(caught: int, runs: int, least: float | None) -> bool | None:
    """Whether at least that share was caught; None where nothing is demanded, or nothing was tried.

    With fewer than MANY runs a share may miss its bound as far as chance explains it, to CHANCE, at a true
    share that is the bound itself.
    """
    if least is None or not runs:
        return None
    if caught >= least * runs - 1e-9:
        return True
    return runs < MANY and bool(binom.cdf(caught, runs, least) > CHANCE + 1e-9)


def table_of(summary: Mapping[str, Any]) -> Table:
    """What was planted, how often it was caught, and in which time."""
    table = Table(title=f"self-test on {summary['device']}", title_justify="left")
    for header in _HEADERS:
        table.add_column(header)
    for cells in _lines(summary):
        table.add_row(*cells)
    return table


def markdown_of(summary: Mapping[str, Any]) -> str:
    """The same for a document."""
    lines = [_HEADERS, ["---"] * len(_HEADERS), *_lines(summary)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_HEADERS = ["planted", "runs", "should be", "was", "demanded", "limit", "median", "longest", "came out as"]


def _lines(summary: Mapping[str, Any]) -> Iterator[list[str]]:
    for one in summary["plants"]:
        runs, caught = one["runs"], one["caught"]
        share = f"{caught} of {runs}" + (f" ({digits(100 * caught / runs, 3)} %)" if runs else "")
        least = "-" if one["least"] is None else f"{100 * one['least']:g} %"
        told = {None: "", True: ", holds", False: ", BROKEN"}[one["holds"]]
        times = ["-" if one[name] is None else f"{one[name]:.1f} s" for name in ("median_s", "max_s")]
        came = ", ".join(f"{count} {what}" for what, count in one["came"].items()) or "-"
        yield [
            one["plant"],
            str(runs),
            one["expected"],
            share,
            least + told,
            f"{one['limit_s']:g} s",
            *times,
            came,
        ]


def broken(summary: Mapping[str, Any]) -> bool:
    """Whether any bound is."""
    return any(one["holds"] is False for one in summary["plants"])


def _head(device: str, limit_s: float | None, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What outcomes must have in common to stand in one file."""
    gpus = [gpu["name"] for gpu in environment["gpus"]] if device != "cpu" else []
    about = environment["torch"] or {}
    return {
        "self_test": 1,
        "device": device,
        "limit_s": limit_s,
        "commit": environment["commit"],
        "cpu": environment["cpu"]["model"],
        "gpus": gpus,
        "torch": about.get("version"),
        "threads": about.get("threads"),
    }


def _file(environment: Mapping[str, Any]) -> Path:
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Path("results") / f"self-test-{now}-{(environment['commit'] or 'unknown')[:7]}.jsonl"


class _Kept:
    """Outcomes on disk, one JSON object a line after the head; what a last line lacks is done again."""

    def __init__(self, file: Path, head: Mapping[str, Any]) -> None:
        self.file = file
        self.done: dict[tuple[str, int], Outcome] = {}
        try:
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            lines = text[: text.rfind("\n") + 1].splitlines()
            if lines:
                self._take(lines, head)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{line}\n" for line in lines or [json.dumps(head)]), encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"--out: {file} cannot be used: {error}") from None

    def _take(self, lines: Sequence[str], head: Mapping[str, Any]) -> None:
        try:
            first, *found = map(json.loads, lines)
            other = [name for name in head if first[name] != head[name]]
            self.done = {(outcome["plant"], outcome["number"]): outcome for outcome in found}
        except (ValueError, LookupError, TypeError):
            raise PlanError(f"--out: {self.file} is no self-test; name another file") from None
        if other:
            told = ", ".join(f"{name} {first[name]!r}, now {head[name]!r}" for name in other)
            raise PlanError(f"--out: {self.file} is of another self-test ({told}); name another file")

    def keep(self, outcome: Outcome) -> None:
        """On disk when this returns."""
        self.done[outcome["plant"], outcome["number"]] = outcome
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")


__all__ = [
    "QUICK",
    "NoNeighbour",
    "WorkerError",
    "broken",
    "self_test",
    "table_of",
]
