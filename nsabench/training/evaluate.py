"""What a model has learned: its answers to fresh questions, as trained and with each branch switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from nsa import Routing
from nsabench.plan.training import Settings
from nsabench.training.data import FileData, SyntheticData
from nsabench.training.synthetic import COPY, NEEDLE, VALUES

Predictor = Callable[[torch.Tensor, Routing], torch.Tensor]
"""``tokens (B,S) int64, routing -> logits (B,S,256)``: a `ByteLM`, or what stands in for one."""

SEQUENCES = 128
"""Sequences that are judged, in batches of the training's size."""


@torch.no_grad()
def evaluate(model: Predictor, settings: Settings, data: FileData | SyntheticData) -> list[dict[str, Any]]:
    """Rows of ``what, accuracy, chance, distance, count, route``, for the trained route and for each branch
    switched off in it.

    Of the synthetic task: needles within the window, past the windows of all layers together, and by
    distance; the copied segment. ``chance`` is the accuracy of one who knows which bytes are answers
    and nothing else; ``distance`` the nearest answer in the row, bytes back. Of a file: the next byte
    of the held-out part, where ``chance`` is the accuracy of always answering the commonest byte.

    A row that nothing was asked for is left out.
    """
    rows = []
    for routing in routes_of(settings.route):
        if isinstance(data, FileData):
            found = _next_byte(model, settings, data, routing)
        else:
            found = _questions(model, settings, data, routing)
        rows += [{**row, "route": str(routing)} for row in found]
    return rows


def routes_of(route: str) -> list[Routing]:
    """The trained routing, and it without each branch that it has; never without its last one."""
    trained = Routing.parse(route)
    running = [branch for branch in ("sel", "cmp", "win") if getattr(trained, branch) != "off"]
    if len(running) == 1:
        return [trained]
    return [trained, *(replace(trained, **{branch: "off"}) for branch in running)]


def _questions(
    model: Predictor, settings: Settings, data: SyntheticData, routing: Routing
) -> Iterator[dict[str, Any]]:
    kinds, distances, rights = [], [], []
    for number in range(-(-SEQUENCES // settings.batch)):
        made = data.fresh(number, settings.batch)
        tokens = torch.from_numpy(made.tokens)
        rights.append(_right(model, tokens, settings, routing))
        kinds.append(torch.from_numpy(made.kind))
        distances.append(torch.from_numpy(made.distance))
    kind, distance, right = torch.cat(kinds), torch.cat(distances), torch.cat(rights)
    needle, far = kind == NEEDLE, data.task.reach
    asked = {
        "needle within the window": needle & (distance < settings.model.w),
        "needle past the window": needle & (distance >= far),
    }
    while far < settings.S:
        asked[f"needle {far} to {2 * far - 1} back"] = needle & (distance >= far) & (distance < 2 * far)
        far *= 2
    asked["copy past the window"] = kind == COPY
    for what, chosen in asked.items():
        if chosen.any():
            yield {
                "what": what,
                "accuracy": right[chosen].double().mean().item(),
                "chance": 1 / VALUES,
                "distance": int(distance[chosen].min()),
                "count": int(chosen.sum()),
            }


def _next_byte(
    model: Predictor, settings: Settings, data: FileData, routing: Routing
) -> Iterator[dict[str, Any]]:
    tokens = data.held_out(SEQUENCES)[0]
    right = torch.cat([_right(model, part, settings, routing) for part in tokens.split(settings.batch)])
    yield {
        "what": "next byte, held-out",
        "accuracy": right.double().mean().item(),
        "chance": (tokens[:, 1:] == data.commonest()).double().mean().item(),
        "distance": None,
        "count": right.numel(),
    }


def _right(model: Predictor, tokens: torch.Tensor, settings: Settings, routing: Routing) -> torch.Tensor:
    """``tokens (B,S+1) -> (B,S)`` bool on the CPU: whether the likeliest byte is the one that follows."""
    logits = model(tokens[:, :-1].to(settings.device), routing)
    return logits.argmax(-1).cpu() == tokens[:, 1:]
