"""`--find-max-S`: the longest sequence that fits, of each route and baseline."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from nsabench.commands._console import CHECK_FAILED, GOOD, INCONCLUSIVE, INTERRUPTED, console, fail
from nsabench.plan import Cell, PlanError
from nsabench.run.capacity import CPU_SHARE, PROBE, Capacity, find_capacity, memory_text
from nsabench.run.executor import LocalExecutor, local_slots
from nsabench.store import DiskError, RunDir, capture_environment

FILE = "capacity.json"

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)(i?b)?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_memory(text: str, name: str = "--memory-limit") -> int:
    """Bytes in `text`: `2GiB`, `1.5g`, `800MB` (powers of 1000 only as KB, MB, GB, TB); else a PlanError."""
    match = _SIZE.fullmatch(text.strip())
    if match:
        number, unit, ending = match[1], match[2].lower(), (match[3] or "").lower()
        bytes_ = int(float(number) * (1000 if unit and ending == "b" else 1024) ** _UNITS[unit])
        if bytes_ > 0:
            return bytes_
    raise PlanError(f"{name}: {text!r} is not an amount of memory; allowed: 2GiB, 1.5GiB, 800MB, 2048")


def find_max_S(
    cells: Sequence[Cell], *, memory_limit: str | None, timeout_s: float, out: Path, json_lines: bool
) -> int:
    """Search the capacity of every arm of `cells`, from its smallest S; print and store it.

    Returns the exit code. PlanError for a `memory_limit` that is no amount of memory.
    """
    limit = None if memory_limit is None else parse_memory(memory_limit)
    arms = _arms(cells)
    talk = console(stderr=json_lines)
    found: list[Capacity] = []
    with _new_run(arms, out) as run:
        for line in _heading(arms[0], limit, timeout_s):
            talk.print(line, soft_wrap=True, markup=False)
        executor = LocalExecutor(local_slots(arms), measure=PROBE)
        try:
            for cell in arms:
                name = _name(cell, arms)
                with talk.status(f"{name}: starting") as status:
                    found.append(
                        find_capacity(
                            cell,
                            executor,
                            limit_bytes=limit,
                            timeout_s=timeout_s,
                            tell=lambda text, name=name: status.update(f"{name}: {text}"),  # type: ignore[misc]
                        )
                    )
                _write(run, limit, found)
                if json_lines:
                    print(json.dumps(_plain(found[-1])), flush=True)
        except KeyboardInterrupt:
            kept = f"interrupted; {len(found)} of {len(arms)} searches are finished and kept in {run.path}"
            raise fail(kept, INTERRUPTED) from None
        finally:
            if found:
                talk.print(capacity_table(found))
        talk.print(f"results: {run.path / FILE}", soft_wrap=True, markup=False)
    return _exit_code(found)


def _arms(cells: Sequence[Cell]) -> list[Cell]:
    """Each arm once, at the smallest S asked for."""
    smallest: dict[Cell, int] = {}
    for cell in cells:
        arm = replace(cell, S=1)
        smallest[arm] = min(cell.S, smallest.get(arm, cell.S))
    return [replace(arm, S=S) for arm, S in smallest.items()]


def _new_run(arms: Sequence[Cell], out: Path) -> RunDir:
    argv = sys.argv[1:]
    return RunDir.create(
        out,
        name=f"{arms[0].phase}-capacity",
        argv=argv,
        repro=shlex.join(["nsabench", *argv]),
        plan=[],
        environment=capture_environment(),
        policy={},
        seed=arms[0].seed,
    )


def _heading(cell: Cell, limit: int | None, timeout_s: float) -> list[str]:
    free = f"{CPU_SHARE:.0%} of the free memory" if cell.device == "cpu" else "the free memory"
    within = free if limit is None else f"{memory_text(limit)}, and never more than {free}"
    counted = "tensors alone are counted" if cell.device == "cpu" else "of torch's allocator"
    return [
        f"longest S of {cell.phase} on {cell.device}: dim {cell.dim}, {cell.heads} heads, "
        f"{cell.groups} KV heads, dk {cell.dk}, dv {cell.dv}, {cell.dtype}",
        f"memory: {within} ({counted}); at most {timeout_s:g} s a try, each in a fresh process",
    ]


def _name(cell: Cell, arms: Sequence[Cell]) -> str:
    """The arm by what tells it from the others."""
    names = [cell.arm]
    for field in ("scope", "passes", "mode", "B", "dtype", "dim", "heads", "groups", "dk", "dv", "device"):
        if len({getattr(arm, field) for arm in arms}) > 1:
            value = getattr(cell, field)
            names.append(value if isinstance(value, str) else f"{field} {value}")
    return ", ".join(names)


def capacity_table(found: Sequence[Capacity]) -> Table:
    """One line an arm: the longest S, what fills the memory there, and the first S that fails."""
    arms = [capacity.cell for capacity in found]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    for header, side in (("route", "left"), ("largest S", "right"), ("memory", "right")):
        table.add_column(header, justify=side, overflow="fold")  # type: ignore[arg-type]
    table.add_column("of which, and what fails first", overflow="fold", ratio=1)
    for capacity in found:
        best, failed = capacity.best, capacity.failed
        largest = "-" if best is None else f"{'' if capacity.exact else 'at least '}{best.S}"
        needs = "-" if best is None or best.need_bytes is None else memory_text(best.need_bytes)
        lines = [parts_text(capacity)] if best else []
        lines += [f"{failed.S}: {failed.reason}"] if failed else []
        table.add_row(_name(capacity.cell, arms), largest, needs, "\n".join(lines))
    steps = [capacity.resolution for capacity in found if capacity.resolution]
    if steps:
        table.caption = f"largest S is known to {_range(steps)} tokens"
    return table


def parts_text(capacity: Capacity) -> str:
    """What holds the memory of the longest S, the most first, and the stage of the peak."""
    best = capacity.best
    if best is None or not best.parts:
        return "-"
    parts = sorted(best.parts.items(), key=lambda part: -part[1])
    text = ", ".join(f"{name} {memory_text(size)}" for name, size in parts if size)
    return f"{text}; peak in {best.stage}" if best.stage not in ("", *best.parts) else text


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _plain(capacity: Capacity) -> dict[str, Any]:
    """As JSON holds it."""
    cell = capacity.cell.to_dict()
    del cell["S"]
    best, failed = (None if x is None else asdict(x) for x in (capacity.best, capacity.failed))
    return {
        **cell,
        "largest_S": capacity.best.S if capacity.best else None,
        "exact": capacity.exact,
        "resolution_tokens": capacity.resolution,
        "limit_bytes": capacity.limit_bytes,
        "best": best,
        "failed": failed,
        "tries": [asdict(x) for x in capacity.tries],
    }


def _write(run: RunDir, limit: int | None, found: Sequence[Capacity]) -> None:
    """The whole file anew: it is whole at any time."""
    stored = {
        "run_id": run.run_id,
        "memory_limit_bytes": limit,
        "capacities": [_plain(capacity) for capacity in found],
    }
    path = run.path / FILE
    try:
        path.with_suffix(".tmp").write_text(json.dumps(stored, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}") from error


def _exit_code(found: Sequence[Capacity]) -> int:
    """1 where a result was wrong or broke, 3 where nothing fits, else 0."""
    ends = {capacity.failed.status for capacity in found if capacity.failed}
    if ends & {"wrong", "nan", "error"}:
        return CHECK_FAILED
    return GOOD if any(capacity.best for capacity in found) else INCONCLUSIVE
