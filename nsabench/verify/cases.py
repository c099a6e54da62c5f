"""The inputs that the rules ask about: drawn once from a seed, small, and of a shape that kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nsa import NSAConfig, reference
from nsa.blocks import num_compressed_blocks
from nsabench.verify.subjects import DTYPES, LAYER_DIM, Case, LayerCase

SMALL: dict[str, int] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "compression_block_size": 8,
    "compression_stride": 4,
    "selection_block_size": 16,
    "num_selected_blocks": 4,
    "window_size": 24,
}
"""Blocks of a few tokens, so that short sequences have many of them."""


def small(**changes: int) -> NSAConfig:
    """``SMALL`` with some fields changed."""
    return NSAConfig(**(SMALL | changes))


def borders(config: NSAConfig) -> list[int]:
    """Lengths at which something begins or ends, and those one less and one more."""
    most = config.num_selected_blocks * config.selection_block_size
    sizes = (1, config.compression_block_size, config.selection_block_size, config.window_size, most)
    return sorted({near for size in sizes for near in (size - 1, size, size + 1) if near > 0})


def normal(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal numbers, fp32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def label(config: NSAConfig, rows: int, batch: int, q_start: int | torch.Tensor) -> str:
    """A case in a few words: ``S=65 B=2 G=3 dk=64 dv=32``."""
    size = f"S={rows} B={batch} G={config.group_size} dk={config.head_dim} dv={config.v_dim}"
    if isinstance(q_start, torch.Tensor):
        return f"{size} q_start={q_start.tolist()}"
    return f"{size} q_start={q_start}" if q_start else size


def draw(
    branch: str,
    config: NSAConfig,
    rows: int,
    dtype: str,
    *,
    batch: int = 2,
    keys: int | None = None,
    q_start: int | torch.Tensor = 0,
    seed: int = 0,
    more: str = "",
    **fields: Any,
) -> Case:
    """Normal inputs of a branch. ``keys`` tokens exist, ``max(q_start) + rows`` when None.

    Selected attention gets the lists that the specification selects for other, random keys. ``more`` is added
    to the name; ``fields`` are those of :class:`Case`.
    """
    length = int(torch.as_tensor(q_start).max()) + rows if keys is None else keys
    blocks, heads = num_compressed_blocks(length, config), config.num_kv_heads
    tensors = {"q": normal(batch, rows, config.num_heads, config.head_dim, seed=seed)}
    if branch in ("cmp", "score"):
        tensors["k_cmp"] = normal(batch, blocks, heads, config.head_dim, seed=seed + 1)
        if branch == "cmp":
            tensors["v_cmp"] = normal(batch, blocks, heads, config.v_dim, seed=seed + 2)
    else:
        tensors["k"] = normal(batch, length, heads, config.head_dim, seed=seed + 1)
        tensors["v"] = normal(batch, length, heads, config.v_dim, seed=seed + 2)
    if branch == "sel":
        other = normal(batch, blocks, heads, config.head_dim, seed=seed + 3)
        tensors["block_indices"] = reference.select_blocks(
            tensors["q"], other, config, q_start=q_start, kv_len=length
        )
    name = label(config, rows, batch, q_start) + (f" {more}" if more else "")
    kv_len = length if branch == "score" else None
    rounded = {n: t.to(DTYPES[dtype]) if t.is_floating_point() else t for n, t in tensors.items()}
    return Case(name, branch, config, dtype, rounded, q_start=q_start, kv_len=kv_len, **fields)


def changed(case: Case, more: str = "", **tensors: torch.Tensor) -> Case:
    """The case with other tensors, rounded to its dtype, and ``more`` added to its name."""
    rounded = {n: t.to(DTYPES[case.dtype]) if t.is_floating_point() else t for n, t in tensors.items()}
    fields = {name: getattr(case, name) for name in case.__dataclass_fields__}
    named = f"{case.name} {more}" if more else case.name
    return type(case)(**(fields | {"tensors": {**case.tensors, **rounded}, "name": named}))


def layer(
    config: NSAConfig,
    length: int,
    dtype: str,
    *,
    batch: int = 2,
    chunks: Sequence[int] = (),
    more: str = "",
    **fields: Any,
) -> LayerCase:
    """Normal tokens ``x`` of a layer, given as ``fields`` of :class:`LayerCase` say."""
    x = normal(batch, length, LAYER_DIM, seed=length).to(DTYPES[dtype])
    name = label(config, length, batch, 0) + (f" {more}" if more else "")
    return LayerCase(name, "layer", config, dtype, {"x": x}, chunks=tuple(chunks), **fields)


def attention(
    config: NSAConfig, rows: int, dtype: str, *, batch: int = 2, more: str = "", **fields: Any
) -> LayerCase:
    """Normal inputs of :func:`nsa.nsa_attention`; gates between 0 and 1."""
    blocks, heads = num_compressed_blocks(rows, config), config.num_kv_heads
    tensors = {"q": normal(batch, rows, config.num_heads, config.head_dim, seed=0)}
    for seed, (branch, length) in enumerate((("cmp", blocks), ("sel", rows), ("win", rows)), 1):
        tensors[f"k_{branch}"] = normal(batch, length, heads, config.head_dim, seed=seed)
        tensors[f"v_{branch}"] = normal(batch, length, heads, config.v_dim, seed=seed + 3)
    tensors["gates"] = normal(batch, rows, config.num_heads, 3, seed=7).sigmoid()
    rounded = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    name = label(config, rows, batch, 0) + (f" {more}" if more else "")
    return LayerCase(name, "layer", config, dtype, rounded, mode="attention", **fields)
