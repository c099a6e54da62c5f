"""What a compiler says of Triton kernels, for any architecture, on a machine with no GPU at all.

A module offers its kernels as `STATIC`, a sequence of mappings:

    STATIC = ({"kernel": fn, "signature": {"x": "*bf16:16", "n": "i32"}, "constexprs": {"BLOCK": 128}},)

`kernel` is a function under `triton.jit` (autotuned or not), `signature` the Triton types of its run-time
arguments (`:16`: divisible by 16), `constexprs` the values of all others. `name`, `num_warps`, `num_stages`,
`num_ctas` and `maxnreg` may be given too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nsabench.measure.device import MeasureError

REGISTERS_PER_SM = 65536
_REGISTERS_AT_ONCE = 256  # a warp is given registers in steps of this many
_WARPS_AT_ONCE = 4  # warps of an SM share its registers in fours
_SHARED_AT_ONCE = 128  # shared memory is given in steps of this many bytes
_SHARED_OF_SYSTEM = 1024  # bytes that every block has besides its own
_TIMEOUT_S = 600.0
_LAST_WORDS = 300


@dataclass(frozen=True)
class Arch:
    """What an SM of one architecture holds at most: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared_bytes: int

    @property
    def shared_per_block(self) -> int:
        """Bytes of shared memory that one block may ask for."""
        return self.shared_bytes - _SHARED_OF_SYSTEM


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
ARCHS = {
    "sm_80": Arch(64, 32, 164 * 1024),
    "sm_86": Arch(48, 16, 100 * 1024),
    "sm_89": Arch(48, 24, 100 * 1024),
    "sm_90": Arch(64, 32, 228 * 1024),
    "sm_100": Arch(64, 32, 228 * 1024),
    "sm_103": Arch(64, 32, 228 * 1024),
    "sm_120": Arch(48, 24, 100 * 1024),
}
_MATRIX = {"tcgen05": r"\btcgen05\.mma\b", "wgmma": r"\bwgmma\.mma_async\b", "mma": r"\bmma\.sync\b"}


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel: registers a thread, bytes of stack a thread, bytes of spill stores and
    loads in the code. None where it does not say.
    """

    registers: int | None = None
    stack_bytes: int | None = None
    spill_store_bytes: int | None = None
    spill_load_bytes: int | None = None


@dataclass(frozen=True)
class Occupancy:
    """Blocks that an SM holds at once, the part of its warps they fill, and what there is no more of: warps,
    blocks, regs (registers) or shared (memory), several joined by `+`.
    """

    blocks_per_sm: int
    pct: float
    limited_by: str


@dataclass(frozen=True)
class StaticRow:
    """One kernel on one architecture. `status`: ok; unsupported, where `reason` says why it cannot be built
    or launched there; error, where the compiler failed. What is not known is None.
    """

    module: str
    kernel: str
    arch: str
    status: str
    reason: str = ""
    constexprs: Mapping[str, Any] | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    registers: int | None = None
    stack_bytes: int | None = None
    spill_store_bytes: int | None = None
    spill_load_bytes: int | None = None
    shared_bytes: int | None = None
    matrix: str = ""
    """`tcgen05`, `wgmma`, `mma`, several joined by `+`, or `none`; empty where it was not compiled."""
    blocks_per_sm: int | None = None
    occupancy_pct: float | None = None
    limited_by: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compile_static(modules: Sequence[str], archs: Sequence[str]) -> list[StaticRow]:
    """Compile every kernel that `modules` (of a package, all in it too) offer, for each of `archs`.

    Each architecture is compiled by a process of its own, which a compiler may crash, with Triton's cache in
    a folder that is removed. MeasureError where Triton is missing, an architecture is unknown, or a module
    offers nothing that can be compiled.
    """
    for arch in archs:
        if arch not in ARCHS:
            raise MeasureError(f"arch is {arch!r}; known: {', '.join(ARCHS)}")
    if find_spec("triton") is None:
        raise MeasureError("Triton is not installed, so there is nothing to compile with: pip install triton")
    with ThreadPoolExecutor(max(1, min(len(archs), os.cpu_count() or 1))) as pool:
        found = list(pool.map(partial(_compile, tuple(modules)), archs))
    return [row for rows in found for row in rows]


def parse_ptxas(log: str) -> Usage:
    """What `ptxas -v` printed of one kernel, the functions that it calls included."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, stores, loads = zip(*(map(int, frame) for frame in frames), strict=True) if frames else ((),) * 3
    if not frames:
        return Usage(max(registers, default=None))
    return Usage(max(registers, default=None), max(stack), sum(stores), sum(loads))


def matrix_instruction(ptx: str) -> str:
    """The kinds of matrix instruction in PTX, joined by `+`, the newest first; `none` without one."""
    return "+".join(name for name, pattern in _MATRIX.items() if re.search(pattern, ptx)) or "none"


def warps_of(ptx: str, num_warps: int) -> int:
    """Warps of a block as the PTX asks for them: a specialised kernel has more than `num_warps`."""
    threads = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
    return -(-int(threads[1]) // 32) if threads else num_warps


def occupancy(arch: Arch, registers: int, shared_bytes: int, warps: int) -> Occupancy:
    """How many blocks of so many `warps` an SM holds; registers a thread, shared memory a block.

    As NVIDIA's occupancy calculator counts: registers in steps of 256 a warp, shared memory in steps of 128
    bytes with 1 KiB of the system's a block.
    """
    per_warp = -(-registers * 32 // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    by_registers = REGISTERS_PER_SM // max(1, per_warp) // _WARPS_AT_ONCE * _WARPS_AT_ONCE // warps
    taken = -(-(shared_bytes + _SHARED_OF_SYSTEM) // _SHARED_AT_ONCE) * _SHARED_AT_ONCE
    limits = {
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
        "regs": by_registers,
        "shared": arch.shared_bytes // taken,
    }
    blocks = min(limits.values())
    least = "+".join(name for name, most in limits.items() if most == blocks)
    return Occupancy(blocks, 100 * blocks * warps / arch.warps, least)


# By its path: its package would bring torch with it, which no compiler needs.
_START = """\
import json, runpy, sys
told = json.loads(sys.argv[1])
sys.path[:] = told.pop("path")
runpy.run_path(told.pop("script"), run_name="static_compile")["main"](**told)
"""


def _compile(modules: tuple[str, ...], arch: str) -> list[StaticRow]:
    """The rows of one architecture; the kernel at which the compiler dies has one, and those after it."""
    with tempfile.TemporaryDirectory(prefix="nsabench-static-") as folder:
        report = Path(folder) / "report.jsonl"
        # The folder on the user's own path, as `python -m` has it: --module names what lies there.
        path = [*dict.fromkeys((os.getcwd(), *sys.path))]
        told: dict[str, Any] = {"path": path, "script": str(Path(__file__).with_name("static_compile.py"))}
        told |= {"modules": modules, "arch": int(arch.removeprefix("sm_")), "report": str(report)}
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": str(Path(folder) / "cache"), "TMPDIR": folder}
        code, printed = _run([sys.executable, "-c", _START, json.dumps(told)], env)
        lines = report.read_text().splitlines() if report.exists() else []
    said = [json.loads(line) for line in lines]
    if not said:
        raise MeasureError(f"the compiler for {arch} did not start: {_last_words(printed, code)}")
    if "refused" in said[0]:
        raise MeasureError(said[0]["refused"])
    offered, done = said[0]["kernels"], said[1:]
    rows = [_row(arch, one) for one in done]
    why = f"the compiler died: {_last_words(printed, code)}"
    for number, (module, kernel) in enumerate(offered[len(done) :]):
        reason = why if number == 0 else "not compiled: the compiler had died at an earlier kernel"
        rows.append(StaticRow(module, kernel, arch, "error", reason))
    return rows


def _run(command: Sequence[str], env: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code (None where it took too long) and what was printed."""
    try:
        done = subprocess.run(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        return None, (error.output or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


def _last_words(printed: str, code: int | None) -> str:
    how = f"not finished within {_TIMEOUT_S:g} s" if code is None else f"exit code {code}"
    lines = printed.strip().splitlines()
    return f"{how}; it printed: {lines[-1][-_LAST_WORDS:]}" if lines else how


def _row(arch: str, one: dict[str, Any]) -> StaticRow:
    """A row from what the compiling process wrote of one kernel."""
    log, ptx = one.pop("log", ""), one.pop("ptx", "")
    if one["status"] != "ok":
        return StaticRow(arch=arch, **one)
    limits, usage, warps = ARCHS[arch], parse_ptxas(log), warps_of(ptx, one["num_warps"])
    known = {**one, **asdict(usage), "arch": arch, "matrix": matrix_instruction(ptx), "num_warps": warps}
    if one["shared_bytes"] > limits.shared_per_block:
        has = f"a block on {arch} has {limits.shared_per_block} bytes"
        return StaticRow(
            **{
                **known,
                "status": "unsupported",
                "reason": f"needs {one['shared_bytes']} bytes of shared memory, {has}",
            }
        )
    if usage.registers is None:
        return StaticRow(**known)
    fits = occupancy(limits, usage.registers, one["shared_bytes"], warps)
    known |= {
        "blocks_per_sm": fits.blocks_per_sm,
        "occupancy_pct": fits.pct,
        "limited_by": fits.limited_by,
    }
    return StaticRow(**known)
