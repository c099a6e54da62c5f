"""Named stages of a step, visible to whoever measures it and free when nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

STAGES = ("proj", "compress", "cmp", "score", "sel", "win", "gate")

StageFactory = Callable[[str], AbstractContextManager[object]]

_OFF: AbstractContextManager[None] = nullcontext()
_factory: StageFactory | None = None


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
