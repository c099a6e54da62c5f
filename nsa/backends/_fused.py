"""Attention in pieces through the fused kernels behind torch's SDPA: one call a piece, memory of one piece.

The backward runs over the same pieces and rebuilds their masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nsa.backends._pieces import NEG_INF, Output, Piece


def attend_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[Piece], scale: float
) -> Output:
    """Attention over pieces with disjoint rows, differentiable in q, k and v.

    ``q (B,T,HQ,D), k (B,S,H,D), v (B,S,H,DV) -> o (B,T,HQ,DV), lse (B,T,HQ)``; rows in no piece are 0 and
    -inf.
    """
    result: Output = _Pieces.apply(q, k, v, pieces, scale)
    return result


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One fused attention call with lse. ``q (N,G,R,D), k (N,G,S,D), v (N,G,S,DV) -> o (N,G,R,DV), lse
    (N,G,R)``.

    The public SDPA function returns no lse, so this calls the operators it is made of. ``mask`` is additive.
    """
    value_dim = v.shape[-1]
    width = max(q.shape[-1], value_dim)
    q, k, v = (_pad_to(t, width) for t in (q, k, v))
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
    else:
        bias = None if mask is None else _aligned(mask.expand(*q.shape[:3], k.shape[2]))
        o, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, False, scale=scale
        )
        lse = lse[..., : q.shape[2]]  # the kernel pads lse to a multiple of its tile
    return o[..., :value_dim], lse


def _pad_to(t: torch.Tensor, width: int) -> torch.Tensor:
    return t if t.shape[-1] == width else torch.nn.functional.pad(t, (0, width - t.shape[-1]))


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """The same bias with row strides of a multiple of 16 elements, which the CUDA kernel requires."""
    keys = bias.shape[-1]
    return torch.nn.functional.pad(bias, (0, -keys % 16))[..., :keys]


def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        dim, value_dim = q.shape[-1], v.shape[-1]
        grad, q, k, v, o = (_pad_to(t, max(dim, value_dim)) for t in (grad, q, k, v, o))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, lse, 0.0, False, attn_mask=mask, scale=scale
        )
        return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        again, _ = attend(leaves[0], leaves[1], leaves[2], mask, scale)
        dq, dk, dv = torch.autograd.grad(again, leaves, grad)
    return dq, dk, dv


def _grouped(t: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``(B,T,H*G,D) -> (B*H, G, T, D)``, a view for B = 1."""
    return t.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[Piece], scale: float
    ) -> Output:
        batch, rows, heads = q.shape[:3]
        kv_heads = k.shape[2]
        group = heads // kv_heads
        qg, kg, vg = (_grouped(t, kv_heads) for t in (q, k, v))
        o = q.new_zeros(batch, rows, kv_heads, group, v.shape[-1])
        lse = torch.full(
            o.shape[:-1], NEG_INF, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
        )
        for piece in pieces:
            if piece.copies > len(qg) and q.device.type == "cpu":
                _forward_copies(piece, qg, kg, vg, scale, o, lse)
            else:
                for single in piece.each():
                    _forward_piece(single, qg, kg, vg, scale, o, lse)
        o, lse = o.flatten(2, 3), lse.flatten(2, 3)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.pieces, ctx.scale = pieces, scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        batch, kv_heads = q.shape[0], k.shape[2]
        group = q.shape[2] // kv_heads
        qg, kg, vg, og, gg = (_grouped(t, kv_heads) for t in (q, k, v, o, grad))
        lse_g = _grouped(lse.unsqueeze(-1), kv_heads).squeeze(-1)
        dq = q.new_zeros(q.shape).unflatten(2, (kv_heads, group))
        # Sums over pieces run in fp32 at least: a key belongs to many pieces.
        dk, dv = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (k, v))
        for piece in [single for several in ctx.pieces for single in several.each()]:
            span, keys = slice(piece.row, piece.row_end), slice(piece.key, piece.key_end)
            mask, empty = _mask(piece, q)
            upstream, part_lse = gg[:, :, span], lse_g[:, :, span]
            if empty is not None:
                upstream = upstream.masked_fill(empty, 0.0)
                part_lse = part_lse.masked_fill(empty.squeeze(-1), 0.0)
            part_q, part_k, part_v = _attend_backward(
                upstream, qg[:, :, span], _repeat(kg[:, :, keys], group), _repeat(vg[:, :, keys], group),
                og[:, :, span], part_lse, mask, ctx.scale,
            )  # fmt: skip
            dq[:, span] = part_q.unflatten(0, (batch, kv_heads)).permute(0, 3, 1, 2, 4)
            for total, part in ((dk, part_k), (dv, part_v)):
                total[:, keys] += (
                    part.sum(1, dtype=total.dtype).unflatten(0, (batch, kv_heads)).transpose(1, 2)
                )
        return dq.flatten(2, 3), dk.to(k.dtype), dv.to(v.dtype), None, None


def _forward_piece(
    piece: Piece,
    qg: torch.Tensor,
    kg: torch.Tensor,
    vg: torch.Tensor,
    scale: float,
    o: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """One piece of all sequences and KV heads; writes its rows of ``o (B,T,H,G,DV)`` and ``lse
    (B,T,H,G)``.
    """
    span, keys = slice(piece.row, piece.row_end), slice(piece.key, piece.key_end)
    group, heads = qg.shape[1], (o.shape[0], o.shape[2])
    mask, empty = _mask(piece, qg)
    k, v = _repeat(kg[:, :, keys], group), _repeat(vg[:, :, keys], group)
    part, part_lse = attend(qg[:, :, span], k, v, mask, scale)
    if empty is not None:
        part = part.masked_fill(empty, 0.0)
        part_lse = part_lse.masked_fill(empty.squeeze(-1), NEG_INF)
    o[:, span] = part.unflatten(0, heads).permute(0, 3, 1, 2, 4)
    lse[:, span] = part_lse.unflatten(0, heads).permute(0, 3, 1, 2)


def _forward_copies(
    piece: Piece,
    qg: torch.Tensor,
    kg: torch.Tensor,
    vg: torch.Tensor,
    scale: float,
    o: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """All copies of a piece in one call a KV head: the copies are its batch, their keys overlapping
    windows of one K.
    """
    mask, _ = _mask(piece, qg)
    rows, width, group = piece.row_end - piece.row, piece.key_end - piece.key, qg.shape[1]
    span = slice(piece.row, piece.row + rows * piece.copies)
    for n in range(len(qg)):
        b, h = divmod(n, o.shape[2])
        windows = [
            t[n, 0, piece.key :].unfold(0, width, rows)[: piece.copies].mT.unsqueeze(1) for t in (kg, vg)
        ]
        q = qg[n, :, span].unflatten(1, (piece.copies, rows)).transpose(0, 1)
        part, part_lse = attend(q, _repeat(windows[0], group), _repeat(windows[1], group), mask, scale)
        o[b, span, h].unflatten(0, (piece.copies, rows)).copy_(part.transpose(1, 2))
        lse[b, span, h].unflatten(0, (piece.copies, rows)).copy_(part_lse.transpose(1, 2))


def _repeat(t: torch.Tensor, group: int) -> torch.Tensor:
    return t.expand(-1, group, -1, -1)


def _mask(piece: Piece, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The additive mask ``(B*H or 1, 1, rows, keys)`` and, where rows may be empty, which are.

    An empty row is shown its first key, so that no kernel meets a row of -inf; its result is cleared by the
    caller.
    """
    if not piece.patches:
        return None, None
    parts = [patch.mask() for patch in piece.patches]
    rows, keys = piece.row_end - piece.row, piece.key_end - piece.key
    mask = like.new_zeros(max(part.shape[0] for part in parts), 1, rows, keys)
    for patch, part in zip(piece.patches, parts, strict=True):
        mask[..., patch.column : patch.column + part.shape[-1]].add_(part.unsqueeze(1))
    if not piece.may_be_empty:
        return mask, None
    empty = (mask == NEG_INF).all(-1, keepdim=True)
    first = torch.arange(keys, device=like.device) == 0
    return mask.masked_fill_(empty & first, 0.0), empty
