"""What two clones document, in eager torch on a CPU: `native_sparse_attention` (XunhaoLai) and `flash_nsa`
(mdy666). Written from their sources, query by query, without the specification of this project.

What their kernels refuse is refused here; what they do not read is not read. `install` makes them importable.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests import flash_attn_emulator

HERE = "from tests.nsabench.peers.clones_emulator import"
OPERATORS = ("NSAHelper", "compress_attn", "select_attn", "slc_topk_indices", "swa_varlen_func")
FILES = {
    "native_sparse_attention/__init__.py": "",
    "native_sparse_attention/ops/__init__.py": f"{HERE} compressed_attention, topk_sparse_attention",
    "native_sparse_attention/ops/triton/topk_sparse_attention.py": "",
    "flash_nsa/__init__.py": f"{HERE} {', '.join(OPERATORS)}",
    "flash_nsa/ops/select_attn.py": "",
    "einops/__init__.py": "",
    "pkg_resources/__init__.py": "",
}
FLASH = {
    "flash_attn/__init__.py": "from tests.flash_attn_emulator import flash_attn_func, flash_attn_varlen_func",
    "flash_attn/flash_attn_interface.py": "",
}

seen: list[tuple[str, Any]] = []
"""What was called, and with what of interest."""


def no_stage(name: str) -> AbstractContextManager[object]:
    """A stage that nobody looks at."""
    return nullcontext()


def install(folder: Path, *, flash: bool = False) -> None:
    """Files that import as the clones would; with ``flash``, also as flash-attn."""
    for name, text in (FILES | (FLASH if flash else {})).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def compressed_attention(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    kernel_size,
    kernel_stride,
    block_size,
    topk,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q=None,
    max_seqlen_k=None,
    sm_scale=None,
    init_blocks=1,
    local_blocks=2,
):
    """Output ``(N,HQ,D)`` and lists ``(H,N,min(topk, blocks))``, ascending, -1 at the tail."""
    seen.append(("compressed_attention", topk))
    assert q.dtype == k.dtype == v.dtype
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert q.shape[0] > k.shape[0]
    assert v.shape[-1] == q.shape[-1]
    assert max_seqlen_k > 0
    o, p = _over_blocks(q, k, v, kernel_size, kernel_stride, cu_seqlens_q, cu_seqlens_k, sm_scale)
    if topk <= 0:
        warnings.warn("topk <= 0, returned topk_idx will be None", stacklevel=2)
        return o, None
    assert topk >= init_blocks + local_blocks
    blocks = -(-max_seqlen_q // block_size)
    lists = []
    for (a, b), weights in zip(pairwise(cu_seqlens_q.tolist()), p, strict=True):
        own = torch.arange(b - a) // block_size
        scores = _by_block(weights, kernel_size, kernel_stride, block_size, blocks)
        j = torch.arange(blocks)
        forced = (j < init_blocks) | ((own[:, None] >= j) & (own[:, None] < j + local_blocks))
        scores = scores.masked_fill(forced, float("inf"))
        chosen = scores.topk(min(topk, blocks), -1).indices.sort(-1).values
        lists.append(chosen.masked_fill(chosen > own[None, :, None], -1).to(torch.int32))
    return o, torch.cat(lists, 1)


def topk_sparse_attention(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale=None):  # type: ignore[no-untyped-def]
    """``(N,HQ,D)``: as many of the first slots count as hold a block that exists."""
    assert block_size in (32, 64, 128, 256)
    assert topk_idx.shape[:2] == (k.shape[1], q.shape[0])
    assert topk_idx.dtype == cu_seqlens.dtype == torch.int32
    seen.append(("topk_sparse_attention", topk_idx.shape[-1]))

    def slots(row: torch.Tensor, at: int) -> torch.Tensor:
        return row[: int(((row >= 0) & (row <= at // block_size)).sum())]

    return _over_lists(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale, slots)


class NSAHelper:
    """Sizes and lengths for all calls. Lengths that are equal are not looked at again."""

    x_cu_seqlens: torch.Tensor | None = None
    sizes = SimpleNamespace()
    blocks = 0

    @classmethod
    def set_hyperparameters(cls, **sizes: int) -> None:
        seen.append(("set_hyperparameters", sizes["window_size"]))
        cls.sizes = SimpleNamespace(**sizes)

    @classmethod
    def init_cu_seqlens(cls, x_cu_seqlens: torch.Tensor) -> None:
        if cls.x_cu_seqlens is not None and torch.equal(cls.x_cu_seqlens, x_cu_seqlens):
            return
        cls.x_cu_seqlens = x_cu_seqlens
        length = int((x_cu_seqlens[1:] - x_cu_seqlens[:-1]).max())
        cls.blocks = (length - cls.sizes.kernel_size) // cls.sizes.stride + 1
        assert cls.blocks > 0

    @classmethod
    def block_bounds(cls) -> torch.Tensor:
        assert cls.x_cu_seqlens is not None
        return torch.arange(len(cls.x_cu_seqlens)) * cls.blocks


def compress_attn(q, k, v, sm_scale=None):  # type: ignore[no-untyped-def]
    """Output ``(N,HQ,DV)`` and what stands for the lse: the weights themselves."""
    seen.append(("compress_attn", v.shape[-1]))
    sizes = NSAHelper.sizes
    where = (NSAHelper.x_cu_seqlens, NSAHelper.block_bounds())
    return _over_blocks(q, k, v, sizes.kernel_size, sizes.stride, *where, sm_scale)


def slc_topk_indices(q, k, lse, sm_scale=None, fp32=False, maybe_efficient_version=False):  # type: ignore[no-untyped-def]
    """Lists ``(H,N,top_n)``: first and last blocks, then the best, then the number of blocks."""
    seen.append(("slc_topk_indices", fp32))
    sizes, bounds = NSAHelper.sizes, NSAHelper.x_cu_seqlens
    assert bounds is not None
    length = int((bounds[1:] - bounds[:-1]).max())
    blocks = -(-length // sizes.block_size)
    lists = torch.full((k.shape[1], q.shape[0], sizes.top_n), blocks, dtype=torch.int32)
    for (a, b), weights in zip(pairwise(bounds.tolist()), lse, strict=True):
        scores = _by_block(weights, sizes.kernel_size, sizes.stride, sizes.block_size, blocks)
        stored = scores if fp32 else (scores**3).half().float()
        for t in range(b - a):
            own = t // sizes.block_size
            first = list(range(sizes.num_init_blocks))
            first += [own - i for i in range(sizes.num_local_blocks) if own - i not in first]
            for h in range(k.shape[1]):
                rest = [j for j in stored[h, t].argsort(descending=True, stable=True).tolist() if j <= own]
                row = [j for j in dict.fromkeys([*first, *rest]) if 0 <= j <= own][: sizes.top_n]
                lists[h, a + t, : len(row)] = torch.tensor(row)
    return lists, None


def select_attn(q, k, v, topk, sm_scale=None):  # type: ignore[no-untyped-def]
    """``(N,HQ,DV)``: as many of the first slots count as there are blocks up to the query, at most all."""
    sizes = NSAHelper.sizes
    assert topk.shape == (k.shape[1], q.shape[0], sizes.top_n)
    assert topk.is_contiguous()

    def slots(row: torch.Tensor, at: int) -> torch.Tensor:
        return row[: min(sizes.top_n, at // sizes.block_size + 1)]

    return _over_lists(q, k, v, topk, sizes.block_size, NSAHelper.x_cu_seqlens, sm_scale, slots)


def swa_varlen_func(q, k, v, sm_scale=None):  # type: ignore[no-untyped-def]
    """flash-attn's window of ``window_size`` keys before the query's own."""
    bounds = NSAHelper.x_cu_seqlens
    assert bounds is not None
    longest = int((bounds[1:] - bounds[:-1]).max())
    return flash_attn_emulator.flash_attn_varlen_func(
        *(q, k, v, bounds, bounds, longest, longest),
        softmax_scale=sm_scale,
        causal=True,
        window_size=(NSAHelper.sizes.window_size, -1),
    )


def _over_blocks(q, k, v, size, stride, bounds_q, bounds_k, scale):  # type: ignore[no-untyped-def]
    """Attention over compressed blocks, and by sequence its weights summed over a group, ``(H,T,C)``."""
    heads, kv_heads = q.shape[1], k.shape[1]
    outputs, weights = [], []
    for (a, b), (c, d) in zip(pairwise(bounds_q.tolist()), pairwise(bounds_k.tolist()), strict=True):
        keys, values = (t[c:d].float().repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        logits = torch.einsum("thd,chd->htc", q[a:b].float(), keys) * scale
        ends = torch.arange(d - c) * stride + size - 1
        p = logits.masked_fill(torch.arange(b - a)[:, None] < ends, float("-inf")).softmax(-1).nan_to_num(0.0)
        outputs.append(torch.einsum("htc,chd->thd", p, values).to(q.dtype))
        weights.append(p.unflatten(0, (kv_heads, -1)).sum(1))
    return torch.cat(outputs), weights


def _by_block(p: torch.Tensor, size: int, stride: int, block: int, blocks: int) -> torch.Tensor:
    """``(H,T,C) -> (H,T,blocks)``: a compressed block counts once for each of its strides in a block."""
    found = torch.zeros(*p.shape[:2], blocks)
    for c in range(p.shape[-1]):
        for part in range(size // stride):
            found[..., (c * stride + part * stride) // block] += p[..., c]
    return found


def _over_lists(q, k, v, lists, block, bounds, scale, slots):  # type: ignore[no-untyped-def]
    """Attention of each query over the blocks of its slots, causal."""
    outputs = []
    for a, b in pairwise(bounds.tolist()):
        allowed = torch.zeros(k.shape[1], b - a, b - a, dtype=torch.bool)
        for t in range(b - a):
            for h in range(k.shape[1]):
                for j in slots(lists[h, a + t], t).tolist():
                    allowed[h, t, j * block : (j + 1) * block] = True
        allowed &= torch.ones(b - a, b - a, dtype=torch.bool).tril()
        group = q.shape[1] // k.shape[1]
        keys, values = (t[a:b].float().repeat_interleave(group, 1) for t in (k, v))
        logits = torch.einsum("thd,shd->hts", q[a:b].float(), keys) * scale
        p = logits.masked_fill(~allowed.repeat_interleave(group, 0), float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", p, values).to(q.dtype))
    return torch.cat(outputs)
