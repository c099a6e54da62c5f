"""NSA's composition, once: select, attend three times, gate (eq. 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nsa.blocks import num_selection_blocks
from nsa.config import NSAConfig
from nsa.packing import Packed
from nsa.routes import Request, Route, Routing, resolve
from nsa.stages import reselecting, settled_blocks, stage


class Tensors(NamedTuple):
    """What :func:`nsa_attention` is given, in its order."""

    q: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor
    k_sel: torch.Tensor
    v_sel: torch.Tensor
    k_win: torch.Tensor
    v_win: torch.Tensor
    gates: torch.Tensor

    def part(self, tokens: slice, blocks: slice) -> Tensors:
        """One of packed sequences."""
        return Tensors(
            *(t[:, blocks if name in ("k_cmp", "v_cmp") else tokens] for name, t in self._asdict().items())
        )


def nsa_attention(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    k_sel: torch.Tensor,
    v_sel: torch.Tensor,
    k_win: torch.Tensor,
    v_win: torch.Tensor,
    gates: torch.Tensor,
    config: NSAConfig,
    *,
    routing: str | Routing = "auto",
    q_start: int | torch.Tensor = 0,
    win_start: int = 0,
    block_indices: torch.Tensor | None = None,
    packed: Packed | None = None,
) -> torch.Tensor:
    """Native Sparse Attention of queries over compressed, selected and sliding keys (eq. 5).

    Args:
        q: ``(B,T,HQ,D)``.
        k_cmp, v_cmp: ``(B,C,H,D)``, ``(B,C,H,DV)``, the compressed blocks.
        k_sel, v_sel: ``(B,S,H,D)``, ``(B,S,H,DV)``, every token.
        k_win, v_win: like ``k_sel, v_sel``, or only the tokens from ``win_start`` on.
        gates: ``(B,T,HQ,3)`` for cmp, sel, win.
        routing: which backend computes each branch; a branch that is ``off`` does no work and adds nothing.
        q_start: absolute position of ``q[:, 0]``, an int or ``(B,)``.
        win_start: absolute position of ``k_win[:, 0]``; at most ``max(0, q_start - w + 1)``.
        block_indices: ``(B,T,H,n)`` int32, the blocks to attend where they are known already: no scores are
            computed. As :func:`nsa.select_blocks` gives them; -1 is an empty slot. They get no gradient.
        packed: the whole sequences that lie one after the other in ``B = 1``, with T = S; each attends only
            itself, and counts its blocks from 0. In one call where every branch's backend takes them so
            (``triton``), else one by one.

    Returns:
        ``o (B,T,HQ,DV)``, the gated sum, in q's dtype.

    Raises:
        ValueError: shapes that do not fit the configuration, or routing text that does not parse.
        UnsupportedRoute: a named backend cannot run here, with the reason of each row.
    """
    tensors = Tensors(q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates)
    more: dict[str, Any] = {
        "routing": routing,
        "q_start": q_start,
        "win_start": win_start,
        "block_indices": block_indices,
        "packed": packed,
    }
    if torch.compiler.is_compiling():
        # Routes are settled in Python, by facts that a trace would have to guard, and end in kernels that no
        # trace can enter.
        from nsa import untraced

        return untraced.run(nsa_attention, *tensors, config, **more)
    if torch.is_autocast_enabled(q.device.type):
        # A backend computes in its inputs' dtype and accumulates in fp32; autocast would undo both inside it.
        with torch.autocast(q.device.type, enabled=False):
            return nsa_attention(*tensors, config, **more)
    _check_shapes(*tensors, config)
    if packed is not None:
        _check_packed(packed, q, k_cmp, k_sel, k_win, q_start, win_start)
    if block_indices is not None:
        _check_blocks(block_indices, q, k_sel, config)
    request = Request(
        device=q.device.type,
        dtype=q.dtype,
        num_queries=q.shape[1] if packed is None else packed.longest,
        kv_len=k_sel.shape[1] if packed is None else packed.longest,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors[:-1]),
        config=config,
    )
    route = resolve(routing, request)
    if packed is not None and (reselecting() or not route.takes_packed):
        each = [
            nsa_attention(
                *tensors.part(tokens, blocks),
                config,
                routing=routing,
                block_indices=None if block_indices is None else block_indices[:, tokens],
            )
            for tokens, blocks in packed.parts()
        ]
        return torch.cat(each, 1) if each else q.new_empty(*q.shape[:3], config.v_dim)
    return _gated(route, tensors, config, q_start, win_start, block_indices, packed)


def _gated(
    route: Route,
    tensors: Tensors,
    config: NSAConfig,
    q_start: int | torch.Tensor,
    win_start: int,
    blocks: torch.Tensor | None,
    packed: Packed | None,
) -> torch.Tensor:
    """The branches of ``route``, one after the other, and their gated sum."""
    q, k_cmp, v_cmp, k_sel, v_sel, k_win, v_win, gates = tensors
    also: dict[str, Any] = {} if packed is None else {"packed": packed}
    known: dict[str, Any] = {}
    parts: list[tuple[int, torch.Tensor]] = []
    if route.cmp is not None:
        with stage("cmp"):
            part, lse = route.cmp(q, k_cmp, v_cmp, config, q_start=q_start, **also)
        parts.append((0, part))
        if route.shares_lse:
            known["lse"] = lse
    if route.sel is not None and route.score is not None:
        if blocks is None:
            with stage("score"):
                length = k_sel.shape[1]
                blocks = route.score(q, k_cmp, config, q_start=q_start, kv_len=length, **also, **known)
        blocks = settled_blocks(blocks, q_start)
        with stage("sel"):
            parts.append((1, route.sel(q, k_sel, v_sel, blocks, config, q_start=q_start, **also)[0]))
    if route.win is not None:
        with stage("win"):
            parts.append((2, route.win(q, k_win, v_win, config, q_start=q_start - win_start, **also)[0]))
    with stage("gate"):
        gates = gates.to(q.dtype).unsqueeze(-1)
        branch, part = parts[0]
        out = part * gates[..., branch, :]
        for branch, part in parts[1:]:
            out = torch.addcmul(out, part, gates[..., branch, :])
    return out


def _check_shapes(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    v_cmp: torch.Tensor,
    k_sel: torch.Tensor,
    v_sel: torch.Tensor,
    k_win: torch.Tensor,
    v_win: torch.Tensor,
    gates: torch.Tensor,
    config: NSAConfig,
) -> None:
    batch, rows = q.shape[:2]
    heads, kv_heads = config.num_heads, config.num_kv_heads
    expected = {
        "q": (q, (batch, rows, heads, config.head_dim)),
        "k_cmp": (k_cmp, (batch, k_cmp.shape[1], kv_heads, config.head_dim)),
        "v_cmp": (v_cmp, (batch, k_cmp.shape[1], kv_heads, config.v_dim)),
        "k_sel": (k_sel, (batch, k_sel.shape[1], kv_heads, config.head_dim)),
        "v_sel": (v_sel, (batch, k_sel.shape[1], kv_heads, config.v_dim)),
        "k_win": (k_win, (batch, k_win.shape[1], kv_heads, config.head_dim)),
        "v_win": (v_win, (batch, k_win.shape[1], kv_heads, config.v_dim)),
        "gates": (gates, (batch, rows, heads, 3)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def _check_packed(
    packed: Packed,
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    k_sel: torch.Tensor,
    k_win: torch.Tensor,
    q_start: int | torch.Tensor,
    win_start: int,
) -> None:
    tokens, blocks = sum(packed.lengths), sum(packed.blocks_each)
    found = [q.shape[0], q.shape[1], k_cmp.shape[1], k_sel.shape[1], k_win.shape[1]]
    if found != [1, tokens, blocks, tokens, tokens]:
        raise ValueError(
            f"packed sequences of {tokens} tokens and {blocks} compressed blocks need B = 1 and T, C, S = "
            f"{tokens}, {blocks}, {tokens}, got B = {found[0]} and {', '.join(map(str, found[1:4]))}, "
            f"and {found[4]} in the window"
        )
    if isinstance(q_start, torch.Tensor) or q_start or win_start:
        raise ValueError(
            f"packed sequences are whole: q_start and win_start must be 0, got {q_start} and {win_start}"
        )


def _check_blocks(blocks: torch.Tensor, q: torch.Tensor, k_sel: torch.Tensor, config: NSAConfig) -> None:
    """Shape, dtype and device; on a CPU also that the blocks exist, which costs a GPU a synchronisation."""
    shape = (*q.shape[:2], config.num_kv_heads, config.num_selected_blocks)
    if blocks.shape != shape:
        raise ValueError(f"block_indices must be {shape}, got {tuple(blocks.shape)}")
    if blocks.dtype != torch.int32 or blocks.device != q.device:
        got = f"{blocks.dtype} on {blocks.device}"
        raise ValueError(f"block_indices must be torch.int32 on {q.device}, got {got}")
    count = num_selection_blocks(k_sel.shape[1], config)
    if blocks.device.type == "cpu" and blocks.numel() and int(blocks.max()) >= count:
        raise ValueError(f"block_indices must be below {count}, got {int(blocks.max())}")
