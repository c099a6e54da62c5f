"""The mistakes behind the field reports, made here on purpose, to see the size of their errors.

Each function returns a line of text. MAE is the mean absolute error.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nsa import NSAConfig, reference
from nsa.blocks import visible_compressed_blocks
from nsabench.verify.cases import draw, layer, small
from nsabench.verify.ours import build_layer


def mae(mine: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean absolute difference."""
    return float((mine.double() - exact.double()).abs().mean())


def keyed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax attention ``(B,T,HQ,DV)`` over the keys that ``allowed (..., T, S)`` names; NaN without one."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True).transpose(1, 2)


def nan_rows() -> str:
    """Boolean masks the wrong way round, and rows of them that allow nothing."""
    q, k, v = (torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=~causal)
    plain = (q @ k.transpose(-1, -2) / 4).masked_fill(causal, float("-inf")).softmax(-1) @ v
    rows = [int(out.isnan().any(-1).sum()) for out in (fused, plain)]
    return (
        f"what the inverted mask gives here: 4 of 32 rows have no key, {rows[0]} of them NaN through "
        f"the SDPA of torch {torch.__version__}, {rows[1]} by a plain softmax"
    )


def small_s() -> str:
    """Full attention of a layer by an inverted mask, and by a causal flag on one query and its past."""
    length = 8
    case = layer(small(window_size=16), length, "fp32", only="win", trained=False)
    built = build_layer(case, "cpu")
    with torch.no_grad():
        given = built.attention_inputs(case.tensors["x"])
        q, k, v = (given[name] for name in ("q", "k_win", "v_win"))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        exact = built.out(keyed(q, k, v, causal).flatten(2))
        inverted = built.out(keyed(q, k, v, ~causal).flatten(2))
        first = torch.zeros(length, length, dtype=torch.bool)
        first[:, 0] = True  # what is_causal=True sees in one query and t + 1 keys: it aligns top-left
        flagged = built.out(keyed(q, k, v, first).flatten(2))
    some = inverted.isfinite().all(-1)
    return (
        f"what the inverted boolean mask gives here: MAE {mae(inverted[some], exact[some]):.3g}; what "
        f"is_causal=True gives for one query over its t + 1 keys (it sees key 0 alone): "
        f"MAE {mae(flagged, exact):.3g}"
    )


def pre_extracted_windows() -> str:
    """One query over its window's keys with a causal flag."""
    config = small(window_size=24)
    t = draw("win", config, 80, "fp64").tensors
    exact = reference.sliding_attention(t["q"], t["k"], t["v"], config)[0]
    first = (torch.arange(80) - config.window_size + 1).clamp_min(0)
    alone = t["v"][:, first].repeat_interleave(config.group_size, 2)
    wider = keyed(t["q"], t["k"], t["v"], torch.ones(80, 80, dtype=torch.bool).tril().triu(-24))
    return (
        f"what causal=True gives here over each query's window cut out beforehand, aligned top-left (it sees "
        f"the window's first key alone): MAE {mae(alone, exact):.3g}; a window of w + 1: "
        f"{mae(wider, exact):.3g}"
    )


def rectangle() -> str:
    """Compressed attention with a causal flag on T queries and C keys."""
    config = small()
    t = draw("cmp", config, 80, "fp64").tensors
    blocks = t["k_cmp"].shape[1]
    exact = reference.compressed_attention(t["q"], t["k_cmp"], t["v_cmp"], config)[0]
    seen = visible_compressed_blocks(torch.arange(80), config) > 0
    errors = {}
    for name, shift in (("bottom-right", blocks - 80), ("top-left", 0)):
        allowed = torch.arange(blocks) <= torch.arange(80)[:, None] + shift
        rows = seen & allowed.any(-1)
        wrong = keyed(t["q"], t["k_cmp"], t["v_cmp"], allowed)
        errors[name] = mae(wrong[:, rows], exact[:, rows])
    said = ", ".join(f"aligned {name} MAE {error:.3g}" for name, error in errors.items())
    return f"what causal=True gives here on the rectangle of 80 queries and {blocks} blocks: {said}"


def causal_packs() -> str:
    """Packed selection with a causal flag: one pack is G queries over their selected tokens."""
    errors = {"top-left": 0.0, "bottom-right": 0.0}
    config = NSAConfig(
        8, 2, 16, compression_block_size=8, compression_stride=4, selection_block_size=16,
        num_selected_blocks=4, window_size=24,
    )  # fmt: skip
    t = draw("sel", config, 80, "fp64", batch=1).tensors
    exact = reference.selected_attention(t["q"], t["k"], t["v"], t["block_indices"], config)[0]
    for row in range(80):
        for head in range(2):
            lists = t["block_indices"][0, row, head]
            keys = [s for s in range(row + 1) if s // 16 in lists]
            own = slice(4 * head, 4 * head + 4)
            q, k, v = t["q"][:, row, own, None], t["k"][:, keys, head, None], t["v"][:, keys, head, None]
            for name, shift in (("top-left", 0), ("bottom-right", len(keys) - 4)):
                allowed = torch.arange(len(keys)) <= torch.arange(4)[:, None] + shift
                packed = keyed(q[:, :, 0, None], k, v, allowed).squeeze(2).nan_to_num()
                errors[name] += mae(packed[0], exact[0, row, own]) / 160
    said = ", ".join(f"aligned {name} MAE {error:.3g}" for name, error in errors.items())
    return f"what causal=True gives here over packs of G = 4 queries: {said}"
