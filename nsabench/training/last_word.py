"""Stores the status of a training whose process was ended by a timer of C: run as a process beside it.

``python -m nsabench.training.last_word FOLDER`` waits for the end of its standard input. Where nothing came
before that, and the stacks of a hang are in the folder, it notes the hang. It imports no torch.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nsabench.store import StoreError, TableRun
from nsabench.store.training import KIND, TRAINING_TABLES

HANG = "hang"
FAREWELL = b"ended by itself\n"

RELEASE_S = 30.0
"""How long a process that ended may take to give its lock back: the kernel closes its pipes before that."""


def heartbeat_file(rank: int) -> str:
    """Name of a rank's heartbeats in the folder of a run."""
    return "heartbeat.jsonl" if rank == 0 else f"heartbeat.rank{rank}.jsonl"


def stacks_file(rank: int) -> str:
    """Name of the file in a run's folder that a hang of this rank leaves."""
    return "stacks.txt" if rank == 0 else f"stacks.rank{rank}.txt"


def now_file(rank: int) -> str:
    """Name of the file in which a rank keeps its present mark in words, while it runs."""
    return f".now.rank{rank}"


@dataclass(frozen=True)
class Sign:
    """The latest sign of life of a rank: ``age`` in seconds, and where it was."""

    rank: int
    age: float
    step: int
    stage: str


def last_sign(folder: Path, rank: int) -> Sign | None:
    """What the last whole line of a rank's heartbeats says; None without one."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        lines = (folder / heartbeat_file(rank)).read_bytes().rpartition(b"\n")[0].splitlines()
        found = json.loads(lines[-1])
        age = time.time() - datetime.fromisoformat(found["t"]).timestamp()
        return Sign(rank, age, int(found["step"]), str(found["stage"]))
    return None


def note_hang(folder: Path) -> None:
    """Note the hang of a process that is no more, where its stacks tell of one and nothing else was noted."""
    if not (folder / stacks_file(0)).stat().st_size:
        return
    with TableRun.open(folder, KIND, TRAINING_TABLES, wait_s=RELEASE_S) as run:
        if run.info.get("status") == "running":
            where = (folder / now_file(0)).read_text(encoding="utf-8").strip() or "the start"
            reason = f"no sign of life since {where}; a call does not give the interpreter back"
            run.note(status=HANG, reason=reason)


if __name__ == "__main__":
    if sys.stdin.buffer.read() != FAREWELL:
        try:
            note_hang(Path(sys.argv[1]))
        except (StoreError, OSError) as error:
            sys.exit(f"cannot store that the training hung: {error}")
