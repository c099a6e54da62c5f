"""Every row of the route table that can run here, against the specification: values, lse and gradients.

The tests are parametrised over the table itself, so a new row is tested without a word here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nsa.reference
from nsa.config import NSAConfig
from nsa.routes import FUNCTIONS, TABLE, Row
from nsa.testing import check, error_budget

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
Parity = Callable[..., None]
Runnable = Callable[..., Callable[..., Any]]

each_row = pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.branch}={row.backend}") for row in TABLE if row.branch != "score"]
)
every_row = pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.branch}={row.backend}") for row in TABLE]
)


@every_row
def test_row_offers_the_contract(row: Row, small: Small, draw: Draw, runnable: Runnable, device: str) -> None:
    config = small(value_dim=32)
    tensors = draw(row.branch, config, 20, dtype=torch.bfloat16, device=device)
    result = runnable(row, tensors, config)(**tensors, config=config)
    if row.branch == "score":
        assert result.shape == (2, 20, 2, 4)
        assert result.dtype == torch.int32
        assert not result.requires_grad
    else:
        o, lse = result
        assert (o.shape, o.dtype) == ((2, 20, 4, 32), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, 20, 4), torch.float32)


@each_row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(row: Row, dtype: torch.dtype, small: Small, draw: Draw, parity: Parity, device: str) -> None:
    config = small()
    parity(row, draw(row.branch, config, 90, dtype=dtype, device=device), config)


@each_row
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 12, 16])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["fp32", "bf16"]
)
def test_group_sizes(
    row: Row, group: int, dtype: torch.dtype, small: Small, draw: Draw, parity: Parity
) -> None:
    config = small(num_heads=2 * group)
    device = "cuda" if dtype == torch.bfloat16 else "cpu"
    parity(row, draw(row.branch, config, 66, dtype=dtype, device=device), config)


# l = 8, l' = 16, w = 24, and lengths around the row chunks of the backends.
@each_row
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 63, 64, 65, 127, 128, 129])
def test_lengths(row: Row, length: int, small: Small, draw: Draw, parity: Parity, device: str) -> None:
    config = small()
    dtype = torch.float32 if device == "cpu" else torch.float16
    parity(row, draw(row.branch, config, length, dtype=dtype, device=device), config)


@each_row
@pytest.mark.parametrize(("heads", "kv_heads", "batch"), [(2, 1, 1), (3, 3, 2)])
def test_many_chunks(
    row: Row, heads: int, kv_heads: int, batch: int, small: Small, draw: Draw, parity: Parity
) -> None:
    config = small(num_heads=heads, num_kv_heads=kv_heads)
    parity(row, draw(row.branch, config, 1037, batch=batch), config)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.backend) for row in TABLE if row.branch == "win"])
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200, 699, 700, 900])
@pytest.mark.parametrize("q_start", [0, 37])
def test_windows(
    row: Row, window: int, q_start: int, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    config = small(num_heads=2, num_kv_heads=1, window_size=window)
    dtype = torch.float32 if device == "cpu" else torch.float16
    tensors = draw("win", config, 700 - q_start, batch=1, q_start=q_start, dtype=dtype, device=device)
    parity(row, tensors, config, q_start=q_start)


@each_row
@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (64, 64), (16, 32), (24, 8)])
def test_value_dim_differs_from_head_dim(
    row: Row, head_dim: int, value_dim: int, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    config = small(head_dim=head_dim, value_dim=value_dim)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    parity(row, draw(row.branch, config, 70, dtype=dtype, device=device), config)


@each_row
@pytest.mark.parametrize("rows", [2, 70])
def test_non_contiguous_inputs(row: Row, rows: int, small: Small, draw: Draw, parity: Parity) -> None:
    config = small()
    tensors = draw(row.branch, config, rows, q_start=30)
    heads_first = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in tensors.items()}
    assert not all(t.is_contiguous() for t in heads_first.values())
    parity(row, heads_first, config, q_start=30)
    # A slice out of a fused projection, and lists that are a slice of longer ones.
    sliced = {name: torch.cat([t, t], -1)[..., : t.shape[-1]] for name, t in tensors.items()}
    parity(row, sliced, config, q_start=30)
    backwards = {name: t.movedim(-1, 0).contiguous().movedim(0, -1) for name, t in tensors.items()}
    parity(row, backwards, config, q_start=30)


@each_row
def test_one_sequence_expanded_over_the_batch(row: Row, small: Small, draw: Draw, parity: Parity) -> None:
    config = small()
    alone = draw(row.branch, config, 70, batch=1)
    parity(row, {name: t.expand(3, -1, -1, -1) for name, t in alone.items()}, config)


@each_row
@pytest.mark.parametrize(("q_start", "rows"), [(1, 1), (6, 3), (7, 1), (23, 2), (40, 1), (40, 70), (203, 5)])
@pytest.mark.parametrize("later_keys", [0, 21])
def test_queries_that_start_later(
    row: Row, q_start: int, rows: int, later_keys: int, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    config = small()
    dtype = torch.float32 if device == "cpu" else torch.float16
    keys = q_start + rows + later_keys
    tensors = draw(row.branch, config, rows, keys=keys, q_start=q_start, dtype=dtype, device=device)
    parity(row, tensors, config, q_start=q_start)


@each_row
@pytest.mark.parametrize("rows", [1, 3, 66])
def test_queries_that_start_anywhere_per_sequence(
    row: Row, rows: int, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    config = small()
    q_start = torch.tensor([0, 41, 6, 130])
    tensors = draw(row.branch, config, rows, batch=4, q_start=q_start, device=device)
    parity(row, tensors, config, q_start=q_start.to(device))


@each_row
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="paper"),
        pytest.param(
            {
                "compression_block_size": 6,
                "compression_stride": 3,
                "selection_block_size": 9,
                "window_size": 7,
            },
            id="odd",
        ),
        pytest.param(
            {
                "compression_block_size": 16,
                "compression_stride": 16,
                "selection_block_size": 16,
                "window_size": 1,
            },
            id="no-overlap",
        ),
        pytest.param(
            {
                "compression_block_size": 32,
                "compression_stride": 4,
                "selection_block_size": 32,
                "window_size": 300,
            },
            id="long-overlap",
        ),
        pytest.param({"num_selected_blocks": 1, "num_initial_blocks": 0, "num_local_blocks": 0}, id="n=1"),
    ],
)
def test_geometries(
    row: Row, shape: dict[str, int], small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    config = small(**shape) if shape else NSAConfig(4, 2, 16)
    q_start = 0 if shape else 1050
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = draw(row.branch, config, 100, batch=1, q_start=q_start, dtype=dtype, device=device)
    parity(row, tensors, config, q_start=q_start)


@each_row
@pytest.mark.parametrize("rows", [3, 70])
def test_a_row_is_the_same_in_any_batch(
    row: Row, rows: int, small: Small, draw: Draw, runnable: Runnable
) -> None:
    config = small()
    tensors = draw(row.branch, config, rows, batch=3, q_start=35, dtype=torch.float64)
    function = runnable(row, tensors, config)
    together = function(**tensors, config=config, q_start=35)
    for b in (0, 2):
        alone = function(**{name: t[b : b + 1] for name, t in tensors.items()}, config=config, q_start=35)
        for part, whole in zip(alone, together, strict=True):
            expected = whole[b : b + 1]
            assert check(part, expected, error_budget(expected, expected)).ok


@each_row
@pytest.mark.parametrize("size", [1.0, 1e3], ids=["same-size", "huge"])
@pytest.mark.parametrize("kv_heads", [4, 2])  # G = 1 and 2
@pytest.mark.parametrize(("rows", "changed"), [(40, 17), (150, 70), (200, 193), (150, 149)])
def test_later_tokens_change_nothing_bit_for_bit(
    row: Row,
    size: float,
    kv_heads: int,
    rows: int,
    changed: int,
    small: Small,
    draw: Draw,
    runnable: Runnable,
    device: str,
) -> None:
    config = small(num_kv_heads=kv_heads)
    tensors = draw(row.branch, config, rows, device=device)
    function = runnable(row, tensors, config)
    other = draw(row.branch, config, rows, device=device, seed=1)
    # A compressed block belongs to the last token it covers.
    block = max(0, changed - config.compression_block_size) // config.compression_stride + 1
    mixed = {}
    for name, tensor in tensors.items():
        first = min(block, tensor.shape[1]) if name in ("k_cmp", "v_cmp") else changed
        later = other[name][:, first:]
        later = later * size if later.is_floating_point() else later
        mixed[name] = torch.cat([tensor[:, :first], later], 1)
    for before, after in zip(
        function(**tensors, config=config), function(**mixed, config=config), strict=True
    ):
        moved = (before != after).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        assert moved
        assert moved[0] >= changed, f"rows {moved} moved when tokens from {changed} on changed"


@each_row
def test_later_tokens_get_no_gradient(row: Row, small: Small, draw: Draw, runnable: Runnable) -> None:
    if "bwd" not in row.passes:
        pytest.skip("computes no gradient")
    config = small()
    tensors = draw(row.branch, config, 100)
    function = runnable(row, tensors, config, gradients=True)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in tensors.items()}
    o, lse = function(**leaves, config=config)
    assert not lse.requires_grad
    o[:, :50].sum().backward()
    assert (leaves["q"].grad[:, 50:] == 0).all()
    for name in leaves.keys() & {"k", "v"}:
        assert (leaves[name].grad[:, 50:] == 0).all()
        assert (leaves[name].grad[:, :48] != 0).any()


@each_row
def test_decode_equals_the_row_of_prefill(row: Row, small: Small, draw: Draw, runnable: Runnable) -> None:
    """One token at a time and all at once: no window, block or mask is off by one between the two."""
    config = small()
    rows = 80
    tensors = draw(row.branch, config, rows, dtype=torch.float64)
    function = runnable(row, tensors, config)
    whole = function(**tensors, config=config)
    for t in range(rows):
        existing = {
            "k": t + 1,
            "v": t + 1,
            "k_cmp": max(0, t - 7) // 4 + (t >= 7),
            "v_cmp": max(0, t - 7) // 4 + (t >= 7),
        }
        step = {n: x[:, : existing[n]] if n in existing else x[:, t : t + 1] for n, x in tensors.items()}
        for part, expected in zip(function(**step, config=config, q_start=t), whole, strict=True):
            assert check(part, expected[:, t : t + 1], error_budget(expected, expected)).ok, f"token {t}"


@pytest.mark.parametrize("branch", list(FUNCTIONS))
def test_every_branch_has_the_specification_as_a_row(branch: str) -> None:
    rows = [row for row in TABLE if (row.branch, row.backend) == (branch, "reference")]
    assert [row.load() for row in rows] == [getattr(nsa.reference, FUNCTIONS[branch])]
