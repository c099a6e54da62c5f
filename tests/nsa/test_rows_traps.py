"""Every row of the route table against what broke other code: empty rows, -1 slots, extreme logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig
from nsa.routes import TABLE, Row

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
Parity = Callable[..., None]
Runnable = Callable[..., Callable[..., Any]]


def rows_of(*branches: str) -> pytest.MarkDecorator:
    found = [row for row in TABLE if row.branch in branches]
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=f"{row.branch}={row.backend}") for row in found]
    )


every_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64],
    ids=["fp16", "bf16", "fp32", "fp64"],
)


def assert_empty(
    row: Row,
    function: Callable[..., Any],
    tensors: dict[str, Any],
    config: NSAConfig,
    empty: torch.Tensor,
    q_start: int | torch.Tensor = 0,
) -> None:
    """The rows ``empty (B,T,HQ)`` give 0, -inf and gradient 0; no NaN anywhere, forward or backward."""
    backward = "bwd" in row.passes
    leaves = {n: t.requires_grad_(backward) if t.is_floating_point() else t for n, t in tensors.items()}
    o, lse = function(**leaves, config=config, q_start=q_start)
    assert (o[empty] == 0).all()
    assert (lse[empty] == float("-inf")).all()
    assert torch.isfinite(o).all()
    assert torch.isfinite(lse[~empty]).all()
    if backward:
        o.backward(torch.ones_like(o))
        for name, tensor in leaves.items():
            if tensor.is_floating_point():
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                assert torch.isfinite(grad).all(), name
                if name == "q":
                    assert (grad[empty] == 0).all()


@rows_of("cmp")
@every_dtype
@pytest.mark.parametrize("rows", [1, 7, 8, 80])
def test_no_nan_rows_compressed(
    row: Row, dtype: torch.dtype, rows: int, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """Rule 2: a query before the end of the first block sees nothing."""
    config = small()
    tensors = draw("cmp", config, rows, dtype=dtype, device=device)
    empty = (torch.arange(rows) < 7)[:, None].expand(2, rows, 4)
    function = runnable(row, tensors, config, gradients=True)
    assert_empty(row, function, tensors, config, empty)


@rows_of("cmp")
def test_no_nan_rows_compressed_per_sequence(
    row: Row, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small()
    q_start = torch.tensor([3, 0, 50])
    tensors = draw("cmp", config, 6, batch=3, q_start=q_start, device=device)
    empty = (q_start[:, None] + torch.arange(6) < 7)[..., None].expand(3, 6, 4)
    function = runnable(row, tensors, config, gradients=True)
    assert_empty(row, function, tensors, config, empty, q_start.to(device))


@rows_of("sel")
@every_dtype
@pytest.mark.parametrize("rows", [1, 5, 80])
def test_no_nan_rows_selected(
    row: Row, dtype: torch.dtype, rows: int, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """An empty list in one KV head, among full ones."""
    config = small()
    tensors = draw("sel", config, rows, dtype=dtype, device=device)
    tensors["block_indices"][:, ::3, 1] = -1
    empty = torch.zeros(2, rows, 4, dtype=torch.bool)
    empty[:, ::3, 2:] = True
    function = runnable(row, tensors, config, gradients=True)
    assert_empty(row, function, tensors, config, empty)


@rows_of("sel")
@every_dtype
def test_no_nan_when_no_list_holds_anything(
    row: Row, dtype: torch.dtype, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    config = small()
    for rows in (1, 70):
        tensors = draw("sel", config, rows, dtype=dtype, device=device)
        tensors["block_indices"].fill_(-1)
        function = runnable(row, tensors, config, gradients=True)
        assert_empty(row, function, tensors, config, torch.ones(2, rows, 4, dtype=torch.bool))


@rows_of("win")
@every_dtype
def test_no_nan_rows_beyond_the_keys(
    row: Row, dtype: torch.dtype, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """30 keys and a window of 24: queries from 53 on see none of them."""
    config = small()
    for q_start, rows in ((20, 90), (53, 2), (60, 70)):
        tensors = draw("win", config, rows, keys=30, q_start=q_start, dtype=dtype, device=device)
        empty = (q_start + torch.arange(rows) >= 53)[:, None].expand(2, rows, 4)
        function = runnable(row, tensors, config, gradients=True)
        assert_empty(row, function, tensors, config, empty, q_start)


@rows_of("sel", "win")
@pytest.mark.parametrize(("q_start", "rows"), [(0, 90), (20, 40), (28, 3), (31, 1), (20, 90)])
def test_fewer_keys_than_queries(
    row: Row, q_start: int, rows: int, small: Small, draw: Draw, parity: Parity
) -> None:
    config = small()
    tensors = draw(row.branch, config, rows, keys=30, q_start=q_start)
    parity(row, tensors, config, q_start=q_start)


Lists = Callable[[torch.Tensor], torch.Tensor]


def shuffled(lists: torch.Tensor) -> torch.Tensor:
    order = torch.rand(lists.shape, generator=torch.Generator().manual_seed(5)).argsort(-1)
    return lists.gather(-1, order.to(lists.device))


LISTS: dict[str, Lists] = {
    "leading -1": lambda lists: torch.nn.functional.pad(lists, (2, 0), value=-1),
    "only the last slot": lambda lists: torch.cat([torch.full_like(lists[..., 1:], -1), lists[..., :1]], -1),
    "-1 everywhere between": lambda lists: torch.stack([torch.full_like(lists, -1), lists], -1).flatten(-2),
    "descending": lambda lists: lists.flip(-1),
    "any order": shuffled,
    "duplicates": lambda lists: torch.cat([lists, lists[..., :2], lists[..., :1]], -1),
    "one block many times": lambda lists: lists[..., :1].expand(*lists.shape[:-1], 5).contiguous(),
    "duplicates in any order": lambda lists: shuffled(
        torch.cat([lists, lists, torch.full_like(lists, -1)], -1)
    ),
    "one slot": lambda lists: lists[..., :1],
    "no slot": lambda lists: lists[..., :0],
    "blocks of the future": lambda lists: torch.where(lists < 0, 4, lists),
    "only the future": lambda lists: torch.full_like(lists, 4),
    "every block": lambda lists: torch.arange(5, device=lists.device).int().expand(*lists.shape[:-1], -1),
    "the initial block only (a hot row)": lambda lists: torch.zeros_like(lists[..., :1]),
    "int64": lambda lists: lists.long(),
}


@rows_of("sel")
@pytest.mark.parametrize("lists", list(LISTS))
@pytest.mark.parametrize("rows", [3, 73], ids=["few-rows", "many-rows"])
def test_any_list(
    row: Row, lists: str, rows: int, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    """Rule 7. The last of the 5 blocks is the own block of the last queries, and incomplete."""
    config = small()
    q_start = 73 - rows
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = draw("sel", config, rows, q_start=q_start, dtype=dtype, device=device)
    tensors["block_indices"] = LISTS[lists](tensors["block_indices"])
    parity(row, tensors, config, q_start=q_start)


@rows_of("sel")
@pytest.mark.parametrize("lists", ["nothing", "the first block", "every block"])
@pytest.mark.parametrize("changed", [64, 65, 100])
def test_later_lists_change_nothing_bit_for_bit(
    row: Row, changed: int, lists: str, small: Small, draw: Draw, runnable: Runnable, device: str
) -> None:
    """From n l' = 64 tokens on, where a list can no longer hold everything."""
    config = small()
    tensors = draw("sel", config, 130, device=device)
    function = runnable(row, tensors, config)
    tensors["block_indices"] = torch.nn.functional.pad(tensors["block_indices"], (0, 8), value=-1)
    before = function(**tensors, config=config)
    later = {
        "nothing": torch.full((12,), -1),
        "the first block": torch.tensor([0] + [-1] * 11),
        "every block": torch.tensor([*range(9), -1, -1, -1]),
    }
    tensors["block_indices"] = tensors["block_indices"].clone()
    tensors["block_indices"][:, changed:] = later[lists].int().to(device)
    for mine, theirs in zip(function(**tensors, config=config), before, strict=True):
        moved = (mine != theirs).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
        assert not moved or moved[0] >= changed, f"rows {moved} moved when lists from {changed} on changed"


@rows_of("sel")
@pytest.mark.parametrize(
    ("dtype", "heads", "rows"),
    [(torch.float16, 4, 600), (torch.bfloat16, 4, 600), (torch.float32, 16, 700)],
    ids=["fp16", "bf16", "fp32"],
)
def test_hot_block_gathers_the_gradient_of_every_query(
    row: Row, dtype: torch.dtype, heads: int, rows: int, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    """The initial block alone: its few keys sum the gradients of every query, but the first, and head."""
    config = small(num_heads=heads, num_kv_heads=1, selection_block_size=64)
    tensors = draw("sel", config, rows, batch=1, dtype=dtype, device=device)
    tensors["block_indices"][..., 1:] = -1
    tensors["block_indices"][:, 0] = -1
    parity(row, tensors, config)


@rows_of("cmp", "sel", "win")
@pytest.mark.parametrize("rows", [3, 100], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
@pytest.mark.parametrize("logit", [-30.0, -200.0, -4000.0])
def test_all_logits_very_negative(
    row: Row,
    logit: float,
    dtype: torch.dtype,
    rows: int,
    small: Small,
    draw: Draw,
    parity: Parity,
    device: str,
) -> None:
    config = small()
    tensors = draw(row.branch, config, rows, q_start=40, dtype=dtype, device=device)
    # With q = a and k = -a in each of 16 places, a logit is -16 a^2 / 4; some noise keeps the softmax alive.
    place = (abs(logit) / 4) ** 0.5
    for name, sign in (("q", 1), ("k", -1), ("k_cmp", -1)):
        if name in tensors:
            tensors[name] = tensors[name] * 0.1 / place + sign * place
    parity(row, tensors, config, q_start=40)


@rows_of("cmp", "sel", "win")
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
@pytest.mark.parametrize("largest", [100.0, 700.0])
def test_row_maxima_far_apart(
    row: Row, largest: float, dtype: torch.dtype, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    """Rows whose largest logits differ by more than 88: a shared maximum overflows or starves small rows."""
    config = small()
    tensors = draw(row.branch, config, 100, dtype=dtype, device=device)
    size = (
        torch.linspace(0, 1, 100, device=device)[:, None, None]
        * torch.tensor([1.0, 0.01, 1.0, -1.0], device=device)[:, None]
    )
    direction = torch.ones(16, device=device) * largest / 16
    tensors["q"] = (size * direction + 0.1 * tensors["q"]).to(dtype)
    for name in ("k", "k_cmp"):
        if name in tensors:
            tensors[name] = (4 + 0.3 * tensors[name]).to(dtype)
    parity(row, tensors, config)


@rows_of("cmp", "sel", "win")
def test_one_key_outweighs_all_others(
    row: Row, small: Small, draw: Draw, parity: Parity, device: str
) -> None:
    config = small()
    tensors = draw(row.branch, config, 100, dtype=torch.float16, device=device)
    for name in tensors.keys() & {"k", "k_cmp"}:
        tensors[name][:, 3] *= 100
    parity(row, tensors, config)


@pytest.mark.gpu
@rows_of("cmp", "sel", "win")
def test_offsets_beyond_int32(row: Row, small: Small, draw: Draw, parity: Parity) -> None:
    """Two sequences, 2^31 elements apart in one buffer."""
    config = small()
    tensors = draw(row.branch, config, 100, dtype=torch.bfloat16, device="cuda")
    far = 2**31
    for name in [name for name in tensors if name.startswith(("k", "v"))]:
        tensor = tensors[name]
        buffer = torch.empty(far + tensor[0].numel(), dtype=tensor.dtype, device="cuda")
        apart = buffer.as_strided(tensor.shape, (far, *tensor[0].contiguous().stride()))
        tensors[name] = apart.copy_(tensor)
    parity(row, tensors, config)
