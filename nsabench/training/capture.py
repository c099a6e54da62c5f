"""The blocks that a trained model selects on its own data, in a file for the benchmark's selection axis."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from nsa import NSAConfig, Routing, select_blocks
from nsabench.plan import Cell, PlanError
from nsabench.plan.training import Settings
from nsabench.run import selection_file
from nsabench.run.selection import Sharing, sharing
from nsabench.run.selection_file import load_selection, read_header
from nsabench.store import files
from nsabench.training.precision import Precision
from nsabench.training.watch import Seen

PAPER_BLOCK = 64
"""The selection block size that kernels are made for, tokens (section 4 of the paper)."""

ROWS = 1024
"""Queries that are scored at a time."""


class Source(Protocol):
    """Where sequences come from."""

    def batch(self, step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``(B,S+1)`` int64 and the mask of their targets, the same for the same numbers."""


def check_target(path: Path, settings: Settings | None = None) -> None:
    """PlanError in a line where a selection cannot be saved at ``path``, or there is none to save."""
    if path.exists():
        raise PlanError(f"--save-selection: {path} exists; name another file")
    if not path.parent.is_dir():
        raise PlanError(f"--save-selection: {path.parent} is no folder")
    if settings is not None and Routing.parse(settings.route).sel == "off":
        raise PlanError(f"--save-selection: {settings.route!r} selects nothing")


def save_selection(
    model: nn.Module, settings: Settings, data: Source, path: Path, *, layer: int | None = None
) -> dict[str, Any]:
    """Write what one layer of a trained model selects in one sequence, in the format of
    :mod:`nsabench.run.selection_file`; returns the file's header.

    The sequence is the first of the batch after the last that was trained on. The header also has the
    measured ``neighbour_overlap`` and ``union_blocks`` of that layer, the same of every layer as ``layers``,
    and as ``l_sel_64`` those of the blocks of 64 tokens that the layers' scores select, in as many blocks a
    query; None where that geometry is not allowed. They count the blocks that are free in the model, where
    ``n_initial`` and ``n_local`` are forced.

    Args:
        model: a `ByteLM`, not compiled.
        layer: counted from 0; the one in the middle when None.

    Raises:
        PlanError: the file exists, the layer does not, or the route selects nothing.
        StoreError: the file cannot be written.
    """
    check_target(path, settings)
    count = settings.model.layers
    layer = count // 2 if layer is None else layer
    if not 0 <= layer < count:
        raise PlanError(f"--save-selection: there is no layer {layer}; allowed: 0 to {count - 1}")
    tokens = data.batch(settings.steps * settings.accumulate, 0, 1)[0][:1, :-1]
    seen, larger = _selected(model, settings, tokens)
    blocks = torch.cat([part[0] for part, _ in seen.blocks[layer]]).cpu()
    cell = _cell(settings, tokens.shape[1])
    source = f"nsabench train of {settings.data}: layer {layer} of {count} after {settings.steps} steps"
    overlap = seen.overlap()
    more = {name: overlap[layer][name] for name in ("neighbour_overlap", "union_blocks")}
    more |= {name: getattr(settings.model, name) for name in ("n_initial", "n_local")}
    more |= {"layer": layer, "layers": overlap, "l_sel_64": larger}
    selection_file.save_selection(path, blocks.numpy(), cell, source)
    return _said_too(path, cell, more)


def _cell(settings: Settings, length: int) -> Cell:
    shape = {name: getattr(settings.model, name) for name in ("dim", "heads", "groups", "dk", "dv")}
    blocks = {name: getattr(settings.model, name) for name in ("l", "d", "l_sel", "n_sel", "w")}
    return Cell(
        phase="train",
        passes="fwd",
        mode="batched",
        S=length,
        B=1,
        **shape,
        **blocks,
        dtype=settings.precision,
        device=settings.device,
        seed=settings.seed,
        route=settings.route,
    )


def _said_too(path: Path, cell: Cell, more: dict[str, Any]) -> dict[str, Any]:
    """Add to a file's header; as whole as it was at any moment."""
    head, blocks = read_header(path) | more, load_selection(path, cell)
    small = np.int16 if blocks.max(initial=0) <= np.iinfo(np.int16).max else np.int32
    data = io.BytesIO()
    np.savez_compressed(data, blocks=blocks.astype(small), header=np.array(json.dumps(head)))
    try:
        files.replace(path, data.getvalue())
    except OSError as error:
        raise files.disk_error(f"write {path}", error) from error
    return head


def _selected(
    model: Any, settings: Settings, tokens: torch.Tensor
) -> tuple[Seen, list[dict[str, Any]] | None]:
    """What the layers select in a sequence ``tokens (1,T)``, and the figures of `PAPER_BLOCK`."""
    device = torch.device(settings.device)
    seen, larger = Seen(model), _Larger(model)
    with torch.no_grad(), Precision(settings.precision, device).autocast(), seen.looking(), larger.looking():
        model(tokens.to(device), settings.route)
    return seen, larger.rows()


class _Larger:
    """What the layers would select in blocks of `PAPER_BLOCK` tokens, by their own scores."""

    def __init__(self, model: Any) -> None:
        self._attention = [layer.attention for layer in model.layers]
        self._found: dict[int, Sharing] = {}

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the forwards of the layers while this is open."""
        hooks = []
        for number, attention in enumerate(self._attention):
            config = larger_blocks(attention.config)
            if config is not None:
                look = self._looking_at(number, attention, config)
                hooks.append(attention.register_forward_pre_hook(look))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _looking_at(self, number: int, attention: Any, config: NSAConfig) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = attention.attention_inputs(inputs[0])
            length, parts = inputs[0].shape[1], []
            for start in range(0, length, ROWS):
                q = given["q"][:, start : start + ROWS]
                parts.append(select_blocks(q, given["k_cmp"], config, q_start=start, kv_len=length))
            self._found[number] = sharing(torch.cat(parts, 1), 0, config)

        return look

    def rows(self) -> list[dict[str, Any]] | None:
        """By layer, as in overlap.csv; None where the geometry is not allowed."""
        found = [
            {"layer": layer, "neighbour_overlap": one.neighbour_overlap, "union_blocks": one.union_blocks}
            for layer, one in sorted(self._found.items())
        ]
        return found or None


def larger_blocks(config: NSAConfig) -> NSAConfig | None:
    """The configuration with selection blocks of `PAPER_BLOCK` tokens; None where it is not allowed."""
    try:
        return replace(config, selection_block_size=PAPER_BLOCK)
    except ValueError:
        return None
