"""Which tokens the steps of a cell feed, and what the route table answers for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.routes import Request, Route, resolve
from nsabench.plan import Cell
from nsabench.run.work import config_of

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Span = tuple[int, int]
"""Tokens ``[start, end)`` that go into the layer in one call, after the ``start`` tokens before them."""


@dataclass(frozen=True)
class Step:
    """What is timed, as token spans in the order they are fed, and its weight in the cell's total.

    Decode of an NSA layer has two: a step that completes a compressed block (``emit``) and one that does not
    (``plain``), weighted by how often each happens. All else has one, named ``""``.
    """

    name: str
    weight: float
    spans: tuple[Span, ...]


def steps_of(cell: Cell) -> list[Step]:
    """The steps of a cell. Decode: at S or less than a stride before; else the whole prompt in its pieces."""
    if cell.phase == "decode" and (cell.impl, cell.scope) != ("nsa", "module"):
        return [Step("", 1.0, ((cell.S - 1, cell.S),))]
    if cell.phase == "decode":
        return [Step(name, weight, ((length - 1, length),)) for name, weight, length in _decode_lengths(cell)]
    size = {"batched": cell.S, "stepwise": 1}.get(cell.mode) or int(cell.mode.partition("=")[2])
    pieces = ((start, min(start + size, cell.S)) for start in range(0, cell.S, size))
    return [Step("", 1.0, tuple(pieces))]


def _decode_lengths(cell: Cell) -> list[tuple[str, float, int]]:
    """Name, weight and length after the step: no block is complete before ``l`` tokens."""
    if cell.l > cell.S:
        return [("plain", 1.0, cell.S)]
    emit = cell.S - (cell.S - cell.l) % cell.d
    if cell.d == 1:
        return [("emit", 1.0, emit)]
    plain = cell.S if emit != cell.S else cell.S - 1
    return [("emit", 1.0 / cell.d, emit), ("plain", 1.0 - 1.0 / cell.d, plain)]


def route_at(cell: Cell, span: Span) -> Route:
    """What runs for one span of a cell's step; UnsupportedRoute where nothing can."""
    start, end = span
    request = Request(
        device=torch.device(cell.device).type,
        dtype=DTYPES[cell.dtype],
        num_queries=end - start,
        kv_len=end,
        needs_grad=cell.passes != "fwd",
        config=config_of(cell),
    )
    return resolve(cell.route, request)
