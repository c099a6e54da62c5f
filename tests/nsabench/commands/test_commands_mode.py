"""`prefill --mode env`: the switch of an earlier code."""

from __future__ import annotations

import pytest

from nsabench.commands._options import mode_of


@pytest.mark.parametrize(
    ("mode", "switch", "expected"),
    [
        ("env", "1", "batched"),
        ("env", "True", "batched"),
        ("env", "0", "stepwise"),
        ("env", None, "stepwise"),
        ("chunked=8", "1", "chunked=8"),
        ("stepwise", "1", "stepwise"),
    ],
)
def test_mode_follows_the_switch_only_when_asked(mode: str, switch: str | None, expected: str) -> None:
    assert mode_of(mode, {} if switch is None else {"NSA_PREFILL_BATCHED": switch}) == expected
