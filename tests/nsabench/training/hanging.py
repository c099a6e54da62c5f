"""Trainings that hang in their third step, to be run as a process: FOLDER, and how each of them hangs."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the optimizer imports, before a process is forked for each training

from nsa import reference, routes
from nsabench.training.heartbeat import Heartbeat
from nsabench.training.loop import Trainer
from nsabench.training.observe import Observer, Observers
from nsabench.training.watchdog import Watchdog
from tests.nsabench.training.small import RandomBytes, new_run, settings

TIMEOUT_S = 5.0
NOW = threading.Event()
"""Set in the step that hangs."""


def blocked_lock(grad: torch.Tensor) -> None:
    if NOW.is_set():
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()


def sleeping_attention(*given: Any, **named: Any) -> Any:
    if NOW.is_set():
        time.sleep(1000)
    return reference.sliding_attention(*given, **named)


def keeping_attention(*given: Any, **named: Any) -> Any:
    if NOW.is_set():
        ctypes.PyDLL(None).sleep(1000)  # a call that does not give the interpreter back
    return reference.sliding_attention(*given, **named)


class BlockingData(RandomBytes):
    def batch(self, step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        if NOW.is_set():
            threading.Event().wait()
        return super().batch(step, rank, world)


class InThirdStep(Observer):
    def begin_step(self, step: int) -> None:
        if step == 3:
            NOW.set()


def main(folder: Path, how: str) -> None:
    options = settings(steps=9, route="cmp=sdpa,score=chunked,sel=gather,win=reference")
    if how in ("sleeping", "keeping"):
        rows = [
            replace(row, target=f"{__spec__.name}:{how}_attention")
            if (row.branch, row.backend) == ("win", "reference")
            else row
            for row in routes.TABLE
        ]
        routes.TABLE = tuple(rows)
    data = (BlockingData if how == "data" else RandomBytes)(options)
    with new_run(folder) as run:

        def note(status: str, reason: str) -> None:
            run.note(status=status, reason=reason)

        def observers(trainer: Trainer) -> Observer:
            heartbeat = Heartbeat(run.path)
            if how == "lock":
                trainer.model.layers[0].feed_forward.up.weight.register_hook(blocked_lock)
            return Observers([heartbeat, Watchdog(heartbeat, TIMEOUT_S, note), InThirdStep()])

        Trainer(options, data, run, observers).train()


def fork(folder: Path, how: str) -> int:
    """The training as a process of its own, with its stderr in a file; torch is imported only once."""
    folder.mkdir()
    pid = os.fork()
    if not pid:
        with folder.with_suffix(".stderr").open("wb") as file:
            os.dup2(file.fileno(), 2)
        main(folder, how)
    return pid


if __name__ == "__main__":
    # As a module of its name: the rows of the table load the functions above, with the event set here.
    sys.modules[__spec__.name] = sys.modules["__main__"]
    pids = {how: fork(Path(sys.argv[1]) / how, how) for how in sys.argv[2:]}
    for how, pid in pids.items():
        print(how, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
