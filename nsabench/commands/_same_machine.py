"""Whether a run may go on here: new rows must be able to stand beside the old ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsabench.store import StoreError

_MUST_AGREE = {
    "commit": ("commit",),
    "torch": ("torch", "version"),
    "torch threads": ("torch", "threads"),
    "CPU": ("cpu", "model"),
}


def refuse_other_machine(info: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """StoreError where the run of ``info`` was begun with another commit, torch, CPU, GPU or thread count."""
    before = info.get("environment")
    for what, path in _MUST_AGREE.items():
        _refuse_unless_equal(info, what, _dig(before, path), _dig(here, path))
    gpus = ([gpu.get("uuid") for gpu in _dig(env, ("gpus",)) or []] for env in (before, here))
    _refuse_unless_equal(info, "GPUs", *gpus)


def _refuse_unless_equal(info: Mapping[str, Any], what: str, old: Any, new: Any) -> None:
    if old != new:
        raise StoreError(
            f"run {info['run_id']} was begun with {what} {old!r}, here it is {new!r}; start a new run"
        )


def _dig(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
