"""The compiled CPU kernels beyond what every row of the table is held to: how they are built, how they split
their work.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import nsa.reference
from nsa import KVCache, NativeSparseAttention, NSAConfig
from nsa.backends import _cpp_library, cpp
from nsa.routes import FUNCTIONS, TABLE, Request, resolve

pytestmark = pytest.mark.skipif(_cpp_library._compiler() is None, reason="no C++ compiler")

ROWS = {row.branch: row for row in TABLE if row.backend == "cpp"}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine that has compiled nothing yet; the folder where it would keep it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(_cpp_library.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    for function in (_cpp_library._outcome, _cpp_library._compiler):
        function.cache_clear()
    yield tmp_path / ".cache" / "nsabench"
    monkeypatch.undo()
    for function in (_cpp_library._outcome, _cpp_library._compiler):
        function.cache_clear()


def fake_compiler(folder: Path, script: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder)


def test_built_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cpp_library.why_not() is None
    (built,) = fresh.iterdir()
    assert built.suffix == ".so"
    _cpp_library._outcome.cache_clear()
    monkeypatch.setattr(_cpp_library, "build", lambda *_: pytest.fail("built a second time"))
    assert _cpp_library.why_not() is None
    assert _cpp_library.provider() == _cpp_library._version(str(_cpp_library._compiler()))


def test_a_read_only_cache_is_no_obstacle(fresh: Path, tmp_path: Path) -> None:
    fresh.parent.mkdir()
    fresh.write_text("a file where the folder should be")
    assert _cpp_library.why_not() is None
    (folder,) = (tmp_path / "temporary").iterdir()
    assert [file.suffix for file in folder.iterdir()] == [".so"]


def test_without_a_compiler_the_reason_is_said(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh / "empty"))
    assert _cpp_library.why_not() == "needs a C++ compiler, found none of c++, g++, clang++"
    assert _cpp_library.provider() is None
    with pytest.raises(_cpp_library.BuildError, match=r"needs a C\+\+ compiler"):
        _cpp_library.library()


def test_a_failing_compiler_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    complain = (
        'case "$1" in --version) echo broken 1.0;; *) echo "x.cpp:1: error: no such flag" >&2; exit 1;; esac'
    )
    monkeypatch.setenv("PATH", f"{fake_compiler(tmp_path / 'bin', complain)}:{os.environ['PATH']}")
    assert _cpp_library.why_not() == "c++ failed: x.cpp:1: error: no such flag"
    assert not list(fresh.iterdir())
    request = Request("cpu", torch.float32, 128, 128, False, NSAConfig(4, 2, 16))
    route = resolve("auto", request)
    assert {route.backend(branch) for branch in ("cmp", "sel", "win")} == {"sdpa"}
    with pytest.raises(nsa.UnsupportedRoute, match="no such flag"):
        resolve("cpp", request)


def test_another_processor_or_compiler_builds_anew(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cpp_library.why_not() is None
    for name, value in (("_processor", lambda: "another"), ("_version", lambda compiler: "another")):
        _cpp_library._outcome.cache_clear()
        monkeypatch.setattr(_cpp_library, name, value)
        assert _cpp_library.why_not() is None
    assert len(list(fresh.iterdir())) == 3


def test_many_processes_build_at_once(fresh: Path) -> None:
    script = "from nsa.backends._cpp_library import why_not; print(why_not())"
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["None"] * 3
    assert len(list(fresh.iterdir())) == 1


PROCESSORS = {"sse2": "-march=x86-64", "avx2": "-march=haswell", "avx512": "-march=skylake-avx512"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="flags of another processor")
@pytest.mark.parametrize("flag", ["sse2", "avx2", "avx512"])
def test_every_register_width(
    flag: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    draw: Callable[..., dict[str, Any]],
    parity: Callable[..., None],
) -> None:
    known = _cpp_library._processor()
    if {"avx2": "avx2", "avx512": "avx512f"}.get(flag, "sse2") not in known:
        pytest.skip(f"this processor has no {flag}")
    path = tmp_path / "cpu.so"
    compiler = _cpp_library._compiler()
    assert compiler is not None
    _cpp_library.build(compiler, path, _cpp_library._openmp_of_torch(), PROCESSORS[flag])
    library = ctypes.CDLL(str(path))
    assert library.nsa_lanes() == {"sse2": 4, "avx2": 8, "avx512": 16}[flag]
    monkeypatch.setattr(cpp, "library", lambda: library)
    config = NSAConfig(
        10, 2, 24, value_dim=40, compression_block_size=8, compression_stride=4,
        selection_block_size=20, num_selected_blocks=4, window_size=70,
    )  # fmt: skip
    for branch in ("cmp", "sel", "win"):
        parity(ROWS[branch], draw(branch, config, 150), config)
    tensors = draw("score", config, 150)
    exact = {name: t.double() for name, t in tensors.items()}
    assert torch.equal(
        cpp.select_blocks(**tensors, config=config), nsa.reference.select_blocks(**exact, config=config)
    )


@pytest.mark.parametrize("branch", FUNCTIONS)
def test_threads_do_not_change_a_bit(branch: str, draw: Callable[..., dict[str, Any]]) -> None:
    config = NSAConfig(6, 2, 16, compression_block_size=8, compression_stride=4, selection_block_size=16,
                       num_selected_blocks=4, window_size=24)  # fmt: skip
    tensors = draw(branch, config, 200)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = getattr(cpp, FUNCTIONS[branch])(**tensors, config=config)
            results.append(found if isinstance(found, tuple) else (found,))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("rising", [False, True])
def test_no_weight_overflows_or_is_lost(
    scale: float, rising: bool, draw: Callable[..., dict[str, Any]], parity: Callable[..., None]
) -> None:
    """Logits that grow along the keys move a row's shift at every panel."""
    config = NSAConfig(4, 2, 16, window_size=600)
    tensors = draw("win", config, 400)
    tensors["k"] = tensors["k"] * scale
    if rising:
        tensors["k"] = tensors["q"][:, :1, ::2] * torch.linspace(0, 4 * scale, 400).view(1, -1, 1, 1)
    parity(ROWS["win"], tensors, config)


def test_gradients_are_refused_not_dropped(draw: Callable[..., dict[str, Any]]) -> None:
    config = NSAConfig(4, 2, 16)
    tensors = draw("win", config, 40)
    tensors["v"].requires_grad_()
    with pytest.raises(RuntimeError, match="compute no gradient"):
        cpp.sliding_attention(**tensors, config=config)
    with torch.no_grad():
        cpp.sliding_attention(**tensors, config=config)


def test_training_takes_rows_with_a_gradient() -> None:
    config = NSAConfig(4, 2, 16)
    layer, x = NativeSparseAttention(config, 32), torch.randn(1, 70, 32)
    asked = resolve("auto", Request("cpu", torch.float32, 70, 70, True, config))
    assert [asked.backend(branch) for branch in ("cmp", "sel", "win")] == ["sdpa"] * 3
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_prompt_and_its_chunks_agree() -> None:
    config = NSAConfig(8, 2, 32)
    layer, x = NativeSparseAttention(config, 64), torch.randn(2, 1300, 64)
    with torch.no_grad():
        whole = layer(x, routing="cpp")
        cache = KVCache(config, 2, 1300)
        parts = [layer(part, cache, "cpp") for part in x.split([900, 1, 15, 16, 368], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
