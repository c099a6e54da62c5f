"""Rows of the route table that go wrong while BROKEN says so: one that gives NaN, one that hands NaN back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa import reference, routes
from nsa.routes import FUNCTIONS, Row

BROKEN: set[str] = set()
"""``forward`` or ``backward``."""

POSITION = 5
"""The query whose output is NaN."""


class _NaNGradient(torch.autograd.Function):
    """Values as they are; gradients NaN while BROKEN has ``backward``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.nan if "backward" in BROKEN else grad


class _Planted:
    def __init__(self, branch: str) -> None:
        self._attend = getattr(reference, FUNCTIONS[branch])

    def attend(self, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> Any:
        o, lse = self._attend(q, k, _NaNGradient.apply(v), *rest, **named)
        if "forward" in BROKEN:
            position = named["q_start"] + torch.arange(o.shape[1])[:, None, None]
            o = torch.where(position == POSITION, torch.nan, o)
        return o, lse


CMP, SEL, WIN = (_Planted(branch) for branch in ("cmp", "sel", "win"))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the row of a branch first in the table, sound as yet; BROKEN is empty again afterwards."""

    def put(branch: str) -> None:
        target = f"{__name__}:{branch.upper()}.attend"
        row = Row(branch, "planted", target, lambda request: None)
        monkeypatch.setattr(routes, "TABLE", (row, *routes.TABLE))

    BROKEN.clear()
    yield put
    BROKEN.clear()
