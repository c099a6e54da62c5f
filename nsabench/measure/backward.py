"""Shares of the stages in a backward pass: a backward node belongs to the stage that made it in forward."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from nsabench.measure.device import MeasureError, resolve_device
from nsabench.measure.profiling import profile, recorded
from nsabench.measure.stages import CLOSING, STAGES, Hook, Shares

_NODE = "autograd::engine::evaluate_function"
_STAGE = "nsa::"


@dataclass(frozen=True)
class Op:
    """One host-side range of a profile: an op, a backward node, or a stage. Times in milliseconds."""

    name: str
    start: float
    end: float
    thread: int
    sequence_nr: int = -1
    fwd_thread: int = 0
    id: int = 0

    @property
    def is_node(self) -> bool:
        return self.name.startswith(_NODE)


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy on the device. Times in milliseconds."""

    start: float
    end: float
    op: int
    """The `id` of the innermost op that launched it; 0 where that is not known."""


def backward_shares(
    step: Callable[[], object], hook: Hook, device: str | torch.device = "cpu", n: int = 3
) -> Shares:
    """Mean shares of the backward pass over `n` runs of `step`, after one that does not count.

    `step` runs forward and backward: the forward, under `hook`, tells which stage made each backward node,
    by autograd's sequence numbers. The total is the backward pass alone: on a CPU the time from its first
    node to its last, on a GPU its kernels' time (idle gaps left out). Nodes made outside the stages,
    gradient accumulation and gaps between nodes are `other`. Profiling slows small ops down: take the
    shares from here and the time from a timer.
    """
    if n < 1:
        raise MeasureError(f"n is {n}; it must be at least 1")
    where = resolve_device(device)
    on_gpu = where.type == "cuda"
    runs = []
    with hook(_stage_range), torch.cuda.device(where) if on_gpu else nullcontext():
        step()
        for _ in range(n):
            with profile(cuda=on_gpu) as profiler:
                step()
                if on_gpu:
                    torch.cuda.synchronize(where)
            ops, kernels = read_profile(profiler)
            runs.append(kernel_shares(ops, kernels) if on_gpu else host_shares(ops))
    return Shares.mean(runs)


def host_shares(ops: Sequence[Op]) -> Shares:
    """Shares of one backward pass by the host's time, from its first node to its last."""
    nodes = [op for op in ops if op.is_node]
    if not nodes:
        return _NO_BACKWARD
    total = max(op.end for op in nodes) - min(op.start for op in nodes)
    own = {id(node): node.end - node.start for node in nodes}
    for node, outer in _nodes_around(nodes):  # a backward pass within a backward pass
        if outer is not None:
            own[id(outer)] -= node.end - node.start
    return _shares(ops, total, [(node, own[id(node)]) for node in nodes])


def kernel_shares(ops: Sequence[Op], kernels: Sequence[Kernel]) -> Shares:
    """Shares of one backward pass by kernel time, all on one stream.

    No shares if, from its first kernel to its last, more than 1 % of the kernel time was launched by no
    backward node: then some stage would be short.
    """
    if not any(op.is_node for op in ops):
        return _NO_BACKWARD
    launchers = {op.id: op if op.is_node else outer for op, outer in _nodes_around(ops) if op.id}
    launched = [(launchers.get(kernel.op), kernel) for kernel in kernels]
    known = [(node, kernel) for node, kernel in launched if node is not None]
    if not known:
        return Shares(0.0, None, "the backward pass launched no kernel")
    first = min(kernel.start for _, kernel in known)
    last = max(kernel.end for _, kernel in known)
    total = math.fsum(k.end - k.start for k in kernels if first <= k.start and k.end <= last)
    costs = [(node, kernel.end - kernel.start) for node, kernel in known]
    inside = math.fsum(cost for _, cost in costs)
    if total - inside > CLOSING * total:
        note = (
            f"backward nodes launched {inside:.4g} ms of the {total:.4g} ms of kernels in the backward pass"
        )
        return Shares(total, None, note)
    return _shares(ops, total, costs)


_NO_BACKWARD = Shares(0.0, None, "the step ran no backward pass")


def _shares(ops: Sequence[Op], total_ms: float, costs: Iterable[tuple[Op, float]]) -> Shares:
    stage_of = _owners(ops)
    times: dict[str, float] = {}
    for node, ms in costs:
        stage = stage_of.get((node.fwd_thread, node.sequence_nr), "other")
        if stage != "other":
            times[stage] = times.get(stage, 0.0) + ms
    if not times:
        return Shares(total_ms, None, "no backward node comes from a stage")
    return Shares.closing(total_ms, times)


def _owners(ops: Sequence[Op]) -> dict[tuple[int, int], str]:
    """The stage of each (thread, sequence number) of the forward; none for what lies outside the stages."""
    # An op is recorded with the number that the next node will get. Ops that make no node share it with the
    # op that does, and that one starts last: once it has made its node, the number is used up.
    makers: dict[tuple[int, int], Op] = {}
    for op in ops:
        if op.sequence_nr < 0 or op.fwd_thread:
            continue
        key = op.thread, op.sequence_nr
        if key not in makers or op.start >= makers[key].start:
            makers[key] = op
    stages = [op for op in ops if op.name.startswith(_STAGE) and op.name.removeprefix(_STAGE) in STAGES]
    owners = {}
    for key, op in makers.items():
        around = [s for s in stages if s.thread == op.thread and s.start <= op.start and op.end <= s.end]
        if around:
            owners[key] = max(around, key=lambda s: s.start).name.removeprefix(_STAGE)
    return owners


def _nodes_around(ops: Iterable[Op]) -> Iterable[tuple[Op, Op | None]]:
    """Every op and the innermost backward node that it runs inside, if any; ops of a thread nest."""
    threads: dict[int, list[Op]] = defaultdict(list)
    for op in ops:
        threads[op.thread].append(op)
    for members in threads.values():
        nodes: list[Op] = []
        for op in sorted(members, key=lambda op: (op.start, -op.end)):
            while nodes and nodes[-1].end < op.end:
                nodes.pop()
            yield op, nodes[-1] if nodes else None
            if op.is_node:
                nodes.append(op)


def _stage_range(name: str) -> torch.profiler.record_function:
    return torch.profiler.record_function(_STAGE + name)


def read_profile(profiler: torch.profiler.profile) -> tuple[list[Op], list[Kernel]]:
    """The ops of the host and the kernels of the device in a finished profile."""
    ops, kernels = [], []
    events = recorded(profiler).events()
    origin = min((event.start_ns() for event in events), default=0)  # nanoseconds since 1970 outgrow a float
    for event in events:
        start, end = (event.start_ns() - origin) / 1e6, (event.end_ns() - origin) / 1e6
        launcher = event.linked_correlation_id()
        if event.device_type() != torch.autograd.DeviceType.CPU:
            if not event.is_user_annotation():  # the shadow of a stage on the device is no kernel
                kernels.append(Kernel(start, end, launcher))
        elif not launcher:  # else a call of the CUDA runtime
            ops.append(
                Op(
                    event.name(),
                    start,
                    end,
                    event.start_thread_id(),
                    event.sequence_nr(),
                    event.fwd_thread_id(),
                    event.correlation_id(),
                )
            )
    return ops, kernels
