"""A task with a known structure: needles far back are asked for at the end, some one by one and some as a
segment to repeat in order. Whoever answers must find the block in which the answer lies.

A needle is one byte, a key with its value, so that one attention can answer. A question is a byte that names
a key; the byte after it is the answer, which names the value. A sequence, from its first byte to its last::

    haystack, with needles and the segment among decoys | decoys over the reach of all windows | questions

A decoy is a needle with a key that nobody asks for in this sequence: no block is empty, and none can be told
by how its bytes look. The needles of the segment stand side by side and are asked for in order. Among the
questions stand some more needles side by side and behind them their questions, in another order: those
answers lie within the window. They teach what a question means; what is far is then a matter of finding it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nsabench.plan import PlanError

KEYS, VALUES = 20, 8
FIRST_QUESTION, FIRST_ANSWER, FIRST_NEEDLE = 0x40, 0x58, 0x60
NEEDLE, COPY = 1, 2
NEAR = 4
"""Needles within the window, where it is wide enough for so many with their questions."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sequences:
    """Sequences and what is known of them.

    ``tokens (B,S+1)`` int64. Of the targets ``tokens[:, 1:]``: ``kind (B,S)`` int64, NEEDLE, COPY or 0 where
    the target does not count; ``distance (B,S)`` int64, from the question to its needle, bytes, 0 where the
    target does not count.
    """

    tokens: Array
    kind: Array
    distance: Array


@dataclass(frozen=True)
class Task:
    """How much of what a sequence holds.

    Args:
        S: bytes that are read; a sequence has one more.
        reach: no answer lies between the window and this distance, bytes.
        asked: needles of the haystack, asked for one by one.
        near: needles that stand side by side before their questions, in each of `clusters` clusters.
        copy: bytes of the segment.
    """

    S: int
    reach: int
    asked: int = 4
    near: int = NEAR
    copy: int = 4
    clusters: int = 2

    def __post_init__(self) -> None:
        if self.haystack < 2 * (self.asked + self.copy):
            least = self.S + 2 * (self.asked + self.copy) - self.haystack
            raise PlanError(
                f"--S: {self.S} is too short for the synthetic task, whose answers lie at least {self.reach} "
                f"bytes back (the windows of all layers); allowed: at least {least}"
            )

    @property
    def tail(self) -> int:
        """Bytes of the questions, their answers and the near needles."""
        return 2 * (self.asked + self.copy) + 3 * self.near * self.clusters

    @property
    def haystack(self) -> int:
        """Bytes before the reach."""
        return self.S + 1 - self.tail - self.reach


def task_of(S: int, w: int, layers: int) -> Task:
    """The task for a decoder's length, window and depth. PlanError where they leave no room."""
    if w < 2:
        raise PlanError(f"--w: {w} is too narrow for the synthetic task; allowed: at least 2")
    # The last question of n needles and n questions with answers stands at most 3 n - 2 behind its needle.
    return Task(S, reach=layers * (w - 1) + 1, near=min(NEAR, (w + 1) // 3))


def retrieval(rng: np.random.Generator, count: int, task: Task) -> Sequences:
    """``count`` sequences."""
    total = task.S + 1
    keys = _shuffled(rng, count, KEYS)
    ends = np.cumsum([task.asked + task.near * task.clusters, task.copy])
    single, in_order, decoys = np.split(keys, ends, axis=1)
    chosen = rng.integers(0, decoys.shape[1], (count, total))
    tokens = _needle(np.take_along_axis(decoys, chosen, 1), rng.integers(0, VALUES, (count, total)))
    made = Sequences(tokens, np.zeros((count, task.S), np.int64), np.zeros((count, task.S), np.int64))

    far, segment = _places(rng, count, task)
    values = rng.integers(0, VALUES, single.shape)
    letters = rng.integers(0, VALUES, (count, task.copy))
    near, questions, run = _tail(rng, count, task)
    _put(tokens, np.concatenate([far, near], 1), _needle(single, values))
    places = segment + np.arange(task.copy)
    _put(tokens, places, _needle(in_order, letters))
    _ask(made, NEEDLE, questions, single, values, np.concatenate([far, near], 1))
    _ask(made, COPY, run, in_order, letters, places)
    return made


def _places(rng: np.random.Generator, count: int, task: Task) -> tuple[Array, Array]:
    """Where the haystack's needles ``(B,asked)`` and its segment ``(B,1)`` stand."""
    slots = _shuffled(rng, count, task.haystack - task.copy + 1)
    segment = slots[:, :1]
    # A slot behind the segment's lies as much further on as the segment is longer than one byte.
    far = slots[:, 1 : task.asked + 1]
    return far + np.where(far > segment, task.copy - 1, 0), segment


def _tail(rng: np.random.Generator, count: int, task: Task) -> tuple[Array, Array, Array]:
    """Where the needles of all clusters ``(B,near)``, the questions of all needles ``(B,asked+near)`` and
    those of the segment ``(B,copy)`` stand: parts in an order by chance, the segment's questions one after
    the other.
    """
    lengths = np.array([2] * task.asked + [3 * task.near] * task.clusters + [2 * task.copy])
    order = _shuffled(rng, count, len(lengths))
    begins = np.empty_like(order)
    ends = lengths[order].cumsum(1)
    np.put_along_axis(begins, order, ends - lengths[order], 1)
    begins += task.S + 1 - task.tail
    clusters = begins[:, task.asked : -1, None]
    near = clusters + np.arange(task.near)
    orders = _shuffled(rng, count * task.clusters, task.near).reshape(near.shape)
    about_near = clusters + task.near + 2 * orders
    questions = np.concatenate([begins[:, : task.asked], about_near.reshape(count, -1)], 1)
    return near.reshape(count, -1), questions, begins[:, -1:] + 2 * np.arange(task.copy)


def _needle(keys: Array, values: Array) -> Array:
    return np.asarray(FIRST_NEEDLE + keys * VALUES + values, np.int64)


def _shuffled(rng: np.random.Generator, count: int, size: int) -> Array:
    """The numbers below ``size`` in an order by chance, ``(count,size)``."""
    return rng.permuted(np.broadcast_to(np.arange(size), (count, size)), axis=1)


def _put(tokens: Array, where: Array, what: Array) -> None:
    np.put_along_axis(tokens, where, what, 1)


def _ask(made: Sequences, kind: int, where: Array, keys: Array, values: Array, answers: Array) -> None:
    _put(made.tokens, where, FIRST_QUESTION + keys)
    _put(made.tokens, where + 1, FIRST_ANSWER + values)
    _put(made.kind, where, np.full_like(where, kind))
    _put(made.distance, where, where - answers)
