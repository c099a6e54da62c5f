"""A worker, seen from its driver: started, spoken to, watched, killed with all it forked."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from nsabench.run.worker import Board, send, split

TAIL_BYTES = 65536
"""What is kept of a worker's output: the end."""

_ENDS_WITHIN_S = 2.0
_DIES_WITHIN_S = 30.0
_DUMPS_WITHIN_S = 1.0
_START = """\
import json, sys
told = json.loads(sys.argv[1])
sys.path[:] = told.pop("path")
from nsabench.run.worker import main
main(**told)
"""


class WorkerError(RuntimeError):
    """Workers cannot be had on this machine, or cannot be got rid of. One line."""


class WorkerProcess:
    """A fresh interpreter in a session of its own that measures with the function ``measure``.

    Its environment, search path and torch's numbers of threads are this process's own. ``number`` tells it
    from the other processes of a run. ``gpus``: UUIDs of the only GPUs that it sees; empty for all.
    """

    def __init__(self, measure: str, number: int, gpus: Sequence[str] = ()) -> None:
        self.number = number
        self._incoming, self._printed = bytearray(), bytearray()
        self._gone = self._mute = False
        self._death: int | None = None
        self._channel, theirs = socket.socketpair()
        self._output, printing = os.pipe()
        lifeline, self._lifeline = os.pipe()
        memory = _shared_memory()
        self.board = Board(memory)
        told = {
            "path": sys.path,
            "measure": measure,
            "threads": _threads(),
            "channel": theirs.fileno(),
            "board": memory,
            "lifeline": lifeline,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(told)],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else None,
                stdin=subprocess.DEVNULL,
                stdout=printing,
                stderr=printing,
                pass_fds=(theirs.fileno(), memory, lifeline),
                start_new_session=True,
            )
        except OSError as error:
            self._close()
            raise WorkerError(f"cannot start a worker: {error}") from error
        finally:
            theirs.close()
            for descriptor in (printing, lifeline, memory):
                os.close(descriptor)
        os.set_blocking(self._output, False)
        if hasattr(os, "pidfd_open"):
            self._death = os.pidfd_open(self.pid)

    @property
    def pid(self) -> int:
        """Also the number of its process group."""
        return self._process.pid

    @property
    def files(self) -> list[Any]:
        """What to wait for: one is readable when there is something to `read`, or the worker has ended."""
        files = [None if self._gone else self._channel, None if self._mute else self._output, self._death]
        return [file for file in files if file is not None]

    @property
    def silent_deaths(self) -> bool:
        """Whether the end of the worker may go unnoticed by who waits for `files` only."""
        return self._death is None

    @property
    def printed(self) -> str:
        """The end of what was printed for the present group."""
        return self._printed.decode(errors="replace")

    def begin(self, *order: object) -> None:
        """Hand over a group: what `nsabench.run.worker` measures next."""
        self._listen()
        self._printed.clear()
        self.board.clear()
        self.send(order)

    def send(self, message: object) -> None:
        """Send a message; nothing if the worker is gone, which `ended` will tell."""
        with suppress(ConnectionError):
            send(self._channel, message)

    def read(self) -> list[Any]:
        """The messages that have come in; never waits. Takes in what was printed, too."""
        self._listen()
        while not self._gone:
            try:
                part = self._channel.recv(TAIL_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                part = b""
            self._incoming += part
            self._gone = not part
        return split(self._incoming)

    def ended(self) -> bool:
        """Whether the worker has ended, or will never be heard of again."""
        return self._gone or self._process.poll() is not None

    def dump_stacks(self) -> None:
        """Have the worker print where each of its threads is; ends when it has, or after a second."""
        until = time.monotonic() + _DUMPS_WITHIN_S
        before = len(self._printed)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        while not self._mute and wait([self._output], max(0.0, until - time.monotonic())):
            self._listen()
            if len(self._printed) != before:
                until = min(until, time.monotonic() + _DUMPS_WITHIN_S / 10)

    def kill(self) -> int:
        """End the worker and all it forked, at once; its exit code, negative for a signal."""
        if self._lifeline < 0:
            return self._process.wait()
        if self._gone:
            # It is ending by itself: let it say with which code.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDS_WITHIN_S)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            code = self._process.wait(_DIES_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise WorkerError(
                f"worker {self.pid} cannot be killed: it waits for a device or a disk"
            ) from None
        self._listen()
        self._close()
        return code

    def _listen(self) -> None:
        # Bounded: who prints without end is not listened to without end.
        for _ in range(64):
            if self._mute:
                return
            try:
                part = os.read(self._output, TAIL_BYTES)
            except BlockingIOError:
                return
            self._mute = not part
            self._printed += part
            del self._printed[:-TAIL_BYTES]

    def _close(self) -> None:
        self._channel.close()
        os.close(self._output)
        os.close(self._lifeline)
        self._lifeline = -1
        if self._death is not None:
            os.close(self._death)


def _shared_memory() -> int:
    """A descriptor of memory for a board, in no folder."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("nsabench-board")
        os.truncate(descriptor, Board.BYTES)
        return descriptor
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(Board.BYTES))
        return os.dup(file.fileno())


def _threads() -> Sequence[int] | None:
    """Torch's numbers of threads here; None where torch is not in use, so that a worker has the defaults."""
    torch = sys.modules.get("torch")
    return None if torch is None else (torch.get_num_threads(), torch.get_num_interop_threads())
