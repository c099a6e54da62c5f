"""Several runs as one: rows keep the run that measured them, and no measurement is averaged or invented."""

import difflib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsabench.store.files import StoreError, csv_rows, header
from nsabench.store.journal import JOURNAL_FILE, journal_line
from nsabench.store.reading import Run, frame_rows, load_run
from nsabench.store.runs import create_folder, utc_now
from nsabench.store.schema import CELL_COLUMNS, SCHEMA_VERSION, TABLES, upgraded

_FRAMES = {"samples.csv": "samples", "telemetry.csv": "telemetry", "kernels.csv": "kernels"}
_NAMES = [c.name for c in CELL_COLUMNS]
_PLAN = _NAMES[_NAMES.index("phase") : _NAMES.index("route") + 1]
_MOST_LISTED = 8

_Key = tuple[Any, ...]


def merge_runs(
    paths: Sequence[Path | str],
    root: Path | str,
    *,
    prefer: Sequence[str] = (),
    across: bool = False,
    argv: Sequence[str] = (),
) -> Path:
    """A new run in `root` with the cells of all runs; returns its folder. The given runs stay as they are.

    Rows keep their `run_id`, and run.json lists each run that measured under `sources`. A measurement that
    comes twice (same run, same cell) is kept once. StoreError, with nothing written, for fewer than two runs;
    for a cell that two runs measured, unless one of them comes first in `prefer` (folders or run ids), whose
    row is then kept alone; and where schema, policy or commit differ, unless `across`, which run.json notes.
    """
    if len(paths) < 2:
        raise StoreError(f"merge takes at least two runs; given: {len(paths)}")
    runs = [load_run(path) for path in paths]
    ranks = _ranks(runs, prefer)
    sources = _sources(runs)
    differing = _differing(sources)
    if differing and not across:
        said = "; ".join(f"{what} ({_both(values)})" for what, values in differing.items())
        raise StoreError(f"the runs differ in {said}; --across merges them nonetheless")
    kept = _kept(runs, ranks)
    info = _info(runs, sources, list(differing), argv)
    stem = f"{utc_now():%Y%m%dT%H%M%SZ}-{info['name']}-{_commit_name(sources)}"
    return create_folder(Path(root), stem, info, _files(runs, kept))


def _sources(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """run.json of every run that measured, less its plan, the first of each id."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for source in run.sources:
            found.setdefault(source["run_id"], {k: v for k, v in source.items() if k != "plan"})
    return list(found.values())


def _differing(sources: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What cannot be merged without a word, with the values it has."""
    policies = [source.get("policy") or {} for source in sources]
    options = dict.fromkeys(name for policy in policies for name in policy)
    values = {"schema": [str(source["schema_version"]) for source in sources]}
    values |= {f"policy {name}": [str(policy.get(name)) for policy in policies] for name in options}
    values["commit"] = [_commit(source) for source in sources]
    return {what: texts for what, texts in values.items() if len(set(texts)) > 1}


def _both(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


def _commit(source: Mapping[str, Any]) -> str:
    environment = source.get("environment") or {}
    return f"{environment.get('commit') or 'nogit'}"[:7] + "-dirty" * bool(environment.get("dirty"))


def _commit_name(sources: Iterable[Mapping[str, Any]]) -> str:
    commits = {_commit(source) for source in sources}
    return commits.pop() if len(commits) == 1 else "mixed"


def _ranks(runs: Sequence[Run], prefer: Sequence[str]) -> dict[str, int]:
    """The preferred runs' ids, the most preferred lowest; StoreError for one that is not merged."""
    ids = {str(source["run_id"]): [str(source["run_id"])] for run in runs for source in run.sources}
    known = ids | {run.run_id: [str(s["run_id"]) for s in run.sources] for run in runs}
    folders = {run.path.resolve(): known[run.run_id] for run in runs}
    ranks: dict[str, int] = {}
    for name in prefer:
        chosen = known.get(name) or folders.get(Path(name).resolve())
        if chosen is None:
            near = difflib.get_close_matches(Path(name).name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise StoreError(f"--prefer: {name!r} is none of the merged runs{hint}")
        for run_id in chosen:
            ranks.setdefault(run_id, len(ranks))
    return ranks


def _kept(runs: Sequence[Run], ranks: Mapping[str, int]) -> list[list[dict[str, Any]]]:
    """The rows that each run gives, every cell once."""
    seen: dict[_Key, tuple[Path, dict[str, Any]]] = {}
    measured: dict[_Key, list[str]] = {}
    new: list[list[dict[str, Any]]] = []
    for run in runs:
        new.append([])
        for row in run.rows:
            path, first = seen.setdefault((row["run_id"], row["cell_id"]), (run.path, row))
            if first != row:
                raise StoreError(
                    f"{path} and {run.path} hold cell {row['cell_id']} of run {row['run_id']} with different "
                    "values: one was edited"
                )
            if first is row:
                measured.setdefault(_key(row), []).append(row["run_id"])
                new[-1].append(row)
    chosen = {key: _chosen(list(dict.fromkeys(run_ids)), ranks) for key, run_ids in measured.items()}
    twice = [key for key, run_id in chosen.items() if run_id is None]
    if twice:
        raise StoreError(_conflict(twice, measured))
    return [[row for row in rows if chosen[_key(row)] == row["run_id"]] for rows in new]


def _key(row: Mapping[str, Any]) -> _Key:
    """Equal for the same cell, whatever schema it was stored in."""
    return tuple(row[name] for name in _PLAN)


def _chosen(run_ids: Sequence[str], ranks: Mapping[str, int]) -> str | None:
    if len(run_ids) == 1:
        return run_ids[0]
    return min((run_id for run_id in run_ids if run_id in ranks), key=lambda i: ranks[i], default=None)


def _conflict(keys: Sequence[_Key], measured: Mapping[_Key, Sequence[str]]) -> str:
    varying = [i for i, name in enumerate(_PLAN) if len({key[i] for key in measured}) > 1 or name == "S"]
    listed = [
        f"{' '.join(f'{_PLAN[i]}={key[i]}' for i in varying)} in {' and '.join(measured[key])}"
        for key in keys[:_MOST_LISTED]
    ]
    more = [f"{len(keys) - _MOST_LISTED} more"] if len(keys) > _MOST_LISTED else []
    what = "1 cell was" if len(keys) == 1 else f"{len(keys)} cells were"
    return f"{what} measured twice: {'; '.join(listed + more)}; --prefer RUN says which run's rows to keep"


def _info(
    runs: Sequence[Run], sources: Sequence[dict[str, Any]], differing: Sequence[str], argv: Sequence[str]
) -> dict[str, Any]:
    def common(name: str) -> Any:
        """What all runs say; None where they do not agree."""
        values = [source.get(name) for source in sources]
        return values[0] if all(value == values[0] for value in values) else None

    plans = (
        upgraded(cell, run.info["schema_version"]) for run in runs for cell in run.info.get("plan") or ()
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": None,
        "name": "merge",
        "created": utc_now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        "argv": list(argv),
        "repro": shlex.join(["nsabench", *argv]),
        "seed": common("seed"),
        "tags": list(dict.fromkeys(tag for source in sources for tag in source.get("tags") or ())),
        "suite": common("suite"),
        "policy": common("policy"),
        "environment": common("environment"),
        "across": list(differing),
        "sources": list(sources),
        "plan": list({json.dumps(cell, sort_keys=True): cell for cell in plans}.values()),
    }


def _files(runs: Sequence[Run], kept: Sequence[Sequence[dict[str, Any]]]) -> dict[str, bytes]:
    """All files but run.json, as if the cells had been measured one after the other in this run."""
    files = {file: bytearray(header(columns)) for file, columns in TABLES.items()}
    journal = bytearray()
    for run, rows in zip(runs, kept, strict=True):
        parts = {file: _by_cell(run, file) for file in _FRAMES}
        for row in rows:
            files["cells.csv"] += csv_rows([row])
            for file, lines in parts.items():
                files[file] += csv_rows(lines.get((row["run_id"], row["cell_id"]), ()))
            journal += journal_line(row, {file: len(data) for file, data in files.items()})
    return {file: bytes(data) for file, data in files.items()} | {JOURNAL_FILE: bytes(journal)}


def _by_cell(run: Run, file: str) -> dict[_Key, list[dict[str, Any]]]:
    found: dict[_Key, list[dict[str, Any]]] = {}
    for line in frame_rows(getattr(run, _FRAMES[file]), TABLES[file]):
        found.setdefault((line["run_id"], line["cell_id"]), []).append(line)
    return found
