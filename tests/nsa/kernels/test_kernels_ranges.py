"""What compressed and sliding attention share: one kernel over a range of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nsa.config import NSAConfig
from nsa.routes import TABLE, Row
from nsa.testing import check, error_budget

pytest.importorskip("triton")

from nsa.kernels import _ranges
from nsa.kernels._installed import interpreted
from nsa.kernels._tiles import on_its_device, padded, split, starts, unit_stride

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]
Parity = Callable[..., None]

each_branch = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.branch)
        for row in TABLE
        if row.backend == "triton" and row.branch in ("cmp", "win")
    ],
)


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (17, (32, 0)),
        (48, (32, 16)),
        (64, (64, 0)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
        (192, (128, 64)),
        (256, (256, 0)),
        (257, (256, 16)),
    ],
)
def test_dims_are_two_powers_of_two(dim: int, parts: tuple[int, int]) -> None:
    assert split(dim) == parts
    assert dim <= sum(parts) <= padded(dim)


def test_starts_are_a_tensor_or_an_int() -> None:
    of = torch.empty(2, 1, 1, 1)
    assert starts(7, of) == (None, 7)
    for given, expected in (([3, 4], [3, 4]), ([[3], [4]], [3, 4]), ([5], [5, 5]), (6, [6, 6])):
        found, first = starts(torch.tensor(given, dtype=torch.int32), of)
        assert found is not None
        assert (found.tolist(), found.dtype, found.is_contiguous(), first) == (expected, torch.int64, True, 0)
    with pytest.raises(RuntimeError):
        starts(torch.tensor([1, 2, 3]), of)


def test_only_a_last_dim_apart_is_copied() -> None:
    drawn = torch.randn(2, 3, 4, 8)
    for view in (drawn, drawn.transpose(1, 2), drawn[..., 2:], drawn[:1].expand(5, -1, -1, -1)):
        assert unit_stride(view) is view
    assert unit_stride(drawn.movedim(-1, 0).contiguous().movedim(0, -1)).stride(-1) == 1


def test_kernels_launch_on_the_gpu_of_their_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = ["the first GPU"]

    @contextmanager
    def device(there: object) -> Iterator[None]:
        current.append(there)
        yield
        current.pop()

    @on_its_device
    def launched_on(q: Any, *, keyword: int) -> tuple[object, int]:
        return current[-1], keyword

    monkeypatch.setattr(torch.cuda, "device", device)
    queries = SimpleNamespace(is_cuda=True, device="the second GPU")
    assert launched_on(cast(torch.Tensor, queries), keyword=3) == ("the second GPU", 3)
    assert launched_on(torch.empty(0), keyword=4) == ("the first GPU", 4)
    assert current == ["the first GPU"]


@pytest.mark.skipif(interpreted(), reason="nothing is compiled")
def test_lengths_never_compile_anew() -> None:
    flags = {param.name: param.do_not_specialize for param in _ranges._attention_kernel.params}
    assert {name for name, flag in flags.items() if flag} == set(_ranges._LENGTHS)


class Recorder:
    """Stands for the kernel: keeps the grid and the arguments of each launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self.launches.append((grid, args, named))


@each_branch
@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_launch_reads_nothing_on_the_host_and_copies_nothing(
    row: Row, per_sequence: bool, small: Small, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without data, which raise where a value or an address is asked for."""
    recorder = Recorder()
    monkeypatch.setattr(_ranges, "_attention_kernel", recorder)
    config = small(num_heads=6, value_dim=32)
    tensors = {
        n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in draw(row.branch, config, 100).items()
    }
    meta = {name: t.to("meta") for name, t in tensors.items()}
    q_start = torch.zeros(2, dtype=torch.int32, device="meta") if per_sequence else 5
    o, lse = row.load()(**meta, config=config, q_start=q_start)
    assert (o.shape, lse.shape) == ((2, 100, 6, 32), (2, 100, 6))
    ((grid, args, named),) = recorder.launches
    assert [a is b for a, b in zip(args, meta.values(), strict=False)] == [True] * 3
    assert (named["G"], named["D0"], named["DV_PADDED"]) == (3, 16, 32)
    assert grid == (-(-300 // named["BLOCK_M"]) * 4,)


@pytest.mark.parametrize("arch", [(8, 0), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 192, 256, 512])
def test_a_launch_for_every_shape(arch: tuple[int, int], dtype: torch.dtype, head_dim: int) -> None:
    for rows in (1, 16, 17, 10**6):
        launch = _ranges.choose(rows, head_dim, 128, dtype, arch)
        assert launch.reason
        assert min(launch.block_m, launch.block_n) >= 16
    few, many = (_ranges.choose(rows, 64, 64, torch.float16, arch).block_m for rows in (16, 17))
    assert few < many
    assert _ranges.choose(64, head_dim, 512, dtype, arch) == _ranges.choose(64, 512, head_dim, dtype, arch)


@pytest.mark.interpret
@each_branch
@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (40, 200), (1, 3), (300, 16)],
)
def test_dims(
    row: Row, head_dim: int, value_dim: int, small: Small, draw: Draw, parity: Parity, kernel_device: str
) -> None:
    config = small(num_kv_heads=1, head_dim=head_dim, value_dim=value_dim)
    tensors = draw(row.branch, config, 70, batch=1, dtype=torch.float16, device=kernel_device)
    parity(row, tensors, config)


@pytest.mark.interpret
@each_branch
@pytest.mark.parametrize(("group", "rows"), [(1, 200), (5, 60), (16, 1), (17, 1), (200, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_groups_fill_tiles(
    row: Row,
    group: int,
    rows: int,
    dtype: torch.dtype,
    small: Small,
    draw: Draw,
    parity: Parity,
    kernel_device: str,
) -> None:
    """Tiles that end inside a token, hold many tokens, or a part of one."""
    config = small(num_heads=2 * group)
    parity(
        row, draw(row.branch, config, rows, dtype=dtype, q_start=50, device=kernel_device), config, q_start=50
    )


@pytest.mark.interpret
@each_branch
def test_decode_equals_the_row_of_prefill(row: Row, small: Small, draw: Draw, kernel_device: str) -> None:
    config = small()
    rows = 26  # the window is 24
    tensors = draw(row.branch, config, rows, device=kernel_device)
    function = row.load()
    whole = function(**tensors, config=config)
    for t in range(rows):
        tokens, blocks = t + 1, max(0, (t - 7) // 4 + 1)
        existing = {"k": tokens, "v": tokens, "k_cmp": blocks, "v_cmp": blocks}
        step = {n: x[:, : existing[n]] if n in existing else x[:, t : t + 1] for n, x in tensors.items()}
        for part, expected in zip(function(**step, config=config, q_start=t), whole, strict=True):
            assert check(part, expected[:, t : t + 1], error_budget(expected, expected)).ok, f"token {t}"


@pytest.mark.interpret
@each_branch
def test_a_row_is_the_same_in_any_batch_bit_for_bit(
    row: Row, small: Small, draw: Draw, kernel_device: str
) -> None:
    config = small()
    tensors = draw(row.branch, config, 70, batch=3, q_start=35, dtype=torch.float16, device=kernel_device)
    function = row.load()
    together = function(**tensors, config=config, q_start=35)
    for b in (0, 2):
        alone = function(**{name: t[b : b + 1] for name, t in tensors.items()}, config=config, q_start=35)
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part, whole[b : b + 1])


@pytest.mark.interpret
@each_branch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_output_is_written(
    row: Row,
    dtype: torch.dtype,
    small: Small,
    draw: Draw,
    kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs begin as NaN: empty rows, rows of a last tile and padded dims, too."""
    config = small(num_heads=6, head_dim=24, value_dim=40)
    tensors = draw(row.branch, config, 45, keys=20, dtype=dtype, device=kernel_device)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **named: empty(*size, **named).fill_(float("nan")))
    o, lse = row.load()(**tensors, config=config)
    assert torch.isfinite(o).all()
    assert not lse.isnan().any()


@pytest.mark.interpret
@each_branch
@pytest.mark.parametrize(("batch", "rows", "keys"), [(2, 0, 30), (0, 5, 30), (2, 5, 0), (0, 0, 0)])
def test_nothing_to_attend(
    row: Row, batch: int, rows: int, keys: int, small: Small, draw: Draw, kernel_device: str
) -> None:
    config = small(value_dim=32)
    tensors = draw(row.branch, config, rows, batch=batch, keys=keys, device=kernel_device)
    for q_start in (0, torch.zeros(batch, dtype=torch.int64, device=kernel_device)):
        o, lse = row.load()(**tensors, config=config, q_start=q_start)
        assert (o.shape, lse.shape) == ((batch, rows, 4, 32), (batch, rows, 4))
        assert keys > 0 or (torch.equal(o, torch.zeros_like(o)) and (lse == float("-inf")).all())


@pytest.mark.gpu
@each_branch
def test_in_a_cuda_graph(row: Row, small: Small, draw: Draw) -> None:
    config = small(head_dim=64)
    q_start = torch.tensor([3, 60], device="cuda")
    tensors = draw(
        row.branch, config, 50, keys=120, q_start=q_start.cpu(), dtype=torch.float16, device="cuda"
    )
    function = row.load()
    expected = function(**tensors, config=config, q_start=q_start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(**tensors, config=config, q_start=q_start)
    for part in captured:
        part.fill_(float("nan"))
    graph.replay()
    for part, whole in zip(captured, expected, strict=True):
        assert torch.equal(part, whole)


@pytest.mark.gpu
@each_branch
def test_under_torch_compile(row: Row, small: Small, draw: Draw) -> None:
    config = small(head_dim=64)
    tensors = draw(row.branch, config, 50, dtype=torch.float16, device="cuda")
    function = row.load()
    compiled = torch.compile(lambda **given: function(**given, config=config), fullgraph=True)
    for part, whole in zip(compiled(**tensors), function(**tensors, config=config), strict=True):
        assert torch.equal(part, whole)
