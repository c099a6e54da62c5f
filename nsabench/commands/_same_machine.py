"""Whether rows of two times may stand beside each other: those of a run that goes on, those of two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    for what, old, new in _differences(info.get("environment"), here):
        raise StoreError(
            f"run {info['run_id']} was begun with {what} {old!r}, here it is {new!r}; start a new run"
        )


def refuse_unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """StoreError where two runs were measured with another torch, CPU, GPU or thread count, or do not say;
    their commits may differ.
    """
    before, after = first.get("environment"), second.get("environment")
    ids = f"{first['run_id']} and {second['run_id']}"
    if not before or not after:
        raise StoreError(f"{ids} do not both say where they were measured; --across-machines compares them")
    for what, old, new in _differences(before, after):
        if what != "commit":
            raise StoreError(f"{ids} differ in {what}: {old!r}, {new!r}; --across-machines compares them")


def _differences(before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """What two environments do not agree on: its name and both values."""
    values = {what: (_dig(before, path), _dig(after, path)) for what, path in _MUST_AGREE.items()}
    values["GPUs"] = _gpus(before), _gpus(after)
    for what, (old, new) in values.items():
        if old != new:
            yield what, old, new


def _gpus(environment: Any) -> list[Any]:
    return [gpu.get("uuid") for gpu in _dig(environment, ("gpus",)) or []]


def _dig(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
