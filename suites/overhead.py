"""What isolation costs: `python suites/overhead.py` (about a minute on two cores).

Each round measures the same cell in a worker and twice in this process, in an order drawn by chance, and
stores it to disk. A ratio is the median over rounds of the worker's time over this process's, with its 95 %
interval: of the whole cell (what a sweep takes longer), and of its samples (a worker must not change what is
measured). The ratio of the two in this process shows the machine's noise. The start of a worker, which a
sweep pays once, stands beside them.
"""

from __future__ import annotations

import argparse
import gc
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy import median

from nsabench.plan import Cell
from nsabench.run import Policy
from nsabench.run.executor import Began, Done, Job, LocalExecutor, local_slots
from nsabench.run.session import measure_group
from nsabench.stats import paired_ratio
from nsabench.store import RunDir

CELL = Cell(
    phase="prefill",
    passes="fwd",
    mode="batched",
    S=512,
    B=1,
    route="auto",
    dim=256,
    heads=8,
    groups=2,
    dk=32,
    dv=32,
    dtype="fp32",
    device="cpu",
    l=32,
    d=16,
    l_sel=64,
    n_sel=16,
    w=512,
    seed=0,
)


class Stored:
    """A run on disk, and the samples (ms) of the cell measured last."""

    def __init__(self, run: RunDir) -> None:
        self._run, self.ms = run, [0.0]

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        assert row["status"] == "ok", row["reason"]
        self.ms = [sample["ms"] for sample in samples]
        self._run.append(row, samples, telemetry, kernels)


def measure(rounds: int, policy: Policy, runs: dict[str, Stored]) -> tuple[float, list[dict[str, float]]]:
    """Seconds until the worker was ready, and of each round the seconds and the median sample of each arm."""
    found: list[dict[str, float]] = []

    def jobs() -> Iterator[Job]:
        shuffle = random.Random(0)
        for number in range(rounds + 1):
            cell, taken = replace(CELL, seed=number), {}
            for arm in shuffle.sample(list(runs), len(runs)):
                began = time.perf_counter()
                if arm == "worker":
                    yield Job((cell,), policy, number)
                else:
                    measure_group([cell], policy, runs[arm])
                    gc.collect()
                taken |= {arm: time.perf_counter() - began, f"{arm} ms": float(median(runs[arm].ms))}
            found.append(taken)

    start = 0.0
    starting = time.perf_counter()
    for event in LocalExecutor(local_slots([CELL])).run(jobs()):
        match event:
            case Began(job=job) if job.number == 0:
                start = time.perf_counter() - starting
            case Done(row=row, samples=samples):
                runs["worker"].done(row, samples)
    return start, found[1:]  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sample-ms", type=float, default=5.0, help="15 of them and the checks are a cell")
    asked = parser.parse_args()
    gc.freeze()  # as a worker does, so that collecting costs the same
    policy = Policy(sample_ms=asked.sample_ms, shares=False, alone=False)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = {"argv": [], "repro": "", "plan": [], "environment": {}, "policy": {}, "seed": 0}
        runs = {
            arm: Stored(stack.enter_context(RunDir.create(Path(folder), name=arm, **settings)))
            for arm in ("worker", "process", "again")
        }
        start, found = measure(asked.rounds, policy, runs)
    print(
        f"a worker starts in {start:.2f} s; a cell takes {median([r['process'] for r in found]) * 1e3:.0f} ms"
    )
    for what, over, under in (
        ("cell, worker over process", "worker", "process"),
        ("cell, process over process", "again", "process"),
        ("sample, worker over process", "worker ms", "process ms"),
        ("sample, process over process", "again ms", "process ms"),
    ):
        ratio = paired_ratio([r[over] for r in found], [r[under] for r in found])
        assert ratio.lo is not None
        assert ratio.hi is not None
        print(f"{what:29} {ratio.point:.4f} ({ratio.lo:.4f} to {ratio.hi:.4f}), {ratio.n} rounds")


if __name__ == "__main__":
    main()
