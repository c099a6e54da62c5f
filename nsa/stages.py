"""What whoever measures a step can see of it, and change: its named stages, and the blocks it selects.

Free when nobody does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES = ("proj", "compress", "cmp", "score", "sel", "win", "gate")

StageFactory = Callable[[str], AbstractContextManager[object]]
Reselect = Callable[[torch.Tensor, int | torch.Tensor], torch.Tensor]

_OFF: AbstractContextManager[None] = nullcontext()
_factory: StageFactory | None = None
_reselect: Reselect | None = None


def stage(name: str) -> AbstractContextManager[object]:
    """The context in which the stage ``name`` runs: the active hook's, else one shared null context."""
    return _OFF if _factory is None else _factory(name)


@contextmanager
def stage_hook(factory: StageFactory) -> Iterator[None]:
    """Run every stage of NSA as ``with factory(name):`` while this context is open.

    ``name`` is one of ``proj, compress, cmp, score, sel, win, gate``; stages never nest. Hooks do: the
    innermost one is active and the outer one comes back when it closes. The hook is process-wide, so one
    measurement runs at a time.
    """
    global _factory
    outer, _factory = _factory, factory
    try:
        yield
    finally:
        _factory = outer


def settled_blocks(chosen: torch.Tensor, q_start: int | torch.Tensor) -> torch.Tensor:
    """The blocks to attend where ``chosen (B,T,H,n)`` were chosen: the active hook's answer, else those."""
    if _reselect is None:
        return chosen
    blocks = _reselect(chosen, q_start)
    if (blocks.shape, blocks.dtype, blocks.device) != (chosen.shape, chosen.dtype, chosen.device):
        got, need = ((tuple(t.shape), t.dtype, str(t.device)) for t in (blocks, chosen))
        raise ValueError(f"a selection hook must return {need}, got {got}")
    return blocks


def reselecting() -> bool:
    """Whether a selection hook is active."""
    return _reselect is not None


@contextmanager
def selection_hook(reselect: Reselect) -> Iterator[None]:
    """Attend the blocks ``reselect(chosen, q_start)`` instead of the ``chosen`` ones while this is open.

    ``chosen`` is ``(B,T,H,n)`` int32 as :func:`nsa.select_blocks` gives it, ``q_start`` the position of its
    first query; the result has its shape, dtype and device. The scores are computed all the same: a step
    does the work it always does, which is what a benchmark with made-up blocks needs (``block_indices`` of
    :func:`nsa.nsa_attention` skips that work). A hook that returns ``chosen`` itself only records. It is
    process-wide, called once per attention (once for each packed sequence), in no stage; the innermost one is
    active. A CUDA graph keeps reading the tensor that was returned while it was captured.
    """
    global _reselect
    outer, _reselect = _reselect, reselect
    try:
        yield
    finally:
        _reselect = outer
