"""The NSA layer: projections, rotary positions, compression, attention, gates, output (section 3 of the
paper).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nsa.attention import nsa_attention
from nsa.cache import KV, BranchViews, KVCache
from nsa.compress import COMPRESSIONS
from nsa.config import NSAConfig
from nsa.packing import Packed
from nsa.routes import Routing
from nsa.stages import stage

TABLE_ROWS = 4096  # rotations computed at a time


class NativeSparseAttention(nn.Module):
    """One layer of Native Sparse Attention, for training, prefill, chunked prefill and decode alike.

    Args:
        config: heads and block geometry.
        dim: width of the token stream.
        rope: base of the rotary embedding (half-split pairs), or None for no positions. Needs an even
        ``head_dim``.
        gate: ``sigmoid`` (the paper) or ``softmax`` over the three branches.
        compress: ``mean``, ``conv`` or ``mlp``, for keys and for values.
        shared_kv: one K and V for the three branches instead of one each (section 3.3.3 argues for one each).
        compress_rotated: compress rotated keys; by default compression sees un-rotated keys and the
        compressed key is
            rotated at its block's first position.
        gate_hidden: width of the gate's hidden layer; ``max(16, dim // 8)`` when None.
    """

    def __init__(
        self,
        config: NSAConfig,
        dim: int,
        *,
        rope: float | None = 10000.0,
        gate: str = "sigmoid",
        compress: str = "mean",
        shared_kv: bool = False,
        compress_rotated: bool = False,
        gate_hidden: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be an integer of at least 1, got {dim!r}")
        if gate not in ("sigmoid", "softmax"):
            raise ValueError(f"gate must be sigmoid or softmax, got {gate!r}")
        if compress not in COMPRESSIONS:
            raise ValueError(f"compress must be one of {', '.join(COMPRESSIONS)}, got {compress!r}")
        if rope is not None and config.head_dim % 2:
            raise ValueError(f"rope rotates pairs and needs an even head_dim, got {config.head_dim}")
        self.config, self.dim, self.rope, self.gate = config, dim, rope, gate
        self.shared_kv, self.compress_rotated = shared_kv, compress_rotated
        # One projection for everything that reads the token. What is rotated comes first, so that one
        # rotation serves it: q | k_sel k_win | k_cmp | v_cmp v_sel v_win | gate; with shared_kv: q | k | v |
        # gate.
        heads, kv_heads = config.num_heads, config.num_kv_heads
        hidden = max(16, dim // 8) if gate_hidden is None else gate_hidden
        self._plain_keys = 1 if shared_kv or not compress_rotated else 0
        self._rotated_keys = 0 if shared_kv else 3 - self._plain_keys
        self._sizes = [
            (heads + kv_heads * self._rotated_keys) * config.head_dim,
            kv_heads * self._plain_keys * config.head_dim,
            kv_heads * (1 if shared_kv else 3) * config.v_dim,
            hidden,
        ]
        self.proj = nn.Linear(dim, sum(self._sizes), bias=False)
        self.gate_out = nn.Linear(hidden, 3 * heads)
        self.out = nn.Linear(heads * config.v_dim, dim, bias=False)
        self.compress_k = COMPRESSIONS[compress](config, config.head_dim)
        self.compress_v = COMPRESSIONS[compress](config, config.v_dim)
        self._rotations: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(
        self,
        x: torch.Tensor,
        cache: KVCache | None = None,
        routing: str | Routing = "auto",
        *,
        cu_seqlens: torch.Tensor | None = None,
        block_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x (B,T,dim) -> y (B,T,dim)``.

        With a cache, ``x`` continues the sequences it holds (the whole prompt, a chunk of it, or one token)
        and the cache grows by T. Without one, ``x`` is the whole sequence.

        Args:
            cu_seqlens: packed sequences, ``(num_sequences + 1,)`` integers from 0 to T; needs ``B = 1`` and
            no cache.
                The result is what each sequence gives on its own.
            block_indices: the blocks that these T tokens attend, as :func:`nsa.nsa_attention` takes them; by
                default the scores choose. Of packed sequences, each counts its own blocks from 0.

        Raises:
            ValueError: shapes that do not fit, a full cache, a cache of another layer's configuration.
            UnsupportedRoute: a named backend cannot run here.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, T, {self.dim}), got {tuple(x.shape)}")
        packed = None
        if cu_seqlens is not None:
            if x.shape[0] != 1 or cache is not None:
                raise ValueError(f"cu_seqlens needs B = 1 and no cache, got B = {x.shape[0]}")
            packed = Packed.of(cu_seqlens, x.shape[1], self.config, device=x.device)
        if x.shape[0] == 0 or x.shape[1] == 0:
            return x.new_zeros(x.shape)
        inputs = self.attention_inputs(x, cache, packed)
        o = nsa_attention(
            **inputs, config=self.config, routing=routing, block_indices=block_indices, packed=packed
        )
        with stage("proj"):
            y: torch.Tensor = self.out(o.flatten(2))
        return y

    def attention_inputs(
        self, x: torch.Tensor, cache: KVCache | None = None, packed: Packed | None = None
    ) -> dict[str, Any]:
        """The tensors :func:`nsa.nsa_attention` needs for ``x`` and where they begin, by argument name.

        A cache grows by T.
        """
        if cache is not None:
            self._check_cache(x, cache)
        start = 0 if cache is None else cache.length
        with stage("proj"):
            q, raw, sel, win, gates = self._project(x, start, packed)
        with stage("compress"):
            if packed is not None:
                views = BranchViews(self._compress_each(raw, packed), sel, win, 0)
            elif cache is None:
                views = BranchViews(self._compress(raw, 0), sel, win, 0)
            else:
                views = cache.append(raw, sel, win, self._compress)
        return {
            "q": q,
            "k_cmp": views.cmp[0],
            "v_cmp": views.cmp[1],
            "k_sel": views.sel[0],
            "v_sel": views.sel[1],
            "k_win": views.win[0],
            "v_win": views.win[1],
            "gates": gates,
            "q_start": start,
            "win_start": views.win_start,
        }

    def _project(
        self, x: torch.Tensor, start: int, packed: Packed | None
    ) -> tuple[torch.Tensor, KV, KV, KV, torch.Tensor]:
        """``x (B,T,dim)`` -> q, and (key, value) of cmp, sel and win, and gates ``(B,T,HQ,3)``."""
        config = self.config
        at = slice(start, start + x.shape[1]) if packed is None else packed.positions()
        length = start + x.shape[1] if packed is None else packed.longest
        rotated, plain, values, hidden = self.proj(x).split(self._sizes, -1)
        rotated = self._rotate(rotated.unflatten(-1, (-1, config.head_dim)), at, length)
        plain = plain.unflatten(-1, (-1, config.head_dim)) if self._plain_keys else plain
        value = values.unflatten(-1, (-1, config.v_dim)).split(config.num_kv_heads, 2)
        gates = self.gate_out(nn.functional.silu(hidden)).unflatten(-1, (config.num_heads, 3))
        gates = gates.sigmoid() if self.gate == "sigmoid" else gates.softmax(-1)
        if self.shared_kv:
            shared = (self._rotate(plain, at, length), value[0])
            return rotated, (shared[0] if self.compress_rotated else plain, value[0]), shared, shared, gates
        heads = [config.num_heads] + [config.num_kv_heads] * self._rotated_keys
        q, sel, win, *rest = rotated.split(heads, 2)
        return q, (rest[0] if rest else plain, value[0]), (sel, value[1]), (win, value[2]), gates

    def _compress(self, raw: KV, first_block: int) -> KV:
        stride = self.config.compression_stride
        key = self.compress_k(raw[0])
        if not self.compress_rotated:
            end = (first_block + key.shape[1]) * stride
            key = self._rotate(key, slice(first_block * stride, end, stride), end)
        # Under autocast a learned phi may give another dtype than its tokens have.
        return key.to(raw[0].dtype), self.compress_v(raw[1]).to(raw[1].dtype)

    def _compress_each(self, raw: KV, packed: Packed) -> KV:
        """The compressed blocks of packed sequences, one after the other."""
        keys, values = zip(
            *(self._compress((raw[0][:, part], raw[1][:, part]), 0) for part, _ in packed.parts()),
            strict=True,
        )
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _rotate(self, x: torch.Tensor, at: slice | torch.Tensor, length: int) -> torch.Tensor:
        """Rotate ``x (B,T,heads,D)`` by the T positions ``at``, all below ``length`` (RoPE, half-split
        pairs).
        """
        if self.rope is None or x.shape[1] == 0:
            return x
        cos, sin = self._rotation(length, x)
        # Two products and a sum: addcmul does not vectorise over a strided x on a CPU.
        return (x * cos[at]).add_(x.roll(x.shape[-1] // 2, -1) * sin[at])

    def _rotation(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin tables ``(at least length, 1, D)``, computed in fp64 and kept in ``like``'s
        dtype.
        """
        key = (like.device, like.dtype)
        table = self._rotations.get(key)
        if table is None or table[0].shape[0] < length:
            # Kept beyond this call: a tensor made in inference mode could never be trained with.
            with torch.inference_mode(False):
                table = self._tables(1 << max(10, (length - 1).bit_length()), like)
            self._rotations[key] = table
        return table

    def _tables(self, rows: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.rope is not None
        half = self.config.head_dim // 2
        exponent = torch.arange(half, device=like.device, dtype=torch.float64) / half
        frequency = float(self.rope) ** -exponent
        tables = tuple(like.new_empty(rows, 1, 2 * half) for _ in range(2))
        # In parts: a long table's angles in fp64 would be the largest tensors of a small model.
        for first in range(0, rows, TABLE_ROWS):
            part = slice(first, min(first + TABLE_ROWS, rows))
            position = torch.arange(part.start, part.stop, device=like.device, dtype=torch.float64)
            angle = torch.outer(position, frequency).unsqueeze(1)
            sin = angle.sin()
            tables[0][part] = angle.cos().repeat(1, 1, 2)
            tables[1][part] = torch.cat([-sin, sin], -1)
        return tables[0], tables[1]

    def _check_cache(self, x: torch.Tensor, cache: KVCache) -> None:
        if cache.config != self.config or cache.shared_kv != self.shared_kv:
            raise ValueError("this cache was made for another configuration than the layer's")
        grad = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        if grad and not cache.keep_graph:
            raise ValueError(
                "a KVCache keeps no gradients: use torch.no_grad(), or KVCache(..., keep_graph=True)"
            )
