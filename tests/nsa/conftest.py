"""What the tests of the attention share: a small shape, inputs of one branch, and the judge of one route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nsa.reference
from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.routes import FUNCTIONS, Request, Row
from nsa.testing import against_spec

pytest.register_assert_rewrite("tests.nsa.selections")

# Small, and still of a shape that block-wise kernels take.
SMALL = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "compression_block_size": 8,
    "compression_stride": 4,
    "selection_block_size": 16,
    "num_selected_blocks": 4,
    "window_size": 24,
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one."""
    return str(request.param)


@pytest.fixture
def small() -> Callable[..., NSAConfig]:
    """``small(**changes)``: a configuration whose blocks are a few tokens long."""
    return lambda **changes: NSAConfig(**(SMALL | changes))


@pytest.fixture
def draw() -> Callable[..., dict[str, Any]]:
    """``draw(branch, config, rows)``: normal inputs of a branch, by the argument names of its function.

    ``keys`` tokens exist, ``max(q_start) + rows`` when None. Selected attention gets the lists that the
    specification selects for other, random keys.
    """

    def inputs(
        branch: str,
        config: NSAConfig,
        rows: int,
        *,
        batch: int = 2,
        keys: int | None = None,
        q_start: int | torch.Tensor = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def normal(tokens: int, heads: int, dim: int) -> torch.Tensor:
            drawn = torch.randn(batch, tokens, heads, dim, generator=generator)
            return drawn.to(device=device, dtype=dtype)

        length = int(torch.as_tensor(q_start).max()) + rows if keys is None else keys
        blocks = num_compressed_blocks(length, config)
        heads = config.num_kv_heads
        q = normal(rows, config.num_heads, config.head_dim)
        if branch in ("cmp", "score"):
            tensors = {"q": q, "k_cmp": normal(blocks, heads, config.head_dim)}
            return tensors | ({"v_cmp": normal(blocks, heads, config.v_dim)} if branch == "cmp" else {})
        tensors = {
            "q": q,
            "k": normal(length, heads, config.head_dim),
            "v": normal(length, heads, config.v_dim),
        }
        if branch == "sel":
            other = normal(blocks, heads, config.head_dim)
            chosen = nsa.reference.select_blocks(q, other, config, q_start=q_start, kv_len=length)
            tensors["block_indices"] = chosen
        return tensors

    return inputs


@pytest.fixture
def runnable() -> Callable[..., Callable[..., Any]]:
    """``runnable(row, tensors, config)``: the row's function; a refusal skips the test in its own words."""

    def load(
        row: Row, tensors: dict[str, Any], config: NSAConfig, *, gradients: bool = False
    ) -> Callable[..., Any]:
        q = tensors["q"]
        if "k" in tensors:
            length = tensors["k"].shape[1]
        else:
            last = max(0, tensors["k_cmp"].shape[1] - 1)
            length = last * config.compression_stride + config.compression_block_size
        request = Request(
            device=q.device.type,
            dtype=q.dtype,
            num_queries=q.shape[1],
            kv_len=length,
            needs_grad=gradients and "bwd" in row.passes,
            config=config,
        )
        reason = row.refuse(request)
        if reason is not None:
            pytest.skip(f"{row.branch}={row.backend}: {reason}")
        return row.load()

    return load


@pytest.fixture
def parity(runnable: Callable[..., Callable[..., Any]]) -> Callable[..., None]:
    """``parity(row, tensors, config)``: output, lse and gradients of a row of the table against the spec."""

    def judge(
        row: Row,
        tensors: dict[str, Any],
        config: NSAConfig,
        *,
        q_start: int | torch.Tensor = 0,
        gradients: bool = True,
    ) -> None:
        gradients = gradients and "bwd" in row.passes
        function = runnable(row, tensors, config, gradients=gradients)
        specification = getattr(nsa.reference, FUNCTIONS[row.branch])

        def part(fn: Callable[..., Any], index: int) -> Callable[..., torch.Tensor]:
            return lambda **given: fn(**given, config=config, q_start=q_start)[index]

        for index, name in enumerate(("o", "lse")):
            outcome = against_spec(
                part(function, index),
                part(specification, index),
                tensors,
                gradients=gradients and name == "o",
            )
            for key, check in outcome.items():
                what = name if key == "out" else key
                assert check.ok, f"{what} differs by {check.max_abs_err:.3e}, budget {check.budget:.3e}"

    return judge
