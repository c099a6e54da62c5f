"""Sliding attention as a kernel: windows that begin, end and fit anywhere in its tiles of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig
from nsa.routes import TABLE

(ROW,) = (row for row in TABLE if (row.branch, row.backend) == ("win", "triton"))

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
Parity = Callable[..., None]


# Tiles of a GPU: 128 rows, 64 keys.
@pytest.mark.interpret
@pytest.mark.parametrize("window", [1, 64, 65, 191, 1000])
@pytest.mark.parametrize(("group", "rows"), [(1, 260), (4, 70), (3, 90)])
def test_windows_across_tiles(
    window: int, group: int, rows: int, small: Small, draw: Draw, parity: Parity, kernel_device: str
) -> None:
    config = small(num_heads=group, num_kv_heads=1, window_size=window)
    for q_start in (0, 333):
        tensors = draw(
            "win", config, rows, batch=1, q_start=q_start, dtype=torch.float16, device=kernel_device
        )
        parity(ROW, tensors, config, q_start=q_start)


@pytest.mark.interpret
@pytest.mark.parametrize("window", [1, 40])
def test_one_key_more_or_less_is_seen(window: int, small: Small, draw: Draw, kernel_device: str) -> None:
    """Values that name their key: the mean of a window of equal weights says where it begins and ends."""
    config = small(num_heads=2, num_kv_heads=1, window_size=window)
    tensors = draw("win", config, 150, batch=1, device=kernel_device)
    tensors["k"].zero_()
    key = torch.arange(150.0, device=kernel_device)
    tensors["v"] = key[None, :, None, None].expand(1, -1, 1, 16).contiguous()
    o, lse = ROW.load()(**tensors, config=config)
    first = (key - window + 1).clamp_min(0)
    torch.testing.assert_close(o[0, :, 0, 0], (first + key) / 2)
    torch.testing.assert_close(lse[0, :, 1], (key - first + 1).log())


@pytest.mark.interpret
def test_keys_that_no_query_sees_are_not_read(small: Small, draw: Draw, kernel_device: str) -> None:
    """NaN in every key before the first window and after the last query."""
    config = small()
    tensors = draw("win", config, 30, keys=300, q_start=150, dtype=torch.float16, device=kernel_device)
    for name in ("k", "v"):
        tensors[name][:, :127] = float("nan")
    o, lse = ROW.load()(**tensors, config=config, q_start=150)
    assert torch.isfinite(o).all()
    assert torch.isfinite(lse).all()
