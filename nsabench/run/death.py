"""Why a worker is dead, from what it left: an exit code, its last words, the kernel's counter."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

_DUMP = re.compile(r"^(Fatal Python error: |Current thread 0x|Thread 0x)", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (\S+)', re.MULTILINE)
_LONGEST = 200


def cause(code: int, printed: str, *, killed_for_memory: bool) -> tuple[str, str]:
    """Status and reason for the cell that a worker was at when it ended with ``code`` (as subprocess has it).

    ``killed_for_memory``: the kernel's counter of such kills moved meanwhile.
    """
    if code == -signal.SIGKILL and killed_for_memory:
        return "oom", "the kernel killed the worker: out of memory"
    if code < 0:
        how = f"the worker was killed by {_name(-code)}"
    else:
        how = f"the worker ended with exit code {code}"
    words = last_words(printed)
    return "error", how + whereabouts(printed) + (f"; it last printed: {words}" if words else "")


def whereabouts(printed: str) -> str:
    """`` at FILE:LINE in FUNCTION``: the innermost line of the stack dumped last; empty without one."""
    dumps = [found.end() for found in re.finditer(r"^Current thread 0x.*$", printed, re.MULTILINE)]
    frame = _FRAME.search(printed, dumps[-1]) if dumps else None
    return f" at {'/'.join(Path(frame[1]).parts[-2:])}:{frame[2]} in {frame[3]}" if frame else ""


def last_words(printed: str) -> str:
    """The last line that says something, before any dump of stacks."""
    dump = _DUMP.search(printed)
    lines = printed[: dump.start() if dump else None].splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last if len(last) <= _LONGEST else f"{last[:_LONGEST]}…"


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this control group (else of this machine) the kernel has killed for memory."""
    for path in _counters(root):
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return None


def _counters(root: Path) -> Iterator[Path]:
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if not controllers:
            yield groups / inside.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield groups / "memory" / inside.lstrip("/") / "memory.oom_control"
    yield groups / "memory.events"
    yield groups / "memory/memory.oom_control"
    yield root / "proc/vmstat"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
