"""The adapter to fla: what it is given, and that with it fla computes what the specification does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import NSAConfig, reference
from nsa.blocks import num_compressed_blocks
from nsa.routes import Request
from nsa.testing import against_spec
from nsabench.peers import fla
from nsabench.peers.branches import Ask
from tests.nsabench.peers.fake_peers import fake_fla

OVERLAPPING = NSAConfig(4, 2, 8, 8, 8, 4, 16, 3, 5)
ONE_SIZE = NSAConfig(4, 2, 8, 8, 8, 8, 8, 3, 5)
LENGTHS = (1, 3, 4, 7, 8, 9, 16, 37)
PARTS = {(part.branch, part.variant): part for part in fla.BRANCHES}


INSTALLED = importlib.util.find_spec("fla") is not None


@pytest.mark.skipif(not INSTALLED, reason="fla-core is not installed: a stand-in is asked in its place")
def test_the_true_one_is_asked_too() -> None:
    assert callable(fla._ops("naive").naive_nsa_selection)
    assert callable(fla._ops("parallel").parallel_nsa)


@pytest.fixture(params=["fake", *(["real"] if INSTALLED else [])])
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for fla, and what it was given; or the true one, where it is installed."""
    found: list[dict[str, Any]] = []
    if request.param == "fake":
        monkeypatch.setattr(fla, "_ops", fake_fla(found))
    return found


def tensors(length: int, config: NSAConfig, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def draw(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(2, rows, heads, config.head_dim, generator=generator)

    blocks, heads = num_compressed_blocks(length, config), config.num_kv_heads
    drawn = {"q": draw(length, config.num_heads), "k_cmp": draw(blocks, heads), "v_cmp": draw(blocks, heads)}
    drawn |= {"k": draw(length, heads), "v": draw(length, heads)}
    drawn["block_indices"] = reference.select_blocks(drawn["q"], drawn["k_cmp"], config, kv_len=length)
    return {name: drawn[name] for name in names}


def first(function: Callable[..., Any], config: NSAConfig) -> Callable[..., torch.Tensor]:
    return lambda **given: function(**given, config=config)[0]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("config", [OVERLAPPING, ONE_SIZE], ids=["overlapping", "one size"])
def test_compressed_attention_is_the_specifications(
    length: int, config: NSAConfig, seen: list[dict[str, Any]]
) -> None:
    given = tensors(length, config, "q", "k_cmp", "v_cmp")
    spec = first(reference.compressed_attention, config)
    outcome = against_spec(first(fla.naive_compressed, config), spec, given, gradients=True)
    assert all(check.ok for check in outcome.values()), outcome
    mine = fla.naive_compressed(**given, config=config)[1]
    theirs = reference.compressed_attention(**given, config=config)[1]
    assert mine is not None
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("length", LENGTHS)
def test_selected_attention_is_the_specifications(length: int, seen: list[dict[str, Any]]) -> None:
    given = tensors(length, OVERLAPPING, "q", "k", "v", "block_indices")
    spec = first(reference.selected_attention, OVERLAPPING)
    outcome = against_spec(first(fla.naive_selected, OVERLAPPING), spec, given, gradients=True)
    assert all(check.ok for check in outcome.values()), outcome
    assert fla.naive_selected(**given, config=OVERLAPPING)[1] is None


@pytest.mark.parametrize("length", LENGTHS)
def test_the_blocks_chosen_are_the_specifications(length: int, seen: list[dict[str, Any]]) -> None:
    given = tensors(length, ONE_SIZE, "q", "k_cmp")
    mine = fla.naive_select(**given, config=ONE_SIZE, kv_len=length)
    assert mine.dtype == torch.int32
    assert torch.equal(mine, reference.select_blocks(**given, config=ONE_SIZE, kv_len=length))


def test_overlapping_blocks_are_attended_by_shifted_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(fla, "_ops", fake_fla(seen))
    fla.naive_compressed(**tensors(37, OVERLAPPING, "q", "k_cmp", "v_cmp"), config=OVERLAPPING)
    assert seen == [{"queries": 33, "blocks": 9, "block_size": 4}]


@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_are_given_what_they_take(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(fla, "_ops", fake_fla(seen))
    drawn = tensors(length, ONE_SIZE, "q", "k_cmp", "v_cmp", "k", "v", "block_indices")
    given = {name: drawn[name] for name in ("q", "k_cmp", "v_cmp")}
    exact = reference.compressed_attention(**given, config=ONE_SIZE)[0]
    o, lse = fla.fused_compressed(**given, config=ONE_SIZE)
    torch.testing.assert_close(o, exact)
    assert lse is None  # theirs is 0 where nothing is seen
    given = {name: drawn[name] for name in ("q", "k", "v", "block_indices")}
    exact = reference.selected_attention(**given, config=ONE_SIZE)[0]
    torch.testing.assert_close(fla.fused_selected(**given, config=ONE_SIZE)[0], exact)
    assert seen[-1]["slots"] == 4  # a list of 3, with one slot more that is empty
    tail = drawn["q"][:, -1:]
    where: dict[str, Any] = {"config": ONE_SIZE, "q_start": length - 1, "kv_len": length}
    mine = fla.fused_select(tail, drawn["k_cmp"], **where)
    assert torch.equal(mine, reference.select_blocks(tail, drawn["k_cmp"], **where))
    assert seen[-1] == {"blocks": -(-length // 8), "tokens": length}


def ask(**changes: Any) -> Ask:
    request = Request("cpu", torch.float32, 37, 37, False, ONE_SIZE)
    start = changes.pop("q_start", 0)
    return Ask(replace(request, **changes), start)


ON_GPU: dict[str, Any] = {
    "device": "cuda",
    "dtype": torch.bfloat16,
    "config": NSAConfig(32, 2, 8, 8, 8, 8, 8, 3),
}


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        (("sel", "naive"), {}, ""),
        (("sel", "naive"), {"dtype": torch.float64}, "computes in fp32, got fp64"),
        (("sel", "naive"), {"num_queries": 5, "q_start": 32}, "takes whole sequences only"),
        (("cmp", "naive"), {"q_start": torch.tensor([0, 3])}, "takes whole sequences only"),
        (("cmp", "naive"), {"config": OVERLAPPING}, ""),
        (("score", "naive"), {}, ""),
        (("score", "naive"), {"config": OVERLAPPING}, "l = d = l' only"),
        (("score", "naive"), {"config": replace(ONE_SIZE, num_local_blocks=1)}, "1 initial and 2 local"),
        (("sel", ""), {}, "Triton kernels: need a CUDA GPU, got cpu"),
        (("sel", ""), ON_GPU, ""),
        (("sel", ""), {**ON_GPU, "config": ONE_SIZE}, "G a power of two of at least 16 only"),
        (("sel", ""), {**ON_GPU, "config": NSAConfig(48, 2, 8)}, "G a power of two of at least 16 only"),
        (("sel", ""), {**ON_GPU, "config": NSAConfig(32, 2, 512)}, "head dims up to 256 only"),
        (("sel", ""), {**ON_GPU, "num_queries": 5, "q_start": 32}, ""),
        (("sel", ""), {**ON_GPU, "num_queries": 5, "q_start": 30}, "takes the last queries"),
        (("sel", ""), {**ON_GPU, "num_queries": 5, "q_start": 32, "needs_grad": True}, "gradients for whole"),
        (("cmp", ""), {**ON_GPU, "num_queries": 5, "q_start": 32}, "takes whole sequences only"),
        (("score", ""), {**ON_GPU, "config": NSAConfig(32, 2, 8, 8, 8, 8, 8, 5)}, "l' of at least twice n"),
        (("score", ""), ON_GPU, ""),
    ],
)
def test_what_it_cannot_do_is_refused(part: tuple[str, str], changes: dict[str, Any], said: str) -> None:
    why = PARTS[part].refuse(ask(**changes))
    assert why.startswith(said)
    assert bool(why) == bool(said)
