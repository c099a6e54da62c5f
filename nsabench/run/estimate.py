"""What a cell will take, guessed before anything is built: for plans and budgets, never for results.

A guess is made from the shape alone (floating-point operations, bytes moved, calls) and from rates that
common machines reach; it is good to about a factor of two, worse for a backend nobody has met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import psutil
import torch

from nsa.blocks import tokens_read
from nsabench.plan import Cell
from nsabench.run.cross_check import SAMPLES as CROSS_SAMPLES
from nsabench.run.policy import Policy
from nsabench.run.steps import steps_of
from nsabench.run.work import ELEMENT_BYTES, config_of

# Score elements that the specification evaluates in fp64 for a check, and bytes it keeps of each.
CHECKED_ELEMENTS, CHECKED_BYTES = 2**24, 24
POINTS = 65
"""Positions at which the tokens read are sampled: enough for a mean to a percent, at any length."""


@dataclass(frozen=True)
class Estimate:
    """``seconds`` to check and measure, ``step_s`` seconds of one step, ``bytes`` of memory at the peak."""

    seconds: float
    step_s: float
    bytes: int


@dataclass(frozen=True)
class Machine:
    """FLOP/s of NSA in fp32 and in half precision, how much faster dense attention works, byte/s of memory,
    seconds for launching one call of NSA, for emptying the cache once and for setting a cell up; ``what``
    says what they stand for.
    """

    fp32: float
    half: float
    dense: float
    bandwidth: float
    call_s: float
    flush_s: float
    setup_s: float
    what: str

    def flops(self, dtype: str) -> float:
        return {"fp64": self.fp32 / 2, "fp32": self.fp32}.get(dtype, self.half)


@lru_cache
def machine(device: str) -> Machine:
    """Rates assumed for ``device``: by its threads or its multiprocessors, an H200's where it is not here."""
    if device == "cpu":
        threads = torch.get_num_threads()
        rate = 60e9 * threads
        what = f"{threads} CPU threads of 60 GFLOP/s in fp32"
        return Machine(rate, rate / 4, 1.0, 8e9, 0.5e-3, 10e-3, 0.4, what)
    here = torch.cuda.is_available()
    units = torch.cuda.get_device_properties(device).multi_processor_count if here else 132
    what = f"{units} multiprocessors of 1 TFLOP/s in half precision" + ("" if here else ", as an H200 has")
    return Machine(0.2e12 * units, 1e12 * units, 3.0, 25e9 * units, 1e-3, 0.1e-3, 3.0, what)


def memory_free(device: str) -> int | None:
    """Bytes that ``device`` has left; None where it is not here."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(torch.device(device))[0]) if torch.cuda.is_available() else None


def estimate_group(cells: Sequence[Cell], policy: Policy) -> Estimate:
    """Of cells that are measured together: times add up, one layer and its inputs serve them all."""
    found = [estimate(cell, policy) for cell in cells]
    return Estimate(
        sum(one.seconds for one in found),
        max(one.step_s for one in found),
        max(one.bytes for one in found),
    )


def estimate(cell: Cell, policy: Policy) -> Estimate:
    """Of one cell."""
    here = machine(cell.device)
    step = _step_s(cell, here)
    return Estimate(_seconds(cell, policy, step, here), step, _bytes(cell))


def _seconds(cell: Cell, policy: Policy, step: float, here: Machine) -> float:
    """Set-up and check, then every sample, stage run and branch alone that the policy asks for."""
    cold = policy.cache_for(cell) == "cold"
    once = step + (here.flush_s if cold else 0.0)
    wanted = policy.sample_ms * 1e-3
    steps = min(max(1.0, wanted / step), 5.0) if cold else max(1.0, wanted / step)
    sample = steps * once
    variants = len(steps_of(cell)) if cell.phase == "decode" else 1
    samples = policy.rounds + 1
    if policy.alone and cell.computes_nsa and cell.passes == "fwd":
        samples += 8
    if cell.device != "cpu":
        samples += 3 * CROSS_SAMPLES
    total = here.setup_s + _check_s(cell, here) + variants * samples * sample + 4 * step
    return total + (policy.share_runs * variants * 1.2 * once if policy.shares else 0.0)


def _check_s(cell: Cell, here: Machine) -> float:
    """The specification on its segments in fp64, and filling a cache with the whole prompt, twice."""
    spec = 8 * (cell.dk + cell.dv) * _checked(cell) * (1 if cell.passes == "fwd" else 3)
    filling = 4 * _parameters(cell) * cell.B * cell.S
    return spec / machine("cpu").flops("fp64") + filling / here.flops(cell.dtype)


def _checked(cell: Cell) -> float:
    return min(CHECKED_ELEMENTS, cell.B * cell.heads * cell.S * (1 if cell.phase == "decode" else cell.S))


def _step_s(cell: Cell, here: Machine) -> float:
    decode = cell.phase == "decode"
    tokens = cell.B * (1 if decode else cell.S)
    calls = 1 if decode else len(steps_of(cell)[0].spans)
    parameters = _parameters(cell) if cell.scope == "module" else 0
    size = ELEMENT_BYTES[cell.dtype]
    read = _tokens_read(cell)
    attention = 2.0 * tokens * cell.heads * (cell.dk + cell.dv) * read
    projections = 2.0 * tokens * parameters
    flops = {
        "fwd": attention + projections,
        "bwd": 2.5 * attention + 2 * projections,
        "fwd_bwd": 3.5 * attention + 3 * projections,
    }[cell.passes]
    passes = {"fwd": 1, "bwd": 2, "fwd_bwd": 3}[cell.passes]
    keys = read if decode else cell.S
    moved = passes * calls * size * (parameters + cell.B * cell.groups * (cell.dk + cell.dv) * keys)
    call_s = here.call_s * (1.0 if cell.computes_nsa else 0.2)
    rate = here.flops(cell.dtype) * (1.0 if cell.computes_nsa else here.dense)
    return passes * calls * call_s + flops / rate + moved / here.bandwidth


def _tokens_read(cell: Cell) -> float:
    """Keys and values a query reads, mean over the queries of a step."""
    first = cell.S if cell.phase == "decode" else 1
    if not cell.computes_nsa:
        return (first + cell.S) / 2
    config = config_of(cell)
    lengths = [first + (cell.S - first) * point // (POINTS - 1) for point in range(POINTS)]
    return sum(sum(tokens_read(length, config).values()) for length in lengths) / POINTS


def _parameters(cell: Cell) -> int:
    """Weights of the layer: projections in and out, and NSA's gates."""
    branches, gates = (3, 3 * cell.heads) if cell.computes_nsa else (1, 0)
    keys = cell.heads * cell.dk + branches * cell.groups * (cell.dk + cell.dv)
    return cell.dim * (keys + gates + cell.heads * cell.dv)


def _bytes(cell: Cell) -> int:
    """Weights, prompt, projections, cache, output and the check's score matrices."""
    branches = 3 if cell.computes_nsa else 1
    heads = cell.heads * (2 * cell.dk + 2 * cell.dv) + 2 * branches * cell.groups * (cell.dk + cell.dv)
    kept = 1 if cell.passes == "fwd" else 4
    tokens = cell.B * cell.S * (2 * cell.dim + heads) * kept
    weights = _parameters(cell) * (1 if cell.passes == "fwd" else 2)
    return int((tokens + weights) * ELEMENT_BYTES[cell.dtype] + CHECKED_BYTES * _checked(cell))
