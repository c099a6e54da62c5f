"""The CPU kernels of ``cpp.cpp``: compiled once for this processor by the machine's own compiler, and loaded.

The compiled library lies in the user's cache folder under a name made of everything it depends on: source,
compiler, flags, processor. Any process may build it; it appears whole.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpp.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp")
NATIVE = "-march=native"
BUILD_SECONDS = 300


class BuildError(RuntimeError):
    """The kernels cannot be built here; one line says why."""


def why_not() -> str | None:
    """Why there are no compiled kernels here, or None. A machine's first call compiles them, in seconds."""
    return _outcome()[1]


def provider() -> str | None:
    """The compiler behind the kernels, e.g. ``g++ (Debian 12.2.0) 12.2.0``; None where there is none."""
    found = _compiler()
    return None if found is None or why_not() else _version(found)


def library() -> ctypes.CDLL:
    """The loaded kernels. BuildError where they cannot be built."""
    loaded, reason = _outcome()
    if loaded is None:
        raise BuildError(reason)
    return loaded


@cache
def _outcome() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _load(), None
    except BuildError as error:
        return None, str(error)


def _load() -> ctypes.CDLL:
    compiler = _compiler()
    if compiler is None:
        raise BuildError(f"needs a C++ compiler, found none of {', '.join(COMPILERS)}")
    openmp = _openmp_of_torch()
    parts = [SOURCE.read_text(), compiler, _version(compiler), *FLAGS, NATIVE, str(openmp), _processor()]
    name = f"nsa-cpu-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    reason = ""
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                reason = f"{folder} belongs to somebody else, who could have put a library there"
                continue
            path = folder / name
            if not path.exists():
                build(compiler, path, openmp)
            return ctypes.CDLL(str(path))
        except OSError as error:
            reason = f"cannot keep the compiled kernels in {folder}: {error.strerror or error}"
    raise BuildError(reason)


def _folders() -> list[Path]:
    """Where the library may lie: the user's cache, or beside temporary files where that is read-only."""
    temporary = Path(tempfile.gettempdir()) / f"nsabench-{os.getuid()}"
    try:
        return [Path.home() / ".cache" / "nsabench", temporary]
    except RuntimeError:  # a user without a home
        return [temporary]


def build(compiler: str, path: Path, openmp: Path | None = None, tune: str = NATIVE) -> None:
    """Compile and link to ``path``, which appears whole or not at all.

    ``openmp`` is the runtime to link with: a second one in a process would keep a second set of threads
    spinning on the same cores. ``tune`` names the processor to compile for. BuildError with the compiler's
    first complaint.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        compiled, linked = Path(scratch) / "cpu.o", Path(scratch) / "cpu.so"
        _run([compiler, *FLAGS, tune, "-c", str(SOURCE), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), "-o", str(linked), str(openmp) if openmp else "-fopenmp"])
        linked.replace(path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {BUILD_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.splitlines()
        complaint = next((line for line in said if "error" in line), said[0] if said else "no message")
        raise BuildError(f"{Path(command[0]).name} failed: {complaint.strip()}")


@cache
def _compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


@cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _openmp_of_torch() -> Path | None:
    """The OpenMP runtime that torch brought along; None where it uses the system's."""
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("lib[gi]omp*.so*"))), None)


def _processor() -> str:
    """What ``-march=native`` means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(
        dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name")))
    )
