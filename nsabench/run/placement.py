"""Where tensors lie in a CPU's memory: each round on copies that lie elsewhere.

Which lines and pages of two tensors fall on each other decides some per cent of a short step's time, and a
process puts them in the same places each time it runs: neither more rounds nor more processes average that
out. Copies at places drawn by chance do (the idea of Stabilizer, Curtsinger and Berger, ASPLOS 2013).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from nsabench.measure import available_bytes
from nsabench.run.arm import Arm
from nsabench.run.rotation import MEMORY_PART, copy_bytes

PLACES = 5
"""Places that the rounds take turns on, the first one included."""

LINE_BYTES = 64
_REACH_BYTES = 2**14
"""Within how much a tensor's beginning is drawn: some pages, for the low bits of an address count."""


def placements(arms: Iterable[Arm]) -> dict[Arm, int]:
    """How many places each arm on a CPU has, where that is more than one.

    As many as fit into half of the free memory, for all arms alike. None for a backward by itself: every copy
    would hold the graph of a whole forward.
    """
    living = [arm for arm in arms if arm.fields["status"] == "ok" and arm.fields["timer"] == "cpu"]
    if not living or living[0].cell.passes == "bwd":
        return {}
    workloads = {arm.workload: arm for arm in living}
    each = sum(copy_bytes(workload) for workload in workloads)
    affordable = math.floor(MEMORY_PART * available_bytes("cpu") / max(each, 1))
    count = min(PLACES, 1 + affordable, living[0].policy.rounds)
    if count < 2:
        return {}
    for workload, arm in workloads.items():
        try:
            copies = workload.copies(count)[1:]
        except (RuntimeError, TypeError):  # tensors that torch does not copy
            return {}
        chance = random.Random(f"{arm.cell.seed} {arm.process} places")
        for one in copies:
            scatter(one, chance)
    return dict.fromkeys(living, count)


def scatter(thing: Any, chance: random.Random) -> int:
    """Move every tensor that ``thing`` holds to a place drawn by chance; returns how many storages moved.

    Tensors that share memory share it afterwards. ``thing`` is any object, looked through by its attributes,
    mappings and sequences; it must be the only one that holds these tensors.
    """
    moved: dict[int, tuple[torch.Tensor, int]] = {}
    left: list[torch.Tensor] = []  # none of them is freed before all have moved: an address names one storage
    for tensor in _tensors(thing, set()):
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            continue
        if storage.data_ptr() not in moved:
            start = LINE_BYTES * chance.randrange(_REACH_BYTES // LINE_BYTES)
            room = torch.empty(storage.nbytes() + _REACH_BYTES, dtype=torch.uint8)
            held = torch.empty(0, dtype=torch.uint8).set_(storage)
            room[start : start + storage.nbytes()] = held
            moved[storage.data_ptr()] = room, start
            left.append(held)
        room, start = moved[storage.data_ptr()]
        offset = start // tensor.element_size() + tensor.storage_offset()
        tensor.data = torch.empty(0, dtype=tensor.dtype).set_(
            room.untyped_storage(), offset, tensor.shape, tensor.stride()
        )
    return len(moved)


def _tensors(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(thing) in seen or isinstance(thing, str | bytes | type | ModuleType | FunctionType | MethodType):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    parts: Iterable[Any] = ()
    if isinstance(thing, Mapping):
        parts = thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        parts = thing
    elif hasattr(thing, "__dict__"):
        parts = vars(thing).values()
    for part in parts:
        yield from _tensors(part, seen)
