"""What the kernels declare, held against what they do: in Triton's interpreter, load by load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.kernels._installed import interpreted
from nsa.kernels.work import DECLARED, Call, declared

KERNELS = Path(__file__).parents[3] / "nsa" / "kernels"


def jit_functions(sources: list[str]) -> tuple[set[str], set[str]]:
    """Triton functions that are kernels, and device functions: those that another one calls."""
    functions, called = set(), set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(mark) for mark in node.decorator_list
            ):
                functions.add(node.name)
                names = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
                called |= {name.id for name in names if isinstance(name, ast.Name)}
    return functions - called, functions & called


def test_kernels_are_told_from_device_functions() -> None:
    device = "@triton.jit\ndef f(x): return x\n"
    source = device + "@triton.jit(do_not_specialize=[])\ndef g(x): f(x)\ndef h(): g[1](2)"
    assert jit_functions([source]) == ({"g"}, {"f"})


def test_every_kernel_declares_its_work() -> None:
    kernels, _ = jit_functions([file.read_text() for file in sorted(KERNELS.glob("*.py"))])
    assert kernels == set(DECLARED)


def test_declarations_import_no_triton() -> None:
    code = "import sys, nsa.kernels.work; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


Places = dict[tuple[str, int], list[Any]]
"""Addresses by kernel and bytes of an element."""


class Counted:
    """What ran in the interpreter, by kernel: FLOPs of products, bytes of loads, stores and atomics.

    Of a load or a store each address counts once, as the lanes of a program share it.
    """

    def __init__(self) -> None:
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self.read: Places = defaultdict(list)
        self.written: Places = defaultdict(list)
        self.kernel = ""

    def touch(self, where: Places, pointers: Any, mask: Any, itemsize: int, *, distinct: bool = True) -> None:
        touched = pointers[np.broadcast_to(mask, pointers.shape)]
        different = np.unique(touched)
        self.bytes[self.kernel] += itemsize * (different if distinct else touched).size
        where[self.kernel, itemsize].append(different)

    def least(self, kernel: str) -> int:
        """Bytes of the different addresses that a kernel read, and of those that it wrote."""
        return sum(
            itemsize * np.unique(np.concatenate(found)).size
            for places in (self.read, self.written)
            for (name, itemsize), found in places.items()
            if name == kernel
        )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts, at the tiles of a GPU."""
    if not interpreted():
        pytest.skip("counts loads, which only the interpreter does")
    from triton.runtime import interpreter

    from nsa.kernels import _ranges, _topn, selection

    count = Counted()
    builder = interpreter.InterpreterBuilder
    load, store, rmw, dot = (
        getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw", "dot")
    )
    run = interpreter.GridExecutor.__call__

    def size(pointers: Any) -> int:
        return int(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)

    def counting_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        count.touch(count.read, pointers.data, mask.data, size(pointers))
        return load(self, pointers, mask, *more)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        count.touch(count.written, pointers.data, mask.data, size(pointers))
        return store(self, pointers, value, mask, *more)

    def counting_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        count.touch(count.written, pointers.data, mask.data, size(pointers), distinct=False)
        return rmw(self, op, pointers, value, mask, *more)

    def counting_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        count.flops[count.kernel] += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return dot(self, a, b, *more)

    def named_run(self: Any, *args: Any, **named: Any) -> Any:
        count.kernel = self.fn.__name__
        return run(self, *args, **named)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", counting_rmw)
    monkeypatch.setattr(builder, "create_dot", counting_dot)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", named_run)
    of_a_gpu = selection.Settings(selection._LSE[0], selection._SCORES[0])
    monkeypatch.setattr(selection, "_INTERPRETED", of_a_gpu)
    monkeypatch.setattr(_ranges, "_INTERPRETED", _ranges._FP32[0][1])
    monkeypatch.setattr(_topn, "SEGMENT", 64)
    monkeypatch.setattr(_topn, "ROWS", 4)
    return count


def drawn(call: Call, seed: int = 0) -> torch.Tensor:
    """Blocks ``(B,T,H,n)`` of every query: all where there are no more than ``n``, else forced and random."""
    config, random = call.config, np.random.default_rng(seed)
    n, initial, local = config.num_selected_blocks, config.num_initial_blocks, config.num_local_blocks
    shape = call.batch, call.num_queries, config.num_kv_heads, n
    blocks = np.full(shape, -1, np.int32)
    for b, t, h in np.ndindex(shape[:3]):
        own = call.positions[t] // config.selection_block_size
        if own < n:
            blocks[b, t, h, : own + 1] = np.arange(own + 1)
        else:
            free = random.choice(own + 1 - initial - local, n - initial - local, replace=False) + initial
            blocks[b, t, h] = np.sort([*range(initial), *free, *range(own + 1 - local, own + 1)])
    return torch.from_numpy(blocks)


def union_blocks(blocks: torch.Tensor, call: Call, tokens: int) -> float:
    """Different blocks of a tile, mean over tiles with a choice."""
    config, found = call.config, []
    for at in range(0, call.num_queries, tokens):
        if call.positions[at] // config.selection_block_size >= config.num_selected_blocks:
            tiles = blocks[:, at : at + tokens].transpose(1, 2).flatten(0, 1).flatten(1).tolist()
            found += [len({*tile} - {-1}) for tile in tiles]
    return sum(found) / len(found)


SMALL = NSAConfig(
    num_heads=12,
    num_kv_heads=2,
    head_dim=80,
    value_dim=48,
    compression_block_size=8,
    compression_stride=4,
    selection_block_size=16,
    num_selected_blocks=4,
    window_size=100,
)
ODD = replace(SMALL, num_heads=2, head_dim=16, value_dim=16, selection_block_size=12)
UNITS = replace(ODD, num_heads=6, selection_block_size=8)
# Several programs a tile of rows, and several tiles of keys a block.
WIDE = replace(
    ODD,
    num_heads=144,
    num_kv_heads=1,
    compression_block_size=4,
    compression_stride=1,
    selection_block_size=80,
)
CALLS = {
    "prompt": Call(SMALL, 96, 96, batch=2, dtype=torch.float16),
    "chunk": Call(SMALL, 30, 237, q_start=207, dtype=torch.bfloat16),
    "one head": Call(ODD, 90, 90, dtype=torch.float16),
    "small blocks": Call(UNITS, 40, 140, q_start=99, dtype=torch.float16),
    "wide": Call(WIDE, 5, 356, q_start=350, dtype=torch.float16),
    "fp32": Call(SMALL, 20, 120, q_start=99, dtype=torch.float32),
}
WAYS = ("cmp", "score", "sel:union", "sel:kv_outer", "sel:query_major", "win")
# How far FLOPs, bytes of L2 and bytes of memory may be off, relatively: by masked rows of an lse and by lists
# that end within a tile.
MARGINS = {
    "_block_kernel": (0.05, 0.03, 0.02),
    "_place_kernel": (0.0, 0.6, 0.05),  # what neighbours gather from the same place is declared for each
    "_mark_kernel": (0.0, 0.0, 0.15),  # words that no query marks are zeros all the same
}
OTHERS = (0.0, 0.02, 0.02)


@pytest.mark.interpret
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])
@pytest.mark.parametrize("way", WAYS)
def test_kernels_do_what_they_declare(way: str, call: Call, counted: Counted) -> None:
    branch, _, variant = way.partition(":")
    call = run(branch, variant, call)
    works = declared(branch, way.replace(branch, "triton"), call)
    assert [one.kernel for one in works] == list(counted.bytes)
    for one in works:
        found = counted.flops[one.kernel], counted.bytes[one.kernel], counted.least(one.kernel)
        for told, true, margin in zip(
            (one.flops, one.l2_bytes, one.dram_bytes), found, MARGINS.get(one.kernel, OTHERS), strict=True
        ):
            assert true == pytest.approx(told, rel=margin), one.kernel


def run(branch: str, variant: str, call: Call) -> Call:
    """Runs a branch, and returns what of the call only its data tell, too."""
    from nsa.kernels import compressed, selected, selection, sliding

    config, few = call.config, num_compressed_blocks(call.kv_len, call.config)
    q = torch.randn(call.batch, call.num_queries, config.num_heads, config.head_dim).to(call.dtype)
    k = torch.randn(call.batch, call.kv_len, config.num_kv_heads, config.head_dim).to(call.dtype)
    v = torch.randn(call.batch, call.kv_len, config.num_kv_heads, config.v_dim).to(call.dtype)
    if branch == "cmp":
        compressed.compressed_attention(q, k[:, :few], v[:, :few], config, q_start=call.q_start)
    elif branch == "win":
        sliding.sliding_attention(q, k, v, config, q_start=call.q_start)
    elif branch == "score":
        selection.select_blocks(q, k[:, :few], config, q_start=call.q_start, kv_len=call.kv_len)
    else:
        blocks = drawn(call)
        if variant == "union":
            tokens = selected.launched(call, (9, 0), variant)["_union_kernel"]["TOKENS"]
            call = replace(call, union_blocks=(tokens, union_blocks(blocks, call, tokens)))
        attend = getattr(selected, f"selected_attention_{variant}")
        attend(q, k, v, blocks, config, q_start=call.q_start)
    return call
