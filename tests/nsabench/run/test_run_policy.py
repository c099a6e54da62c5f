"""How a sweep is measured, as it is stored and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nsabench.plan import Cell, PlanError
from nsabench.run import Policy


def test_a_policy_comes_back_from_what_is_stored() -> None:
    policy = Policy(rounds=7, timer="cpu", cache="cold", shares=False)
    assert Policy.from_dict(policy.to_dict()) == policy
    with pytest.raises(PlanError, match=r"policy: unknown colour; known: .*rounds"):
        Policy.from_dict({**policy.to_dict(), "colour": "red"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rounds": 0}, "--rounds: 0 is not allowed; allowed: 1 to 10000"),
        ({"rounds": 10_001}, "--rounds: 10001 is not allowed"),
        ({"rounds": True}, "--rounds: True is not allowed"),
        ({"timer": "sundial"}, "--timer: 'sundial' is unknown; allowed: auto, cpu, host, event, graph"),
        ({"cache": "lukewarm"}, "--cache: 'lukewarm' is unknown; allowed: auto, cold, warm"),
        ({"regime": "calm"}, "--regime: 'calm' is unknown; allowed: latency, sustained"),
        (
            {"regime": "sustained", "cache": "cold"},
            "--cache: 'cold' does not go with --regime sustained; allowed there: auto, warm",
        ),
        ({"sample_ms": 0}, "--sample-ms: 0 is not allowed; allowed: above 0, up to 60000"),
        ({"timeout_s": -1.0}, "--timeout: -1.0 is not allowed; allowed: above 0, up to 604800"),
        ({"timeout_s": float("nan")}, "--timeout: nan is not allowed"),
        ({"share_runs": 0}, "--share-runs: 0 is not allowed; allowed: 1 to 10000"),
    ],
)
def test_a_wrong_setting_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        Policy(**setting)


@pytest.mark.parametrize(
    ("timer", "device", "phase", "used"),
    [
        ("auto", "cpu", "decode", "cpu"),
        ("auto", "cpu", "prefill", "cpu"),
        ("cpu", "cpu", "prefill", "cpu"),
        ("auto", "cuda", "decode", "graph"),
        ("auto", "cuda:1", "prefill", "event"),
        ("event", "cuda", "decode", "event"),
        ("host", "cuda", "decode", "host"),
    ],
)
def test_the_timer_follows_device_and_phase(
    make_cell: Callable[..., Cell], timer: str, device: str, phase: str, used: str
) -> None:
    assert Policy(timer=timer).timer_for(make_cell(device=device, phase=phase)) == used


@pytest.mark.parametrize(
    ("timer", "device"), [("graph", "cpu"), ("event", "cpu"), ("host", "cpu"), ("cpu", "cuda")]
)
def test_a_timer_of_another_device_is_refused(
    make_cell: Callable[..., Cell], timer: str, device: str
) -> None:
    with pytest.raises(PlanError, match=f"--timer: '{timer}' does not time {device}; allowed there: auto"):
        Policy(timer=timer).timer_for(make_cell(device=device))


@pytest.mark.parametrize(
    ("cache", "phase", "used"),
    [
        ("auto", "decode", "cold"),
        ("auto", "prefill", "warm"),
        ("cold", "prefill", "cold"),
        ("warm", "decode", "warm"),
    ],
)
def test_between_two_decode_steps_other_layers_evict_the_cache(
    make_cell: Callable[..., Cell], cache: str, phase: str, used: str
) -> None:
    assert Policy(cache=cache).cache_for(make_cell(phase=phase)) == used


def test_back_to_back_a_step_finds_its_own_data(make_cell: Callable[..., Cell]) -> None:
    policy = Policy(regime="sustained", cache="auto")
    assert policy.cache_for(make_cell(phase="decode")) == "warm"
    assert policy.how_for(make_cell(phase="decode")) == "timer cpu, sustained, warm cache"


def test_a_policy_from_before_there_were_regimes_means_latency() -> None:
    stored = Policy().to_dict()
    del stored["regime"]
    assert Policy.from_dict(stored).regime == "latency"
