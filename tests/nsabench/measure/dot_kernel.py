"""A Triton kernel with a matrix product, offered as the project's own kernels are."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns, steps = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, STEP):
        left = tl.load(a + rows[:, None] * depth + (start + steps)[None, :])
        right = tl.load(b + (start + steps)[:, None] * COLUMNS + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * COLUMNS + columns[None, :], total)


_SHAPE = {"ROWS": 64, "COLUMNS": 64, "STEP": 64}
_TYPES = {"a": "*bf16:16", "b": "*bf16:16", "c": "*fp32:16", "depth": "i32:16"}
STATIC = (
    {"kernel": product, "signature": _TYPES, "constexprs": _SHAPE, "num_stages": 2},
    {"kernel": product, "signature": _TYPES, "constexprs": _SHAPE, "num_stages": 12},
)
