"""Ten thousand stored cells, listed, tabulated and drawn: `python suites/scale.py` (half a minute).

Makes up runs as sweeps leave them (`--runs`, each of 96 cells: 16 sizes, five routes and dense attention,
15 rounds), then lets a fresh process without torch do what `nsabench results` and `nsabench plot` do, and
prints the seconds of each part: the best of `--repeats` processes, for other work on the machine only adds.
Import, load, list and plot are what `nsabench plot results` takes; the rest is `nsabench results --cells`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from nsabench.plan import Cell, sweep
from nsabench.stats import median_interval
from nsabench.store.files import csv_rows, header
from nsabench.store.journal import journal_line
from nsabench.store.runs import create_folder
from nsabench.store.schema import SCHEMA_VERSION, STAGES, TABLES, check_row, clean_row

ROUTES = ["auto", "sdpa", "gather", "fa2", "cmp=fa2,sel=triton,win=sdpa"]
SIZES = sorted(size * 2**i for i in range(8) for size in (256, 384))
ROUNDS = 15

TIMED = """
import sys
import time

start = time.perf_counter()


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(name)


sys.meta_path.insert(0, NoTorch())


def lap(what):
    global start
    now = time.perf_counter()
    print(what, now - start)
    start = time.perf_counter()


from pathlib import Path

from rich.console import Console

from nsabench.present.catalog import collect, runs_table, summarise
from nsabench.present.export import export_cells
from nsabench.present.plots import plot_run, second_process
from nsabench.present.tables import compared_table
from nsabench.store import find_runs, load_cells, load_run

lap("import")
with second_process() as helper:
    paths = find_runs(sys.argv[1])
    found = [load_cells(path) for path in paths]
    lap("load")
    plot_run(found, Path(sys.argv[2]), sys.argv[3].split(","), helper=helper)
lap("plot")
Console(file=open("/dev/null", "w")).print(runs_table([summarise(run) for run in found]))
lap("list the runs")
whole = [load_run(path) for path in paths]
lap("load with all samples")
collected = collect(whole)
lap("intervals of all cells")
Console(file=open("/dev/null", "w")).print(compared_table(collected.cells, last=400))
lap("table of 400 cells")
export_cells(collected, "csv")
lap("export of all cells")
"""


def make_run(root: Path, number: int) -> int:
    """A run of 96 cells; returns how many that are."""
    phase = ("prefill", "decode")[number % 2]
    shape = {"dim": 256, "heads": 8, "groups": 2, "dk": 32, "dv": 32, "dtype": "fp32", "device": "cpu"}
    blocks = {"mode": "batched", "l": 32, "d": 16, "l_sel": 64, "n_sel": 16, "w": 512, "seed": 0}
    cells = sweep(
        S=SIZES, B=[1], routes=ROUTES, passes=["fwd"], baselines=["dense"], phase=phase, **shape, **blocks
    )
    commit = f"{number:040x}"
    info = {
        "schema_version": SCHEMA_VERSION,
        "name": phase,
        "created": f"2026-01-{1 + number // 24:02d}T{number % 24:02d}:00:00Z",
        "repro": f"nsabench {phase}",
        "tags": ["made-up"],
        "environment": {"commit": commit, "cpu": {"model": "AMD EPYC"}, "gpus": []},
        "plan": [cell.to_dict() for cell in cells],
    }
    stem = f"202601{1 + number // 24:02d}T{number % 24:02d}0000Z-{phase}-{commit[-7:]}"
    create_folder(root, stem, info, _files(stem, cells, np.random.default_rng(number)))
    return len(cells)


def _files(run_id: str, cells: list[Cell], rng: np.random.Generator) -> dict[str, bytes]:
    files = {file: bytearray(header(columns)) for file, columns in TABLES.items()}
    journal = bytearray()
    arms = len(ROUTES) + 1
    for number, cell in enumerate(cells):
        ids = {"run_id": run_id, "cell_id": cell.cell_id}
        kinds = ("emit", "plain") if cell.phase == "decode" and cell.impl == "nsa" else ("",)
        slow = 0.5 + 0.2 * (number % arms) if cell.impl == "nsa" else cell.S / 4096
        times = slow * (cell.S / 512) ** 0.4 * rng.lognormal(0, 0.01, (ROUNDS, len(kinds)))
        total = median_interval(times.mean(axis=1))
        shares = dict(zip(STAGES, map(float, 100 * rng.dirichlet(np.arange(2, 10))), strict=True))
        row = cell.to_dict() | ids | {"status": "ok", "ms_total": total.point, "ms_lo": total.lo}
        row |= {"ms_hi": total.hi, "n_rounds": ROUNDS, "timer": "cpu", "regime": "latency", "cache": "cold"}
        row |= {f"share_{stage}_pct": share for stage, share in shares.items()}
        row |= {f"ms_{stage}": share * total.point / 100 for stage, share in shares.items()}
        row |= {"peak_alloc_bytes": 9000 * cell.S, "kv_cache_bytes": 512 * cell.S}
        row |= {"reads_tokens": min(cell.S, 1536 + cell.S // 16), "reads_tokens_dense": cell.S}
        check_row(row)
        samples = [
            {**ids, "process": 0, "round": r, "position": (number + r) % arms, "variant": kind, "iters": 5}
            | {"ms": float(times[r, k]), "t_s": float(r)}
            for r in range(ROUNDS)
            for k, kind in enumerate(kinds)
        ]
        clean = {"cells.csv": [row], "samples.csv": samples}
        for file, rows in clean.items():
            files[file] += csv_rows(clean_row(one, TABLES[file]) for one in rows)
        journal += journal_line(
            clean_row(row, TABLES["cells.csv"]), {file: len(data) for file, data in files.items()}
        )
    return {file: bytes(data) for file, data in files.items()} | {"journal.jsonl": bytes(journal)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=105)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", default="png")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "results"
        count = sum(make_run(root, number) for number in range(given.runs))
        best: dict[str, float] = {}
        for _ in range(given.repeats):
            command = [sys.executable, "-c", TIMED, str(root), f"{folder}/plots", given.formats]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for line in text.splitlines():
                what, seconds = line.rsplit(" ", 1)
                best[what] = min(best.get(what, float("inf")), float(seconds))
    if given.json:
        print(json.dumps({"cells": count, "runs": given.runs, "seconds": best}))
        return
    print(f"{count} cells of {given.runs} runs, figures as {given.formats}; seconds, best of {given.repeats}")
    for what, took in best.items():
        print(f"{took:6.2f}  {what}")
    print(f"{sum(best.values()):6.2f}  altogether")


if __name__ == "__main__":
    main()
