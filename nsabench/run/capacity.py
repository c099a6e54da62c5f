"""The longest sequence that fits: each length tried once in a fresh worker, what fills the memory there, and
why the next one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from nsabench.measure import available_bytes, peak_memory
from nsabench.plan import Cell
from nsabench.run.executor import Done, Executor, Job
from nsabench.run.gate import Refused, judge, refuse_wrong_cache
from nsabench.run.policy import Policy
from nsabench.run.worker import Fields, Sink
from nsabench.run.workload import Workload, workload_for

PROBE = "nsabench.run.capacity:probe"
"""The function that tries a length, as ``module:name``, for an executor."""

MOST_TOKENS, MOST_BYTES = 2**30, 2**63 - 1
RESOLUTION = 32
"""The answer is known to a ``1/RESOLUTION`` of itself."""

CPU_SHARE = 0.9
"""The part of a CPU's free memory that tries may take: the rest keeps the machine alive."""

# A length whose need, drawn on in a straight line, is this far over the limit is not tried.
FAR_OVER = 1.25
# What a worker may take beyond its tensors: code loaded late, buffers of libraries.
SLACK_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class Limits(Policy):
    """How a length is tried: within ``memory_bytes`` of tensors; ``check``: after the specification's."""

    memory_bytes: int
    check: bool = False


@dataclass(frozen=True)
class Try:
    """What became of a length. ``need_bytes`` of memory at the peak, where that is known; ``parts`` of it by
    what holds them; ``stage`` in which it comes. ``reason`` is empty where it fits.
    """

    S: int
    status: str
    reason: str = ""
    need_bytes: int | None = None
    parts: dict[str, int] | None = None
    stage: str = ""

    @property
    def fits(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True)
class Capacity:
    """The longest sequence of an arm. ``best`` is the longest try that fits, None without one; ``failed`` the
    shortest above it that does not, None at the end of the search. ``exact``: nothing longer fits, to the
    resolution; else the search was stopped, and the answer is a lower bound.
    """

    cell: Cell
    limit_bytes: int
    best: Try | None
    failed: Try | None
    exact: bool
    tries: tuple[Try, ...]

    @property
    def resolution(self) -> int | None:
        """Tokens between the two."""
        if not self.exact or self.failed is None:
            return None
        return self.failed.S - (self.best.S if self.best else 0)


def find_capacity(
    cell: Cell,
    executor: Executor,
    *,
    limit_bytes: int | None,
    timeout_s: float,
    tell: Callable[[str], None] = lambda text: None,
) -> Capacity:
    """Search from the cell's own S by doubling, then between what fits and what does not.

    The first length is checked against the specification: an arm that is wrong has no capacity. Tensors may
    take ``limit_bytes``, but never more than the device has free at the try.
    """
    used: list[int] = []
    tries: list[Try] = []

    def attempt(S: int) -> Try:
        used.append(min(_usable(cell.device), limit_bytes or MOST_BYTES))
        far = far_over(tries, S, used[-1])
        if far is not None:
            return far
        tell(f"trying S = {S}")
        limits = Limits(memory_bytes=used[-1], check=not tries, timeout_s=timeout_s)
        return _run(executor, replace(cell, S=S), limits)

    def guess() -> int | None:
        line = line_through(tries)
        return int(line[0] + (used[-1] - line[1]) / line[2]) if line and line[2] > 0 else None

    best, failed, exact = search(attempt, cell.S, tries, guess)
    return Capacity(cell, min(used), best, failed, exact, tuple(tries))


def search(
    attempt: Callable[[int], Try],
    start: int,
    tries: list[Try],
    guess: Callable[[], int | None] = lambda: None,
) -> tuple[Try | None, Try | None, bool]:
    """The longest that fits, the shortest that does not, and whether nothing between them is left to try.

    Every try is added to ``tries``. Only a lack of memory is searched around; any other failure ends it.
    ``guess`` is asked once where the border may be: it saves tries, and never decides.
    """
    best: Try | None = None
    failed: Try | None = None
    S = start
    narrowed = 0
    while True:
        tries.append(attempt(S))
        if tries[-1].fits:
            best = tries[-1]
        else:
            failed = tries[-1]
            if failed.status != "oom":
                return best, failed, False
        low, high = best.S if best else 0, failed.S if failed else None
        if high is None:
            if low >= MOST_TOKENS:
                return best, None, False
            S = min(2 * low, MOST_TOKENS)
            continue
        if high - low <= grain(low):
            return best, failed, True
        S = inside((low + high) // 2, low, high)
        if narrowed == 0:
            S = inside(guess() or S, low, high)
        elif narrowed == 1:
            S = inside(low + grain(low) if tries[-1].fits else high - grain(low), low, high)
        narrowed += 1


def grain(S: int) -> int:
    """The resolution at a length: lengths tried between two others are multiples of it."""
    return max(1, (1 << max(0, S.bit_length() - 1)) // RESOLUTION)


def inside(S: int, low: int, high: int) -> int:
    """Between the two, never one of them: the multiple of the grain at or below S where it is, else S, else
    the middle.
    """
    step = grain(low)
    return next(at for at in (S // step * step, S, (low + high) // 2) if low < at < high)


def line_through(tries: Sequence[Try]) -> tuple[int, int, float] | None:
    """A length, its need, and bytes a token beyond it, by the longest two tries whose need is known."""
    known = sorted((t.S, t.need_bytes) for t in tries if t.need_bytes is not None)[-2:]
    if len(known) < 2:
        return None
    (a, need_a), (b, need_b) = known
    return b, need_b, (need_b - need_a) / (b - a)


def far_over(tries: Sequence[Try], S: int, limit: int) -> Try | None:
    """The try of a length that is hopeless, by the line through shorter ones."""
    line = line_through([t for t in tries if t.S < S])
    if line is None:
        return None
    need = int(line[1] + line[2] * (S - line[0]))
    if need <= FAR_OVER * limit:
        return None
    needs = f"would need about {memory_text(need)}, by what shorter ones need"
    return Try(S, "oom", f"not tried: {needs}; {memory_text(limit)} may be used")


def _usable(device: str) -> int:
    free = available_bytes(device)
    return int(CPU_SHARE * free) if device == "cpu" else free


def _run(executor: Executor, cell: Cell, limits: Limits) -> Try:
    """One length in a worker of its own."""
    with closing(executor.run(iter([Job((cell,), limits, 0)]))) as events:
        row = next((event.row for event in events if isinstance(event, Done)), None)
    if row is not None:
        status = "timeout" if row["status"] == "hang" else row["status"]
        need, parts = row.get("need_bytes"), row.get("parts")
        return Try(cell.S, status, row["reason"], need, parts, row.get("peak_stage", ""))
    return Try(cell.S, "error", "its worker ended without an answer")


def probe(
    cells: Sequence[Cell], policy: Limits, sink: Sink, *, process: int = 0, clock: object = None
) -> None:
    """Try cells, in a worker made for it: the memory it may take is bounded from here on."""
    for cell in cells:
        sink.mark(cell)
        row: dict[str, Any] = {"cell_id": cell.cell_id, "status": "ok", "reason": ""}
        with _failures(row), _bounded(cell.device, policy.memory_bytes):
            row |= _measured(cell, policy, sink)
        sink.done(row)


def _measured(cell: Cell, limits: Limits, sink: Sink) -> Fields:
    if limits.check:
        _refuse_wrong(cell, sink)
    built: list[Workload] = []
    building = peak_memory(lambda: built.append(workload_for(cell)), cell.device)
    sink.mark(cell)
    (workload,) = built
    held = workload.held_bytes() | {f"cache {k}": v for k, v in workload.cache_bytes().items()}
    workload.settle(cell.route)
    # Called once before, a step would say less: what it makes on its first call is part of what it needs.
    step = peak_memory(_step(workload, cell), cell.device, hook=workload.hook)
    return account(held, building.alloc_bytes, step.alloc_bytes, step.stage, limits.memory_bytes)


def account(held: dict[str, int], building: int, step: int, stage: str, limit: int) -> Fields:
    """Where the memory goes at the peak, of the building or of the step above what is ``held``; Refused where
    that is over the limit.
    """
    standing = sum(held.values())
    need = max(building, standing + step)
    parts = {name: size for name, size in held.items() if size}
    if building > standing + step:
        parts["building"], stage = building - standing, "building"
    else:
        parts["temporaries"] = step
    found = {"need_bytes": need, "parts": parts, "peak_stage": stage}
    if need > limit:
        where = f"most in {stage}" if stage else "at the peak"
        raise _TooLarge(f"needs {memory_text(need)}, {where}; {memory_text(limit)} may be used", found)
    return found


class _TooLarge(Refused):
    def __init__(self, reason: str, fields: Fields) -> None:
        super().__init__("oom", reason)
        self.fields = fields


def _step(workload: Workload, cell: Cell) -> Callable[[], object]:
    """The step that ends at S, made and called: what making it takes counts too."""

    def run() -> None:
        step = next(step for step in workload.steps if step.spans[-1][1] == cell.S)
        workload.variant(step, cell.route).step()

    return run


def _refuse_wrong(cell: Cell, sink: Sink) -> None:
    sink.doing(f"checking S = {cell.S} against the specification")
    workload = workload_for(cell)
    workload.settle(cell.route)
    refuse_wrong_cache(workload)
    verdict, _ = judge(workload, cell.route)
    if verdict.reason:
        raise Refused("nan" if verdict.has_nan else "wrong", verdict.reason)
    sink.mark(cell)


@contextmanager
def _failures(row: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Refused as error:
        row |= {"status": error.status, "reason": str(error)} | dict(getattr(error, "fields", {}))
    except (torch.OutOfMemoryError, MemoryError) as error:
        row |= {"status": "oom", "reason": _line(error)}
    except Exception as error:
        text = str(error)
        short = any(part in text for part in ("can't allocate memory", "not enough memory", "bad_alloc"))
        row |= {"status": "oom" if short else "error", "reason": _line(error)}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


@contextmanager
def _bounded(device: str, memory_bytes: int) -> Iterator[None]:
    """Have the allocator refuse what goes beyond, before the system is driven to kill something."""
    if device != "cpu":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total), device)
        yield
        return
    try:
        import resource

        held = _data_bytes()
        before = resource.getrlimit(resource.RLIMIT_DATA)
    except (ImportError, OSError, ValueError):
        yield
        return
    most = held + memory_bytes + SLACK_BYTES
    if before[1] != resource.RLIM_INFINITY:
        most = min(most, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """Private memory of this process as RLIMIT_DATA counts it; OSError where the system does not say."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    raise OSError("no VmData")


def memory_text(size: float) -> str:
    """Four digits and a unit: ``98.34 MiB``."""
    unit, name = next(
        ((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if size >= unit),
        (1, "bytes"),
    )
    digits = 2 if size < 100 * unit else 1
    return f"{size / unit:.{digits if unit > 1 else 0}f} {name}"
