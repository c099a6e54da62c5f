"""Stage hooks: every stage in its order, never one inside another, and nothing at all when nobody looks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nsa import KVCache, NativeSparseAttention, NSAConfig, stage_hook
from nsa.stages import STAGES, stage
from tests.nsa.recorder import Recorder

Small = Callable[..., NSAConfig]


FORWARD = ["proj", "compress", "cmp", "score", "sel", "win", "gate", "proj"]


def test_a_step_goes_through_every_stage_in_order(small: Small) -> None:
    layer, recorder = NativeSparseAttention(small(), 32), Recorder()
    with stage_hook(recorder):
        y = layer(torch.randn(2, 20, 32))
    assert recorder.seen == FORWARD
    assert set(FORWARD) == set(STAGES)
    with stage_hook(recorder):
        y.sum().backward()
    assert recorder.seen == FORWARD, "the backward runs no stage"


def test_prefill_and_decode_have_the_same_stages(small: Small) -> None:
    config = small()
    layer, cache = NativeSparseAttention(config, 32), KVCache(config, 1, 64)
    for tokens in (20, 1, 1, 7):
        recorder = Recorder()
        with torch.no_grad(), stage_hook(recorder):
            layer(torch.randn(1, tokens, 32), cache)
        assert recorder.seen == FORWARD


@pytest.mark.parametrize(
    ("routing", "left_out"),
    [
        ("cmp=off", {"cmp"}),
        ("sel=off", {"score", "sel"}),
        ("win=off", {"win"}),
        ("cmp=off,sel=off", {"cmp", "score", "sel"}),
    ],
)
def test_a_branch_that_is_off_has_no_stage(routing: str, left_out: set[str], small: Small) -> None:
    layer, recorder = NativeSparseAttention(small(), 32), Recorder()
    with stage_hook(recorder):
        layer(torch.randn(1, 20, 32), routing=routing)
    assert recorder.seen == [name for name in FORWARD if name not in left_out]


def test_packed_sequences_are_projected_together_and_attended_one_by_one(small: Small) -> None:
    layer, recorder = NativeSparseAttention(small(), 32), Recorder()
    with stage_hook(recorder):
        layer(torch.randn(1, 20, 32), cu_seqlens=torch.tensor([0, 12, 20]))
    assert recorder.seen == [*FORWARD[:2], *FORWARD[2:-1] * 2, FORWARD[-1]]


def test_the_innermost_hook_is_active_and_the_outer_returns() -> None:
    outer, inner = Recorder(), Recorder()
    with stage_hook(outer):
        with stage("cmp"):
            pass
        with stage_hook(inner), stage("sel"):
            pass
        with stage("win"):
            pass
    with stage("gate"):
        pass
    assert outer.seen == ["cmp", "win"]
    assert inner.seen == ["sel"]


def test_hooks_are_restored_after_an_exception() -> None:
    outer, inner = Recorder(), Recorder()
    with stage_hook(outer):
        with pytest.raises(RuntimeError, match="lost"), stage_hook(inner), stage("cmp"):
            raise RuntimeError("lost")
        with stage("win"):
            pass
    with pytest.raises(RuntimeError, match="again"), stage_hook(inner):
        raise RuntimeError("again")
    with stage("gate"):
        pass
    assert (outer.seen, inner.seen) == (["win"], ["cmp"])
    assert inner.inside is None


def test_without_a_hook_a_stage_is_one_shared_context() -> None:
    """No object is made, nothing is recorded: all stages are the same null context."""
    assert len({id(stage(name)) for name in STAGES}) == 1
    with stage("cmp") as entered:
        assert entered is None
        with stage("sel"):  # may be entered again while open
            pass
    with stage_hook(Recorder()):
        assert stage("cmp") is not stage("cmp")
    assert len({id(stage(name)) for name in STAGES}) == 1
