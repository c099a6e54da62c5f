"""A profiled cell as tables: its kernels, the longest first, and its stages under the roofs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nsabench.present.frame import Row
from nsabench.present.roofline import CALIBRATE, Roofs, Spot, spot_of, stage_spots
from nsabench.present.wording import MISSING, digits

IDLE = "(nothing runs)"
_KERNEL_WIDTH = 44  # of 80 columns, what the numbers leave


_DECLARED = ("flops", "l2_bytes", "dram_bytes")


def kernel_objects(
    kernels: Iterable[Mapping[str, Any]], profile: Mapping[str, Any], roofs: Roofs | None = None
) -> list[dict[str, Any]]:
    """The kernels with their part of the profiled step in percent, the longest first; all that ran. Those
    that declare their work, with what they reached by it: TFLOP/s, GB/s from L2 and of memory, which part of
    the nearer of the two roofs; the others with None.
    """
    step = profile["step_ms"]
    rows = []
    for one in kernels:
        work = _declared(one, profile)
        spot = (
            Spot(one["kernel"], work["flops"], work["dram_bytes"], one["ms"]) if work and one["ms"] else None
        )
        rows.append(
            {
                "branch": one["branch"] or None,
                "kernel": one["kernel"],
                "calls": one["calls"],
                "ms": one["ms"],
                "pct": 100 * one["ms"] / step if step else None,
                **(work or dict.fromkeys(_DECLARED)),
                "tflops": spot and spot.tflops,
                "l2_gbps": spot and Spot(spot.name, 0, work["l2_bytes"], spot.ms).gbps,
                "gbps": spot and spot.gbps,
                "pct_of_roof": spot and _of_roof(spot, roofs),
                "roof": spot and _roof(spot, roofs),
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def _declared(kernel: Mapping[str, Any], profile: Mapping[str, Any]) -> dict[str, float]:
    """What a kernel declares to do in a step, in its stage or, without one, in all; empty if nothing."""
    known = [
        one
        for one in profile.get("kernels") or ()
        if one["kernel"] == kernel["kernel"] and kernel["branch"] in ("", None, one["branch"])
    ]
    return {name: math.fsum(one[name] for one in known) for name in _DECLARED} if known else {}


def kernel_table(
    kernels: Iterable[Mapping[str, Any]], profile: Mapping[str, Any], *, top: int
) -> list[Text | Table]:
    """The `top` longest kernels, the others summed, the time in which nothing ran, and all of it together;
    with lines above and below.
    """
    rows, step = kernel_objects(kernels, profile), profile["step_ms"]
    table = _table()
    for name in ("stage", "kernel", "calls", "ms", "% of step"):
        table.add_column(name, justify="left" if name in ("stage", "kernel") else "right", no_wrap=True)
    for row in rows[:top]:
        table.add_row(row["branch"] or MISSING, Text(_short(row["kernel"])), *_numbers(row, step))
    rest = rows[top:]
    if rest:
        summed = {name: math.fsum(row[name] for row in rest) for name in ("calls", "ms")}
        table.add_row("", f"({len(rest)} more)", *_numbers(summed, step))
    if profile["idle_ms"]:
        table.add_row("", IDLE, "", *_numbers({"calls": 0, "ms": profile["idle_ms"]}, step)[1:])
    total = {"calls": math.fsum(row["calls"] for row in rows)}
    total["ms"] = math.fsum([*(row["ms"] for row in rows), profile["idle_ms"]])
    table.add_row("", "together", *_numbers(total, step))
    title = Text(f"kernels of a profiled step of {digits(step)} ms", style="bold")
    return [title, table, *_notes([f"no stages: {profile['note']}" if profile["note"] else ""])]


def declared_table(
    kernels: Iterable[Mapping[str, Any]], profile: Mapping[str, Any], roofs: Roofs | None
) -> list[Text | Table]:
    """The kernels that declare their work, and what they reached; nothing where none ran."""
    rows = [row for row in kernel_objects(kernels, profile, roofs) if row["tflops"] is not None]
    if not rows:
        return []
    table = _table()
    for name in (
        "stage",
        "kernel",
        "ms",
        "TFLOP/s",
        "L2 GB/s",
        "GB/s",
        *(["% of roof", "roof"] if roofs else []),
    ):
        table.add_column(
            name, justify="left" if name in ("stage", "kernel", "roof") else "right", no_wrap=True
        )
    for row in rows:
        under = [digits(row["pct_of_roof"]), row["roof"]] if roofs else []
        reached = (row["ms"], row["tflops"], row["l2_gbps"], row["gbps"])
        table.add_row(row["branch"] or MISSING, Text(row["kernel"]), *map(digits, reached), *under)
    return [Text("what kernels reached, by the work that they declare", style="bold"), table]


def stage_objects(row: Row, profile: Mapping[str, Any], roofs: Roofs | None) -> list[dict[str, Any]]:
    """The whole step and its stages: what was counted, what was reached, and which part of the roof above."""
    whole = spot_of(row)
    spots = [*([whole] if whole else []), *stage_spots(row, profile)[0]]
    return [
        {
            "stage": spot.name,
            "ms": spot.ms,
            "flops": spot.flops,
            "bytes": spot.bytes,
            "flop_per_byte": spot.intensity,
            "tflops": spot.tflops,
            "gbps": spot.gbps,
            "pct_of_roof": _of_roof(spot, roofs),
            "roof": _roof(spot, roofs),
        }
        for spot in spots
    ]


def stage_table(row: Row, profile: Mapping[str, Any], roofs: Roofs | None) -> list[Text | Table]:
    """`stage_objects` as a table, with lines above and below: what could not be placed, how to get roofs."""
    found = stage_objects(row, profile, roofs)
    unit, factor = ("TFLOP/s", 1.0) if any(one["tflops"] >= 1 for one in found) else ("GFLOP/s", 1e3)
    table = _table()
    for name in ("stage", "ms", "FLOP/byte", unit, "GB/s", *(["% of roof", "roof"] if roofs else [])):
        table.add_column(name, justify="left" if name in ("stage", "roof") else "right", no_wrap=True)
    for one in found:
        under = [digits(one["pct_of_roof"]), one["roof"]] if roofs else []
        reached = (one["ms"], one["flop_per_byte"], one["tflops"] * factor, one["gbps"])
        table.add_row(one["stage"], *map(digits, reached), *under)
    notes = [stage_spots(row, profile)[1]]
    if roofs is None:
        notes.append(f"peaks of {row['device']} are not measured, so there are no roofs: {CALIBRATE}")
    title = Text(
        f"what the timed step of {digits(row['ms_total'])} ms reached, by its counted work", style="bold"
    )
    return [title, table, *_notes(notes)]


def _of_roof(spot: Spot, roofs: Roofs | None) -> float | None:
    return None if roofs is None else 100 * max(_parts(spot, roofs).values())


def _roof(spot: Spot, roofs: Roofs | None) -> str | None:
    if roofs is None:
        return None
    parts = _parts(spot, roofs)
    return max(parts, key=lambda name: parts[name])


def _parts(spot: Spot, roofs: Roofs) -> dict[str, float]:
    """Of each roof, the part that was reached; of work without FLOPs, too. The larger is the one above it."""
    parts = {"memory": spot.gbps / roofs.copy_gbps}
    return parts if roofs.matrix_tflops is None else {"matrix": spot.tflops / roofs.matrix_tflops} | parts


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


def _notes(lines: Iterable[str]) -> list[Text | Table]:
    return [Text(line, style="dim") for line in lines if line]


def _numbers(row: Mapping[str, Any], step: float) -> Sequence[str]:
    calls = f"{row['calls']:.0f}" if float(row["calls"]).is_integer() else f"{row['calls']:.2f}"
    return calls, digits(row["ms"]), f"{100 * row['ms'] / step:.1f}" if step else MISSING


def _short(kernel: str) -> str:
    """A long name without its middle."""
    if len(kernel) <= _KERNEL_WIDTH:
        return kernel
    half = (_KERNEL_WIDTH - 1) // 2
    return f"{kernel[:half]}…{kernel[-half:]}"
