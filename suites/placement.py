"""What the places of tensors in memory do to a time: `python suites/placement.py` (a minute on two cores).

Two equal decode steps of dense attention, each on tensors of its own, are timed in turn; then both get new
tensors, and again. One allocates them as any program does, the other moves them to places drawn by chance, as
rounds do. Each of some processes gives a row: by how much the second step was slower at each place.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

PLACES, SECONDS, LENGTH, WIDTH, CALLS = 8, 0.4, 1024, 64, 100


def difference(steps: list[Callable[[], None]], chance: random.Random) -> float:
    """Per cent by which the second of two steps was slower: median over pairs, their order by chance."""
    for step in steps:
        step()
    found, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        took = {}
        for place in chance.sample((0, 1), 2):
            began = time.perf_counter()
            steps[place]()
            took[place] = time.perf_counter() - began
        found.append(100 * (took[1] / took[0] - 1))
    return statistics.median(found)


def in_this_process(seed: int, scattered: bool) -> list[float]:
    """The difference at each place."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from nsabench.run.placement import scatter

    chance, kept, found = random.Random(seed), [], []
    for _ in range(PLACES):
        steps = []
        for _ in range(2):
            q, k, v = tensors = [torch.randn(1, 1, n, WIDTH) for n in (1, LENGTH, LENGTH)]
            if scattered:
                scatter(tensors, chance)
            kept.append(tensors)

            def step(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
                for _ in range(CALLS):
                    scaled_dot_product_attention(q, k, v)

            steps.append(step)
        found.append(difference(steps, chance))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--one", nargs=2, metavar=("SEED", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(in_this_process(int(given.one[0]), given.one[1] == "chance")))
        return
    for how, title in (("allocator", "places as the allocator gives them"), ("chance", "places by chance")):
        rows = []
        print(f"\n{title}: the second of two equal steps is slower by, %")
        for seed in range(given.processes):
            command = [sys.executable, __file__, "--one", str(seed), how]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            print("  process", seed + 1, *(f"{value:+6.1f}" for value in rows[-1]))
        print("  mean     ", *(f"{statistics.fmean(column):+6.1f}" for column in zip(*rows, strict=True)))
        within = statistics.fmean(statistics.stdev(row) for row in rows)
        means = [statistics.fmean(row) for row in rows]
        print(
            f"  standard deviation over the places of a process {within:.2f}; of the processes' means "
            f"{statistics.stdev(means):.2f} about {statistics.fmean(means):+.2f}"
        )


if __name__ == "__main__":
    main()
