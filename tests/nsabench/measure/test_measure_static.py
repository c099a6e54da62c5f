"""What compilers say of kernels: read from what ptxas printed, reckoned by hand, and compiled for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nsabench.measure import MeasureError
from nsabench.measure.static import (
    ARCHS,
    Occupancy,
    StaticRow,
    Usage,
    compile_static,
    matrix_instruction,
    occupancy,
    parse_ptxas,
    warps_of,
)
from nsabench.measure.static_compile import why_not

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent

CLEAN = """\
ptxas-blackwell info    : 0 bytes gmem
ptxas-blackwell info    : Compiling entry function 'mm' for 'sm_90a'
ptxas-blackwell info    : Function properties for mm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas-blackwell info    : Used 168 registers, used 1 barriers
ptxas-blackwell info    : Compile time = 148.303 ms
"""
SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mm' for 'sm_70'
ptxas info    : Function properties for mm
    25080 bytes stack frame, 41472 bytes spill stores, 40896 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 25080 bytes cumulative stack size, 400 bytes cmem[0]
"""
UNKNOWN = "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"


def test_what_ptxas_prints() -> None:
    assert parse_ptxas(CLEAN) == Usage(168, 0, 0, 0)
    assert parse_ptxas(SPILLING) == Usage(32, 25080, 41472, 40896)


def test_functions_that_a_kernel_calls_count() -> None:
    assert parse_ptxas(SPILLING + CLEAN) == Usage(168, 25080, 41472, 40896)


def test_what_ptxas_does_not_say_is_unknown_not_zero() -> None:
    assert parse_ptxas("") == Usage(None, None, None, None)


@pytest.mark.parametrize(
    ("ptx", "found"),
    [
        ("\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}", "wgmma"),
        ("\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}", "mma"),
        ("\ttcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1", "tcgen05"),
        ("tcgen05.mma.x\nmma.sync.y", "tcgen05+mma"),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;\nwgmma.fence.sync.aligned;", "none"),
    ],
)
def test_matrix_instructions(ptx: str, found: str) -> None:
    assert matrix_instruction(ptx) == found


def test_warps_are_those_that_are_launched() -> None:
    assert warps_of(".maxntid 384", 4) == 12
    assert warps_of(".reqntid 128\n.maxntid 128", 8) == 4
    assert warps_of("", 8) == 8


def test_occupancy_by_hand() -> None:
    # 168 registers are 5376 a warp, 21 steps of 256: 12 warps, in fours. 1 KiB of the system's a block.
    assert occupancy(ARCHS["sm_90"], 168, 98304, 4) == Occupancy(2, 12.5, "shared")
    assert occupancy(ARCHS["sm_90"], 168, 0, 4) == Occupancy(3, 18.75, "regs")
    # 80 registers are 2560 a warp, 25 of which there is room for, hence 24.
    assert occupancy(ARCHS["sm_120"], 80, 32, 8) == Occupancy(3, 50.0, "regs")
    assert occupancy(ARCHS["sm_80"], 32, 0, 1) == Occupancy(32, 50.0, "blocks")
    assert occupancy(ARCHS["sm_80"], 32, 0, 32) == Occupancy(2, 100.0, "warps+regs")
    assert occupancy(ARCHS["sm_90"], 16, 227 * 1024, 4).blocks_per_sm == 1


def test_an_architecture_beyond_ptxas_is_unsupported_not_an_error() -> None:
    said = why_not(RuntimeError(f"`ptxas` failed\n{UNKNOWN}\n"), 121)
    assert said == {
        "status": "unsupported",
        "reason": "the ptxas that comes with Triton does not know sm_121",
    }
    assert why_not(RuntimeError("one\nptxas fatal   : out of luck\nthree"), 90) == {
        "status": "error",
        "reason": "RuntimeError: ptxas fatal   : out of luck",
    }


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(MeasureError, match=r"arch is 'sm_91'; known: sm_80, .*sm_90"):
        compile_static(["json"], ["sm_91"])


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsabench.measure.static.find_spec", lambda name: None)
    with pytest.raises(MeasureError, match="Triton is not installed"):
        compile_static(["json"], ["sm_90"])


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be named, in an environment that interprets kernels here."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_a_product_is_compiled_for_architectures_that_are_not_here(modules: Path) -> None:
    rows = compile_static(["dot_kernel"], ["sm_80", "sm_90"])
    assert [(row.arch, row.status, row.matrix) for row in rows] == [
        ("sm_80", "ok", "mma"),
        ("sm_80", "unsupported", "mma"),
        ("sm_90", "ok", "wgmma"),
        ("sm_90", "ok", "wgmma"),
    ]
    first, too_much, *_ = rows
    assert first.kernel == "product ROWS=64 COLUMNS=64 STEP=64 num_stages=2"
    assert first.constexprs == {"ROWS": 64, "COLUMNS": 64, "STEP": 64}
    assert first.registers is not None
    assert 16 <= first.registers <= 255
    assert (first.num_warps, first.spill_store_bytes, first.spill_load_bytes) == (4, 0, 0)
    assert first.shared_bytes is not None
    assert first.shared_bytes >= 64 * 64 * 2
    assert first.blocks_per_sm == round(first.occupancy_pct / 100 * 64 / 4)  # type: ignore[operator]
    assert too_much.reason.startswith("needs ")
    assert too_much.reason.endswith(f"a block on sm_80 has {163 * 1024} bytes")
    assert (too_much.blocks_per_sm, too_much.registers is None) == (None, False)
    assert not (modules / "cache").exists()


def test_a_compiler_that_dies_costs_its_kernel_and_those_after_it(modules: Path) -> None:
    (modules / "deadly.py").write_text(
        "import os\n"
        "from nsabench.measure.probe_kernels import STATIC as found\n"
        "class Bomb:\n"
        "    def __str__(self): print('tick', flush=True); os._exit(7)\n"
        "bomb = {**found[0], 'name': 'bomb', 'constexprs': {'BLOCK': Bomb()}}\n"
        "STATIC = [found[1], bomb, {**found[1], 'name': 'after'}]\n"
    )
    good, bomb, after = compile_static(["deadly"], ["sm_90"])
    assert (good.status, good.kernel) == ("ok", "_copy_kernel")
    died = "the compiler died: exit code 7; it printed: tick"
    assert bomb == StaticRow("deadly", "bomb", "sm_90", "error", died)
    assert (after.status, after.kernel) == ("error", "after")
    assert after.reason == "not compiled: the compiler had died at an earlier kernel"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("", "module 'given' offers no kernels: it has no STATIC"),
        ("1 / 0", "module 'given' cannot be imported: ZeroDivisionError: division by zero"),
        ("STATIC = [3]", r"given.STATIC\[1\] is no mapping with kernel and signature"),
        ("STATIC = [{'kernel': print, 'signature': {}}]", "not a function under triton.jit"),
        ("STATIC = [{'kernel': print, 'signature': {}, 'warps': 4}]", "unknown key 'warps'; allowed: kernel"),
        (
            "from nsabench.measure.probe_kernels import STATIC as found\n"
            "STATIC = [{**found[0], 'signature': {'source': '*i32'}}]",
            r"total, words: the kernel takes source, total, words, BLOCK, each is needed once",
        ),
        ("import os; os._exit(3)", "the compiler for sm_90 did not start: exit code 3"),
    ],
)
def test_a_module_that_offers_nothing_to_compile(modules: Path, source: str, why: str) -> None:
    (modules / "given.py").write_text(source)
    with pytest.raises(MeasureError, match=why):
        compile_static(["given"], ["sm_90"])


@pytest.mark.slow
def test_the_probes_compile_for_every_architecture(modules: Path) -> None:
    rows = compile_static(["nsabench.measure.probe_kernels"], ["sm_80", "sm_90", "sm_100", "sm_120"])
    assert {(row.kernel, row.status, row.matrix) for row in rows} == {
        ("_read_kernel", "ok", "none"),
        ("_copy_kernel", "ok", "none"),
    }
    assert len(rows) == 8


def test_the_probes_read_and_copy() -> None:
    pytest.importorskip("triton")
    code = (
        "import torch\n"
        "from nsabench.measure.probe_kernels import copy, read_sum\n"
        "for size in (0, 1, 4096, 10001):\n"
        "    source = torch.randint(-2**16, 2**16, (size,), dtype=torch.int32)\n"
        "    total = torch.full((1,), 5, dtype=torch.int32)\n"
        "    wanted = 5 + source.sum(dtype=torch.int32)\n"
        "    assert read_sum(source, total).item() == wanted.item(), size\n"
        "    target = torch.full_like(source, -7)\n"
        "    assert torch.equal(copy(source, target), source), size\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_probes_refuse_what_they_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    from nsabench.measure.probe_kernels import copy, read_sum

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(MeasureError, match="run on a GPU, not on cpu"):
        read_sum(words, words[:1])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(MeasureError, match="contiguous int32 tensors"):
        read_sum(words.float(), words[:1])
    with pytest.raises(MeasureError, match="contiguous int32 tensors"):
        copy(words[::2], words[:4])
    with pytest.raises(MeasureError, match="a copy of 8 words into 4"):
        copy(words, words[:4])
