"""A group of cells, measured: each arm gated and timed in interleaved rounds, each row handed on at once."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch

from nsabench.measure import MeasureError, NvmlSampler, open_sampler
from nsabench.measure.canary import LIMIT_S, canary, settle
from nsabench.plan import Cell
from nsabench.run.arm import Arm
from nsabench.run.gate import Refused, refuse_wrong_cache
from nsabench.run.neighbours import Neighbours
from nsabench.run.placement import placements
from nsabench.run.policy import Policy
from nsabench.run.rotation import rotation
from nsabench.run.timing import dropped_rounds
from nsabench.run.worker import DEVICE_LOST, Sink
from nsabench.run.workload import Workload, least_bytes, workload_for

Fields = dict[str, Any]

SAID_EVERY_S = 0.1
"""Rounds shorter than this are not all told of: a message costs a fifth of a millisecond."""


class DeviceLost(RuntimeError):
    """Nothing more can be measured in this process; the cell that did it has its row."""


def measure_group(
    cells: Sequence[Cell],
    policy: Policy,
    sink: Sink,
    *,
    process: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure cells of one shape in the same rounds, a row of each to ``sink``. A failure is a row too.

    ``process`` numbers the process that measures: samples of two were never taken in turn. ``clock`` gives
    the seconds since the run began.

    Raises:
        DeviceLost: a cell broke the device's context; cells without a row want a fresh process.
    """
    neighbours = Neighbours(cells[0].device, policy, sink)
    workloads = _built(cells, sink)
    arms = [
        Arm(cell, workloads[_built_as(cell)], policy, clock, process)
        for cell in cells
        if _built_as(cell) in workloads
    ]
    if not arms:
        return
    for arm in arms:
        sink.doing(f"checking {arm.cell.arm} against the specification")
        _guard(arm, arm.prepare, sink)
    for arm, steps in rotation(arms).items():
        sink.doing(f"{steps} steps of {arm.cell.arm} in one graph")
        _guard(arm, partial(arm.rotate, steps), sink)
    for arm, places in placements(arms).items():
        sink.doing(f"{places} copies of the tensors of {arm.cell.arm}, elsewhere in memory")
        _guard(arm, partial(arm.spread, places), sink)
    if policy.settle:
        _settle(arms, sink)
    with open_sampler(cells[0].device, clock=clock) as sampler:
        began = clock()
        with neighbours.over_rounds():
            _rounds(arms, policy, sampler, sink, clock)
        ended = clock()
    telemetry = sampler.readings
    if lost := sampler.lost(began, ended):
        sink.doing(f"NVML stopped answering during the rounds: no more {', '.join(lost)}")
    read = sampler.summary(began, ended) | sampler.validity(began, ended)
    if len(arms) > 1:
        # Spent on all of them: the counter does not tell whose.
        read["energy_j"] = None
    for arm in arms:
        arm.fields |= {"neighbour_load_pct": neighbours.load_pct}
        if sampler.slow_downs(began, ended) is not None:
            arm.fields["dropped_rounds"] = len(dropped_rounds(arm.samples))
        if arm.fields["status"] == "ok":
            sink.doing(f"stages, branches and memory of {arm.cell.arm}")
        _guard(arm, arm.finish, sink)
        arm.fields |= read
        arm.release()
        kernels = arm.kernels if arm.fields["status"] == "ok" else ()
        sink.done(arm.fields, arm.samples, telemetry if arm is arms[0] else (), kernels)


def _built(cells: Sequence[Cell], sink: Sink) -> dict[Cell, Workload]:
    """What is to be timed, by `_built_as`; what cannot be built becomes rows."""
    workloads: dict[Cell, Workload] = {}
    kinds = dict.fromkeys(_built_as(cell) for cell in cells)
    for kind in kinds:
        mine = [cell for cell in cells if _built_as(cell) == kind]
        failed: Fields = {}
        sink.mark(mine[0] if len(kinds) > 1 else None)
        try:
            with _failures(failed):
                _refuse_hopeless(mine[0])
                workload = workload_for(mine[0])
                refuse_wrong_cache(workload)
                workloads[kind] = workload
        except _Failed:
            for cell in mine:
                sink.done({**cell.to_dict(), "cell_id": cell.cell_id, **failed})
    return workloads


def _built_as(cell: Cell) -> Cell:
    """Equal for the cells that share a workload: they differ in nothing but the route, or not at all."""
    return replace(cell, route="auto", twin=0)


def _settle(arms: Sequence[Arm], sink: Sink) -> None:
    """Wait until the device takes the same time for the same work, and note how far it still does not."""
    living = [arm for arm in arms if arm.fields["status"] == "ok"]
    if not living:
        return
    sink.mark(None)
    sink.doing("waiting for a steady device")
    # Arms that leave no memory for the canary are measured all the same.
    with suppress(torch.OutOfMemoryError):
        device = living[0].cell.device
        spread = settle(canary(device), limit_s=LIMIT_S[torch.device(device).type]).spread
        for arm in living:
            arm.fields["canary_spread_pct"] = 100 * spread


def _rounds(
    arms: list[Arm], policy: Policy, sampler: NvmlSampler, sink: Sink, clock: Callable[[], float]
) -> None:
    """Visit every living arm once a round, in a seeded random order, so that drift falls on all alike. A
    round in which the hardware slowed down counts for none.
    """
    shuffle = random.Random(f"{arms[0].cell.seed} {arms[0].process}")
    said = -math.inf
    opened = sampler.edge()["t_s"]
    for number in range(policy.rounds):
        living = [arm for arm in arms if arm.fields["status"] == "ok"]
        if not living:
            return
        shuffle.shuffle(living)
        if clock() - said >= SAID_EVERY_S:
            sink.doing(f"round {number + 1} of {policy.rounds}")
            said = clock()
        for position, arm in enumerate(living):
            _guard(arm, partial(arm.sample, number, position), sink)
        closed = sampler.edge()["t_s"]
        if slow := sampler.slow_downs(opened, closed):
            _drop(arms, number, slow)
        opened = closed


def _drop(arms: Sequence[Arm], number: int, why: str) -> None:
    for arm in arms:
        for sample in arm.samples:
            if sample["round"] == number:
                sample["dropped"] = why


class _Failed(Exception):
    """A failure that has become a status and a reason."""


def _guard(arm: Arm, act: Callable[[], None], sink: Sink) -> None:
    if arm.fields["status"] != "ok":
        return
    sink.mark(arm.cell)
    try:
        with _failures(arm.fields):
            act()
    except _Failed:
        if arm.fields["status"] == "error" and (lost := _lost(arm.cell.device)):
            arm.fields["reason"] = f"{DEVICE_LOST}: {arm.fields['reason']}"
            sink.done(arm.fields, arm.samples)
            raise DeviceLost(f"{DEVICE_LOST} when {arm.cell.arm} failed: {lost}") from None
        arm.release()


def _lost(device: str) -> str:
    """Why the device can do nothing more in this process; empty while it can."""
    if device == "cpu":
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return _line(error)
    return ""


@contextmanager
def _failures(fields: dict[str, Any]) -> Iterator[None]:
    """Turn whatever stops a cell into its status and reason; Ctrl-C is not the cell's."""
    try:
        yield
        return
    except Refused as error:
        fields |= {"status": error.status, "reason": str(error)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        fields |= {"status": "oom", "reason": _line(error)}
    except MeasureError as error:
        fields |= {"status": "invalid", "reason": str(error)}
    except Exception as error:
        out_of_memory = "can't allocate memory" in str(error) or "not enough memory" in str(error)
        fields |= {"status": "oom" if out_of_memory else "error", "reason": _line(error)}
    raise _Failed


def _line(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"


def _refuse_hopeless(cell: Cell) -> None:
    """Refuse a cell whose tensors cannot fit before a build drives the machine into swap or the OOM
    killer.
    """
    if cell.device == "cpu":
        free = psutil.virtual_memory().available
    else:
        free = torch.cuda.mem_get_info(torch.device(cell.device))[0]
    needed = least_bytes(cell)
    if needed > free:
        raise Refused("oom", f"needs at least {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
