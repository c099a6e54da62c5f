"""Ends a training that hangs: stacks, the last marks of the device and a status are written first."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from torch import nn

from nsabench.store import StoreError
from nsabench.training import last_word
from nsabench.training.heartbeat import Heartbeat, Mark
from nsabench.training.last_word import FAREWELL, HANG, Sign, last_sign, stacks_file
from nsabench.training.observe import Observer

EXIT_CODE = 1
"""Of a process that hung."""

GRACE_S = 5.0
"""How long the other ranks wait for the first one to write the status, and how much later than the timeout a
process ends whose interpreter itself is stuck."""

Note = Callable[[str, str], None]
"""Takes the status and the reason, in a line, that the run is to get."""


class Watchdog(Observer):
    """Watches a heartbeat from a thread of its own.

    Where the training has made no mark for ``timeout_s``, on no rank whose heartbeat is in the same folder,
    it writes the stacks of all threads to `stacks_file` and to stderr, the last marks and on a GPU which of
    them the device came to, notes the status ``hang``, and ends the process with `EXIT_CODE`: whatever the
    main thread is stuck in. Where a call keeps the interpreter itself, no thread of Python can do that: then
    a timer of C writes the stacks and ends the process, `GRACE_S` later, and a small process that waits
    beside it (:mod:`nsabench.training.last_word`) notes the status.

    Args:
        note: how the status is stored; None on ranks that store nothing.
        world: number of ranks.
        end: what ends the process, with an exit code.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        timeout_s: float,
        note: Note | None,
        *,
        rank: int = 0,
        world: int = 1,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._heartbeat, self._timeout_s, self._note = heartbeat, timeout_s, note
        self._folder, self._rank, self._world, self._end = heartbeat.path.parent, rank, world, end
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: TextIO | None = None
        self._began = 0.0
        self._beside: subprocess.Popen[bytes] | None = None

    def begin(self, model: nn.Module, first_step: int) -> None:
        self._began = time.monotonic()
        # Opened now: a process that hangs may have no file descriptor, or no disk, to open it with.
        self._file = (self._folder / stacks_file(self._rank)).open("w", encoding="utf-8")
        if self._note is not None:
            self._beside = subprocess.Popen(
                [sys.executable, "-m", last_word.__name__, str(self._folder.resolve())],
                stdin=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                # A Ctrl-C is meant for the training.
                start_new_session=True,
            )
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
        if self._beside is not None:
            with suppress(OSError):
                self._beside.communicate(FAREWELL)
            self._beside = None
        if self._file is not None:
            self._file.close()
            with suppress(OSError):
                (self._folder / stacks_file(self._rank)).unlink()

    def _watch(self) -> None:
        poll = min(1.0, self._timeout_s / 4)
        while not self._stop.is_set():
            age = self._age()
            if age > self._timeout_s:
                self._hung(age)
                return
            # A full or slow disk is told of by the main thread, which writes the same file.
            with suppress(StoreError):
                self._heartbeat.flush(poll)
            faulthandler.dump_traceback_later(self._timeout_s + GRACE_S, exit=True, file=self._stacks())
            self._stop.wait(poll)

    def _stacks(self) -> TextIO:
        assert self._file is not None
        return self._file

    def _age(self) -> float:
        """Seconds since the latest mark of any rank."""
        last = self._heartbeat.last
        own = time.monotonic() - (self._began if last is None else last.at)
        if own <= self._timeout_s or self._world == 1:
            return own
        return min([own, *(one.age for one in self._others())])

    def _others(self) -> list[Sign]:
        """The latest signs of the other ranks that write here, of those since the start."""
        ranks = (rank for rank in range(self._world) if rank != self._rank)
        found = [last_sign(self._folder, rank) for rank in ranks]
        since = time.monotonic() - self._began
        return [sign for sign in found if sign is not None and sign.age <= since]

    def _hung(self, age: float) -> None:
        last = self._heartbeat.last
        reason = f"no sign of life for {age:.0f} s at {last or 'the start'}{self._culprit(last)}"
        lines = [reason, *map(str, self._heartbeat.marks), ""]
        # Whatever of the rest blocks: the disk, or a query of the device.
        faulthandler.dump_traceback_later(3 * GRACE_S, exit=True, file=self._stacks())
        self._tell("\n".join(lines))
        for file in (self._stacks(), sys.__stderr__):
            if file is not None:
                with suppress(OSError, ValueError):
                    faulthandler.dump_traceback(file, all_threads=True)
        if self._note is not None:
            try:
                self._note(HANG, reason)
            except (StoreError, OSError) as error:
                self._tell(f"cannot store the status: {error}\n")
        self._tell("".join(f"{line}\n" for line in on_device(list(self._heartbeat.marks))))
        if self._note is None:
            time.sleep(GRACE_S)
        self._end(EXIT_CODE)

    def _culprit(self, last: Mark | None) -> str:
        """Which rank stopped first, where it was another."""
        others = self._others() if self._world > 1 else []
        first = max(others, key=lambda sign: sign.age, default=None)
        if first is None or last is None or first.age <= time.monotonic() - last.at:
            return ""
        return f"; rank {first.rank} stopped first, at step {first.step}, {first.stage}"

    def _tell(self, text: str) -> None:
        for file in (self._stacks(), sys.__stderr__):
            if file is not None:
                with suppress(OSError, ValueError):
                    file.write(text)
                    file.flush()


def on_device(marks: Sequence[Mark]) -> list[str]:
    """In words, how far the device has come in the queued work; empty for marks without events."""
    queued = [mark for mark in marks if mark.event is not None]
    if not queued:
        return []
    try:
        done = [mark.event.query() for mark in queued]
    except RuntimeError as error:
        return [f"device: {str(error).splitlines()[0]}"]
    if all(done):
        return [f"device: has finished what was queued up to {queued[-1]}"]
    first = done.index(False)
    before = f"came to {queued[first - 1]}" if first else "came to none of the marks kept"
    waiting = [f"device: not yet at {mark}" for mark in queued[first:]]
    return [f"device: {before}; what was queued after it runs or waits", *waiting]
