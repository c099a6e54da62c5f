"""The whole core of another implementation: its branches composed as :func:`nsa.nsa_attention` composes ours,
each in the peer's own layouts, so that nothing but the peer's work and the gates is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from nsa import NSAConfig
from nsa.routes import Request
from nsabench.peers.branches import DTYPE_WORDS, Ask, PeerBranch, whole_sequences
from nsabench.peers.installed import located

HALVES = (torch.float16, torch.bfloat16)
WIDEST_WINDOW = 256
"""The largest head dim of flash-attn."""

Output = tuple[torch.Tensor, torch.Tensor | None]


class PeerCore(ABC):
    """Forward of whole sequences, from the first token on, as many queries as keys. Stateless.

    Tensors come as in :mod:`nsa.reference`. ``lists`` are selected blocks as the peer writes them, one
    tensor; what its choice gives goes to its selected attention as it is. ``chooses_alone``: whether a choice
    without the compressed branch does no more than choose.
    """

    chooses_alone = True

    @abstractmethod
    def refuse(self, request: Request, branches: Collection[str]) -> str:
        """Why it cannot run these of ``cmp, score, sel, win``, or an empty text. Imports nothing of it."""

    @abstractmethod
    def compressed(
        self, q: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, config: NSAConfig, *, chooses: bool
    ) -> tuple[torch.Tensor, Any]:
        """``o (B,T,HQ,DV)``, and what `choose` begins with where it follows, as ``chooses`` says."""

    @abstractmethod
    def choose(
        self, q: torch.Tensor, k_cmp: torch.Tensor, config: NSAConfig, known: Any = None
    ) -> torch.Tensor:
        """The lists of ``q``. ``known`` comes from `compressed` on the same ``q`` and ``k_cmp``; None where
        that did not run.
        """

    @abstractmethod
    def selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: torch.Tensor, config: NSAConfig
    ) -> torch.Tensor:
        """``o (B,T,HQ,DV)``."""

    @abstractmethod
    def sliding(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        """``o (B,T,HQ,DV)``."""

    @abstractmethod
    def lists_of(self, blocks: torch.Tensor, config: NSAConfig) -> torch.Tensor:
        """Blocks ``(B,T,H,n)`` as :func:`nsa.select_blocks` gives them, in the peer's form."""

    @abstractmethod
    def blocks_of(self, lists: torch.Tensor, batch: int, config: NSAConfig) -> torch.Tensor:
        """The inverse: ``(B,T,H,n)`` int32 ascending, -1 at the tail."""


def attend(
    core: PeerCore,
    branches: Collection[str],
    inputs: Mapping[str, Any],
    config: NSAConfig,
    *,
    lists: torch.Tensor | None = None,
    stage: Callable[[str], AbstractContextManager[object]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated sum ``(B,T,HQ,DV)`` of ``branches`` (of cmp, sel, win), and the lists that the peer chose.

    ``inputs`` are the arguments of :func:`nsa.nsa_attention`. ``lists``, in the peer's form, are attended in
    place of those that it chooses; it chooses all the same. Each stage runs in ``stage(name)``.
    """
    q, k_cmp = inputs["q"], inputs["k_cmp"]
    parts: list[tuple[int, torch.Tensor]] = []
    known: Any = None
    chosen: torch.Tensor | None = None
    if "cmp" in branches:
        with stage("cmp"):
            o, known = core.compressed(q, k_cmp, inputs["v_cmp"], config, chooses="sel" in branches)
        parts.append((0, o))
    if "sel" in branches:
        with stage("score"):
            chosen = core.choose(q, k_cmp, config, known)
        with stage("sel"):
            attended = chosen if lists is None else lists
            parts.append((1, core.selected(q, inputs["k_sel"], inputs["v_sel"], attended, config)))
    if "win" in branches:
        with stage("win"):
            parts.append((2, core.sliding(q, inputs["k_win"], inputs["v_win"], config)))
    with stage("gate"):
        gates = inputs["gates"].to(q.dtype).unsqueeze(-1)
        branch, part = parts[0]
        out = part * gates[..., branch, :]
        for branch, part in parts[1:]:
            out = torch.addcmul(out, part, gates[..., branch, :])
    return out, chosen


def branches_of(core: PeerCore, lists: Callable[[Ask], str] = lambda ask: "") -> tuple[PeerBranch, ...]:
    """The branches of a core one by one, with the signatures of :mod:`nsa.reference`; none gives an lse.

    ``lists`` says why it cannot attend the blocks of an :class:`Ask`, or returns an empty text.
    """

    def compressed(q: Any, k_cmp: Any, v_cmp: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
        return core.compressed(q, k_cmp, v_cmp, config, chooses=False)[0], None

    def select(
        q: Any, k_cmp: Any, config: NSAConfig, *, q_start: Any = 0, kv_len: int | None = None
    ) -> torch.Tensor:
        with torch.no_grad():
            return core.blocks_of(core.choose(q, k_cmp, config), q.shape[0], config)

    def selected(
        q: Any, k: Any, v: Any, block_indices: Any, config: NSAConfig, *, q_start: Any = 0
    ) -> Output:
        return core.selected(q, k, v, core.lists_of(block_indices, config), config), None

    def sliding(q: Any, k: Any, v: Any, config: NSAConfig, *, q_start: Any = 0) -> Output:
        return core.sliding(q, k, v, config), None

    def refuse(ask: Ask, branch: str) -> str:
        if ask.request.needs_grad:
            return "asked for forwards only"
        return whole_sequences(ask) or core.refuse(ask.request, (branch,)) or lists(ask)

    functions: dict[str, Callable[..., Any]] = {
        "cmp": compressed,
        "score": select,
        "sel": selected,
        "win": sliding,
    }
    return tuple(
        PeerBranch(branch, "", fn, partial(refuse, branch=branch)) for branch, fn in functions.items()
    )


def needs_gpu(request: Request) -> str:
    """Why Triton kernels that take halves cannot run, or an empty text."""
    if request.device != "cuda":
        return f"Triton kernels: need a CUDA GPU, got {request.device}"
    if request.dtype not in HALVES:
        return f"takes fp16 and bf16, got {DTYPE_WORDS[request.dtype]}"
    return ""


def needs_block(request: Request) -> str:
    """Why what cannot be launched without a compressed block cannot run, or an empty text."""
    least = request.config.compression_block_size
    return f"needs a whole compressed block, {least} tokens" if request.kv_len < least else ""


def needs_flash(request: Request, *others: str) -> str:
    """Why a window that is flash-attn's cannot run, or an empty text; ``others`` are modules that serve as
    well.
    """
    config = request.config
    package = located("flash_attn", "flash_attn_interface.py")
    if package is None and not any(find_spec(name) for name in others):
        return "its sliding branch is flash-attn's, which is not installed; ask with win=off"
    if config.head_dim != config.v_dim or config.head_dim > WIDEST_WINDOW:
        return f"its sliding branch takes one head dim up to {WIDEST_WINDOW}; ask with win=off"
    return ""


@lru_cache(maxsize=64)
def ends(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """``cu_seqlens`` of equal sequences, ``(B+1,)`` int32 on the device; made once."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def packed(t: torch.Tensor) -> torch.Tensor:
    """``(B,T,...) -> (B*T,...)``, a view of contiguous memory."""
    return t.flatten(0, 1)


def by_head(blocks: torch.Tensor) -> torch.Tensor:
    """``(B,T,H,n) -> (H,B*T,n)``, contiguous."""
    return blocks.permute(2, 0, 1, 3).flatten(1, 2).contiguous()


def by_token(lists: torch.Tensor, batch: int) -> torch.Tensor:
    """``(H,B*T,n) -> (B,T,H,n)``."""
    return lists.unflatten(1, (batch, -1)).permute(1, 2, 0, 3)


def ascending(lists: torch.Tensor, own: torch.Tensor, slots: int) -> torch.Tensor:
    """Blocks ``(B,T,H,any)`` in any order as ``(B,T,H,slots)`` int32, ascending, -1 at the tail. ``own (T,)``
    is the last block that exists for a query; what is past it is an empty slot.
    """
    last = torch.iinfo(torch.int32).max
    empty = (lists < 0) | (lists > own[:, None, None])
    ordered = lists.masked_fill(empty, last).sort(-1).values
    ordered = ordered.masked_fill(ordered == last, -1).to(torch.int32)[..., :slots]
    return torch.nn.functional.pad(ordered, (0, slots - ordered.shape[-1]), value=-1)
