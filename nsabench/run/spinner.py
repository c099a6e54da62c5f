"""A neighbour: processes that are not ours and keep a device busy."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_READY_WITHIN_S = 60.0

# The one in between ends at once: what it began is then nobody's child, as a true neighbour is.
_LAUNCH = """\
import subprocess, sys
for _ in range(int(sys.argv[1])):
    subprocess.Popen([sys.executable, "-c", *sys.argv[2:]], start_new_session=True)
"""
# It works until nobody holds the other end of its input, whichever way that came about.
_SPIN = """\
import select, sys
device, work = sys.argv[1], lambda: sum(range(10**6))
if device != "cpu":
    import torch
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    def work():
        for _ in range(20):
            a @ a
        torch.cuda.synchronize(device)
work()
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    work()
"""


class NoNeighbour(RuntimeError):
    """A neighbour could not be planted. One line."""


@contextmanager
def neighbour(device: str) -> Iterator[None]:
    """Every core that this process may use kept busy by another process, or the GPU; gone afterwards.

    Raises:
        NoNeighbour: they do not start.
    """
    count = _cores() if device == "cpu" else 1
    theirs, ours = os.pipe()
    told, telling = os.pipe()
    try:
        try:
            command = [sys.executable, "-c", _LAUNCH, str(count), _SPIN, device]
            subprocess.run(command, stdin=theirs, stdout=telling, stderr=subprocess.DEVNULL, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoNeighbour(f"a neighbour cannot be started: {error}") from None
        finally:
            os.close(theirs)
            os.close(telling)
        _wait(told, count)
        yield
    finally:
        os.close(ours)
        # The last of them closes its output when it ends.
        while select.select([told], [], [], _READY_WITHIN_S)[0] and os.read(told, 1024):
            continue
        os.close(told)


def _wait(told: int, count: int) -> None:
    heard = b""
    while heard.count(b"ready") < count:
        if not select.select([told], [], [], _READY_WITHIN_S)[0]:
            raise NoNeighbour(f"a neighbour has not started within {_READY_WITHIN_S:g} s")
        part = os.read(told, 1024)
        if not part:
            raise NoNeighbour("a neighbour ended before it was ready")
        heard += part


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
