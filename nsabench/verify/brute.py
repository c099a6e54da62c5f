"""The rules once more, as a Python loop over queries that shares nothing with the specification.

On the CPU, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nsa import NSAConfig
from nsabench.verify.subjects import Case, Tensors

Keys = Callable[[int, int, int], Sequence[int]]
"""The keys of (sequence, absolute position, KV head)."""


def answers(case: Case) -> Tensors:
    """``o`` and ``lse`` of a branch, or the ``blocks`` and ``scores`` of ``score``."""
    given = {n: t.double() if t.is_floating_point() else t for n, t in case.tensors.items()}
    config, starts = case.config, start_list(case)
    if case.branch == "score":
        return _chosen(given["q"], given["k_cmp"], config, starts, case.kv_len or 0)
    if case.branch == "cmp":
        count = given["k_cmp"].shape[1]
        return attended(
            given["q"], given["k_cmp"], given["v_cmp"], lambda b, t, h: visible(t, count, config), starts
        )
    length = given["k"].shape[1]
    if case.branch == "win":
        return attended(given["q"], given["k"], given["v"], lambda b, t, h: window(t, length, config), starts)
    lists = given["block_indices"].tolist()

    def selected(b: int, t: int, h: int) -> list[int]:
        return block_tokens(lists[b][t - starts[b]][h], t, length, config)

    return attended(given["q"], given["k"], given["v"], selected, starts)


def start_list(case: Case) -> list[int]:
    """The position of each sequence's first query."""
    if isinstance(case.q_start, torch.Tensor):
        return [int(start) for start in case.q_start]
    return [case.q_start] * case.tensors["q"].shape[0]


def visible(t: int, blocks: int, c: NSAConfig) -> list[int]:
    """Compressed blocks that a query at ``t`` sees (rule 1)."""
    return [i for i in range(blocks) if i * c.compression_stride + c.compression_block_size - 1 <= t]


def window(t: int, length: int, c: NSAConfig) -> list[int]:
    """Keys in the window of a query at ``t`` (rule 8)."""
    return [s for s in range(length) if t - c.window_size < s <= t]


def block_tokens(blocks: Sequence[int], t: int, length: int, c: NSAConfig) -> list[int]:
    """Tokens of the blocks up to ``t``, each once (rule 7)."""
    return [s for s in range(min(t + 1, length)) if s // c.selection_block_size in blocks]


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Keys, starts: Sequence[int]) -> Tensors:
    """Softmax attention of each query over its own keys; 0 and -inf where it has none."""
    batch, rows, heads, dim = q.shape
    group = heads // k.shape[2]
    o = q.new_zeros(batch, rows, heads, v.shape[-1])
    lse = q.new_full((batch, rows, heads), float("-inf"))
    for b in range(batch):
        for t in range(rows):
            for h in range(k.shape[2]):
                seen = keys(b, starts[b] + t, h)
                if not seen:
                    continue
                own = slice(h * group, (h + 1) * group)
                logits = q[b, t, own] @ k[b, seen, h].T / dim**0.5
                top = logits.amax(-1, keepdim=True)
                weights = (logits - top).exp()
                total = weights.sum(-1, keepdim=True)
                o[b, t, own] = (weights / total) @ v[b, seen, h]
                lse[b, t, own] = (top + total.log())[:, 0]
    return {"o": o, "lse": lse}


def _chosen(
    q: torch.Tensor, k_cmp: torch.Tensor, c: NSAConfig, starts: Sequence[int], length: int
) -> Tensors:
    batch, rows, _, dim = q.shape
    kv_heads, count = k_cmp.shape[2], -(-length // c.selection_block_size)
    scores = q.new_zeros(batch, rows, kv_heads, count)
    blocks = torch.full((batch, rows, kv_heads, c.num_selected_blocks), -1, dtype=torch.int32)
    for b in range(batch):
        for t in range(rows):
            seen = visible(starts[b] + t, k_cmp.shape[1], c)
            for h in range(kv_heads):
                group = q[b, t].unflatten(0, (kv_heads, -1))[h]
                p = (group @ k_cmp[b, seen, h].T / dim**0.5).softmax(-1).sum(0)
                scores[b, t, h] = torch.tensor(_pairs(p.tolist(), count, c), dtype=q.dtype)
                chosen = select(scores[b, t, h].tolist(), starts[b] + t, c)
                blocks[b, t, h, : len(chosen)] = torch.tensor(chosen)
    return {"blocks": blocks, "scores": scores}


def _pairs(p: Sequence[float], count: int, c: NSAConfig) -> list[float]:
    """Eq. 9, pair by pair."""
    per_selection = c.selection_block_size // c.compression_stride
    per_compression = c.compression_block_size // c.compression_stride
    total = [0.0] * count
    for j in range(count):
        for m in range(per_selection):
            for n in range(per_compression):
                i = per_selection * (j + 1) - 1 - m - n
                if 0 <= i < len(p):
                    total[j] += p[i]
    return total


def select(scores: Sequence[float], t: int, c: NSAConfig) -> list[int]:
    """Rule 6: the blocks of one query, ascending."""
    own = t // c.selection_block_size
    local = range(own - c.num_local_blocks + 1, own + 1)
    forced = {*range(c.num_initial_blocks), *local} & set(range(own + 1))
    others = sorted(set(range(own + 1)) - forced, key=lambda j: (-scores[j], j))
    return sorted([*forced, *others[: c.num_selected_blocks - len(forced)]])
