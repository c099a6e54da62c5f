"""How figures, runs and machines are called: titles, subtitles and the names of files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsabench.present.frame import PLANNED, Compared, Row
from nsabench.present.wording import field_text, fields_text, value_text
from nsabench.store import Run, RunCells

WITHIN = ("S", "impl")
"""Planned fields that may differ within a figure. All others split it, as do the machine and the regime."""

_USUAL = {"passes": "fwd", "mode": "batched", "scope": "module", "B": 1}
"""Values that a file name leaves out."""


@dataclass(frozen=True)
class Member:
    run: Run
    machine: str
    cell: Compared

    @property
    def row(self) -> Row:
        return self.cell.row

    @property
    def ok(self) -> bool:
        return bool(self.row["status"] == "ok")


def regime_of(row: Row) -> tuple[str, str]:
    return row["regime"], row["cache"]


def created_at(run: RunCells) -> str:
    """When the run was made, in words that sort by time; empty where unknown."""
    return str(run.info.get("created") or "")


def run_names(runs: Sequence[Run]) -> list[str]:
    """Their commits, or their ids where a commit comes twice."""
    commits = [commit_of(run.info) for run in runs]
    return commits if len(set(commits)) == len(runs) else [str(run.info["run_id"]) for run in runs]


def commit_of(info: Mapping[str, Any]) -> str:
    environment = info.get("environment") or {}
    commit = environment.get("commit")
    return f"{commit[:7]}{'-dirty' if environment.get('dirty') else ''}" if commit else "unknown"


def machine_of(info: Mapping[str, Any], device: str) -> str:
    """The model of the CPU or GPU, or the device's own name where that is not known."""
    environment = info.get("environment") or {}
    kind, _, number = device.partition(":")
    if kind == "cpu":
        model = (environment.get("cpu") or {}).get("model") or ""
        return re.sub(r"\((R|TM)\)| CPU| Processor| \d+-Core|\s*@.*", "", model).strip() or device
    gpus = environment.get("gpus") or []
    index = int(number or 0)
    return str(gpus[index]["name"]) if index < len(gpus) else device


def title_of(part: Sequence[Member]) -> str:
    row = part[0].row
    core = " core" if row["scope"] == "core" else ""
    return f"{row['phase'].capitalize()} {row['passes'].replace('_', ' + ')}{core}"


def subtitle_of(part: Sequence[Member], runs: Sequence[Run]) -> tuple[str, str]:
    """Shape and dtype; then device, commit, and how it was measured."""
    row = part[0].row
    aside = {*WITHIN, "phase", "passes", "device", "selection", "seed"}
    good = [m.row for m in part if m.ok]
    timers = "/".join(dict.fromkeys(r["timer"] for r in good if r["timer"]))
    regime, cache = regime_of(good[0])
    where = [
        row["device"] if part[0].machine == row["device"] else f"{row['device']} ({part[0].machine})",
        f"commit {', '.join(dict.fromkeys(commit_of(run.info) for run in runs))}",
        f"{timers} timer" if timers else "",
        regime,
        f"{cache} cache" if cache else "",
        *(field_text(row, f) for f in ("selection", "seed")),
    ]
    return fields_text(row, [f for f in PLANNED if f not in aside]), ", ".join(filter(None, where))


def file_names(parts: Sequence[Sequence[Member]]) -> list[str]:
    """The beginning of each figure's file names: phase, what is unusual, and what tells namesakes apart."""
    firsts = [next(m for m in part if m.ok) for part in parts]
    described = [_described(first) for first in firsts]
    names = [
        [first.row["phase"], *(words[f] for f, usual in _USUAL.items() if first.row[f] != usual)]
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


def _described(member: Member) -> dict[str, str]:
    """What may tell a figure apart, the most telling first, as words fit for a file name."""
    row = member.row
    fields = ("device", "dtype", *(f for f in PLANNED if f not in {*WITHIN, "phase", "device", "dtype"}))
    words = {f: _word(row, f) for f in fields}
    words |= {"machine": member.machine, "regime": row["regime"], "cache": row["cache"]}
    return {f: re.sub(r"[^a-z0-9_.]+", "-", word.lower()).strip("-") for f, word in words.items()}


def _word(row: Row, name: str) -> str:
    text = value_text(row, name)
    return f"{name.replace('_', '')}{text}" if text.isdigit() else text
