"""NSAConfig checks itself where it is made: each bad field gives one clear line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from nsa import NSAConfig

Small = Callable[..., NSAConfig]

FIELDS = [field.name for field in fields(NSAConfig)]


def error(**changes: Any) -> str:
    given = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    with pytest.raises(ValueError, match=r"^num_|_dim|_size|_stride") as caught:
        NSAConfig(**(given | changes))
    return str(caught.value)


def test_defaults_are_the_papers() -> None:
    config = NSAConfig(64, 4, 192)
    assert config == NSAConfig(64, 4, 192, 192, 32, 16, 64, 16, 512, 1, 2)
    assert (config.group_size, config.v_dim, config.value_dim) == (16, 192, 192)
    assert config.scale == 192**-0.5


def test_value_dim_may_differ() -> None:
    config = NSAConfig(64, 4, 192, 128)
    assert (config.v_dim, config.value_dim) == (128, 128)


def test_frozen_and_hashable(small: Small) -> None:
    config = small()
    with pytest.raises(FrozenInstanceError):
        config.num_heads = 8  # type: ignore[misc]
    assert hash(config) == hash(small())
    assert config != small(window_size=25)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [-1, 1.0, "4", True, float("nan")])
def test_every_field_is_an_integer_of_the_least_size(field: str, value: Any) -> None:
    least = 0 if field in ("num_initial_blocks", "num_local_blocks") else 1
    assert error(**{field: value}) == f"{field} must be an integer of at least {least}, got {value!r}"


@pytest.mark.parametrize(
    "field", [name for name in FIELDS if not name.endswith(("initial_blocks", "local_blocks"))]
)
def test_zero_is_too_small(field: str) -> None:
    assert error(**{field: 0}) == f"{field} must be an integer of at least 1, got 0"


@pytest.mark.parametrize("field", [name for name in FIELDS if name != "value_dim"])
def test_none_is_only_for_the_value_dim(field: str) -> None:
    assert "got None" in error(**{field: None})


def test_no_forced_blocks_are_allowed(small: Small) -> None:
    config = small(num_initial_blocks=0, num_local_blocks=0)
    assert (config.num_initial_blocks, config.num_local_blocks) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads=8, got 3"),
        ({"num_kv_heads": 16}, "num_kv_heads must divide num_heads=8, got 16"),
        ({"compression_stride": 12}, "compression_stride must divide compression_block_size=32, got 12"),
        ({"compression_stride": 64}, "compression_stride must divide compression_block_size=32, got 64"),
        ({"selection_block_size": 72}, "compression_stride must divide selection_block_size=72, got 16"),
        (
            {"compression_block_size": 80},
            "compression_block_size must be at most selection_block_size=64, got 80",
        ),
        (
            {"num_selected_blocks": 2},
            "num_selected_blocks must hold the 3 forced blocks (initial + local), got 2",
        ),
        (
            {"num_initial_blocks": 15},
            "num_selected_blocks must hold the 17 forced blocks (initial + local), got 16",
        ),
    ],
)
def test_fields_must_fit_each_other(changes: dict[str, int], message: str) -> None:
    assert error(**changes) == message


def test_the_least_that_fits() -> None:
    config = NSAConfig(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0)
    assert config.group_size == 1
    assert NSAConfig(8, 8, 64, num_selected_blocks=3).group_size == 1
