"""NSA beside dense attention on a CPU, in one run: `python suites/cpu.py` (about two minutes on two cores).

Each row times NSA and torch's dense causal SDPA of the same heads in interleaved rounds of random order,
after checking NSA against its specification. A ratio is the median over rounds of dense over NSA, with its 95
% interval; above 1, NSA is faster. The dense time is the attention alone; an NSA module also projects,
compresses, selects, gates and projects back, so only the rows named `core` compare like with like.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nsa import KVCache, NativeSparseAttention, NSAConfig, nsa_attention
from nsa.routes import Request, resolve
from nsabench.measure import choose_iters, make_timer
from nsabench.run.check import check_arm
from nsabench.stats import median_interval, paired_ratio
from nsabench.store import capture_environment

Step = Callable[[], object]


@dataclass(frozen=True)
class Line:
    """One row of the table: milliseconds with their interval, and dense over NSA."""

    what: str
    S: int
    ms: float
    ms_lo: float | None
    ms_hi: float | None
    dense_ms: float
    ratio: float
    ratio_lo: float | None
    ratio_hi: float | None
    goal: str


def compare(what: str, S: int, nsa_step: Step, dense_step: Step, goal: str, rounds: int, seed: int) -> Line:
    """Time both steps in `rounds` rounds of random order."""
    arms = {}
    for name, step in (("nsa", nsa_step), ("dense", dense_step)):
        timer = make_timer("cpu", "cpu", "warm")
        timer.prepare(step)
        arms[name] = timer, choose_iters(max(timer.sample(1), 1e-3), 50)
    times: dict[str, list[float]] = {name: [] for name in arms}
    order, shuffle = list(arms), random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            timer, iters = arms[name]
            times[name].append(timer.sample(iters))
    mine = median_interval(times["nsa"])
    ratio = paired_ratio(times["dense"], times["nsa"])
    dense = median_interval(times["dense"]).point
    return Line(what, S, mine.point, mine.lo, mine.hi, dense, ratio.point, ratio.lo, ratio.hi, goal)


def dense_step(heads: int, dim: int, S: int, *, queries: int | None = None) -> Step:
    """Dense causal SDPA of `heads` heads; with `queries`, the last ones only, as in decode."""
    q = torch.randn(1, heads, queries or S, dim)
    k, v = torch.randn(1, heads, S, dim), torch.randn(1, heads, S, dim)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=queries is None)


def gate(config: NSAConfig, inputs: dict[str, object], S: int) -> None:
    """Refuse to time what is not right."""
    queries = inputs["q"].shape[1]  # type: ignore[attr-defined]
    route = resolve("auto", Request("cpu", torch.float32, queries, S, False, config))
    verdict = check_arm(inputs, route, "auto", config, gradients=False)
    if verdict.reason:
        raise SystemExit(f"NSA is wrong at S = {S}: {verdict.reason}")


def module_lines(rounds: int, seed: int) -> list[Line]:
    """The whole layer: dim 256, 8 heads, 2 KV heads, dk 32, fp32."""
    config = NSAConfig(num_heads=8, num_kv_heads=2, head_dim=32)
    layer = NativeSparseAttention(config, 256).eval()
    lines = []
    for S, goal in ((512, ""), (1024, "15 ms"), (2048, "35 ms")):
        x = torch.randn(1, S, 256)
        gate(config, layer.attention_inputs(x), S)
        lines.append(
            compare("module prefill", S, lambda x=x: layer(x), dense_step(8, 32, S), goal, rounds, seed)  # type: ignore[misc]
        )
    x, cache = torch.randn(1, 1024, 256), KVCache(config, 1, 1024)
    layer(x[:, :1023], cache)
    before = cache.checkpoint()

    def decode() -> object:
        cache.rollback(before)
        return layer(x[:, 1023:], cache)

    lines.append(
        compare("module decode", 1024, decode, dense_step(8, 32, 1024, queries=1), "0.8 ms", rounds, seed)
    )
    return lines


def core_lines(lengths: list[int], rounds: int, seed: int) -> list[Line]:
    """The attention core alone: 8 heads, 2 KV heads, d 64, fp32; dense SDPA is the same work without
    selection.
    """
    config = NSAConfig(num_heads=8, num_kv_heads=2, head_dim=64)
    layer = NativeSparseAttention(config, 512).eval()
    lines = []
    for S in lengths:
        inputs = layer.attention_inputs(torch.randn(1, S, 512))
        gate(config, inputs, S)
        step = lambda inputs=inputs: nsa_attention(**inputs, config=config)  # noqa: E731
        goal = {8192: "1x", 16384: "1.5x"}.get(S, "")
        lines.append(compare("core prefill", S, step, dense_step(8, 64, S), goal, rounds, seed))
    return lines


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each row; an interval needs 6")
    parser.add_argument("--core", default="4096,8192,16384", help="lengths of the core rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows and the environment to this file")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    with torch.inference_mode():
        lines = module_lines(given.rounds, given.seed)
        lines += core_lines([int(S) for S in given.core.split(",") if S], given.rounds, given.seed)
    table = Table(
        title=f"NSA beside dense SDPA, fp32, {torch.get_num_threads()} threads", title_justify="left"
    )
    for header in ("", "S", "NSA ms", "95 % interval", "dense ms", "dense / NSA", "95 % interval", "goal"):
        table.add_column(header, justify="left" if not header else "right")
    for line in lines:
        table.add_row(
            line.what, str(line.S), f"{line.ms:.2f}", _range(line.ms_lo, line.ms_hi), f"{line.dense_ms:.2f}",
            f"{line.ratio:.2f}", _range(line.ratio_lo, line.ratio_hi), line.goal,
        )  # fmt: skip
    Console().print(table)
    if given.json:
        stored = {
            "argv": sys.argv[1:],
            "environment": capture_environment(),
            "lines": [asdict(x) for x in lines],
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(stored, indent=1) + "\n")


def _range(lo: float | None, hi: float | None) -> str:
    return "-" if lo is None or hi is None else f"{lo:.2f} to {hi:.2f}"


if __name__ == "__main__":
    main()
