"""Where a step's time goes, kernel by kernel: each to the stage that launched it.

On a GPU kernels by the op that launched them, backward ones by the stage that made their node; on a CPU the
self time of torch's operators. Profiling slows small ops down: shares come from here, times from a timer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from nsabench.measure.device import MeasureError, QueueAhead, no_flush, resolve_device
from nsabench.measure.profiling import profile
from nsabench.measure.stages import CLOSING, STAGES, Hook
from nsabench.measure.trace import (
    Kernel,
    Op,
    Seen,
    branches,
    names_by_stage,
    read_profile,
    short_name,
    stage_range,
)

_RUN = "nsabench::step"

Step = Callable[[], object]
Before = Callable[[], None]


@dataclass(frozen=True)
class KernelTime:
    """One kernel of one stage; on a CPU one operator, or as `nsa::<branch>` what of a stage no operator
    covers: Python, and compiled code that is no operator of torch.
    """

    kernel: str
    branch: str
    """A stage's name or `other`; empty where the stages cannot be told."""
    calls: float
    """A step."""
    ms: float
    """A step, all calls together."""


@dataclass(frozen=True)
class Attribution:
    """A step's kernels, the longest first. With `idle_ms` they add up to `total_ms` within 1 %, or `note`
    says why not and no kernel has a branch.
    """

    kernels: tuple[KernelTime, ...]
    total_ms: float
    """Mean time of a step while profiled: by CUDA events on a GPU, by the profiler's clock on a CPU."""
    idle_ms: float
    """Of it, the time in which the device ran nothing; 0 on a CPU."""
    note: str = ""
    seen: Seen = field(default_factory=dict)
    """Names of all operators and kernels by stage, for who asks what ran."""

    @property
    def ms(self) -> dict[str, float] | None:
        """Time by stage, in the order of STAGES with `other` last; None where the stages cannot be told."""
        if self.note:
            return None
        ms = {stage: math.fsum(k.ms for k in self.kernels if k.branch == stage) for stage in STAGES}
        ran = {kernel.branch for kernel in self.kernels} | {"other"}
        return {stage: time for stage, time in ms.items() if stage in ran}


def attribute(
    step: Step,
    hook: Hook,
    device: str | torch.device,
    *,
    runs: int = 5,
    before: Before = no_flush,
    graph: Step | None = None,
    api: Any = torch.cuda,
) -> Attribution:
    """Mean kernel times over `runs` of `step` under `hook`, after some that do not count.

    `before` runs ahead of every step and counts for nothing: a flush of the cache, the forward of a backward.
    `graph` replays the same step from a CUDA graph, where kernels have no op: the times are then the
    replay's, and its kernels go to stages in the order of capture (see `capture_order`). MeasureError where
    torch's profiler cannot run.
    """
    if runs < 1:
        raise MeasureError(f"runs is {runs}; it must be at least 1")
    where = resolve_device(device, api=api)
    if where.type == "cpu":
        with hook(stage_range):
            _repeat(step, before, 1)
            ops, kernels = _profiled(partial(_repeat, step, before, runs), cuda=False)
        return replace(host_times(ops), seen=names_by_stage(ops, kernels))
    with api.device(where):
        with hook(stage_range):
            eager = _queued(step, before, runs if graph is None else 1, api)
        found = (
            kernel_times(*eager) if graph is None else replay_times(eager, _queued(graph, before, runs, api))
        )
    return replace(found, seen=names_by_stage(*eager[:2]))


_Queued = tuple[list[Op], list[Kernel], list[float]]


def _queued(step: Step, before: Before, runs: int, api: Any) -> _Queued:
    """Profile steps that are queued ahead of the device: ops, kernels, and each run's ms by events."""
    ahead = QueueAhead(before=before, api=api)
    spans: list[float] = []
    # Launching costs more under a profiler, and its first use more again.
    _profiled(lambda: ahead.calibrate(step), cuda=True)

    def measure() -> None:
        spans.extend(ahead.measure(partial(_marked, step)).ms for _ in range(runs))
        api.synchronize()

    ops, kernels = _profiled(measure, cuda=True)
    return ops, kernels, spans


def _profiled(act: Callable[[], object], *, cuda: bool) -> tuple[list[Op], list[Kernel]]:
    profiler = profile(cuda=cuda)
    try:
        profiler.start()
    except RuntimeError as error:
        raise MeasureError(f"torch.profiler cannot start: {str(error).splitlines()[0]}") from error
    try:
        act()
    finally:
        profiler.stop()
    return read_profile(profiler)


def _repeat(step: Step, before: Before, runs: int) -> None:
    for _ in range(runs):
        before()
        _marked(step)


def _marked(step: Step) -> None:
    with torch.profiler.record_function(_RUN):
        step()


def host_times(ops: Sequence[Op]) -> Attribution:
    """Self times of the ops inside the marked runs, each in its run's thread."""
    runs = [op for op in ops if op.name == _RUN]
    total = math.fsum(run.end - run.start for run in runs)
    times: list[KernelTime] = []
    threads = {run.thread for run in runs}
    open_: list[list[Any]] = []  # op, its branch, its self time

    def close(until: float) -> None:
        while open_ and open_[-1][0].end < until:
            op, branch, own = open_.pop()
            covers = op.name == _RUN or op.stage
            times.append(KernelTime(f"nsa::{branch}" if covers else op.name, branch, 1.0, max(0.0, own)))

    for op, branch in branches([op for op in ops if op.thread in threads]):
        close(op.end)
        if not open_ and op.name != _RUN:
            continue
        if open_:
            open_[-1][2] -= op.end - op.start
        open_.append([op, branch, op.end - op.start])
    close(math.inf)
    return Attribution(_summed(times, len(runs)), total / max(1, len(runs)), 0.0)


def kernel_times(ops: Sequence[Op], kernels: Sequence[Kernel], totals: Sequence[float]) -> Attribution:
    """Kernels of the marked runs by the stage that launched them; `totals` are the runs' measured ms."""
    by_run, lost = _by_run(ops, kernels)
    total = math.fsum(totals) / len(totals)
    note = _not_closing(by_run, lost, totals)
    busy = math.fsum(_busy([kernel for kernel, _ in run]) for run in by_run) / len(totals)
    times = [KernelTime(k.name, branch, 1.0, k.end - k.start) for run in by_run for k, branch in run]
    found = Attribution(_summed(times, len(totals)), total, max(0.0, total - busy))
    return _refused(found, note) if note else found


def replay_times(eager: _Queued, replay: _Queued) -> Attribution:
    """Kernels of a graph's replays, with the stages of the same kernels in one eager run."""
    found = kernel_times(*replay)
    captured, _ = _by_run(*eager[:2])
    ran, _ = _by_run(*replay[:2])
    if found.note or not captured or not ran:
        return found
    order = [(kernel.name, branch) for kernel, branch in captured[0]]
    times = []
    for run in ran:
        stages, note = capture_order(order, [kernel.name for kernel, _ in run])
        if note:
            return _refused(found, note)
        times += [
            KernelTime(k.name, stage, 1.0, k.end - k.start) for (k, _), stage in zip(run, stages, strict=True)
        ]
    return replace(found, kernels=_summed(times, len(ran)))


def capture_order(eager: Sequence[tuple[str, str]], replay: Sequence[str]) -> tuple[list[str], str]:
    """Stages of a replay's kernels, which run in the order of their capture.

    `eager` are (kernel, stage) of the step outside a graph, `replay` the kernels in it, both in the order
    they ran. Only equal sequences of kernels can be mapped; else no stages, and why.
    """
    for number, ((captured, _), ran) in enumerate(zip(eager, replay, strict=False)):
        if captured != ran:
            what = (
                f"kernel {number + 1} is {short_name(captured)!r} eagerly, {short_name(ran)!r} in the graph"
            )
            return [], f"the graph runs other kernels than the eager step: {what}"
    if len(eager) != len(replay):
        return [], f"the graph runs {len(replay)} kernels, the eager step {len(eager)}"
    return [stage for _, stage in eager], ""


def _by_run(
    ops: Sequence[Op], kernels: Sequence[Kernel]
) -> tuple[list[list[tuple[Kernel, str]]], list[Kernel]]:
    """Kernels launched in each marked run, with their stage, in the order they ran; and those that ran
    between them but were launched by nothing that was seen.
    """
    marks = sorted((op for op in ops if op.name == _RUN), key=lambda op: op.start)
    starts = [mark.start for mark in marks]
    launchers = {op.id: (op, branch) for op, branch in branches(ops) if op.id}
    runs: list[list[tuple[Kernel, str]]] = [[] for _ in marks]
    unknown = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if kernel.op not in launchers:
            unknown.append(kernel)
            continue
        op, branch = launchers[kernel.op]
        number = bisect_right(starts, op.start) - 1
        if number >= 0 and op.start <= marks[number].end:
            runs[number].append((kernel, branch))
    inside = [(run[0][0].start, run[-1][0].end) for run in runs if run]
    lost = [k for k in unknown if any(first <= k.start and k.end <= last for first, last in inside)]
    return runs, lost


def _not_closing(
    by_run: list[list[tuple[Kernel, str]]], lost: Sequence[Kernel], totals: Sequence[float]
) -> str:
    """Why these kernels do not say where the time went; empty when they do."""
    counts = sorted({len(run) for run in by_run})
    if not counts or counts == [0]:
        return "the profiler saw no kernel of the step"
    if len(counts) > 1 or len(by_run) != len(totals):
        return f"the profile holds {counts[0]} to {counts[-1]} kernels a step: it lost some, or steps differ"
    total = math.fsum(totals)
    missing = math.fsum(kernel.end - kernel.start for kernel in lost)
    if missing > CLOSING * total:
        return f"nothing that was seen launched {missing:.4g} ms of kernels in a total of {total:.4g} ms"
    busy = math.fsum(_busy([kernel for kernel, _ in run]) for run in by_run)
    added = math.fsum(kernel.end - kernel.start for run in by_run for kernel, _ in run)
    if added - busy > CLOSING * total:
        return f"kernels overlap: {added:.4g} ms of them in {busy:.4g} ms"
    if busy > (1 + CLOSING) * total:
        return f"kernels take {busy:.4g} ms of a total of {total:.4g} ms"
    return ""


def _busy(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one of the kernels ran; they come in the order they start."""
    busy, until = 0.0, -math.inf
    for kernel in kernels:
        busy += max(0.0, kernel.end - max(until, kernel.start))
        until = max(until, kernel.end)
    return busy


def _refused(found: Attribution, note: str) -> Attribution:
    times = [replace(kernel, branch="") for kernel in found.kernels]
    return replace(found, kernels=_summed(times, 1), note=note)


def _summed(times: Iterable[KernelTime], runs: int) -> tuple[KernelTime, ...]:
    """Calls and times a run, by kernel and stage, the longest first."""
    added: dict[tuple[str, str], tuple[float, float]] = {}
    for one in times:
        calls, ms = added.get((one.kernel, one.branch), (0.0, 0.0))
        added[one.kernel, one.branch] = calls + one.calls, ms + one.ms
    rows = [KernelTime(*key, calls / runs, ms / runs) for key, (calls, ms) in added.items()]
    return tuple(sorted(rows, key=lambda row: (-row.ms, row.kernel, row.branch)))
