"""The adapter to lucidrains' module: which of its branches agree, and what it is asked."""

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
from nsabench.peers import lucidrains
from nsabench.peers.branches import Ask
from tests.nsabench.peers.fake_peers import FakeSparseAttention

CONFIG = NSAConfig(4, 2, 8, 8, 8, 4, 16, 4, 5)
LENGTHS = (1, 3, 15, 16, 17, 32, 70)
PARTS = {part.branch: part for part in lucidrains.BRANCHES}


NAME = "native_sparse_attention_pytorch"
INSTALLED = importlib.util.find_spec(NAME) is not None


@pytest.mark.skipif(not INSTALLED, reason=f"{NAME} is not installed: a stand-in is asked in its place")
def test_the_true_one_is_asked_too(request: pytest.FixtureRequest) -> None:
    if "real" in request.node.name:
        assert lucidrains._module().__module__.startswith(NAME)


@pytest.fixture(autouse=True, params=["fake", *(["real"] if INSTALLED else [])])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the module, or the true one, where it is installed."""
    if request.param == "fake":
        monkeypatch.setattr(lucidrains, "_module", lambda: FakeSparseAttention)


def tensors(length: int, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def draw(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(2, rows, heads, CONFIG.head_dim, generator=generator)

    blocks, heads = num_compressed_blocks(length, CONFIG), CONFIG.num_kv_heads
    drawn = {"q": draw(length, CONFIG.num_heads), "k_cmp": draw(blocks, heads), "v_cmp": draw(blocks, heads)}
    drawn |= {"k": draw(length, heads), "v": draw(length, heads)}
    drawn["block_indices"] = reference.select_blocks(drawn["q"], drawn["k_cmp"], CONFIG, kv_len=length)
    return {name: drawn[name] for name in names}


def first(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    return lambda **given: function(**given, config=CONFIG)[0]


@pytest.mark.parametrize("length", LENGTHS)
def test_its_window_agrees(length: int) -> None:
    given = tensors(length, "q", "k", "v")
    spec = first(reference.sliding_attention)
    outcome = against_spec(first(lucidrains.sliding_attention), spec, given, gradients=True)
    assert all(check.ok for check in outcome.values()), outcome


@pytest.mark.parametrize("length", LENGTHS)
def test_its_selected_branch_agrees_on_given_lists(length: int) -> None:
    given = tensors(length, "q", "k", "v", "block_indices")
    spec = first(reference.selected_attention)
    outcome = against_spec(first(lucidrains.selected_attention), spec, given, gradients=True)
    assert all(check.ok for check in outcome.values()), outcome


def test_lists_in_any_order_with_empty_slots_and_repeats() -> None:
    given = tensors(70, "q", "k", "v", "block_indices")
    mixed = given["block_indices"].flip(-1).repeat_interleave(2, -1)
    exact = reference.selected_attention(**given, config=CONFIG)[0]
    o = lucidrains.selected_attention(**(given | {"block_indices": mixed}), config=CONFIG)[0]
    torch.testing.assert_close(o, exact)


def test_its_compressed_branch_sees_a_block_one_token_later() -> None:
    q, k_cmp, v_cmp = tensors(40, "q", "k_cmp", "v_cmp").values()
    o = lucidrains.compressed_attention(q, k_cmp, v_cmp, CONFIG)[0]
    last = CONFIG.compression_block_size - 1
    assert not o[:, : last + 1].any()  # block 0 is complete at its last token: rule 1 shows it there
    assert o[:, last + 1].any()
    assert PARTS["cmp"].differs.startswith("a query sees a block one token after it is complete")


def test_it_chooses_by_scores_of_its_own() -> None:
    q, k_cmp = tensors(70, "q", "k_cmp").values()
    mine = lucidrains.select_blocks(q, k_cmp, CONFIG, kv_len=70)
    assert (mine.shape, mine.dtype) == ((2, 70, 2, 4), torch.int32)
    own = torch.arange(70) // CONFIG.selection_block_size
    assert (mine == own[:, None, None]).any(-1).all()
    assert (mine <= own[:, None, None]).all()
    full = mine.masked_fill(mine < 0, 99)
    assert torch.equal(full, full.sort(-1).values)
    assert PARTS["score"].differs


def test_weights_that_nothing_uses_leave_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lucidrains.sliding_attention(**tensors(9, "q", "k", "v"), config=CONFIG)
    assert torch.equal(torch.get_rng_state(), before)


def ask(blocks: torch.Tensor | None = None, q_start: int = 0, **changes: Any) -> Ask:
    return Ask(replace(Request("cpu", torch.float32, 9, 9, False, CONFIG), **changes), q_start, blocks)


@pytest.mark.parametrize(
    ("branch", "given", "said"),
    [
        ("win", ask(), ""),
        ("win", ask(config=replace(CONFIG, window_size=1)), "a window of at least 2 keys only"),
        ("win", ask(config=replace(CONFIG, value_dim=16)), "one head dim for keys and values only"),
        ("win", ask(num_queries=4, q_start=5), "takes whole sequences only"),
        ("cmp", ask(config=replace(CONFIG, value_dim=16)), "one head dim for keys and values only"),
        ("score", ask(config=replace(CONFIG, value_dim=16)), ""),
        ("score", ask(num_queries=4, q_start=5), "takes whole sequences only"),
        ("sel", ask(torch.zeros(1, 9, 1, 2, dtype=torch.int32)), ""),
        ("sel", ask(torch.full((1, 9, 1, 2), -1, dtype=torch.int32)), "attends the own block of every query"),
    ],
)
def test_what_it_cannot_do_is_refused(branch: str, given: Ask, said: str) -> None:
    why = PARTS[branch].refuse(given)
    assert why.startswith(said)
    assert bool(why) == bool(said)
