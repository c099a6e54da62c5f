"""Compressed attention as a kernel: blocks that become visible anywhere in its tiles of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig
from nsa.routes import TABLE

(ROW,) = (row for row in TABLE if (row.branch, row.backend) == ("cmp", "triton"))

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
Parity = Callable[..., None]


# Tiles of a GPU: 128 rows, 64 keys. l and d: the paper's, no overlap, each token a block, not powers of two.
@pytest.mark.interpret
@pytest.mark.parametrize(("block", "stride"), [(32, 16), (16, 16), (1, 1), (12, 3)])
@pytest.mark.parametrize("group", [1, 6])
def test_blocks_across_tiles(
    block: int, stride: int, group: int, small: Small, draw: Draw, parity: Parity, kernel_device: str
) -> None:
    shape = {"compression_block_size": block, "compression_stride": stride, "selection_block_size": 48}
    config = small(num_heads=group, num_kv_heads=1, **shape)
    for q_start, rows in ((0, 90), (700, 50)):
        tensors = draw(
            "cmp", config, rows, batch=1, q_start=q_start, dtype=torch.float16, device=kernel_device
        )
        parity(ROW, tensors, config, q_start=q_start)


@pytest.mark.interpret
@pytest.mark.parametrize(("block", "stride"), [(8, 4), (32, 16), (9, 3)])
def test_one_block_more_or_less_is_seen(
    block: int, stride: int, small: Small, draw: Draw, kernel_device: str
) -> None:
    """Equal keys: lse is the logarithm of the number of blocks that end at or before the query."""
    shape = {"compression_block_size": block, "compression_stride": stride, "selection_block_size": 96}
    config = small(
        num_heads=2, num_kv_heads=1, **(shape if block != 9 else shape | {"selection_block_size": 9})
    )
    tensors = draw("cmp", config, 150, batch=1, device=kernel_device)
    tensors["k_cmp"].zero_()
    _, lse = ROW.load()(**tensors, config=config)
    seen = [sum(i * stride + block - 1 <= t for i in range(tensors["k_cmp"].shape[1])) for t in range(150)]
    torch.testing.assert_close(lse[0, :, 1].cpu(), torch.tensor(seen).float().log())
    assert seen[block - 2 : block] == [0, 1]


@pytest.mark.interpret
def test_blocks_still_to_come_are_not_read(small: Small, draw: Draw, kernel_device: str) -> None:
    """NaN in every block that ends after the last query."""
    config = small()
    tensors = draw("cmp", config, 30, keys=400, q_start=70, dtype=torch.float16, device=kernel_device)
    for name in ("k_cmp", "v_cmp"):
        tensors[name][:, (99 - 7) // 4 + 1 :] = float("nan")
    o, lse = ROW.load()(**tensors, config=config, q_start=70)
    assert torch.isfinite(o).all()
    assert torch.isfinite(lse).all()
