"""What the Triton kernels should take on an H200: `python suites/predict.py` (seconds; needs Triton, no GPU).

Prints the README's table, from the FLOPs and bytes that each kernel declares (`nsa/kernels/work.py`). A
kernel takes the longest of three: its products, its bytes between L2 and the SMs, its least bytes of memory,
each at a rate of its own; a route takes the sum of its kernels. Exponentials, launches, loads that wait and
what torch does between the kernels are not in the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from nsa import NSAConfig
from nsa.kernels.work import Call, KernelWork, declared, expected_union
from nsabench.present.wording import digits


@dataclass(frozen=True)
class Rates:
    """What an H200 sustains: 1e12 FLOP/s, 1e12 bytes/s from L2 to the SMs, and of memory.

    ``tflops`` is assumed: a bf16 matrix product alone reaches 790, attention forward about 650 in the best
    public kernels, products between softmaxes of small tiles less. ``l2_tbps`` is what kernels bound by L2
    reach on H100-class parts, ``dram_tbps`` a device copy measured on one, bytes read and written.
    """

    tflops: float = 450.0
    l2_tbps: float = 5.5
    dram_tbps: float = 4.3

    def ms(self, works: Iterable[KernelWork]) -> float:
        """Of the kernels, one after the other."""
        return 1e-9 * sum(
            max(one.flops / self.tflops, one.l2_bytes / self.l2_tbps, one.dram_bytes / self.dram_tbps)
            for one in works
        )


SHORT, LONG = 8192, 65536
GROUPS = NSAConfig(num_heads=64, num_kv_heads=4, head_dim=128)
SINGLE = NSAConfig(num_heads=64, num_kv_heads=64, head_dim=128)
OVERLAP = 0.9
TILE = 4
"""Tokens of a tile of the union kernel at 16 heads a KV head."""
ROUTES = (
    ("cmp", "triton", GROUPS, None, ""),
    ("score", "triton", GROUPS, None, ""),
    ("sel", "triton:union", GROUPS, OVERLAP, "neighbours share 90 %"),
    ("sel", "triton:union", GROUPS, None, "random blocks"),
    ("sel", "triton:query_major", GROUPS, None, ""),
    ("sel", "triton:kv_outer", SINGLE, None, "64 KV heads, random blocks"),
    ("win", "triton", GROUPS, None, ""),
)


def blocks_of_tiles(length: int, overlap: float | None) -> float:
    """Different blocks of a tile that are expected at a prompt of ``length``, mean."""
    tiles = (range(at, at + TILE) for at in range(0, length, TILE))
    return fmean(expected_union(tile, GROUPS, overlap) for tile in tiles)


def table(rates: Rates) -> str:
    """The routes as a Markdown table."""
    lines = ["| route | FLOPs at 64k | L2 at 64k | memory at 64k | 8k | 64k |", "|---|---|---|---|---|---|"]
    for branch, backend, config, overlap, about in ROUTES:
        short, long = (
            declared(branch, backend, Call(config, length, length, overlap=overlap))
            for length in (SHORT, LONG)
        )
        name = ", ".join(filter(None, (f"`{branch}={backend}`", about)))
        if backend == "triton:union":
            blocks = [f"{blocks_of_tiles(length, overlap):.0f}" for length in (SHORT, LONG)]
            name += f": {blocks[0]} a tile of {TILE} tokens at 8k, {blocks[1]} at 64k"
        lines.append(line(name, short, long, rates))
    whole = [forward(length, OVERLAP) for length in (SHORT, LONG)]
    lines.append(line(f"`triton`, neighbours share {OVERLAP:.0%}".replace("%", " %"), *whole, rates))
    return "\n".join(lines)


def line(name: str, short: Sequence[KernelWork], long: Sequence[KernelWork], rates: Rates) -> str:
    """A row of the table."""
    cells = [
        name,
        f"{digits(sum(one.flops for one in long) / 1e12)} T",
        f"{digits(sum(one.l2_bytes for one in long) / 1e9)} GB",
        f"{digits(sum(one.dram_bytes for one in long) / 1e9)} GB",
        f"{digits(rates.ms(short))} ms",
        f"{digits(rates.ms(long))} ms",
    ]
    return f"| {' | '.join(cells)} |"


def forward(length: int, overlap: float) -> list[KernelWork]:
    """The whole of `triton`, in which compressed attention hands its lse on."""
    call = Call(GROUPS, length, length, overlap=overlap, lse_given=True)
    return [one for branch in ("cmp", "score", "sel", "win") for one in declared(branch, "triton", call)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--tflops", type=float, default=Rates.tflops, help="of matrix products, 1e12 FLOP/s")
    parser.add_argument("--l2", type=float, default=Rates.l2_tbps, help="L2 to the SMs, 1e12 bytes/s")
    parser.add_argument("--memory", type=float, default=Rates.dram_tbps, help="of memory, 1e12 bytes/s")
    given = parser.parse_args()
    print(table(Rates(given.tflops, given.l2, given.memory)))


if __name__ == "__main__":
    main()
