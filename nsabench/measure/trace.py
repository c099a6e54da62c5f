"""What torch.profiler saw of a step: ops of the host, kernels of the device, and the stages they work for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nsabench.measure.device import MeasureError
from nsabench.measure.profiling import profile, recorded
from nsabench.measure.stages import STAGES, Hook

Result = TypeVar("Result")

_NODE = "autograd::engine::evaluate_function"
_STAGE = "nsa::"
_RUNTIME = re.compile(r"cu(da)?[A-Z]")  # calls of the CUDA runtime and driver


@dataclass(frozen=True)
class Op:
    """One host-side range of a profile: an op, a backward node, a stage, or a launch that no op made. Times
    in milliseconds.
    """

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

    @property
    def stage(self) -> str:
        """The stage whose range this is; empty for all else."""
        name = self.name.removeprefix(_STAGE)
        return name if name in STAGES and name != self.name else ""


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device. Times in milliseconds."""

    start: float
    end: float
    op: int
    """The `id` of the innermost op that launched it; 0 where that is not known."""
    name: str = ""


def stage_range(name: str) -> torch.profiler.record_function:
    """The context of a stage while a profile is taken: it shows there as `nsa::<name>`."""
    return torch.profiler.record_function(_STAGE + name)


def read_profile(profiler: torch.profiler.profile) -> tuple[list[Op], list[Kernel]]:
    """The ops of the host and the kernels of the device in a finished profile."""
    return read_events(recorded(profiler).events())


def read_events(events: Sequence[Any]) -> tuple[list[Op], list[Kernel]]:
    """The same from a profile's events, as kineto gives them (`torch._C._autograd._KinetoEvent`).

    A kernel carries the id of its op as `linked_correlation_id`. One that no op launched (Triton outside of
    one, a graph's replay) carries 0: it goes to the call of the CUDA runtime with the same `correlation_id`,
    which becomes an `Op` with that number, negative.
    """
    ops: list[Op] = []
    found: list[tuple[float, float, int, int, str]] = []
    launches: dict[int, Op] = {}
    origin = min((event.start_ns() for event in events), default=0)  # nanoseconds since 1970 outgrow a float
    for event in events:
        start, end = (event.start_ns() - origin) / 1e6, (event.end_ns() - origin) / 1e6
        name, number, linked = event.name(), event.correlation_id(), event.linked_correlation_id()
        if event.device_type() != torch.autograd.DeviceType.CPU:
            # The shadow of a stage on the device is no kernel.
            if not event.is_user_annotation() and not name.startswith(_STAGE):
                found.append((start, end, linked, number, name))
        elif _RUNTIME.match(name):
            launches[number] = Op(name, start, end, event.start_thread_id(), id=-number)
        elif not linked:
            thread, sequence_nr, forward = event.start_thread_id(), event.sequence_nr(), event.fwd_thread_id()
            ops.append(Op(name, start, end, thread, sequence_nr, forward, number))
    known = {op.id for op in ops}
    kernels = []
    used = {}
    for start, end, linked, number, name in found:
        if linked in known:
            kernels.append(Kernel(start, end, linked, name))
            continue
        call = launches.get(number)
        if call is not None:
            used[number] = call
        kernels.append(Kernel(start, end, call.id if call else 0, name))
    return ops + list(used.values()), kernels


def around(ops: Iterable[Op], is_border: Callable[[Op], bool]) -> Iterator[tuple[Op, Op | None]]:
    """Every op and the innermost border that it runs inside, if any, in the order they begin thread by
    thread; ops of a thread nest.
    """
    threads: dict[int, list[Op]] = defaultdict(list)
    for op in ops:
        threads[op.thread].append(op)
    for members in threads.values():
        borders: list[Op] = []
        for op in sorted(members, key=lambda op: (op.start, -op.end)):
            while borders and borders[-1].end < op.end:
                borders.pop()
            yield op, borders[-1] if borders else None
            if is_border(op):
                borders.append(op)


def owners(ops: Iterable[Op]) -> dict[tuple[int, int], str]:
    """The stage of each (thread, sequence number) of the forward; none for what lies outside the stages."""
    # An op is recorded with the number that the next node will get. Ops that make no node share it with the
    # op that does, and that one starts last: once it has made its node, the number is used up.
    makers: dict[tuple[int, int], tuple[Op, Op | None]] = {}
    for op, stage in around(ops, lambda op: bool(op.stage)):
        if op.sequence_nr < 0 or op.fwd_thread:
            continue
        key = op.thread, op.sequence_nr
        if key not in makers or op.start >= makers[key][0].start:
            makers[key] = op, stage
    return {key: stage.stage for key, (_, stage) in makers.items() if stage is not None}


def branches(ops: Sequence[Op]) -> Iterator[tuple[Op, str]]:
    """Every op and the stage it works for: the innermost around it, for a backward node and what runs in it
    the stage that made the node in forward; `other` for what belongs to none.
    """
    stage_of = owners(ops)

    def own(border: Op) -> str:
        return border.stage or stage_of.get((border.fwd_thread, border.sequence_nr), "other")

    for op, border in around(ops, lambda op: op.is_node or bool(op.stage)):
        if op.is_node or op.stage:
            yield op, own(op)
        else:
            yield op, "other" if border is None else own(border)


Seen = dict[str, tuple[str, ...]]
"""By stage, the names of the operators and kernels that ran in it, each once."""


def observe(act: Callable[[], Result], hook: Hook, device: str | torch.device) -> tuple[Result, Seen | None]:
    """Run ``act`` once under ``hook``: what it returns, and what ran in each stage that it entered.

    None for what ran where that cannot be seen: another profiler is at work, or this one recorded nothing.
    """
    on_gpu = torch.device(device).type == "cuda"
    profiler = profile(cuda=on_gpu)
    try:
        profiler.start()
    except RuntimeError:
        return act(), None
    try:
        with hook(stage_range):
            result = act()
        if on_gpu:
            torch.cuda.synchronize(device)
    finally:
        profiler.stop()
    try:
        ops, kernels = read_profile(profiler)
    except MeasureError:
        return result, None
    return result, names_by_stage(ops, kernels)


def names_by_stage(ops: Sequence[Op], kernels: Iterable[Kernel]) -> Seen:
    """Names of ops and kernels by the stage they worked for; a stage in which nothing ran is there too."""
    names: dict[str, dict[str, None]] = {}
    stage_of = {}
    for op, stage in branches(ops):
        if op.id:
            stage_of[op.id] = stage
        ran = names.setdefault(stage, {})
        if not op.stage:
            ran[op.name] = None
    for kernel in kernels:
        names.setdefault(stage_of.get(kernel.op, "other"), {})[kernel.name] = None
    return {stage: tuple(ran) for stage, ran in names.items()}


def short_name(kernel: str) -> str:
    """A kernel's name without return type, arguments, template arguments and anonymous namespaces."""
    name = kernel.replace("(anonymous namespace)::", "").replace("<unnamed>::", "").replace("->", "")
    out, depth = "", 0
    for char in name:
        depth += char in "<(["
        if not depth:
            out += char
        depth -= char in ">)]"
    return out.strip().removeprefix("void ").strip() or kernel
