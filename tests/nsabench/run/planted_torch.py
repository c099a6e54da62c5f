"""Functions for a worker to measure with that bring torch, as the true one does."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from nsabench.plan import Cell
from nsabench.run import arm, session
from nsabench.run.worker import Sink
from tests.nsabench.run.planted import row_of


def report(cells: Sequence[Cell], policy: object, sink: Sink, **more: Any) -> None:
    """Say what this process has from its driver."""
    found = {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "environment": dict(os.environ),
        "affinity": sorted(os.sched_getaffinity(0)),
        "folder": os.getcwd(),
        "path": sys.path,
        "stdin": sys.stdin.read(),
    }
    sink.doing(json.dumps(found))
    sink.done(row_of(cells[0]))


def real_with_faults(cells: Sequence[Cell], policy: Any, sink: Sink, **more: Any) -> None:
    """The true measurement, with a true crash, hang and exhaustion inside the check of three routes."""
    prepare = arm.Arm.prepare

    def broken(self: arm.Arm) -> None:
        if self.cell.route == "win=reference":
            ctypes.string_at(0)
        if self.cell.route == "sel=reference":
            time.sleep(1000)
        if self.cell.route == "cmp=reference":
            torch.empty(2**50)
        prepare(self)

    setattr(arm.Arm, "prepare", broken)  # noqa: B010
    try:
        session.measure_group(cells, policy, sink, **more)
    finally:
        setattr(arm.Arm, "prepare", prepare)  # noqa: B010
