"""NSA's branches through compiled CPU kernels (``cpp.cpp``): forward only, sums in fp32.

Each token of each KV head is computed by itself over exactly the keys it attends, so a result does not depend
on batch, later tokens or threads by a bit. All keys are packed once a call; for a handful of queries that
costs more than it saves.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

from nsa.backends._cpp_library import library
from nsa.config import NSAConfig

Output = tuple[torch.Tensor, torch.Tensor]
PANEL = 64  # keys of a packed panel, as in cpp.cpp
# From so many queries on, values are packed too; a few queries read them where they lie.
PACK_VALUES_FROM = 16
# Scratch up to this many floats is kept for the next call: fresh memory costs a page fault every 4 KiB.
KEPT_FLOATS = 2**22

_FLOATS = ("q", "k", "v", "o", "lse", "panels", "values")
_POINTERS = (*_FLOATS, "blocks", "chosen", "starts")
_STRIDES = ("q_stride", "k_stride", "v_stride")
_SIZES = (
    *("batch", "rows", "kv_heads", "group", "keys", "dim", "value_dim"),
    *("slots", "window", "block", "compression_block", "stride", "initial", "local", "kv_len"),
)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64 * 3) for name in _STRIDES),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def compressed_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.compressed_attention`; fp32, fp16 and bf16, no gradient."""
    return _attend("nsa_compressed", q, k_cmp, v_cmp, config, q_start)


def sliding_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig, *, q_start: int | torch.Tensor = 0
) -> Output:
    """See :func:`nsa.reference.sliding_attention`; fp32, fp16 and bf16, no gradient."""
    return _attend("nsa_sliding", q, k, v, config, q_start)


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
) -> Output:
    """See :func:`nsa.reference.selected_attention`; fp32, fp16 and bf16, no gradient."""
    blocks = block_indices.to(torch.int32).contiguous()
    return _attend("nsa_selected", q, k, v, config, q_start, blocks=blocks)


def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    config: NSAConfig,
    *,
    q_start: int | torch.Tensor = 0,
    kv_len: int | None = None,
) -> torch.Tensor:
    """See :func:`nsa.reference.select_blocks`: the same sets, scores in fp32."""
    if kv_len is None:
        kv_len = q.shape[1] + (int(q_start.max()) if isinstance(q_start, torch.Tensor) else q_start)
    slots = config.num_selected_blocks
    chosen = torch.empty(*q.shape[:2], config.num_kv_heads, slots, dtype=torch.int32)
    _run("nsa_select", config, q_start, q=q.detach(), k=k_cmp.detach(), chosen=chosen, kv_len=kv_len)
    return chosen


def _attend(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    blocks: torch.Tensor | None = None,
) -> Output:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise RuntimeError("the cpp kernels compute no gradient; use torch.no_grad() or another backend")
    o = torch.empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[:3])
    _run(kernel, config, q_start, q=q, k=k, v=v, o=o, lse=lse, blocks=blocks)
    return o.to(q.dtype), lse


def _run(
    kernel: str,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    kv_len: int = 0,
    **tensors: torch.Tensor | None,
) -> None:
    """Fill in a call and make it; the tensors it names stay alive until it returns."""
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the cpp kernels take fp32, fp16 and bf16 on a cpu, got {q.dtype} on {q.device}")
    if q.numel() == 0:
        return
    (batch, rows), (keys, heads) = q.shape[:2], k.shape[1:3]
    loaded = library()
    panels = -(-keys // PANEL)
    starts = torch.as_tensor(q_start, dtype=torch.int64).expand(batch).contiguous()
    given: dict[str, Any] = {"q": _plain(q), "k": _plain(k), "starts": starts} | tensors
    packed = batch * heads * panels * PANEL
    lanes = loaded.nsa_lanes()
    width = -(-config.v_dim // lanes) * lanes
    sizes = [packed * config.head_dim]
    if (v := tensors.get("v")) is not None:
        given["v"] = _plain(v)
        if rows >= PACK_VALUES_FROM or width != config.v_dim:
            sizes.append(packed * width)
    given |= zip(("panels", "values"), _scratch(sum(sizes)).split(sizes), strict=False)
    call = _Call(
        batch=batch,
        rows=rows,
        kv_heads=heads,
        group=config.group_size,
        keys=keys,
        dim=config.head_dim,
        value_dim=config.v_dim,
        slots=config.num_selected_blocks,
        window=config.window_size,
        block=config.selection_block_size,
        compression_block=config.compression_block_size,
        stride=config.compression_stride,
        initial=config.num_initial_blocks,
        local=config.num_local_blocks,
        kv_len=kv_len,
        scale=config.scale,
        threads=torch.get_num_threads(),
        **{name: t.data_ptr() for name, t in given.items() if t is not None},
    )
    if (blocks := tensors.get("blocks")) is not None:
        call.slots = blocks.shape[-1]
    for name in ("q", "k", "v"):
        if given.get(name) is not None:
            getattr(call, f"{name}_stride")[:] = given[name].stride()[:3]
    getattr(loaded, kernel)(ctypes.byref(call))


class _Kept(threading.local):
    scratch = torch.empty(0)


_kept = _Kept()


def _scratch(floats: int) -> torch.Tensor:
    """Memory for one call of this thread, ``(floats,)``, with anything in it."""
    if floats > KEPT_FLOATS:
        return torch.empty(floats)
    if len(_kept.scratch) < floats:
        _kept.scratch = torch.empty(floats)
    return _kept.scratch[:floats]


def _plain(t: torch.Tensor) -> torch.Tensor:
    """fp32 with adjacent channels."""
    t = t.to(torch.float32)
    return t if t.stride(-1) == 1 else t.contiguous()
