"""Dynamo traces every launcher whole, and finds its kernels, with no GPU: nothing is run or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa.config import NSAConfig
from nsa.packing import Packed
from nsa.routes import TABLE, Row

pytest.importorskip("triton")

from nsa.kernels._installed import interpreted

Small = Callable[..., NSAConfig]
Draw = Callable[..., dict[str, Any]]


class Traced(Exception):
    """Instead of a run."""


@pytest.mark.skipif(interpreted(), reason="nothing is compiled")
@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.branch}={row.backend}")
        for row in TABLE
        if row.backend.startswith("triton")
    ],
)
def test_one_graph(
    row: Row, is_packed: bool, small: Small, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where there is no GPU, Dynamo takes kernels for Python.
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda *args: True)
    torch._dynamo.reset()
    config = small()
    more = {"packed": Packed.of(torch.tensor([0, 20, 50]), 50, config)} if is_packed else {}
    drawn = draw(row.branch, config, 50, batch=1, dtype=torch.float16)
    tensors = {name: tensor.to("meta") for name, tensor in drawn.items()}
    function, kernels = row.load(), []

    def see(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        kernels.extend(node for node in graph.graph.nodes if "triton_kernel" in str(node.target))

        def stop(*args: Any) -> Any:
            raise Traced

        return stop

    with pytest.raises(Traced):
        torch.compile(lambda: function(**tensors, config=config, **more), backend=see, fullgraph=True)()
    assert len(kernels) >= {"cmp": 1, "score": 3, "sel": 1, "win": 1}[row.branch]
