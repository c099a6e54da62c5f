"""Data: pure functions of seed, step and rank, and a synthetic task that is what it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsabench.plan import PlanError
from nsabench.plan.training import ModelSettings, Settings
from nsabench.training.data import HELD_OUT, MOST_HELD_OUT, FileData, SyntheticData, open_data
from nsabench.training.synthetic import (
    COPY,
    FIRST_ANSWER,
    FIRST_NEEDLE,
    FIRST_QUESTION,
    KEYS,
    NEEDLE,
    VALUES,
    Sequences,
    Task,
    task_of,
)

LENGTHS, WINDOWS, LAYERS = st.integers(110, 400), st.integers(2, 24), st.integers(1, 2)


def synthetic(seed: int = 0, size: int = 6, S: int = 256, w: int = 16, layers: int = 2) -> SyntheticData:
    model = ModelSettings(layers=layers, w=w)
    data = open_data(Settings(data="synthetic", model=model, S=S, batch=size, seed=seed))
    assert isinstance(data, SyntheticData)
    return data


def from_file(path: Path, content: bytes, S: int = 16, size: int = 4, seed: int = 0) -> FileData:
    path.write_bytes(content)
    data = open_data(Settings(data=str(path), S=S, batch=size, seed=seed))
    assert isinstance(data, FileData)
    return data


def counted(made: Sequences) -> list[tuple[int, int]]:
    return [(int(b), int(t)) for b, t in zip(*made.kind.nonzero(), strict=True)]


@settings(max_examples=20)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 64))
def test_a_batch_depends_on_seed_step_and_rank_alone(seed: int, step: int, rank: int) -> None:
    tokens, mask = synthetic(seed).batch(step, rank, 65)
    other = synthetic(seed)
    other.batch(step + 1, rank, 65)
    again = other.batch(step, rank, 65)
    assert torch.equal(tokens, again[0])
    assert torch.equal(mask, again[1])
    for different in (
        synthetic(seed + 1).batch(step, rank, 65),
        other.batch(step + 1, rank, 65),
        other.batch(step, rank + 1, 66),
    ):
        assert not torch.equal(tokens, different[0])


@settings(max_examples=20)
@given(LENGTHS, WINDOWS, LAYERS, st.integers(1, 5))
def test_batches_have_the_agreed_shape(S: int, w: int, layers: int, size: int) -> None:
    tokens, mask = synthetic(size=size, S=S, w=w, layers=layers).batch(3, 0, 1)
    assert (tokens.shape, tokens.dtype) == ((size, S + 1), torch.int64)
    assert (mask.shape, mask.dtype) == ((size, S), torch.bool)
    assert 0 <= tokens.min() <= tokens.max() < 256
    assert mask.any(1).all()


@settings(max_examples=40)
@given(st.integers(0, 2**32), LENGTHS, WINDOWS, LAYERS)
def test_every_answer_lies_where_the_distance_says(seed: int, S: int, w: int, layers: int) -> None:
    """In a needle of the key that is asked for, and in no other."""
    data = synthetic(seed, S=S, w=w, layers=layers)
    for made in (data.sequences(seed % 7, 0), data.fresh(0, 4)):
        for b, t in counted(made):
            row = made.tokens[b]
            key, value = row[t] - FIRST_QUESTION, row[t + 1] - FIRST_ANSWER
            assert 0 <= key < KEYS
            assert 0 <= value < VALUES
            assert row[t - made.distance[b, t]] == FIRST_NEEDLE + key * VALUES + value
            needles = row[row >= FIRST_NEEDLE] - FIRST_NEEDLE
            assert (needles // VALUES == key).sum() == 1, "no other needle has this key"
        assert ((made.distance == 0) == (made.kind == 0)).all()


@settings(max_examples=40)
@given(st.integers(0, 2**32), LENGTHS, WINDOWS, LAYERS)
def test_answers_lie_within_the_window_or_past_all_windows(seed: int, S: int, w: int, layers: int) -> None:
    data = synthetic(seed, S=S, w=w, layers=layers)
    task = data.task
    made = data.fresh(0, 4)
    needles = made.distance[made.kind == NEEDLE]
    near = needles < w
    assert (needles[~near] > layers * (w - 1)).all()
    assert (made.distance[made.kind == COPY] > layers * (w - 1)).all()
    assert near.sum() == 4 * task.near * task.clusters
    assert (~near).sum() == 4 * task.asked
    assert (made.kind == COPY).sum() == 4 * task.copy


def test_every_byte_says_what_it_is() -> None:
    made, task = synthetic(size=8).fresh(2, 8), synthetic().task
    for row, kind, distance in zip(made.tokens, made.kind, made.distance, strict=True):
        keys = Counter(((row[row >= FIRST_NEEDLE] - FIRST_NEEDLE) // VALUES).tolist())
        asked = set((row[:-1][kind != 0] - FIRST_QUESTION).tolist())
        assert {keys[key] for key in asked} == {1}
        assert len(asked) == task.asked + task.near * task.clusters + task.copy
        decoys = sum(count for key, count in keys.items() if key not in asked)
        assert decoys == (row >= FIRST_NEEDLE).sum() - len(asked) == task.haystack + task.reach - 8
        (run,) = np.nonzero(kind == COPY)
        assert (np.diff(run) == 2).all(), "the segment is asked for in order"
        assert (np.diff(run - distance[run]) == 1).all(), "and stands side by side"


def test_values_and_their_places_are_uniform() -> None:
    """No value, no place in the haystack is likelier: nobody answers without reading."""
    made, task = synthetic().fresh(0, 1500), synthetic().task
    for kind, edge in ((NEEDLE, 16), (COPY, 0)):
        far = (made.kind == kind) & (made.distance >= edge)
        values = np.bincount(made.tokens[:, 1:][far] - FIRST_ANSWER, minlength=VALUES)
        assert values.min() > 0.8 * values.mean()
        assert values.max() < 1.2 * values.mean()
        source = (np.arange(256) - made.distance)[far]
        quarters = np.histogram(source, bins=4, range=(0, task.haystack))[0]
        assert quarters.sum() == len(source)
        assert quarters.min() > 0.8 * quarters.mean()


def test_judging_uses_other_sequences_than_training() -> None:
    data = synthetic(size=2)
    assert not np.array_equal(data.fresh(0, 1).tokens, data.sequences(0, 0).tokens[1:])
    assert np.array_equal(data.fresh(5, 3).tokens, data.fresh(5, 3).tokens)


def test_too_little_room_for_the_task_is_told() -> None:
    least = next(S for S in range(1, 400) if not _refused(S))
    assert task_of(least, 16, 2).haystack == 16
    with pytest.raises(
        PlanError, match=rf"^--S: {least - 1} is too short .* at least 31 .* at least {least}$"
    ):
        task_of(least - 1, 16, 2)
    with pytest.raises(
        PlanError, match=r"^--w: 1 is too narrow for the synthetic task; allowed: at least 2$"
    ):
        task_of(256, 1, 2)
    assert isinstance(task_of(256, 8, 2), Task)


def _refused(S: int) -> bool:
    try:
        task_of(S, 16, 2)
    except PlanError:
        return True
    return False


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 7))
def test_crops_are_stretches_of_the_file(seed: int, step: int, rank: int) -> None:
    content = np.arange(200, dtype=np.uint8)
    data = FileData(content, held=40, S=16, size=4, seed=seed)
    tokens, mask = data.batch(step, rank, 8)
    assert (tokens.shape, tokens.dtype) == ((4, 17), torch.int64)
    assert (mask.shape, mask.dtype) == ((4, 16), torch.bool)
    assert mask.all()
    assert (tokens.diff(dim=1) == 1).all()
    assert tokens.max() < 160, "held-out bytes are not trained on"
    assert torch.equal(tokens, FileData(content, 40, 16, 4, seed).batch(step, rank, 8)[0])


def test_crops_reach_every_place_of_their_part() -> None:
    data = FileData(np.arange(60, dtype=np.uint8), held=20, S=16, size=64, seed=0)
    begins = {int(tokens[0]) for step in range(20) for tokens in data.batch(step, 0, 1)[0]}
    assert begins == set(range(40 - 16))
    assert not torch.equal(data.batch(0, 0, 2)[0], data.batch(0, 1, 2)[0])
    assert not torch.equal(data.batch(0, 0, 1)[0], data.batch(1, 0, 1)[0])


def test_the_tail_is_held_out(tmp_path: Path) -> None:
    data = from_file(tmp_path / "text", bytes(range(250)) * 8)
    assert data.held == int(2000 * HELD_OUT)
    tokens, mask = data.held_out(1000)
    assert len(tokens) == 200 // 17
    assert mask.all()
    assert tokens[0, 0] == 1800 % 250
    assert tokens[-1, -1] == 249
    assert len(data.held_out(3)[0]) == 3


def test_a_short_file_holds_one_sequence_out(tmp_path: Path) -> None:
    data = from_file(tmp_path / "text", bytes(range(34)))
    assert data.held == 17
    assert data.batch(0, 0, 1)[0].tolist() == [list(range(17))] * 4
    assert data.held_out(9)[0].tolist() == [list(range(17, 34))]
    assert MOST_HELD_OUT == 2**20


def test_the_commonest_byte_is_of_what_is_trained_on(tmp_path: Path) -> None:
    assert from_file(tmp_path / "text", b"a" * 60 + b"b" * 50 + b"c" * 12).commonest() == ord("a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; allowed: synthetic, or a file"),
        (lambda path: path.mkdir(), "is a folder; allowed: synthetic, or a file"),
        (lambda path: path.touch(), "is empty"),
        (
            lambda path: path.write_bytes(bytes(33)),
            r"has 33 bytes; one sequence of S \+ 1 = 17 to train on and one to judge by need at least 34",
        ),
    ],
    ids=["missing", "folder", "empty", "short"],
)
def test_a_file_that_cannot_be_learned_is_told_in_one_line(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    make(path)
    with pytest.raises(PlanError, match=f"^--data: {path} {message}$"):
        open_data(Settings(data=str(path), S=16))


def test_a_file_nobody_may_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(99))

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(PlanError, match=f"^--data: {path} cannot be read: Permission denied$"):
        open_data(Settings(data=str(path), S=16))
