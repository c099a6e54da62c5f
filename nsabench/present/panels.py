"""Which cells stand together in one figure, and what that figure's title says."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsabench.present.frame import (
    PLANNED,
    PresentError,
    Row,
    baselines,
    cell_rows,
    planned_routes,
    speeds,
)
from nsabench.present.wording import count_text, field_text, fields_text, value_text
from nsabench.stats import Interval
from nsabench.store import Run

_WITHIN = ("S", "impl")
"""Planned fields that may differ within a figure. All others split it, as do the machine and the regime."""

_USUAL = {"passes": "fwd", "mode": "batched", "B": 1}
"""Values that a file name leaves out."""


@dataclass(frozen=True)
class Point:
    """One cell, the name of its baseline, and its speed relative to that."""

    row: Row
    baseline: str
    speed: Interval | None

    @property
    def ok(self) -> bool:
        return bool(self.row["status"] == "ok")


@dataclass(frozen=True)
class Series:
    """The cells of one route in one run, by ascending S. `run` counts the runs of the figure from 0."""

    label: str
    route: str
    run: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """All cells that may stand in one figure: one shape but for S, one machine, one regime."""

    name: str
    title: str
    subtitle: tuple[str, str]
    series: tuple[Series, ...]

    @property
    def sizes(self) -> list[int]:
        """Every S, ascending."""
        return sorted({p.row["S"] for s in self.series for p in s.points})


@dataclass(frozen=True)
class _Member:
    run: Run
    machine: str
    point: Point


def make_panels(runs: Sequence[Run]) -> list[Panel]:
    """The figures' material, in the order of the runs; shapes without an ok cell are left out.

    PresentError when there is no run, or no ok cell in any.
    """
    if not runs:
        raise PresentError("there is no run to plot")
    members = [member for run in runs for member in _members(run)]
    groups: dict[tuple[Any, ...], list[_Member]] = {}
    for member in members:
        groups.setdefault(_figure_key(member), []).append(member)
    parts = [part for group in groups.values() for part in _by_regime(group)]
    if not parts:
        raise PresentError(_nothing_to_plot(runs, [m.point.row for m in members]))
    order = list(dict.fromkeys(m.point.row["route"] for m in members))
    order = list(dict.fromkeys([*(r for run in runs for r in planned_routes(run.info)), *order]))
    return [
        Panel(name, _title(part), _subtitle(part), _series(part, order))
        for name, part in zip(_names(parts), parts, strict=True)
    ]


def _members(run: Run) -> list[_Member]:
    rows, order = cell_rows(run.cells), planned_routes(run.info)
    together = zip(rows, baselines(rows, order), speeds(rows, run.samples, order), strict=True)
    return [
        _Member(run, _machine(run.info, row["device"]), Point(row, base["route"], speed))
        for row, base, speed in together
    ]


def _figure_key(member: _Member) -> tuple[Any, ...]:
    return (*(member.point.row[f] for f in PLANNED if f not in _WITHIN), member.machine)


def _by_regime(group: Sequence[_Member]) -> list[list[_Member]]:
    """The group split by regime and cache state, which are never compared; each part has the failed cells."""
    regimes = dict.fromkeys(_regime(m.point.row) for m in group if m.point.ok)
    return [[m for m in group if not m.point.ok or _regime(m.point.row) == regime] for regime in regimes]


def _regime(row: Row) -> tuple[str, str]:
    return row["regime"], row["cache"]


def _nothing_to_plot(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    names = ", ".join(run.info["run_id"] for run in runs)
    if not rows:
        return f"{names}: no cell is finished, so there is nothing to plot"
    return f"{names}: no cell is ok ({count_text(rows)}), so there is nothing to plot"


def _series(part: Sequence[_Member], order: Sequence[str]) -> tuple[Series, ...]:
    runs = _runs(part)
    impls = {m.point.row["impl"] for m in part}
    lines: dict[tuple[int, int, str], list[Point]] = {}
    for member in part:
        row = member.point.row
        key = (order.index(row["route"]), _index(runs, member.run), row["impl"])
        lines.setdefault(key, []).append(member.point)
    run_names = _run_names(runs)
    series = []
    for (place, number, impl), points in sorted(lines.items(), key=lambda item: item[0]):
        words = [impl] * (len(impls) > 1) + [order[place]] + [f"@ {run_names[number]}"] * (len(runs) > 1)
        by_size = sorted(points, key=lambda p: p.row["S"])
        series.append(Series(" ".join(words), order[place], number, tuple(by_size)))
    return tuple(series)


def _runs(part: Sequence[_Member]) -> list[Run]:
    return list({id(m.run): m.run for m in part}.values())


def _index(runs: Sequence[Run], run: Run) -> int:
    return next(i for i, other in enumerate(runs) if other is run)


def _run_names(runs: Sequence[Run]) -> list[str]:
    """Their commits, or their ids where a commit comes twice."""
    commits = [_commit(run.info) for run in runs]
    return commits if len(set(commits)) == len(runs) else [str(run.info["run_id"]) for run in runs]


def _commit(info: Mapping[str, Any]) -> str:
    environment = info.get("environment") or {}
    commit = environment.get("commit")
    return f"{commit[:7]}{'-dirty' if environment.get('dirty') else ''}" if commit else "unknown"


def _machine(info: Mapping[str, Any], device: str) -> str:
    """The model of the CPU or GPU, or the device's own name where that is not known."""
    environment = info.get("environment") or {}
    kind, _, number = device.partition(":")
    if kind == "cpu":
        model = (environment.get("cpu") or {}).get("model") or ""
        return re.sub(r"\((R|TM)\)| CPU| Processor| \d+-Core|\s*@.*", "", model).strip() or device
    gpus = environment.get("gpus") or []
    index = int(number or 0)
    return str(gpus[index]["name"]) if index < len(gpus) else device


def _title(part: Sequence[_Member]) -> str:
    row = part[0].point.row
    return f"{row['phase'].capitalize()} {row['passes'].replace('_', ' + ')}"


def _subtitle(part: Sequence[_Member]) -> tuple[str, str]:
    """Shape and dtype; then device, commit, and how it was measured."""
    row = part[0].point.row
    aside = {*_WITHIN, "phase", "passes", "device", "selection", "seed"}
    good = [m.point.row for m in part if m.point.ok]
    timers = "/".join(dict.fromkeys(r["timer"] for r in good if r["timer"]))
    regime, cache = _regime(good[0])
    where = [
        row["device"] if part[0].machine == row["device"] else f"{row['device']} ({part[0].machine})",
        f"commit {', '.join(dict.fromkeys(_commit(run.info) for run in _runs(part)))}",
        f"{timers} timer" if timers else "",
        regime,
        f"{cache} cache" if cache else "",
        *(field_text(row, f) for f in ("selection", "seed")),
    ]
    return fields_text(row, [f for f in PLANNED if f not in aside]), ", ".join(filter(None, where))


def _names(parts: Sequence[Sequence[_Member]]) -> list[str]:
    """The beginning of each figure's file names: phase, what is unusual, and what tells namesakes apart."""
    firsts = [next(m for m in part if m.point.ok) for part in parts]
    described = [_described(first) for first in firsts]
    names = [
        [first.point.row["phase"], *(words[f] for f, usual in _USUAL.items() if first.point.row[f] != usual)]
        for first, words in zip(firsts, described, strict=True)
    ]
    for field in described[0]:
        namesakes = {tuple(name) for name in names if names.count(name) > 1}
        for name in namesakes:
            same = [i for i, other in enumerate(names) if tuple(other) == name]
            if len({described[i][field] for i in same}) > 1:
                for i in same:
                    names[i] = [*name, described[i][field]]
    return ["-".join(name) for name in names]


def _described(member: _Member) -> dict[str, str]:
    """What may tell a figure apart, the most telling first, as words fit for a file name."""
    row = member.point.row
    fields = ("device", "dtype", *(f for f in PLANNED if f not in {*_WITHIN, "phase", "device", "dtype"}))
    words = {f: _word(row, f) for f in fields}
    words |= {"machine": member.machine, "regime": row["regime"], "cache": row["cache"]}
    return {f: re.sub(r"[^a-z0-9_.]+", "-", word.lower()).strip("-") for f, word in words.items()}


def _word(row: Row, name: str) -> str:
    text = value_text(row, name)
    return f"{name.replace('_', '')}{text}" if text.isdigit() else text
