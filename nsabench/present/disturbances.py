"""What disturbed a measurement, in words: other processes, hardware that slowed down, readings that ended."""

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from nsabench.present.frame import Row
from nsabench.stats.neighbours import LOUD_PCT
from nsabench.store import Run
from nsabench.store.schema import TELEMETRY_COLUMNS

_READINGS = [
    column.name for column in TELEMETRY_COLUMNS if column.name not in ("run_id", "cell_id", "t_s", "gpu_uuid")
]


def is_dropped(samples: pd.DataFrame) -> "pd.Series[bool]":
    """Of each sample whether its round does not count."""
    dropped = samples["dropped"]
    return dropped.notna() & (dropped != "")


def load_text(load_pct: float, device: str) -> str:
    """What other processes used of a device."""
    return f"other processes used {load_pct:.0f} % of the {'cores' if device == 'cpu' else 'GPU'}"


def row_notes(rows: Sequence[Row]) -> list[str]:
    """What is to be said under a table of cells."""
    notes = []
    loud = [row for row in rows if (row["neighbour_load_pct"] or 0.0) > LOUD_PCT]
    if loud:
        worst = max(loud, key=lambda row: row["neighbour_load_pct"])
        said = load_text(worst["neighbour_load_pct"], worst["device"])
        where = f", the most of {len(loud)} disturbed cells" if len(loud) > 1 else ""
        notes.append(f"{said}{where}: times may be too long")
    dropped = [row["dropped_rounds"] for row in rows if row["dropped_rounds"]]
    if dropped:
        cells = "1 cell" if len(dropped) == 1 else f"{len(dropped)} cells"
        notes.append(f"{sum(dropped)} rounds of {cells} were dropped: the hardware slowed down")
    doubts = Counter(row["timers_note"] for row in rows if row["timers_note"] and row["status"] == "ok")
    for text, count in doubts.items():
        notes.append(f"warning: {text}" + (f" ({count} cells)" if count > 1 else ""))
    return notes


def run_notes(run: Run) -> list[str]:
    """What is to be said of a run whose samples and telemetry are at hand."""
    notes = []
    rounds = run.samples[["process", "round"]].drop_duplicates()
    dropped = run.samples[is_dropped(run.samples)]
    if len(dropped):
        lost = dropped[["process", "round"]].drop_duplicates()
        why = ", ".join(sorted(set(dropped["dropped"])))
        notes.append(f"{len(lost)} of {len(rounds)} rounds dropped for {why}")
    if lost_readings := readings_lost(run.telemetry):
        notes.append(f"NVML stopped answering: no more {', '.join(lost_readings)}")
    return notes


def readings_lost(telemetry: pd.DataFrame) -> list[str]:
    """The readings of a GPU that were had while some group was measured, but no more at its end."""
    if telemetry.empty:
        return []
    known = telemetry[_READINGS].notna() & (telemetry[_READINGS] != "")
    by_process = known.groupby(telemetry["cell_id"])
    ended = by_process.any() & ~by_process.last()
    return [name for name in _READINGS if ended[name].any()]
