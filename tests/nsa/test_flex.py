"""The flex backend: its tiles and masks against the specification, what compiles, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import nsa.reference
from nsa import NSAConfig
from nsa.backends import flex
from nsa.routes import FUNCTIONS, TABLE, Request, UnsupportedRoute, resolve
from nsa.testing import against_spec

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]

BRANCHES = ("cmp", "sel", "win")
each_branch = pytest.mark.parametrize("branch", BRANCHES)


def tiles_of(branch: str, tensors: dict[str, Any], config: NSAConfig, q_start: Any = 0) -> flex.Tiles:
    if branch == "cmp":
        return flex.compressed_tiles(tensors["q"], tensors["k_cmp"], config, q_start)
    if branch == "win":
        return flex.sliding_tiles(tensors["q"], tensors["k"], config, q_start)
    return flex.selected_tiles(tensors["q"], tensors["k"], tensors["block_indices"], config, q_start)


# The tiles a kernel visits: FlexAttention's unfused form never reads them.


@each_branch
@pytest.mark.parametrize(
    ("group", "rows", "q_start"), [(1, 700, 0), (2, 300, 5), (3, 130, 400), (12, 41, 0), (130, 5, 90)]
)
def test_tiles_hold_whatever_the_mask_shows(
    branch: str, group: int, rows: int, q_start: int, small: Small, draw: Draw
) -> None:
    config = small(num_heads=2 * group, window_size=150)
    tensors = draw(branch, config, rows, q_start=q_start)
    mine = tiles_of(branch, tensors, config, q_start)
    shape = 2, mine.some.shape[1], mine.rows, mine.keys
    drawn = create_block_mask(mine.mask, *shape, device="cpu", BLOCK_SIZE=flex.TILE)
    listed = mine.block_mask(backward=True)
    seen, expected = listed.to_dense().bool(), drawn.to_dense().bool()
    assert not (expected & ~seen).any()
    assert listed.q_indices is not None
    if mine.whole is not None:
        assert seen.equal(expected)
        assert listed.full_kv_num_blocks.equal(drawn.full_kv_num_blocks)
        for (*row, count), index in zip(
            [(*place, int(listed.full_kv_num_blocks[place])) for place in _places(listed.full_kv_num_blocks)],
            listed.full_kv_indices.flatten(0, 2),
            strict=True,
        ):
            assert index[:count].equal(drawn.full_kv_indices[tuple(row)][:count])


def _places(counts: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(place) for place in torch.ones_like(counts).nonzero().tolist()]


def test_tiles_nothing_falls_into_are_left_out(small: Small, draw: Draw) -> None:
    config = small(window_size=100)
    for branch, part in (("win", 0.35), ("cmp", 0.7), ("sel", 0.7)):
        tensors = draw(branch, config, 1500, batch=1)
        if branch == "sel":  # the same few blocks for neighbours
            own = torch.arange(1500) // config.selection_block_size
            tensors["block_indices"] = own[None, :, None, None].expand(1, 1500, 2, 1).int()
        assert tiles_of(branch, tensors, config).some.float().mean() < part, branch


# What compiles.


class Counted:
    """A compiler that makes no kernel and counts what it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@each_branch
def test_one_compilation_serves_every_length_and_geometry(branch: str, small: Small, draw: Draw) -> None:
    compiler = Counted()
    compiled = flex.Flex(compiler)
    geometries = [
        {},
        {"window_size": 7, "compression_block_size": 6, "compression_stride": 3, "selection_block_size": 9},
    ]
    for rows, q_start, batch, geometry in [
        (300, 1500, 3, 0),
        (201, 1733, 5, 0),
        (513, 1000, 3, 0),
        (400, 2000, 3, 1),
    ]:
        config = small(**geometries[geometry])
        tensors = draw(branch, config, rows, q_start=q_start, batch=batch)
        o, lse = getattr(compiled, FUNCTIONS[branch])(**tensors, config=config, q_start=q_start)
        exact = getattr(nsa.reference, FUNCTIONS[branch])(**tensors, config=config, q_start=q_start)
        torch.testing.assert_close((o, lse), exact)
    assert compiler.graphs == 1


def test_as_many_shapes_as_come_are_compiled(small: Small, draw: Draw) -> None:
    """torch stops compiling a function it compiled too often, eight times unless told otherwise."""
    compiler = Counted()
    compiled = flex.Flex(compiler)
    with torch._dynamo.config.patch(recompile_limit=1):
        for heads in (1, 2, 3):
            config = small(num_heads=heads, num_kv_heads=heads)
            tensors = draw("win", config, 20)
            o, _ = compiled.sliding_attention(**tensors, config=config)
            torch.testing.assert_close(o, nsa.reference.sliding_attention(**tensors, config=config)[0])
    assert compiler.graphs == 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="torch's kernel needs AVX2")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as its compiler is imported
def test_a_kernel_that_visits_only_the_tiles_agrees(small: Small, draw: Draw) -> None:
    """torch's kernel for a CPU, for one shape: it returns no lse, so no row of the table runs it."""
    config, branch = small(), "sel"
    tensors = draw(branch, config, 300, q_start=40)
    tiles = tiles_of(branch, tensors, config, 40)
    assert not tiles.some.all()
    kernel = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = q.unflatten(2, (2, 2)).transpose(1, 2).flatten(2, 3)
        mask = tiles.block_mask(backward=False)
        o = kernel(rows, k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, scale=config.scale)
        return o.unflatten(2, (-1, 2)).transpose(1, 2).flatten(2, 3)

    def exact(**given: torch.Tensor) -> torch.Tensor:
        o: torch.Tensor = getattr(nsa.reference, FUNCTIONS[branch])(**given, config=config, q_start=40)[0]
        return o

    outcome = against_spec(compiled, exact, tensors)
    assert outcome["out"].ok, outcome


# What is refused, and what auto does.


def request_for(config: NSAConfig, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Request:
    return Request(device=device, dtype=dtype, num_queries=64, kv_len=64, needs_grad=True, config=config)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("nsa.refusals.find_spec", lambda name: name)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_it_by_name(small: Small) -> None:
    for backend in ("flex", "flex:eager"):
        route = resolve(backend, request_for(small()))
        assert [route.backend(branch) for branch in BRANCHES] == [backend] * 3
    assert resolve("flex", request_for(small())).cmp == flex.COMPILED.compressed_attention


@pytest.mark.parametrize(
    ("change", "asked", "reason"),
    [
        ({}, {"device": "cpu"}, "compiled kernel returns no lse on a CPU; flex:eager does"),
        ({}, {"device": "mps"}, "runs on cuda, got mps"),
        ({}, {"dtype": torch.float64}, "takes fp32, fp16 and bf16, got fp64"),
        ({"head_dim": 8}, {}, "head_dim at least 16, got 8"),
        ({"value_dim": 8}, {}, "head_dim at least 16, got 8"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_refusal_says_why(change: dict[str, int], asked: dict[str, Any], reason: str, small: Small) -> None:
    with pytest.raises(UnsupportedRoute) as refused:
        resolve("cmp=flex,sel=off,win=off", request_for(small(**change), **asked))
    assert str(refused.value).startswith("cmp=flex: ")
    assert reason in str(refused.value)


@pytest.mark.usefixtures("gpu")
def test_a_missing_compiler_or_an_old_gpu_is_named(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(UnsupportedRoute, match=r"needs compute capability 7\.0, got 6\.1"):
        resolve("flex", request_for(small()))
    monkeypatch.setattr("nsa.refusals.find_spec", lambda name: None)
    with pytest.raises(UnsupportedRoute, match=r"which is not installed: pip install triton"):
        resolve("flex", request_for(small()))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_never_takes_it(device: str, small: Small) -> None:
    rows = [row for row in TABLE if row.backend.startswith("flex")]
    assert len(rows) == 6
    assert all(row.avoid(request_for(small(), device)) for row in rows)
    backends = [(row.branch, row.backend) for row in TABLE]
    for row in rows:
        assert backends.index((row.branch, "sdpa")) < backends.index((row.branch, row.backend))
