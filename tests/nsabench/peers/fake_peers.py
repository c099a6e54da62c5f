"""Small stand-ins for other implementations, written from what their sources compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from nsa import NSAConfig, reference


def fake_fla(seen: list[dict[str, Any]]) -> Any:
    """In place of `nsabench.peers.fla._ops`: modules with fla's functions. What they get goes to ``seen``."""

    def compression(q, k, v, block_size, scale):  # type: ignore[no-untyped-def]
        seen.append({"queries": q.shape[1], "blocks": k.shape[1], "block_size": block_size})
        rows, blocks = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, 2).float() for t in (k, v))
        logits = torch.einsum("bthd,bchd->bhtc", q.float(), k) * scale
        logits = logits.masked_fill((blocks + 1) * block_size - 1 > rows, float("-inf"))
        p = logits.softmax(-1).nan_to_num(0.0)
        return torch.einsum("bhtc,bchd->bthd", p, v).to(q.dtype), logits.logsumexp(-1).transpose(1, 2)

    def selection(q, k, v, block_indices, block_size, scale):  # type: ignore[no-untyped-def]
        seen.append({"slots": block_indices.shape[-1], "dtype": block_indices.dtype})
        config = NSAConfig(
            q.shape[2], k.shape[2], q.shape[3], v.shape[3], block_size, block_size, block_size, 4
        )
        assert scale == config.scale
        return reference.selected_attention(q, k, v, block_indices, config, q_start=k.shape[1] - q.shape[1])[
            0
        ]

    def topk(q, k, n, block_size, scale):  # type: ignore[no-untyped-def]
        seen.append({"blocks": k.shape[1], "n": n})
        config = NSAConfig(q.shape[2], k.shape[2], q.shape[3], None, *(block_size,) * 3, n)
        blocks = reference.select_blocks(q, k, config).long()
        return blocks.flip(-1)  # best first, -1 anywhere

    def parallel_nsa(q, k, v, *, block_indices, block_counts, block_size, scale):  # type: ignore[no-untyped-def]
        assert block_counts == block_indices.shape[-1]
        return selection(q, k, v, block_indices, block_size, scale)

    def parallel_topk(q, k, tokens, lse, n, block_size, scale):  # type: ignore[no-untyped-def]
        known = {} if lse is None else {"lse": True}
        seen.append({"blocks": k.shape[1], "tokens": tokens, **known})
        config = NSAConfig(q.shape[2], k.shape[2], q.shape[3], None, *(block_size,) * 3, n)
        blocks = reference.select_blocks(q, k, config, q_start=tokens - q.shape[1], kv_len=tokens)
        return pad(blocks, (0, (1 << (n - 1).bit_length()) - n), value=-1)

    def parallel_compression(q, k, v, tokens, block_size, scale):  # type: ignore[no-untyped-def]
        assert tokens == q.shape[1]
        return compression(q, k, v, block_size, scale)

    def parallel_apply(q, k, v, block_indices, block_counts, block_size, scale, cu_seqlens):  # type: ignore[no-untyped-def]
        assert cu_seqlens is None
        return selection(q, k, v, block_indices[..., :block_counts], block_size, scale)

    modules = {
        "naive": SimpleNamespace(
            naive_nsa_compression=compression, naive_nsa_selection=selection, naive_nsa_topk=topk
        ),
        "compression": SimpleNamespace(parallel_nsa_compression=parallel_compression),
        "parallel": SimpleNamespace(
            parallel_nsa=parallel_nsa,
            parallel_nsa_topk=parallel_topk,
            ParallelNSAFunction=SimpleNamespace(apply=parallel_apply),
        ),
    }
    return modules.__getitem__


class FakeSparseAttention(nn.Module):
    """A layer as native-sparse-attention-pytorch has it: three branches with dense masks, its own scores."""

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        kv_heads: int,
        sliding_window_size: int,
        compress_block_size: int,
        compress_block_sliding_stride: int,
        selection_block_size: int,
        num_selected_blocks: int,
        causal: bool,
        norm: bool,
        compress_mlp: nn.Module,
        strategy_combine_mlp: nn.Module,
    ) -> None:
        super().__init__()
        assert causal
        assert not norm
        assert selection_block_size % compress_block_sliding_stride == 0
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.block, self.stride = compress_block_size, compress_block_sliding_stride
        self.fine, self.window = selection_block_size, sliding_window_size
        self.num_selected_blocks = num_selected_blocks
        self.sliding_window = nn.Module()
        self.to_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * dim_head)
        self.combine_heads = nn.Linear(heads * dim_head, dim)
        self.k_compress, self.v_compress = compress_mlp, compress_mlp
        self.memory = nn.Parameter(torch.zeros(2, kv_heads, 1, dim_head))
        self.scale = 0.0

    def forward(self, x: torch.Tensor, fine_selection_flex_mask: Any = None) -> torch.Tensor:
        sizes = [n * self.dim_head for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (
            t.unflatten(-1, (-1, self.dim_head)).transpose(1, 2) for t in self.to_qkv(x).split(sizes, -1)
        )
        tokens, group = x.shape[1], self.heads // self.kv_heads
        t = torch.arange(tokens)
        count = tokens // self.stride
        windows = pad(k, (0, 0, self.block - self.stride, 0))[
            :, :, : count * self.stride + self.block - self.stride
        ]
        windows = (
            windows.unfold(2, self.block, self.stride).transpose(-1, -2)
            if count
            else k.new_zeros(*k.shape[:2], 0, self.block, self.dim_head)
        )
        memory = self.memory.unsqueeze(1).expand(-1, x.shape[0], -1, -1, -1)
        ck, cv = (
            torch.cat([mem, fold(windows)], 2)
            for mem, fold in zip(memory, (self.k_compress, self.v_compress), strict=True)
        )
        ends = pad((torch.arange(count) + 1) * self.stride - 1, (1, 0), value=-1)
        sees = ends < t[:, None]
        logits = self._logits(q, ck, self.dim_head**-0.5).masked_fill(~sees, -1e30)
        compressed = self._mix(logits, cv)
        q, k = self.rotary_emb.rotate_queries_with_cached_keys(q, k)

        per = self.fine // self.stride
        scores = logits[..., 1:].unflatten(1, (-1, group)).mean(2)
        scores = scores[..., : scores.shape[-1] // per * per].unflatten(-1, (-1, per)).mean(-1)
        own = t // self.fine
        scores = scores.masked_fill(own[:, None] == torch.arange(scores.shape[-1]), -1e30)
        scores = pad(scores, (1, 0), value=-1e3).softmax(-1)[..., 1:]
        best = scores.topk(min(self.num_selected_blocks, scores.shape[-1]), -1)
        if best.indices.shape[-1] and fine_selection_flex_mask is not None:
            fine_selection_flex_mask(best.indices, num_grouped_queries=group)
        blocks = -(-tokens // self.fine)
        taken = torch.zeros(*scores.shape[:3], blocks, dtype=torch.bool)
        taken = taken.scatter(-1, best.indices, best.values > 1e-10) | (own[:, None] == torch.arange(blocks))
        causal = t[:, None] >= t
        allowed = (taken[..., t // self.fine] & causal).repeat_interleave(group, 1)
        scale = self.scale if best.indices.shape[-1] else self.dim_head**-0.5
        fine = self._mix(self._logits(q, k, scale).masked_fill(~allowed, -1e30), v)

        near = causal & (t[:, None] - t <= self.window)
        sliding = self._mix(self._logits(q, k, self.sliding_window.scale).masked_fill(~near, -1e30), v)
        gates = self.to_strategy_combine(x)
        out = sum(gates[..., i, None] * o for i, o in enumerate((compressed, fine, sliding)))
        return self.combine_heads(out.transpose(1, 2).flatten(2))

    def _logits(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        return q @ k.repeat_interleave(self.heads // self.kv_heads, 1).transpose(-1, -2) * scale

    def _mix(self, logits: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1) @ v.repeat_interleave(self.heads // self.kv_heads, 1)
