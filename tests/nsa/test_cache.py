"""KVCache: what each branch sees after any sequence of appends, what it costs, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa import KVCache, NativeSparseAttention, NSAConfig
from nsa.cache import KV, BranchViews

Small = Callable[..., NSAConfig]


def config_of(**changes: int) -> NSAConfig:
    shape = {
        "compression_block_size": 8,
        "compression_stride": 4,
        "selection_block_size": 16,
        "window_size": 6,
    }
    return NSAConfig(2, 2, 3, 2, num_selected_blocks=4, **(shape | changes))


def tokens(config: NSAConfig, start: int, count: int, *, branch: float, batch: int = 1) -> KV:
    """Keys and values that tell which token, head and branch they are."""
    token = torch.arange(start, start + count, dtype=torch.float32)[None, :, None, None]
    head = torch.arange(config.num_kv_heads)[:, None] / 8
    key = (1000 * branch + token + head).expand(batch, count, config.num_kv_heads, config.head_dim)
    return key, -key[..., : config.v_dim]


def sums(config: NSAConfig) -> Callable[[KV, int], KV]:
    """A compression that adds each block's number to the sum of its tokens, so that a wrong number shows."""

    def compress(raw: KV, first_block: int) -> KV:
        size, stride = config.compression_block_size, config.compression_stride

        def one(x: torch.Tensor) -> torch.Tensor:
            total = x.unfold(1, size, stride).sum(-1) if x.shape[1] >= size else x[:, :0]
            return total + 1e5 * (first_block + torch.arange(total.shape[1])[:, None, None])

        return one(raw[0]), one(raw[1])

    return compress


def append(cache: KVCache, count: int, batch: int = 1) -> BranchViews:
    at = cache.length
    raw, sel, win = (tokens(cache.config, at, count, branch=branch, batch=batch) for branch in (0, 1, 2))
    return cache.append(raw, sel, win, sums(cache.config))


def assert_views(views: BranchViews, cache: KVCache, new: int, batch: int = 1) -> None:
    config, length = cache.config, cache.length
    everything = [tokens(config, 0, length, branch=branch, batch=batch) for branch in (0, 1, 2)]
    for mine, whole in zip(views.cmp, sums(config)(everything[0], 0), strict=True):
        assert torch.equal(mine, whole)
    for mine, whole in zip(views.sel, everything[1], strict=True):
        assert torch.equal(mine, whole)
    # The window of the first new query is inside, and nothing is missing up to the last.
    assert 0 <= views.win_start <= max(0, length - new - config.window_size + 1)
    for mine, whole in zip(views.win, everything[1 if cache.shared_kv else 2], strict=True):
        assert torch.equal(mine, whole[:, views.win_start :])


chunk_lists = st.lists(st.integers(1, 13), min_size=1, max_size=12)
shapes = st.sampled_from(
    [
        {},
        {"window_size": 1},
        {"window_size": 40},
        {"compression_stride": 8},
        {"compression_block_size": 1, "compression_stride": 1},
        {"compression_block_size": 6, "compression_stride": 2, "selection_block_size": 6},
    ]
)


@given(shapes, chunk_lists, st.integers(0, 20), st.booleans(), st.booleans())
def test_any_sequence_of_appends(
    shape: dict[str, int], chunks: list[int], spare: int, shared_kv: bool, keep_graph: bool
) -> None:
    config = config_of(**shape)
    cache = KVCache(config, 2, sum(chunks) + spare, shared_kv=shared_kv, keep_graph=keep_graph)
    for count in chunks:
        views = append(cache, count, batch=2)
        assert_views(views, cache, count, batch=2)


@given(shapes, chunk_lists, chunk_lists, st.booleans(), st.booleans())
def test_rollback_forgets_what_came_after(
    shape: dict[str, int], first: list[int], undone: list[int], shared_kv: bool, keep_graph: bool
) -> None:
    """Where rollback accepts, the cache goes on as if nothing had happened; it accepts one token always."""
    config = config_of(**shape)
    cache = KVCache(config, 1, sum(first) + sum(undone) + 7, shared_kv=shared_kv, keep_graph=keep_graph)
    for count in first:
        append(cache, count)
    state = cache.checkpoint()
    for count in undone:
        append(cache, count)
    try:
        cache.rollback(state)
        refused = None
    except ValueError as error:
        refused = str(error)
    if refused is None:
        assert cache.length == sum(first)
        assert_views(append(cache, 7), cache, 7)
    else:
        pattern = rf"cannot roll back to {sum(first)} tokens: tokens from \d+ on were needed and are gone"
        assert re.fullmatch(pattern, refused)
        assert undone != [1]
        assert_views(append(cache, 7), cache, 7)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_one_step_may_be_repeated_at_every_length(keep_graph: bool) -> None:
    config = config_of()
    cache = KVCache(config, 1, 60, keep_graph=keep_graph)
    for _ in range(60):
        for _ in range(3):
            state = cache.checkpoint()
            append(cache, 1)
            cache.rollback(state)
        assert_views(append(cache, 1), cache, 1)


def test_rollback_runs_only_backwards() -> None:
    config = config_of()
    cache, ahead = KVCache(config, 1, 20), KVCache(config, 1, 20)
    append(ahead, 5)
    append(cache, 3)
    with pytest.raises(ValueError, match=r"^cannot roll back from 3 tokens forward to 5$"):
        cache.rollback(ahead.checkpoint())
    assert cache.length == 3


def test_rollback_past_the_window_is_refused_and_changes_nothing() -> None:
    cache = KVCache(config_of(), 1, 100)
    append(cache, 5)
    state = cache.checkpoint()
    append(cache, 50)
    message = r"^cannot roll back to 5 tokens: tokens from 0 on were needed and are gone$"
    with pytest.raises(ValueError, match=message):
        cache.rollback(state)
    assert_views(append(cache, 2), cache, 2)


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("keep_graph", [False, True])
def test_reset_forgets_every_token(shared_kv: bool, keep_graph: bool) -> None:
    cache = KVCache(config_of(), 1, 40, shared_kv=shared_kv, keep_graph=keep_graph)
    for count in (3, 20, 11):
        append(cache, count)
    cache.reset()
    assert (cache.length, cache.num_blocks) == (0, 0)
    for count in (5, 1, 30):
        assert_views(append(cache, count), cache, count)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_a_full_cache_is_an_error_and_stays_as_it_was(keep_graph: bool) -> None:
    cache = KVCache(config_of(), 1, 20, keep_graph=keep_graph)
    append(cache, 13)
    with pytest.raises(ValueError, match=r"^the cache is full: 13 \+ 8 tokens, max_seq_len is 20$"):
        append(cache, 8)
    assert cache.length == 13
    assert_views(append(cache, 7), cache, 7)
    with pytest.raises(ValueError, match=r"^the cache is full: 20 \+ 1 tokens, max_seq_len is 20$"):
        append(cache, 1)


def test_another_batch_is_an_error_and_changes_nothing() -> None:
    cache = KVCache(config_of(), 1, 20)
    append(cache, 3)
    with pytest.raises(ValueError, match=r"^this cache holds 1 sequences, got a batch of 2$"):
        append(cache, 1, batch=2)
    assert_views(append(cache, 5), cache, 5)


@pytest.mark.parametrize("name", ["batch_size", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_are_at_least_one(name: str, value: int) -> None:
    sizes = {"batch_size": 1, "max_seq_len": 8, name: value}
    with pytest.raises(ValueError, match=rf"^{name} must be at least 1, got {value}$"):
        KVCache(config_of(), sizes["batch_size"], sizes["max_seq_len"])


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_are_what_is_allocated(dtype: torch.dtype, size: int) -> None:
    """2 heads of 3 + 2 channels. 100 tokens hold 24 blocks; open tokens and window get 2 l and 2 w rows."""
    row = 3 * 2 * (3 + 2) * size
    cache = KVCache(config_of(), 3, 100, dtype=dtype)
    assert cache.bytes_per_branch() == {"cmp": (24 + 16) * row, "sel": 100 * row, "win": 12 * row}
    before = cache.bytes_per_branch()
    for count in (1, 40, 59):
        key, value = tokens(cache.config, cache.length, count, branch=0, batch=3)
        new = (key.to(dtype), value.to(dtype))
        cache.append(new, new, new, sums(cache.config))
        assert cache.bytes_per_branch() == before
    cache.reset()
    assert cache.bytes_per_branch() == before


def test_bytes_of_short_and_of_shared_caches() -> None:
    row = 2 * (3 + 2) * 4
    # Never more rows than tokens; no compressed block fits in 5 tokens.
    assert KVCache(config_of(), 1, 5).bytes_per_branch() == {"cmp": 5 * row, "sel": 5 * row, "win": 5 * row}
    shared = KVCache(config_of(), 1, 100, shared_kv=True).bytes_per_branch()
    assert shared == {"cmp": 40 * row, "sel": 100 * row, "win": 0}


def test_views_are_written_in_place() -> None:
    """Preallocated: the keys of a later step live in the same memory, and earlier views stay right."""
    cache = KVCache(config_of(), 1, 40)
    first = append(cache, 10)
    kept = first.sel[0].clone()
    second = append(cache, 10)
    assert second.sel[0].data_ptr() == first.sel[0].data_ptr()
    assert second.cmp[0].data_ptr() == first.cmp[0].data_ptr()
    assert torch.equal(first.sel[0], kept)


# The cache in the layer's hands.


@pytest.fixture
def layer(small: Small) -> NativeSparseAttention:
    return NativeSparseAttention(small(), 32)


def test_a_cache_of_another_configuration_is_refused(layer: NativeSparseAttention, small: Small) -> None:
    message = r"^this cache was made for another configuration than the layer's$"
    for cache in (KVCache(small(window_size=25), 1, 40), KVCache(small(), 1, 40, shared_kv=True)):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            layer(torch.randn(1, 3, 32), cache)
        assert cache.length == 0


def test_gradients_need_a_cache_that_keeps_them(layer: NativeSparseAttention) -> None:
    x = torch.randn(1, 3, 32)
    message = r"^a KVCache keeps no gradients: use torch.no_grad\(\), or KVCache\(\.\.\., keep_graph=True\)$"
    cache = KVCache(layer.config, 1, 40)
    with pytest.raises(ValueError, match=message):
        layer(x, cache)
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        layer(x.clone().requires_grad_(), cache)
    assert cache.length == 0
    layer(x, cache)  # nothing asks for a gradient
    assert cache.length == 3
    layer.requires_grad_(True)
    layer(x, KVCache(layer.config, 1, 40, keep_graph=True)).sum().backward()


@torch.no_grad()
def test_a_full_cache_stays_usable_in_the_layer(layer: NativeSparseAttention) -> None:
    x = torch.randn(1, 30, 32)
    cache, other = KVCache(layer.config, 1, 30), KVCache(layer.config, 1, 30)
    layer(x[:, :25], cache)
    layer(x[:, :25], other)
    with pytest.raises(ValueError, match=r"^the cache is full: 25 \+ 6 tokens, max_seq_len is 30$"):
        layer(torch.randn(1, 6, 32), cache)
    assert torch.equal(layer(x[:, 25:], cache), layer(x[:, 25:], other))


@torch.no_grad()
def test_another_batch_is_refused_by_the_layer(layer: NativeSparseAttention) -> None:
    cache = KVCache(layer.config, 2, 30)
    with pytest.raises(ValueError, match=r"^this cache holds 2 sequences, got a batch of 3$"):
        layer(torch.randn(3, 6, 32), cache)
    assert cache.length == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cache_of_another_dtype_is_refused(layer: NativeSparseAttention, dtype: torch.dtype) -> None:
    cache = KVCache(layer.config, 1, 30, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^this cache stores {dtype}, got torch.float32$"):
        layer(torch.randn(1, 6, 32), cache)
    assert cache.length == 0


@torch.no_grad()
def test_an_empty_chunk_leaves_the_cache_alone(layer: NativeSparseAttention) -> None:
    cache = KVCache(layer.config, 1, 30)
    assert layer(torch.randn(1, 0, 32), cache).shape == (1, 0, 32)
    assert cache.length == 0


@torch.no_grad()
def test_rollback_repeats_a_step_exactly(layer: NativeSparseAttention) -> None:
    cache = KVCache(layer.config, 1, 100)
    layer(torch.randn(1, 70, 32), cache)
    step = torch.randn(1, 1, 32)
    state = cache.checkpoint()
    first = layer(step, cache)
    cache.rollback(state)
    layer(torch.randn(1, 1, 32), cache)
    cache.rollback(state)
    assert torch.equal(layer(step, cache), first)


@torch.no_grad()
@pytest.mark.parametrize("shared_kv", [False, True])
def test_reset_starts_a_new_sequence(small: Small, shared_kv: bool) -> None:
    layer = NativeSparseAttention(small(), 32, shared_kv=shared_kv)
    cache, fresh = (KVCache(layer.config, 1, 100, shared_kv=shared_kv) for _ in range(2))
    layer(torch.randn(1, 70, 32), cache)
    cache.reset()
    x = torch.randn(1, 50, 32)
    assert torch.equal(layer(x, cache), layer(x, fresh))
