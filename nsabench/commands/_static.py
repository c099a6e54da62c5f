"""What compilers say of kernels, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from nsabench.commands._console import CHECK_FAILED, GOOD, INCONCLUSIVE, console
from nsabench.measure import MeasureError
from nsabench.measure.static import ARCHS, StaticRow, compile_static
from nsabench.plan import PlanError
from nsabench.plan.axes import nearest

OURS = ("nsa.kernels", "nsabench.measure.probe_kernels")


def show_static(archs: Sequence[str], modules: Sequence[str] | None, *, json_lines: bool) -> int:
    """Compile and show; returns the exit code: 1 where a compiler failed, 3 where nothing could be built."""
    wanted = list(dict.fromkeys(arch.strip() for arch in archs))
    for arch in wanted:
        if arch not in ARCHS:
            raise PlanError(f"--arch: {arch!r} is unknown; {nearest(arch, ARCHS)}")
    try:
        rows = compile_static(list(dict.fromkeys(modules or our_modules())), wanted)
    except MeasureError as error:
        raise PlanError(f"--static: {error}") from None
    if json_lines:
        for row in rows:
            typer.echo(json.dumps(row.to_dict()))
    else:
        for part in static_tables(rows):
            console().print(part, soft_wrap=isinstance(part, Text))
    statuses = {row.status for row in rows}
    if "error" in statuses:
        return CHECK_FAILED
    return GOOD if "ok" in statuses else INCONCLUSIVE


def our_modules() -> list[str]:
    """The modules of this project that hold kernels."""
    return [name for name in OURS if find_spec(name) is not None]


def static_tables(rows: Sequence[StaticRow]) -> list[Text | Table]:
    """A table a kernel, a line an architecture; what stands in the way of one is at the end, by number."""
    reasons = list(dict.fromkeys(_reason(row) for row in rows if row.reason))
    parts: list[Text | Table] = []
    for module, kernel in dict.fromkeys((row.module, row.kernel) for row in rows):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("arch", no_wrap=True)
        for name in ("warps", "regs", "spills\nbytes", "shared\nbytes", "blocks\n/SM", "occ.\n%"):
            table.add_column(name, justify="right", no_wrap=True, min_width=5)
        for name in ("limited by", "matrix", "status"):
            table.add_column(name, no_wrap=True)
        for row in rows:
            if (row.module, row.kernel) == (module, kernel):
                status = f"({reasons.index(_reason(row)) + 1})" if row.reason else row.status
                table.add_row(row.arch, *_numbers(row), row.limited_by, row.matrix, status)
        parts += [Text(kernel, style="bold").append(f"  {module}", style="dim"), table]
    return [*parts, *(Text(f"({number}) {reason}") for number, reason in enumerate(reasons, 1))]


def _reason(row: StaticRow) -> str:
    return f"{row.status}: {row.reason}"


def _numbers(row: StaticRow) -> list[str]:
    spills = (row.spill_store_bytes, row.spill_load_bytes)
    spilled = None if None in spills else sum(n or 0 for n in spills)
    occupancy = None if row.occupancy_pct is None else f"{row.occupancy_pct:.0f}"
    values = (row.num_warps, row.registers, spilled, row.shared_bytes, row.blocks_per_sm, occupancy)
    return ["-" if value is None else str(value) for value in values]
