"""One cell looked into: gated and timed as in a sweep, then its kernels, a trace, its memory, its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsa import Routing
from nsabench.measure.snapshot import write_memory, write_trace
from nsabench.plan import Cell
from nsabench.run.declared import declared_work
from nsabench.run.impl_nsa import ATTENDING
from nsabench.run.jobs import Began, Doing, Done, Event, Job, Over, Slot
from nsabench.run.kernels import attributed, kernel_rows, no_stages
from nsabench.run.policy import Policy
from nsabench.run.session import DeviceLost, measure_group
from nsabench.run.work import Part, stage_work
from nsabench.run.worker import Fields, Sink
from nsabench.run.workload import Variant, Workload, workload_for
from nsabench.store.profile import save_profile

MEASURE = "nsabench.run.profile:measure_profile"
"""The function that measures, as ``module:name``."""


@dataclass(frozen=True, kw_only=True)
class ProfilePolicy(Policy):
    """How to measure, and the folder of the run, into which trace, memory and ``profile.json`` go."""

    folder: str


def measure_profile(
    cells: Sequence[Cell],
    policy: ProfilePolicy,
    sink: Sink,
    *,
    process: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure as :func:`measure_group` does, then look into every cell that is ok, before its row is handed
    on. What cannot be looked into keeps its row; profile.json then says why.
    """
    held = _Held(sink)
    measure_group(cells, policy, held, process=process, clock=clock)
    for cell in cells:
        for row, samples, telemetry, kernels in held.rows.get(cell.cell_id, ()):
            sink.mark(cell)
            sink.doing("kernels, trace and memory of a step")
            told, found = _looked_into(cell, row, Path(policy.folder))
            save_profile(Path(policy.folder), told)
            sink.done(row, samples, telemetry, found or kernels)


class _Held:
    """A sink that keeps rows that are ok, to be handed on later."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.mark, self.doing = sink.mark, sink.doing
        self.rows: dict[str, list[tuple[Fields, Any, Any, Any]]] = {}

    def done(
        self,
        row: Fields,
        samples: Sequence[Fields] = (),
        telemetry: Sequence[Fields] = (),
        kernels: Sequence[Fields] = (),
    ) -> None:
        if row["status"] != "ok":
            self._sink.done(row, samples, telemetry, kernels)
        else:
            self.rows.setdefault(row["cell_id"], []).append((row, samples, telemetry, kernels))


def _looked_into(cell: Cell, row: Fields, folder: Path) -> tuple[dict[str, Any], list[Fields]]:
    """What goes into profile.json, and the rows of kernels.csv."""
    about: dict[str, Any] = {"cell_id": cell.cell_id, "failed": ""}
    try:
        workload = workload_for(cell)
        # Asked for before anything runs: a step may need what settling prepares.
        workload.settle(cell.route)
        return _profile(workload, row, folder, about)
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0]
        return {**about, "failed": f"{type(error).__name__}: {text}"}, []


def _profile(
    workload: Workload, row: Fields, folder: Path, about: dict[str, Any]
) -> tuple[dict[str, Any], list[Fields]]:
    cell, device = workload.cell, workload.device
    variants = workload.variants(cell.route)
    weighted = attributed(workload, variants, cell.route, dict(row), row["ms_total"])
    note = "" if weighted else f"a step of {len(workload.steps[0].spans)} calls is too long to profile"
    steps, hook = _shown_steps(workload, variants), workload.hook or no_stages
    most = max(variants, key=lambda variant: variant.weight).name
    files = {
        "trace": write_trace(steps, hook, device, folder).name,
        "memory": write_memory(steps.get(most) or steps[""], hook, device, folder).name,
    }
    told = {
        **about,
        "step_ms": sum(weight * step.total_ms for weight, step in weighted),
        "idle_ms": sum(weight * step.idle_ms for weight, step in weighted),
        "note": next((step.note for _, step in weighted if step.note), note),
        "stages": {name: asdict(part) for name, part in parts_of(workload, cell.route).items()},
        "kernels": declared_work(workload.cell, workload.steps, row),
        "files": files,
    }
    return told, [*kernel_rows(weighted)]


def _shown_steps(workload: Workload, variants: Sequence[Variant]) -> dict[str, Callable[[], object]]:
    """What trace and memory show, by name; a backward with its forward, which tells whose its nodes are."""
    if workload.cell.passes != "fwd":
        return {"": workload.training_step(workload.cell.route)}
    return {variant.name: variant.step for variant in variants}


def parts_of(workload: Workload, route: str) -> dict[str, Part]:
    """Counted work by stage; empty for an implementation without NSA's stages."""
    if not workload.cell.computes_nsa:
        return {}
    routing = Routing.parse(route)
    branches = tuple(branch for branch in ATTENDING if getattr(routing, branch) != "off")
    return stage_work(workload.cell, branches, workload.parameters)


class Here:
    """An executor that looks into cells in this process, which a crash ends and no limit of time guards."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.slots = (Slot(0, frozenset(cell.device for cell in cells)),)

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        """As every executor's; the events of a job come when it has ended."""
        began = time.perf_counter()
        for job in jobs:
            yield Began(0, job)
            said = _Said()
            assert isinstance(job.policy, ProfilePolicy)
            # The row of the cell that lost the device says so.
            with suppress(DeviceLost):
                measure_profile(job.cells, job.policy, said, clock=lambda: time.perf_counter() - began)
            yield from said.events
            yield Over(0, job, ())


class _Said:
    """A sink that keeps what it is told as events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.doing = lambda text: self.events.append(Doing(0, text))

    def mark(self, cell: Cell | None) -> None: ...

    def done(
        self,
        row: Fields,
        samples: Sequence[Fields] = (),
        telemetry: Sequence[Fields] = (),
        kernels: Sequence[Fields] = (),
    ) -> None:
        self.events.append(Done(0, row, samples, telemetry, kernels))
