"""Launches of the Triton kernels side by side: `python suites/tune.py --json tune.jsonl` (minutes, a GPU).

Each kernel runs by itself, with the small ones around it, at its own launch and at others that compile for
sm_90 without spills; each is first checked against the specification at the last tokens of the prompt. Rounds
take all launches in an order drawn by chance; a launch is told by the ratio of its time to that of the
kernel's own, with a 95 % interval. Beside it: what the FLOPs and bytes that it declares at that launch
(`nsa/kernels/work.py`) make of the time, and what `suites/predict.py` predicts. A better launch belongs into
its kernel's table, with this ratio as the reason.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from nsa import NSAConfig, reference
from nsa.blocks import num_compressed_blocks
from nsa.kernels import _by_keys, _ranges, compressed, selected, selection, sliding
from nsa.kernels._tiles import LOG2E, Launch, capability, layout_of, padded
from nsa.kernels.work import Call, KernelWork, declared
from nsa.testing import against_spec
from nsabench.measure import MeasureError, choose_iters, make_timer, resolve_device
from nsabench.plan import PlanError
from nsabench.plan.axes import parse_duration, parse_ints
from nsabench.present.wording import digits
from nsabench.run.selection import synthetic
from nsabench.stats import median_interval, paired_ratio

sys.path.insert(0, str(Path(__file__).parent))
from predict import Rates

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECKED = 16  # queries
SAMPLE_MS = 20.0
OWN, LATE = "its own", "no time left"


@dataclass(frozen=True)
class Prompt:
    """Random inputs of all kernels, ``(1,S,...)``; ``lse`` is that of compressed attention."""

    config: NSAConfig
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor
    lse: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def drawn(
        cls, config: NSAConfig, length: int, dtype: torch.dtype, device: str, overlap: float | None
    ) -> Prompt:
        """``overlap`` as of ``nsabench --selection overlap=X``; None for random blocks."""
        torch.manual_seed(0)
        heads, rows = config.num_kv_heads, num_compressed_blocks(length, config)

        def normal(tokens: int, heads: int, width: int) -> torch.Tensor:
            return torch.randn(1, tokens, heads, width, device=device, dtype=dtype)

        q, k = normal(length, config.num_heads, config.head_dim), normal(length, heads, config.head_dim)
        v, v_cmp = normal(length, heads, config.v_dim), normal(rows, heads, config.v_dim)
        k_cmp = normal(rows, heads, config.head_dim)
        lse = compressed.compressed_attention(q, k_cmp, v_cmp, config)[1]
        blocks = torch.from_numpy(synthetic(config, heads, (0, length), 0, overlap)).unsqueeze(0).to(device)
        return cls(config, q, k, v, k_cmp, v_cmp, lse, blocks)


@dataclass(frozen=True)
class Kernel:
    """One kernel by itself.

    ``declared`` is the branch, the backend and the kernel's name in `nsa.kernels.work`. ``run`` gives for a
    whole prompt what ``specify(**tensors, config=, q_start=)`` gives for its last queries. ``chooser`` is the
    function that chooses the launch, ``choice`` what it returns for one and its own arguments. ``others`` are
    rows, keys, warps and stages to try.
    """

    declared: tuple[str, str, str]
    run: Callable[[Prompt], torch.Tensor]
    specify: Callable[..., torch.Tensor]
    chooser: tuple[Any, str]
    choice: Callable[..., Any]
    others: tuple[tuple[int, int, int, int], ...]

    def at(self, launch: Launch | None) -> AbstractContextManager[object]:
        """The context in which ``run`` launches so; None for the kernel's own launch."""
        if launch is None:
            return nullcontext()
        return patch.object(*self.chooser, partial(self.choice, launch))


def only_lse(prompt: Prompt) -> torch.Tensor:
    lse = torch.empty_like(prompt.lse)
    layout = layout_of(prompt.q, prompt.k_cmp, None, by_blocks=True)
    selection._lse(prompt.q, prompt.k_cmp, lse, prompt.config, 0, layout)
    return lse / LOG2E


def union_of(launch: Launch, config: NSAConfig, *where: Any) -> Launch:
    rows = selected.tokens_of_tile(config.group_size, launch.block_m) * config.group_size
    return replace(launch, block_m=min(launch.block_m, padded(rows)))


SETTINGS = selection.settings


def settings_with(name: str) -> Callable[..., selection.Settings]:
    return lambda launch, *given: replace(SETTINGS(*given), **{name: launch})


def as_is(launch: Launch, *given: Any) -> Launch:
    return launch


def specify_selected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, **more: Any
) -> torch.Tensor:
    return reference.selected_attention(q, k, v, blocks, **more)[0]


def attend(function: Callable[..., Any], *names: str) -> Callable[[Prompt], torch.Tensor]:
    return lambda prompt: function(*(getattr(prompt, name) for name in names), prompt.config)[0]


RANGES = ((128, 64, 8, 2), (128, 64, 8, 4), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 8, 3), (64, 32, 4, 3))
UNIONS = ((128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 2))
KERNELS = {
    "cmp": Kernel(
        ("cmp", "triton", "_attention_kernel"),
        attend(compressed.compressed_attention, "q", "k_cmp", "v_cmp"),
        lambda q, k_cmp, v_cmp, **more: reference.compressed_attention(q, k_cmp, v_cmp, **more)[0],
        (_ranges, "choose"),
        as_is,
        RANGES,
    ),
    "win": Kernel(
        ("win", "triton", "_attention_kernel"),
        attend(sliding.sliding_attention, "q", "k", "v"),
        lambda q, k, v, **more: reference.sliding_attention(q, k, v, **more)[0],
        (_ranges, "choose"),
        as_is,
        RANGES,
    ),
    "lse": Kernel(
        ("score", "triton", "_lse_kernel"),
        only_lse,
        lambda q, k_cmp, v_cmp, **more: reference.compressed_attention(q, k_cmp, v_cmp, **more)[1],
        (selection, "settings"),
        settings_with("lse"),
        (
            (128, 64, 8, 3),
            (128, 64, 4, 3),
            (64, 128, 4, 2),
            (64, 128, 4, 3),
            (128, 128, 8, 3),
            (128, 256, 8, 2),
        ),
    ),
    "scores": Kernel(
        ("score", "triton", "_scores_kernel"),
        lambda prompt: selection.select_blocks(prompt.q, prompt.k_cmp, prompt.config, lse=prompt.lse),
        lambda q, k_cmp, **more: reference.select_blocks(q, k_cmp, **more),
        (selection, "settings"),
        settings_with("scores"),
        (
            (64, 128, 4, 3),
            (64, 128, 8, 2),
            (128, 128, 8, 2),
            (64, 64, 4, 3),
            (128, 64, 4, 2),
            (64, 256, 8, 2),
        ),
    ),
    "union": Kernel(
        ("sel", "triton:union", "_union_kernel"),
        attend(selected.selected_attention_union, "q", "k", "v", "blocks"),
        specify_selected,
        (selected, "choose_union"),
        union_of,
        UNIONS,
    ),
    "kv_outer": Kernel(
        ("sel", "triton:kv_outer", "_block_kernel"),
        attend(selected.selected_attention_kv_outer, "q", "k", "v", "blocks"),
        specify_selected,
        (_by_keys, "choose"),
        as_is,
        ((64, 64, 4, 1), (128, 64, 4, 1), (64, 64, 8, 1)),
    ),
    "query_major": Kernel(
        ("sel", "triton:query_major", "_query_kernel"),
        attend(selected.selected_attention_query_major, "q", "k", "v", "blocks"),
        specify_selected,
        (selected, "choose_query_major"),
        as_is,
        ((16, 64, 4, 2), (16, 64, 2, 3), (16, 64, 2, 2), (16, 32, 2, 4)),
    ),
}


def fault(kernel: Kernel, prompt: Prompt) -> str:
    """What is wrong with the kernel's output for the last queries; empty where nothing is."""
    rows, taken = slice(-CHECKED, None), signature(kernel.specify).parameters
    tensors = {
        name: (t[:, rows] if name in ("q", "blocks") else t).cpu()
        for name, t in vars(prompt).items()
        if name in taken
    }
    found = kernel.run(prompt)[:, rows].cpu()
    known = {"config": prompt.config, "q_start": max(0, prompt.q.shape[1] - CHECKED)}
    if not found.is_floating_point():
        exact = kernel.specify(**{name: t.double() for name, t in tensors.items()}, **known)
        return "" if torch.equal(found, exact) else "chooses other blocks than the specification"
    outcome = against_spec(lambda **_: found, partial(kernel.specify, **known), tensors)["out"]
    return "" if outcome.ok else f"off by {outcome.max_abs_err:.2e}, allowed {outcome.budget:.2e}"


def work_of(kernel: Kernel, call: Call, device: torch.device) -> KernelWork:
    """What the kernel declares at the launch of the context."""
    branch, backend, name = kernel.declared
    return next(one for one in declared(branch, backend, call, capability(device)) if one.kernel == name)


def tune(
    name: str, prompt: Prompt, overlap: float | None, rounds: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """A row for each launch of a kernel, its own first; what has no time says why."""
    kernel, device = KERNELS[name], prompt.q.device
    length = prompt.q.shape[1]
    call = Call(prompt.config, length, length, dtype=prompt.q.dtype, overlap=overlap)
    launches = [None, *(Launch(*other, "") for other in kernel.others)]
    timers, faults, works = {}, {}, {}
    for launch in launches:
        try:
            with kernel.at(launch):
                faults[launch] = fault(kernel, prompt)
                if faults[launch]:
                    continue
                works[launch] = work_of(kernel, call, device)
                kind = "cpu" if device.type == "cpu" else "event"
                timer = make_timer(kind, device, "warm", "sustained")
                timer.prepare(lambda: kernel.run(prompt))
                timers[launch] = timer, choose_iters(timer.sample(1), SAMPLE_MS)
        except Exception as error:  # a launch that does not fit is a finding, whatever raises it
            faults[launch] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    samples: dict[Launch | None, list[float]] = {launch: [] for launch in timers}
    for _ in range(rounds):
        if time.monotonic() > deadline:
            break
        for launch in random.sample(list(timers), len(timers)):
            timer, iters = timers[launch]
            with kernel.at(launch):
                samples[launch].append(timer.sample(iters))
    for launch in launches:
        row = {"kernel": name, "S": length, "launch": words(launch), "why": faults[launch]}
        if samples.get(launch):
            base = None if launch is None else samples.get(None)
            row |= figures(samples[launch], base, works[launch])
        elif not faults[launch]:
            row["why"] = LATE
        yield row


def figures(times: list[float], base: list[float] | None, work: KernelWork) -> dict[str, Any]:
    """Of a launch's ``times``, ms; ``base`` are those of the kernel's own, None for that one itself."""
    ms = median_interval(times)
    found = {"ms": ms.point, "ms_lo": ms.lo, "ms_hi": ms.hi, "samples": times}
    found |= {"tflops": work.flops / ms.point * 1e-9, "l2_tbps": work.l2_bytes / ms.point * 1e-9}
    found["predicted_ms"] = Rates().ms([work])
    if base:
        ratio = paired_ratio(times, base)
        found |= {"ratio": ratio.point, "ratio_lo": ratio.lo, "ratio_hi": ratio.hi}
    return found


def words(launch: Launch | None) -> str:
    """``128x64, 8 warps, 3 stages``; the kernel's own has no name."""
    if launch is None:
        return OWN
    return f"{launch.block_m}x{launch.block_n}, {launch.num_warps} warps, {launch.num_stages} stages"


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    told = (
        f"{digits(row['ratio'])} ({digits(row['ratio_lo'])} to {digits(row['ratio_hi'])})"
        if "ratio" in row
        else ""
    )
    cells = [
        row["kernel"],
        str(row["S"]),
        row["launch"],
        digits(row.get("ms")),
        told,
        digits(row.get("predicted_ms")),
        digits(row.get("tflops")),
        digits(row.get("l2_tbps")),
        row["why"],
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a kernel is wrong, or fails, at its own launch."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--S", default="8k,64k")
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4, help="KV heads")
    parser.add_argument("--dk", type=int, default=128)
    parser.add_argument("--dv", type=int, default=None)
    parser.add_argument(
        "--overlap", type=float, default=0.9, help="of neighbours' blocks; below 0: random blocks"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", default="8m", help="no round begins later")
    parser.add_argument("--json", type=Path, help="a row a line, with samples")
    given = parser.parse_args(argv)
    names = given.kernels.split(",")
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        parser.error(f"--kernels: {unknown[0]!r}; allowed: {', '.join(KERNELS)}")
    if given.rounds < 1:
        parser.error(f"--rounds: at least 1, got {given.rounds}")
    try:
        resolve_device(given.device)
        config = NSAConfig(given.heads, given.groups, given.dk, given.dv)
        lengths = parse_ints(given.S, minimum=config.compression_block_size)
        deadline = time.monotonic() + parse_duration(given.budget)
    except (MeasureError, PlanError, ValueError) as error:
        parser.error(str(error))
    overlap = given.overlap if given.overlap >= 0 else None
    failed = False
    print("| kernel | S | launch | ms | time, of its own | predicted ms | TFLOP/s | L2 TB/s | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for length in lengths:
        prompt = Prompt.drawn(config, length, DTYPES[given.dtype], given.device, overlap)
        for name in names:
            for row in tune(name, prompt, overlap, given.rounds, deadline):
                print(line(row), flush=True)
                failed |= row["launch"] == OWN and "ms" not in row and row["why"] != LATE
                if given.json:
                    with given.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
