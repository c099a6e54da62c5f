"""Files about one step for other tools to open: a trace of what ran when, and who holds which memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsabench.measure.device import resolve_device
from nsabench.measure.memory import read_allocations, stage_at
from nsabench.measure.profiling import profile
from nsabench.measure.stages import STAGES, Hook
from nsabench.measure.trace import stage_range

TRACE_FILE = "trace.json.gz"
TRACED_STEPS = 3
_MOST_EVENTS = 200_000

Step = Callable[[], object]


def write_trace(
    steps: dict[str, Step], hook: Hook, device: str | torch.device, folder: Path, *, api: Any = torch.cuda
) -> Path:
    """Run each step a few times under torch.profiler; the Chrome trace (gzip) is written into `folder`.

    Stages show as ranges `nsa::<stage>`, steps as `step <name>`.
    """
    where = resolve_device(device, api=api)
    on_gpu = where.type == "cuda"
    path = folder / TRACE_FILE
    with hook(stage_range):
        for step in steps.values():
            step()
        with profile(cuda=on_gpu) as profiler:
            for name, step in steps.items():
                for _ in range(TRACED_STEPS):
                    with torch.profiler.record_function(f"step {name}".strip()):
                        step()
            if on_gpu:
                api.synchronize(where)
    profiler.export_chrome_trace(str(path))
    return path


def write_memory(
    step: Step, hook: Hook, device: str | torch.device, folder: Path, *, api: Any = torch.cuda
) -> Path:
    """Run a step once and write what it allocates into `folder`.

    On a GPU `memory.pickle`: the CUDA allocator's snapshot with its history, for torch's memory viewer. torch
    has none for a CPU; there `memory.json`: every allocation of torch's CPU allocator with its stage (see
    `allocations`), and the sums by stage.
    """
    where = resolve_device(device, api=api)
    if where.type == "cuda":
        return _write_snapshot(step, hook, where, folder, api)
    path = folder / "memory.json"
    path.write_text(json.dumps(allocations(step, hook)) + "\n")
    return path


def _write_snapshot(step: Step, hook: Hook, device: torch.device, folder: Path, api: Any) -> Path:
    path = folder / "memory.pickle"
    with api.device(device), hook(stage_range):
        api.memory._record_memory_history(max_entries=_MOST_EVENTS)
        try:
            step()
            api.synchronize()
            api.memory._dump_snapshot(str(path))
        finally:
            api.memory._record_memory_history(enabled=None)
    return path


def allocations(step: Step, hook: Hook) -> dict[str, Any]:
    """Of one step on a CPU: `stages` (by stage how many allocations, their bytes, and the most bytes live in
    it), and `events` in time order: ms since the first, bytes (negative: freed), bytes live, stage.

    Only what the step itself allocates counts; freeing what was there before is left out.
    """
    with hook(stage_range), profile(memory=True) as profiler:
        step()
    found, ranges = read_allocations(profiler)
    found.sort(key=lambda event: event[0])
    live: dict[int, int] = {}
    held = 0
    events: list[tuple[float, int, int, str]] = []
    for time, address, size in found:
        change = size if size >= 0 else -live.pop(address, 0)
        if size >= 0:
            live[address] = size
        if change:
            held += change
            events.append(((time - found[0][0]) / 1e6, change, held, stage_at(time, ranges)))
    names = [stage for stage in (*STAGES, "backward") if any(event[3] == stage for event in events)]
    return {
        "what": "allocations of torch's CPU allocator in one step, as torch.profiler saw them",
        "stages": {name: _stage_sums([event for event in events if event[3] == name]) for name in names},
        "events": events,
    }


def _stage_sums(events: list[tuple[float, int, int, str]]) -> dict[str, int]:
    taken = [change for _, change, _, _ in events if change > 0]
    return {
        "allocations": len(taken),
        "bytes": sum(taken),
        "most_live_bytes": max(held for _, _, held, _ in events),
    }
