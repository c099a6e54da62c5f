"""Rows of the table at lengths where they change their way: one causal call, several tiles a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig
from nsa.routes import TABLE, Row

Draw = Callable[..., dict[str, Any]]

ROWS = [pytest.param(row, id=f"{row.branch}={row.backend}") for row in TABLE if row.backend != "reference"]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("rows", [800, 1100])
def test_long_prompts_in_the_papers_blocks(
    row: Row, rows: int, draw: Draw, parity: Callable[..., None]
) -> None:
    """800 tokens select everything; of 1100 the last ones leave blocks out."""
    if row.branch == "score":
        pytest.skip("selection has its own tests")
    config = NSAConfig(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6)
    parity(row, draw(row.branch, config, rows, batch=1), config)


@pytest.mark.parametrize("backend", ["gather:queries", "sdpa"])
def test_dense_rows_of_several_sequences(backend: str, draw: Draw, parity: Callable[..., None]) -> None:
    (row,) = (r for r in TABLE if r.branch == "sel" and r.backend == backend)
    config = NSAConfig(num_heads=6, num_kv_heads=2, head_dim=8)
    tensors = draw("sel", config, 830, batch=2, dtype=torch.float64)
    parity(row, tensors, config)
