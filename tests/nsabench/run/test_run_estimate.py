"""Guesses: every cell has one, and they grow with the work. How good they are is not a test's to say."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from nsabench.plan import Cell
from nsabench.run import Policy
from nsabench.run.estimate import estimate, estimate_group, machine, memory_free

Make = Callable[..., Cell]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("impl", ["nsa", "dense"])
@pytest.mark.parametrize("scope", ["module", "core"])
@pytest.mark.parametrize(
    ("phase", "passes", "mode"),
    [
        ("decode", "fwd", "batched"),
        ("prefill", "fwd", "batched"),
        ("prefill", "bwd", "chunked=16"),
        ("prefill", "fwd_bwd", "stepwise"),
    ],
)
def test_every_cell_has_one_and_more_work_takes_more(
    make_cell: Make, device: str, impl: str, scope: str, phase: str, passes: str, mode: str
) -> None:
    names = ("device", "impl", "scope", "phase", "passes", "mode")
    fixed = dict(zip(names, (device, impl, scope, phase, passes, mode), strict=True))
    found = [estimate(make_cell(**fixed, S=S), Policy()) for S in (64, 1024, 16384)]
    assert all(one.seconds > one.step_s > 0 and one.bytes > 0 for one in found)
    for one, more in itertools.pairwise(found):
        assert more.step_s >= one.step_s
        assert more.bytes > one.bytes
    wider = estimate(make_cell(**fixed, S=64, B=4), Policy())
    assert wider.step_s > found[0].step_s


def test_the_first_and_the_longest_length_have_one(make_cell: Make) -> None:
    for S in (1, 2**30):
        assert estimate(make_cell(S=S), Policy()).seconds > 0


def test_what_the_policy_asks_for_costs_time(make_cell: Make) -> None:
    cell = make_cell(S=4096, phase="prefill")
    seconds = [
        estimate(cell, policy).seconds
        for policy in (
            Policy(rounds=6, shares=False, alone=False),
            Policy(rounds=6, shares=False),
            Policy(rounds=6),
            Policy(rounds=60),
        )
    ]
    assert seconds == sorted(set(seconds))


def test_times_of_a_group_add_up_and_memory_does_not(make_cell: Make) -> None:
    cells = [make_cell(route="auto"), make_cell(route="sdpa"), make_cell(impl="dense")]
    whole, parts = estimate_group(cells, Policy()), [estimate(cell, Policy()) for cell in cells]
    assert whole.seconds == pytest.approx(sum(one.seconds for one in parts))
    assert whole.bytes == max(one.bytes for one in parts)
    assert whole.step_s == max(one.step_s for one in parts)


def test_rates_say_what_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    machine.cache_clear()
    assert "CPU threads" in machine("cpu").what
    assert machine("cuda").what.endswith("as an H200 has")
    assert memory_free("cuda") is None
    assert (memory_free("cpu") or 0) > 0
    machine.cache_clear()
