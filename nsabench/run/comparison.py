"""A comparison: cells in the same rounds, one fresh process after another, until their ratios are known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Protocol

from nsabench.measure.nvml_reader import join_reasons, split_reasons
from nsabench.plan import Cell
from nsabench.run.executor import Doing, Done, Executor, Job, WorkerError
from nsabench.run.gate import Refused
from nsabench.run.limits import known_peaks, part_of_limit
from nsabench.run.policy import Policy
from nsabench.run.steps import steps_of
from nsabench.run.timing import by_round, dropped_rounds, time_fields, too_many_dropped
from nsabench.run.worker import DEVICE_LOST, Fields
from nsabench.stats import Interval, paired_ratio
from nsabench.store import RunDir
from nsabench.store.schema import STAGES, without_performance

MOST_PROCESSES = 20
"""Processes of a group at most, however wide its intervals are."""

_ACROSS: dict[str, Callable[[list[float]], float]] = {
    **dict.fromkeys(("power_w", "util_pct", "power_capped_pct"), fmean),
    **dict.fromkeys(("sm_clock_mhz", "mem_clock_mhz"), median),
    **dict.fromkeys((f"share_{stage}_pct" for stage in STAGES), fmean),
    **dict.fromkeys((f"ms_alone_{branch}" for branch in ("cmp", "sel", "win")), median),
    **dict.fromkeys(("temp_c", "clock_spread_pct", "canary_spread_pct", "max_abs_err", "rel_err"), max),
    **dict.fromkeys(("peak_alloc_bytes", "peak_reserved_bytes", "nvml_used_bytes"), max),
    "neighbour_load_pct": max,
    **dict.fromkeys(("ms_cross", "host_bound"), median),
    **dict.fromkeys(("queue_gated_pct", "cold_probe", "copies"), max),
    "selection_overlap": min,
    **dict.fromkeys(("neighbour_overlap", "union_blocks"), fmean),
}
"""What is made of the columns in which the processes of a cell differ. Times come from the samples."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """When enough is measured. Whether a difference shows plays no part.

    ``processes``: fresh processes at least, whatever they cost. ``width``: of the interval of every ratio,
    as a fraction, below which no further process is begun. ``budget_s``: seconds for the comparison, shared
    by the groups that are left; a further process that would not fit is not begun.
    """

    processes: int = 3
    width: float = 0.005
    budget_s: float = 120.0


class Watcher(Protocol):
    """Who watches a comparison."""

    def activity(self, text: str) -> None: ...

    def finished(self, group: Sequence[Cell], rows: Sequence[Mapping[str, Any]], processes: int) -> None: ...


Hire = Callable[[Sequence[Cell], int], Executor]
"""A new executor for these cells; its first process has that number."""


def run_comparison(
    groups: Sequence[Sequence[Cell]],
    policy: Policy,
    effort: Effort,
    run: RunDir,
    watcher: Watcher,
    *,
    hire: Hire,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measure each group, the first side first and its control last, and store its rows when it is finished.

    A cell that fails in any process is that failure, and the processes after go without it. ``stop`` is asked
    after each process: true ends the comparison with what there is.

    Raises:
        WorkerError: the machine fails; what was measured of the group is stored, with a status that says so.
        DiskError: the disk refuses; the groups stored are safe.
    """
    began, end, process = clock(), clock() + effort.budget_s, 0
    for number, cells in enumerate(groups):
        if stop():
            return
        now = clock()
        until = now + (end - now) / (len(groups) - number)
        group = Group(cells, process)
        try:
            _measure(group, policy, effort, watcher, hire, stop, clock, began, until)
        except WorkerError as error:
            group.fail(str(error))
            raise
        finally:
            rows = [_stored(run, *measured) for measured in group.rows()]
            watcher.finished(cells, rows, group.processes)
        process = group.next_number


def _measure(
    group: Group,
    policy: Policy,
    effort: Effort,
    watcher: Watcher,
    hire: Hire,
    stop: Callable[[], bool],
    clock: Callable[[], float],
    began: float,
    until: float,
) -> None:
    while group.comparable and not stop():
        start, cells = clock(), group.living
        job = Job(tuple(cells), policy, group.processes)
        with closing(hire(cells, group.next_number).run(iter([job]))) as events:
            for event in events:
                if isinstance(event, Doing):
                    watcher.activity(f"process {group.processes + 1}: {event.text}")
                elif isinstance(event, Done):
                    group.add(event, since_s=start - began)
        group.processes += 1
        if not group.living:
            reasons = [row["reason"] for row in group.broken.values()]
            if lost := [reason for reason in reasons if reason.startswith(DEVICE_LOST)]:
                raise WorkerError(f"none can be measured any more: {lost[0]}")
            if group.processes > 1:
                raise WorkerError(f"all broke in process {group.processes}, which ran before: {reasons[0]}")
        if group.processes < effort.processes:
            continue
        now = clock()
        if group.processes >= MOST_PROCESSES or group.known(effort.width) or 2 * now - start > until:
            return


def _stored(
    run: RunDir, row: Fields, samples: Sequence[Fields], telemetry: Sequence[Fields]
) -> dict[str, Any]:
    run.append(row if row["status"] == "ok" else without_performance(row), samples, telemetry)
    return run.finished[row["cell_id"]]


class Group:
    """The cells of one comparison, what their processes gave, and what comes of it."""

    def __init__(self, cells: Sequence[Cell], process: int = 0) -> None:
        """``cells``: the first side, the others, and the first side again. ``process``: the first one's
        number.
        """
        self.cells = list(cells)
        self.processes, self._first = 0, process
        self.broken: dict[str, Fields] = {}
        self._slowed: dict[str, Fields] = {}
        self._well: dict[str, list[Fields]] = {cell.cell_id: [] for cell in cells}
        self._samples: dict[str, list[Fields]] = {cell.cell_id: [] for cell in cells}
        self._telemetry: dict[str, list[Fields]] = {cell.cell_id: [] for cell in cells}

    @property
    def living(self) -> list[Cell]:
        """The cells that have not failed."""
        return [cell for cell in self.cells if cell.cell_id not in self.broken]

    @property
    def comparable(self) -> bool:
        """Whether the first side, its control and at least one other live."""
        living = self.living
        return self.cells[0] in living and self.cells[-1] in living and len(living) > 2

    @property
    def next_number(self) -> int:
        """Of the next process: one that was lost and replaced used up two."""
        used = [sample["process"] for samples in self._samples.values() for sample in samples]
        return max([self._first + self.processes, *(number + 1 for number in used)])

    def add(self, done: Done, *, since_s: float) -> None:
        """What a process says of a cell; it began ``since_s`` after the run did."""
        cell_id = done.row["cell_id"]
        if done.row["status"] == "ok":
            self._well[cell_id].append(done.row)
        elif done.row["status"] == "invalid" and too_many_dropped(done.samples):
            # No fault of the cell: whether too many were dropped, the rounds of all processes tell.
            self._slowed[cell_id] = done.row
        else:
            self.broken[cell_id] = done.row
        for kept, given in ((self._samples, done.samples), (self._telemetry, done.telemetry)):
            kept[cell_id] += [{**one, "t_s": one["t_s"] + since_s} for one in given]

    def fail(self, why: str) -> None:
        """The machine failed: no cell of this group has a time."""
        for cell in self.living:
            failed = {"status": "error", "reason": f"the machine failed: {why}"}
            self.broken[cell.cell_id] = {**cell.to_dict(), "cell_id": cell.cell_id, **failed}

    def known(self, width: float) -> bool:
        """Whether the interval of every ratio to the first side is no wider than ``width``, a fraction."""
        first, *others = self.living
        ratios = [self._ratio(other, first) for other in others]
        return all(
            ratio is not None
            and ratio.lo is not None
            and ratio.hi is not None
            and ratio.hi / ratio.lo - 1 <= width
            for ratio in ratios
        )

    def rows(self) -> Iterator[tuple[Fields, list[Fields], list[Fields]]]:
        """The row, the samples and the telemetry of each cell that was measured at all."""
        control = self._control()
        aa = {} if control is None else {"aa_lo": control.lo, "aa_hi": control.hi}
        for cell in self.cells:
            cell_id = cell.cell_id
            if cell_id in self.broken:
                row = self.broken[cell_id]
            elif self._well[cell_id]:
                row = {**self._timed(cell), **aa}
            elif cell_id in self._slowed:
                samples = self._samples[cell_id]
                told = {"reason": too_many_dropped(samples), "dropped_rounds": len(dropped_rounds(samples))}
                row = {**self._slowed[cell_id], **told}
            else:
                continue
            yield row, self._samples[cell_id], self._telemetry[cell_id]

    def _control(self) -> Interval | None:
        ends = {self.cells[0].cell_id, self.cells[-1].cell_id}
        return None if ends & self.broken.keys() else self._ratio(self.cells[-1], self.cells[0])

    def _timed(self, cell: Cell) -> dict[str, Any]:
        """One row from those of all processes, its times from all samples."""
        row, samples = _across(self._well[cell.cell_id]), self._samples[cell.cell_id]
        work = {"flops": row["flops"], "moved_bytes": row["bytes"]}
        if row.get("dropped_rounds") is not None:
            row["dropped_rounds"] = len(dropped_rounds(samples))
        try:
            row |= time_fields(cell, samples, _weights(cell), **work)
            for stage in STAGES:
                if row.get(f"share_{stage}_pct") is not None:
                    row[f"ms_{stage}"] = row[f"share_{stage}_pct"] / 100 * row["ms_total"]
            return row | part_of_limit(row, known_peaks(cell.device))
        except Refused as error:
            return row | {"status": error.status, "reason": str(error)}

    def _ratio(self, cell: Cell, first: Cell) -> Interval | None:
        """Time of a cell over that of the first, over the rounds in which both were measured."""
        a, b = (by_round(self._samples[one.cell_id], _weights(one)) for one in (cell, first))
        both = sorted(a.keys() & b.keys())
        if not both:
            return None
        processes = [process for process, _ in both]
        return paired_ratio([a[key] for key in both], [b[key] for key in both], processes=processes)


def _weights(cell: Cell) -> dict[str, float]:
    return {step.name: step.weight for step in steps_of(cell)}


def _across(rows: Sequence[Fields]) -> dict[str, Any]:
    """The rows of a cell's processes as one; empty for none."""
    found = dict(rows[0]) if rows else {}
    for name, combined in _ACROSS.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = combined(values)
    # A sum lacks what one of them could not tell.
    energy = [row.get("energy_j") for row in rows]
    found["energy_j"] = None if None in energy else sum(energy)
    notes = dict.fromkeys(row["timers_note"] for row in rows if row.get("timers_note"))
    if notes:
        found["timers_note"] = "; ".join(notes)
    reasons = [row["throttle_reasons"] for row in rows if row.get("throttle_reasons")]
    if reasons:
        found["throttle_reasons"] = join_reasons(name for text in reasons for name in split_reasons(text))
    return found
