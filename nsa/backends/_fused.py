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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One fused attention call with lse. ``q (N,G,R,D), k (N,G,S,D), v (N,G,S,DV) -> o (N,G,R,DV), lse
    (N,G,R)``.

    The public SDPA function returns no lse, so this calls the operators it is made of. ``mask`` is additive;
    ``causal`` aligns top-left.
    """
    value_dim = v.shape[-1]
    width = max(q.shape[-1], value_dim)
    q, k, v = (_pad_to(t, width) for t in (q, k, v))
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    else:
        bias = None if mask is None else _aligned(mask.expand(*q.shape[:3], k.shape[2]))
        o, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, 0.0, causal, scale=scale
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
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu":
        dim, value_dim = q.shape[-1], v.shape[-1]
        grad, q, k, v, o = (_pad_to(t, max(dim, value_dim)) for t in (grad, q, k, v, o))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        again, _ = attend(leaves[0], leaves[1], leaves[2], mask, causal, scale)
        dq, dk, dv = torch.autograd.grad(again, leaves, grad)
    return dq, dk, dv


def _rows(t: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``(B,T,H*G,D) -> (B*H, 1, T*G, D)``: the G queries of a token are neighbouring rows over one K and V,
    so that a group is one matrix product instead of G small ones. A view for keys (G = 1) of one sequence.
    """
    batch, length, heads, dim = t.shape
    group = heads // kv_heads
    apart = t.reshape(batch, length, kv_heads, group, dim).transpose(1, 2)
    return apart.reshape(batch * kv_heads, 1, length * group, dim)


def _apart(rows: torch.Tensor, group: int) -> torch.Tensor:
    """``(N, 1, R*G, D) -> (N, G, R, D)``: the kernel's own causal mask wants a token a row."""
    return rows.squeeze(1).unflatten(1, (-1, group)).transpose(1, 2)


def _causal_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, q, o = (_apart(t, group) for t in (grad, q, o))
    k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
    lse = _apart(lse.unsqueeze(-1), group).squeeze(-1)
    dq, dk, dv = _attend_backward(grad, q, k, v, o, lse, None, True, scale)
    dtype = lse.dtype
    dk, dv = dk.sum(1, keepdim=True, dtype=dtype), dv.sum(1, keepdim=True, dtype=dtype)
    return dq.transpose(1, 2).flatten(1, 2).unsqueeze(1), dk, dv


def _heads(rows: torch.Tensor, like: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The inverse, ``(B*H, T*G, ...) -> (B,T,H*G,...)``, for the batch and length of ``like``."""
    batch, length, heads = like.shape[:3]
    apart = rows.reshape(batch, kv_heads, length, heads // kv_heads, *rows.shape[2:]).transpose(1, 2)
    return apart.reshape(batch, length, heads, *rows.shape[2:])


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[Piece], scale: float
    ) -> Output:
        kv_heads = k.shape[2]
        group = q.shape[2] // kv_heads
        rows, keys, values = (_rows(t, kv_heads) for t in (q, k, v))
        o = q.new_zeros(len(rows), rows.shape[2], v.shape[-1])
        lse = torch.full(
            o.shape[:2], NEG_INF, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
        )
        for piece in pieces:
            if piece.copies > len(rows) and q.device.type == "cpu":
                _forward_copies(piece, rows, keys, values, group, scale, o, lse)
            else:
                for single in piece.each():
                    _forward_piece(single, rows, keys, values, group, scale, o, lse)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.pieces, ctx.scale = pieces, scale
        out, log_sum = _heads(o, q, kv_heads), _heads(lse, q, kv_heads)
        ctx.mark_non_differentiable(log_sum)
        return out, log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        kv_heads = k.shape[2]
        group = q.shape[2] // kv_heads
        rows, keys, values, upstream = (_rows(t, kv_heads) for t in (q, k, v, grad))
        dq = torch.zeros_like(rows)
        # Sums over pieces run in fp32 at least: a key belongs to many pieces.
        dk, dv = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (keys, values))
        for piece in [single for several in ctx.pieces for single in several.each()]:
            span, seen = slice(piece.row * group, piece.row_end * group), slice(piece.key, piece.key_end)
            mask, empty = _mask(piece, q, group)
            part_grad, part_lse = upstream[:, :, span], lse[:, span].unsqueeze(1)
            if empty is not None:
                part_grad = part_grad.masked_fill(empty, 0.0)
                part_lse = part_lse.masked_fill(empty.squeeze(-1), 0.0)
            given = (
                part_grad,
                rows[:, :, span],
                keys[:, :, seen],
                values[:, :, seen],
                o[:, span].unsqueeze(1),
            )
            if piece.causal:
                part_q, part_k, part_v = _causal_backward(*given, part_lse, group, ctx.scale)
            else:
                part_q, part_k, part_v = _attend_backward(*given, part_lse, mask, False, ctx.scale)
            dq[:, :, span] = part_q
            dk[:, :, seen] += part_k
            dv[:, :, seen] += part_v
        gradients = ((dq, q), (dk, k), (dv, v))
        return *(_heads(d.squeeze(1), like, kv_heads).to(like.dtype) for d, like in gradients), None, None


def _forward_piece(
    piece: Piece,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: int,
    scale: float,
    o: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """One piece of all sequences and KV heads; writes its rows of ``o (B*H, T*G, DV)`` and ``lse``."""
    span, seen = slice(piece.row * group, piece.row_end * group), slice(piece.key, piece.key_end)
    mask, empty = _mask(piece, rows, group)
    q, k, v = rows[:, :, span], keys[:, :, seen], values[:, :, seen]
    if piece.causal:
        k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
        part, part_lse = attend(_apart(q, group), k, v, None, True, scale)
        o[:, span], lse[:, span] = part.transpose(1, 2).flatten(1, 2), part_lse.mT.flatten(1)
        return
    part, part_lse = attend(q, k, v, mask, False, scale)
    if empty is not None:
        part = part.masked_fill(empty, 0.0)
        part_lse = part_lse.masked_fill(empty.squeeze(-1), NEG_INF)
    o[:, span], lse[:, span] = part.squeeze(1), part_lse.squeeze(1)


def _forward_copies(
    piece: Piece,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: int,
    scale: float,
    o: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """All copies of a piece in one call a KV head: the copies are its batch, their keys overlapping
    windows of one K.
    """
    mask, _ = _mask(piece, rows, group)
    step, width = piece.row_end - piece.row, piece.key_end - piece.key
    span = slice(piece.row * group, (piece.row + step * piece.copies) * group)
    for n in range(len(rows)):
        k, v = (t[n, 0, piece.key :].unfold(0, width, step)[: piece.copies].mT for t in (keys, values))
        q = rows[n, 0, span].unflatten(0, (piece.copies, -1))
        part, part_lse = attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), mask, False, scale)
        o[n, span] = part.flatten(0, 2)
        lse[n, span] = part_lse.flatten()


def _mask(piece: Piece, like: torch.Tensor, group: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The additive mask ``(B*H or 1, 1, rows * G, keys)`` and, where rows may be empty, which are.

    An empty row is shown its first key, so that no kernel meets a row of -inf; its result is cleared by the
    caller.
    """
    if not piece.patches:
        return None, None
    parts = [patch.mask() for patch in piece.patches]
    rows, keys = piece.row_end - piece.row, piece.key_end - piece.key
    mask = like.new_zeros(max(part.shape[0] for part in parts), rows, group, keys)
    for patch, part in zip(piece.patches, parts, strict=True):
        mask[..., patch.column : patch.column + part.shape[-1]].add_(part.unsqueeze(2))
    mask = mask.flatten(1, 2).unsqueeze(1)
    if not piece.may_be_empty:
        return mask, None
    empty = (mask == NEG_INF).all(-1, keepdim=True)
    first = torch.arange(keys, device=like.device) == 0
    return mask.masked_fill_(empty & first, 0.0), empty
