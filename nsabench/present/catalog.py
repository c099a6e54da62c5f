"""Many runs at once: a line for each, whatever its kind, or the cells of all."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from nsabench.present.frame import cell_rows, planned_routes
from nsabench.present.material import (
    device_of,
    load_kind,
    scorecard_line,
    scorecard_status,
    setting_of,
    training_line,
    training_status,
)
from nsabench.present.naming import commit_of, machine_of
from nsabench.present.pairing import Compared, compare
from nsabench.present.wording import MISSING, count_text
from nsabench.store import Run, RunCells, load_cells
from nsabench.store.scorecard import Scorecard
from nsabench.store.training import Training

Keep = Callable[[pd.DataFrame], "pd.Series[bool]"]


@dataclass(frozen=True)
class Summary:
    """A run in one line. `counts` are its cells, or checks, by status, the most frequent first.

    `narrowed`: only those that were looked for. `planned`: how many cells the run was to have. `kind` is
    cells, verify or train, `status` what became of it: of cells ok, failed where one did, or unfinished.
    `outcome` says it in words, empty for cells, where the counts do.
    """

    path: str
    run_id: str
    created: str
    name: str
    tags: tuple[str, ...]
    suite: str
    machines: tuple[str, ...]
    commits: tuple[str, ...]
    planned: int
    narrowed: bool
    counts: Mapping[str, int]
    sources: int
    kind: str = "cells"
    status: str = ""
    outcome: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The summary for JSON."""
        return {
            "run_id": self.run_id,
            "path": self.path,
            "kind": self.kind,
            "status": self.status or None,
            "outcome": counts_text(self),
            "created": self.created or None,
            "name": self.name or None,
            "tags": list(self.tags),
            "suite": self.suite or None,
            "machines": list(self.machines),
            "commits": list(self.commits),
            "merged_from": self.sources if self.sources > 1 else None,
            "planned": self.planned if self.kind == "cells" else None,
            "cells": dict(self.counts) if self.kind == "cells" else None,
        }


def load_brief(path: Path) -> RunCells | Scorecard | Training:
    """The run in the folder, whatever its kind, with what a line about it takes."""
    return load_kind(path, load_cells)


def summarise(run: RunCells | Scorecard | Training, keep: Keep | None = None) -> Summary:
    """The run, and those of its cells that `keep` names: a run of another kind has none."""
    if not isinstance(run, RunCells):
        return _other(run, keep is not None)
    statuses = run.cells[keep(run.cells)]["status"].tolist() if keep else run.column("status")
    info, devices = run.info, dict.fromkeys(run.column("device"))
    machines = dict.fromkeys(machine_of(source, str(device)) for source in run.sources for device in devices)
    return Summary(
        path=str(run.path),
        run_id=run.run_id,
        created=str(info.get("created") or ""),
        name=str(info.get("name") or ""),
        tags=tuple(info.get("tags") or ()),
        suite=str((info.get("suite") or {}).get("name") or ""),
        machines=tuple(machines),
        commits=tuple(dict.fromkeys(commit_of(source) for source in run.sources)),
        planned=len(info.get("plan") or ()),
        narrowed=keep is not None,
        counts=dict(Counter(statuses).most_common()),
        sources=len(run.sources) if "sources" in info else 1,
        status=_status_of(run),
    )


def _status_of(run: RunCells) -> str:
    found = set(run.column("status"))
    if len(run.column("status")) < len(run.info.get("plan") or ()):
        return "unfinished"
    return "failed" if found - {"ok", "unsupported"} else "ok"


def _other(run: Scorecard | Training, narrowed: bool) -> Summary:
    """A scorecard or a training."""
    info, card = run.info, isinstance(run, Scorecard)
    rows = run.rows if isinstance(run, Scorecard) else []
    device = device_of(run) if isinstance(run, Scorecard) else str(setting_of(run, "device") or "cpu")
    return Summary(
        path=str(run.path),
        run_id=str(info["run_id"]),
        created=str(info.get("created") or ""),
        name=str(info.get("name") or ""),
        tags=tuple(info.get("tags") or ()),
        suite="",
        machines=(machine_of(info, device),),
        commits=(commit_of(info),),
        planned=0,
        narrowed=narrowed,
        counts={} if narrowed else dict(Counter(row["status"] for row in rows)),
        sources=1,
        kind="verify" if card else "train",
        status=scorecard_status(run) if isinstance(run, Scorecard) else training_status(run),
        outcome=scorecard_line(run) if isinstance(run, Scorecard) else training_line(run),
    )


def runs_table(summaries: Sequence[Summary], width: int = 100) -> Table:
    """One line per run: its id, when, tags, machine and cells by status; two lines where it is narrow."""
    table = _runs_table(summaries, stacked=False)
    console = Console(width=10_000)
    if Measurement.get(console, console.options, table).maximum <= width:
        return table
    return _runs_table(summaries, stacked=True)


def _runs_table(summaries: Sequence[Summary], stacked: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for head in ["run\n  when (UTC), tags, machine"] if stacked else ["run", "when (UTC)", "tags", "machine"]:
        table.add_column(head, overflow="fold")
    table.add_column(outcome_head(summaries), overflow="fold")
    for run in summaries:
        words = [when_text(run.created), " ".join(run.tags), ", ".join(run.machines)]
        if stacked:
            below = Text("\n  " + ", ".join(filter(None, words)), style="dim")
            table.add_row(Text(run.run_id).append(below), Text(counts_text(run)))
        else:
            table.add_row(*map(Text, (run.run_id, *words, counts_text(run))))
    return table


def about_run(run: Summary, info: Mapping[str, Any]) -> list[object]:
    """The run in a few lines above its cells."""
    words = [
        ", ".join(run.machines),
        f"commit {', '.join(run.commits)}",
        f"tags {' '.join(run.tags)}" if run.tags else "",
        f"suite {run.suite}" if run.suite else "",
        counts_text(run),
    ]
    return [
        f"{run.run_id}, {when_text(run.created)} UTC",
        ", ".join(filter(None, words)),
        *([f"repro: {info['repro']}"] if info.get("repro") else []),
    ]


def outcome_head(summaries: Sequence[Summary]) -> str:
    """What the column of `counts_text` is called."""
    return "cells" if all(run.kind == "cells" for run in summaries) else "outcome"


def counts_text(run: Summary) -> str:
    """The cells by status, and how many of the planned they are where some are missing; of a run of another
    kind what it is, its status and what it came to.
    """
    if run.kind != "cells":
        what = {"verify": "scorecard", "train": "training"}[run.kind]
        return f"{what} {run.status or 'unfinished'}: {run.outcome}"
    found = sum(run.counts.values())
    by_status = count_text({"status": status} for status, n in run.counts.items() for _ in range(n))
    merged = f", merged from {run.sources} runs" if run.sources > 1 else ""
    missing = f"{found} of {run.planned}: " if found < run.planned and not run.narrowed else ""
    return f"{missing}{by_status or 'none'}{merged}"


def when_text(created: str) -> str:
    """2026-11-20T12:26:34Z -> 2026-11-20 12:26."""
    return created[:16].replace("T", " ") or MISSING


@dataclass(frozen=True)
class Collected:
    """Cells of several runs, compared within each; `info` is run.json by run_id."""

    cells: list[Compared]
    info: dict[str, Mapping[str, Any]]


def collect(runs: Sequence[Run], keep: Keep | None = None) -> Collected:
    """The cells of all runs that `keep` names, each once, with what they were compared with in their run.

    What they are compared with need not be among them.
    """
    parts = list({part.run_id: part for run in runs for part in run.parts()}.values())
    if not parts:
        return Collected([], {})
    cells = pd.concat([part.cells for part in parts], ignore_index=True)
    samples = pd.concat([part.samples for part in parts], ignore_index=True)
    order = {part.run_id: planned_routes(part.info) for part in parts}
    compared = compare(cell_rows(cells), samples, order)
    wanted = keep(cells).tolist() if keep else [True] * len(cells)
    return Collected(
        [cell for cell, good in zip(compared, wanted, strict=True) if good],
        {part.run_id: part.info for part in parts},
    )
