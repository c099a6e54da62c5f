"""Shares of the stages in a backward pass: a backward node belongs to the stage that made it in forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch

from nsabench.measure.device import MeasureError, resolve_device
from nsabench.measure.profiling import profile
from nsabench.measure.stages import CLOSING, Hook, Shares
from nsabench.measure.trace import Kernel, Op, around, owners, read_profile, stage_range


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
    with hook(stage_range), torch.cuda.device(where) if on_gpu else nullcontext():
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
    for node, outer in around(nodes, _is_node):  # a backward pass within a backward pass
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
    launchers = {op.id: op if op.is_node else outer for op, outer in around(ops, _is_node) if op.id}
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
    stage_of = owners(ops)
    times: dict[str, float] = {}
    for node, ms in costs:
        stage = stage_of.get((node.fwd_thread, node.sequence_nr), "other")
        if stage != "other":
            times[stage] = times.get(stage, 0.0) + ms
    if not times:
        return Shares(total_ms, None, "no backward node comes from a stage")
    return Shares.closing(total_ms, times)


def _is_node(op: Op) -> bool:
    return op.is_node
