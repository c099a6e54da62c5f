"""Signs of life of a training: where it is, in memory at every mark and in a file about once a second."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsa import stage_hook
from nsabench.store.files import disk_error
from nsabench.training.last_word import heartbeat_file, now_file
from nsabench.training.observe import Observer

EVERY_S = 1.0
"""A line of the file is at most so much older than what it would say now."""

KEPT = 64
"""Marks that are kept: several layers' stages."""

WORDS = 256
"""Bytes of the present mark in words."""


@dataclass(frozen=True)
class Mark:
    """A training came to ``stage`` of ``step``, in ``detail`` to a layer and a stage of NSA there.

    ``at`` is `time.monotonic`, ``wall`` `time.time`, both in seconds; ``event`` a CUDA event that was put
    into the stream there.
    """

    at: float
    wall: float
    step: int
    stage: str
    detail: str = ""
    event: Any = None

    def __str__(self) -> str:
        return f"step {self.step}, {self.stage}" + (f": {self.detail}" if self.detail else "")

    def line(self) -> str:
        """The mark as a line of the heartbeat file."""
        moment = datetime.fromtimestamp(self.wall, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"t": moment.replace("+00:00", "Z"), "step": self.step, "stage": self.stage})


class Heartbeat(Observer):
    """Marks every stage of a step, and in the model every layer and stage of NSA, forward and backward.

    The file gets a line where a stage is told for the first time, and else at most one every ``every_s``: it
    costs a training nothing, and survives the end of the process. Lines of a rank go to `heartbeat_file`.
    The present mark is besides in a file that is mapped into memory, for whoever asks after a process that
    could not write any more.

    Args:
        folder: of the run.
        device: on a GPU each mark is a CUDA event too, so that a hang can be told from work in flight.
        inside: mark inside of the model; off for a compiled one, whose graph would break there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        device: str = "cpu",
        inside: bool = True,
        every_s: float = EVERY_S,
    ) -> None:
        self.path = folder / heartbeat_file(rank)
        self.marks: deque[Mark] = deque(maxlen=KEPT)
        self.step, self.name = 0, "start"
        self._layer = ""
        self._events = torch.device(device).type == "cuda"
        self._inside, self._every_s = inside, every_s
        self._open = ExitStack()
        self._lock = threading.Lock()
        self._written: Mark | None = None
        self._told: set[str] = set()
        self._now = _mapped(folder / now_file(rank))
        self._open.callback((folder / now_file(rank)).unlink, missing_ok=True)
        self._open.callback(self._now.close)

    @property
    def last(self) -> Mark | None:
        """The latest mark."""
        return self.marks[-1] if self.marks else None

    def begin(self, model: nn.Module, first_step: int) -> None:
        self.step = first_step
        if not self._inside:
            return
        layers: Any = model.layers
        for number, layer in enumerate(layers):
            for hook in (
                layer.register_forward_pre_hook(self._entering(f"layer {number}")),
                layer.register_forward_hook(self._leaving(f"gradient of layer {number}")),
            ):
                self._open.callback(hook.remove)
        self._open.enter_context(stage_hook(self._in_stage))

    def begin_step(self, step: int) -> None:
        self.step = step

    def stage(self, name: str) -> None:
        self.name, self._layer = name, ""
        self.mark()
        if name not in self._told:
            self._told.add(name)
            self.flush()

    def mark(self, detail: str = "") -> None:
        """The training is here now."""
        event = None
        if self._events:
            event = torch.cuda.Event()
            event.record()
        mark = Mark(time.monotonic(), time.time(), self.step, self.name, detail, event)
        self.marks.append(mark)
        if not self._now.closed:
            self._now[:] = str(mark).encode()[:WORDS].ljust(WORDS)
        if self._written is None or mark.at - self._written.at >= self._every_s:
            self.flush()

    def flush(self, wait_s: float = -1) -> None:
        """Write the latest mark, if it is not written yet; from any thread. Without, where another thread is
        at it for longer than ``wait_s``.

        StoreError where the file cannot be written.
        """
        if not self._lock.acquire(timeout=wait_s):
            return
        try:
            mark = self.last
            if mark is None or mark is self._written:
                return
            self._written = mark
            with self.path.open("a", encoding="utf-8") as file:
                file.write(mark.line() + "\n")
        except OSError as error:
            raise disk_error(f"write {self.path}", error) from error
        finally:
            self._lock.release()

    def finish(self) -> None:
        self._open.close()
        self.flush()

    def _entering(self, layer: str) -> Any:
        def enter(module: nn.Module, inputs: Any) -> None:
            self._layer = layer
            self.mark(layer)

        return enter

    def _leaving(self, text: str) -> Any:
        def arrived(grad: torch.Tensor) -> None:
            self.mark(text)

        def leave(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self._layer = ""
            if output.requires_grad:
                output.register_hook(arrived)

        return leave

    @contextmanager
    def _in_stage(self, name: str) -> Iterator[None]:
        self.mark(f"{self._layer}, {name}" if self._layer else name)
        yield


def _mapped(path: Path) -> mmap.mmap:
    """A new file of WORDS blanks, in memory."""
    try:
        path.write_bytes(b" " * WORDS)
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), WORDS)
    except OSError as error:
        raise disk_error(f"write {path}", error) from error
