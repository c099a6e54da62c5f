"""The process that measures: started by an executor, given one group of cells after another, killed at need.

It imports no more than the function that measures does: a worker that needs no torch starts at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from nsabench.plan import Cell

MEASURE = "nsabench.run.session:measure_group"
"""The function that measures, as ``module:name``."""

DEVICE_LOST = "the device was lost"
"""So begins the reason of a cell after which nothing more could be measured in its process."""

Fields = Mapping[str, Any]

_driver: int | None = None


def driver() -> int | None:
    """The process that this one measures for; None where it measures for itself."""
    return _driver


class Sink(Protocol):
    """Where the measurement of a group goes, and who is told what is at fault should the process end."""

    def mark(self, cell: Cell | None) -> None:
        """``cell`` is being worked on from now on (None: all of the group). A microsecond; call it between
        samples, as a sign of progress too.
        """

    def doing(self, text: str) -> None:
        """What is being done, for whoever watches. Not inside a timed loop."""

    def done(
        self,
        row: Fields,
        samples: Sequence[Fields] = (),
        telemetry: Sequence[Fields] = (),
        kernels: Sequence[Fields] = (),
    ) -> None:
        """A cell is finished; its row is on disk when this returns."""


class Board:
    """What a worker is at, in memory that it shares with its driver: no pipe and no lock.

    Doubles: the place of the marked cell in its group, when that was marked (monotonic seconds, one clock for
    all processes of a machine), and the seconds spent on each cell so far.
    """

    BYTES = 32768
    UNTOUCHED, EVERY = -2, -1

    def __init__(self, descriptor: int) -> None:
        """On memory of BYTES bytes behind ``descriptor``."""
        self._memory = mmap.mmap(descriptor, self.BYTES)
        self._at = memoryview(self._memory).cast("d")

    def clear(self) -> None:
        """Before a group is handed over: none of its cells has been touched."""
        self._memory[:] = bytes(self.BYTES)
        self._at[0] = self.UNTOUCHED

    def mark(self, place: int) -> None:
        """Work on the cell at ``place`` from now on."""
        self.pause()
        self._at[0] = place

    def pause(self) -> None:
        """Charge the time since the last mark to its cell, and go on from now."""
        now, place = time.monotonic(), int(self._at[0])
        if 0 <= place < len(self._at) - 2:
            self._at[2 + place] += now - self._at[1]
        self._at[1] = now

    def resume(self) -> None:
        """Go on from now; the time since the last mark is nobody's."""
        self._at[1] = time.monotonic()

    @property
    def place(self) -> int:
        """Of the marked cell; EVERY for all of the group, UNTOUCHED while it was not begun."""
        return int(self._at[0])

    @property
    def marked(self) -> float:
        """When the last mark was made, monotonic seconds."""
        return self._at[1]

    @property
    def spent(self) -> float:
        """Seconds charged to the marked cell before its last mark."""
        place = self.place
        return self._at[2 + place] if 0 <= place < len(self._at) - 2 else 0.0


def send(channel: socket.socket, message: object) -> None:
    """Send one message."""
    data = pickle.dumps(message)
    channel.sendall(struct.pack("!Q", len(data)) + data)


def split(buffer: bytearray) -> list[Any]:
    """Take the whole messages out of what has come in."""
    found = []
    while len(buffer) >= 8:
        end = 8 + struct.unpack_from("!Q", buffer)[0]
        if len(buffer) < end:
            break
        found.append(pickle.loads(buffer[8:end]))
        del buffer[:end]
    return found


def receive(channel: socket.socket) -> Any:
    """Wait for one message; EOFError when the other side is gone."""
    buffer = bytearray()
    while True:
        wanted = 8 if len(buffer) < 8 else 8 + struct.unpack_from("!Q", buffer)[0]
        if 8 < wanted == len(buffer):
            return split(buffer)[0]
        part = channel.recv(wanted - len(buffer))
        if not part:
            raise EOFError
        buffer += part


class _Speaker:
    """The sink of a worker. What it is told goes to the driver, which answers when all is done with it: the
    driver and the measurement never run at the same time.
    """

    def __init__(self, channel: socket.socket, board: Board) -> None:
        self._channel, self._board = channel, board
        self._pid = os.getpid()
        self._places: dict[Cell | None, int] = {}

    def begin(self, cells: Sequence[Cell]) -> None:
        self._places = {None: Board.EVERY, **{cell: place for place, cell in enumerate(cells)}}
        self.mark(None)

    def mark(self, cell: Cell | None) -> None:
        self._silence_children()
        self._board.mark(self._places[cell])

    def doing(self, text: str) -> None:
        self._say("doing", text)

    def done(
        self,
        row: Fields,
        samples: Sequence[Fields] = (),
        telemetry: Sequence[Fields] = (),
        kernels: Sequence[Fields] = (),
    ) -> None:
        self._say("done", row, samples, telemetry, kernels)

    def over(self) -> None:
        self._silence_children()
        send(self._channel, ("over",))

    def _say(self, *message: object) -> None:
        self._silence_children()
        self._board.pause()
        send(self._channel, message)
        receive(self._channel)
        self._board.resume()

    def _silence_children(self) -> None:
        """A child forked by a cell believes to be the worker, down to the last line of its loop."""
        if os.getpid() != self._pid:
            os._exit(0)


def main(*, channel: int, board: int, lifeline: int, measure: str, threads: tuple[int, int] | None) -> None:
    """Measure what comes through ``channel``, until it closes.

    ``threads``: torch's threads within and between operators, as the driver has them; None leaves them.
    """
    global _driver
    _driver = os.getppid()
    _die_with(lifeline)
    _prefer_for_oom()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    module, _, name = measure.partition(":")
    measure_group: Callable[..., None] = getattr(import_module(module), name)
    if threads is not None:
        _set_threads(*threads)
    # What was imported stays: a collection after each group need not look at it again.
    gc.freeze()
    with socket.socket(fileno=channel) as stream:
        speaker = _Speaker(stream, Board(board))
        send(stream, ("ready",))
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                _measure(speaker, measure_group, *receive(stream))


def _measure(
    speaker: _Speaker,
    measure_group: Callable[..., None],
    cells: Sequence[Cell],
    policy: object,
    process: int,
    since_s: float,
) -> None:
    began = time.perf_counter() - since_s
    speaker.begin(cells)
    measure_group(cells, policy, speaker, process=process, clock=lambda: time.perf_counter() - began)
    gc.collect()
    speaker.over()


def _die_with(lifeline: int) -> None:
    """Kill this process and all it forked as soon as nobody holds the other end of ``lifeline``."""

    def watch() -> None:
        while os.read(lifeline, 1):
            continue
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    import fcntl

    if hasattr(fcntl, "F_SETSIG"):
        # The thread needs the interpreter, which a hanging extension never gives back; the kernel does not.
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _prefer_for_oom() -> None:
    """Have the kernel take this process, not the driver, when memory runs out."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _set_threads(within: int, between: int) -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.get_num_threads() != within:
        torch.set_num_threads(within)
    if torch.get_num_interop_threads() != between:
        torch.set_num_interop_threads(between)
