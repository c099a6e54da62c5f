"""``--route env``: the switches of an earlier NSA code, read as a routing."""

from __future__ import annotations

import pytest

from nsa.routes import Routing


@pytest.mark.parametrize(
    ("switches", "routing"),
    [
        ("", "auto"),
        ("NSA_USE_FA2=1", "cmp=fa2,win=fa2"),
        ("NSA_USE_FA2=0", "auto"),
        ("NSA_USE_FA2_WIN=1", "win=fa2"),
        ("NSA_USE_FA2_CMP=1", "cmp=fa2"),
        ("NSA_USE_FA2_WIN=1 NSA_USE_FA2_CMP=1", "cmp=fa2,win=fa2"),
        ("NSA_USE_FA2_WIN=0", "win=sdpa"),
        ("NSA_USE_FA2=1 NSA_USE_FA2_WIN=0 NSA_USE_FA2_CMP=1", "cmp=fa2,win=sdpa"),
        ("NSA_WIN_FORCE_DENSE=1", "win=sdpa"),
        ("NSA_USE_FA2=1 NSA_WIN_FORCE_DENSE=1", "cmp=fa2,win=sdpa"),
        ("NSA_USE_FA2_WIN=1 NSA_WIN_FORCE_DENSE=0", "win=fa2"),
        ("NSA_FA2_FORCE_VARLEN=1", "auto"),
        ("NSA_USE_FA2=1 NSA_FA2_FORCE_VARLEN=1", "cmp=fa2:varlen,win=fa2:varlen"),
        ("NSA_USE_FA2_WIN=1 NSA_FA2_FORCE_VARLEN=1", "win=fa2:varlen"),
        ("NSA_USE_FA2=1 NSA_FA2_FORCE_VARLEN=1 NSA_WIN_FORCE_DENSE=1", "cmp=fa2:varlen,win=sdpa"),
        ("NSA_USE_SEL_VARLEN=1", "sel=fa2"),
        ("NSA_USE_SEL_VARLEN=1 NSA_SEL_VARLEN_V2=1", "sel=fa2"),
        ("NSA_USE_SEL_VARLEN=1 NSA_SEL_VARLEN_V2=0", "sel=fa2"),
        ("NSA_USE_SEL_VARLEN=0", "sel=gather"),
        ("NSA_USE_SEL_VARLEN=0 NSA_SEL_VARLEN_V2=1", "sel=gather"),
        ("NSA_SEL_VARLEN_V2=1", "sel=gather"),
        ("NSA_SEL_VARLEN_V2=0", "auto"),
        ("NSA_USE_FA2=1 NSA_USE_SEL_VARLEN=1", "cmp=fa2,sel=fa2,win=fa2"),
        ("NSA_PREFILL_BATCHED=1 NSA_SDPA_AUDIT=1 NSA_DETECT_ANOMALY=1", "auto"),
        ("UNRELATED=1", "auto"),
    ],
)
def test_switches(switches: str, routing: str) -> None:
    environment = dict(pair.split("=") for pair in switches.split())
    assert str(Routing.from_env(environment)) == routing


@pytest.mark.parametrize(
    ("value", "is_on"),
    [("1", True), ("true", True), ("Yes", True), (" ON ", True), ("0", False), ("no", False), ("", False)],
)
def test_what_counts_as_on(value: str, is_on: bool) -> None:
    assert Routing.from_env({"NSA_USE_FA2": value}).win == ("fa2" if is_on else "auto")


def test_env_is_a_route_and_only_it_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_USE_FA2_WIN", "1")
    assert Routing.parse(" env ").win == "fa2"
    assert Routing.parse("auto") == Routing()
    monkeypatch.setenv("NSA_USE_FA2_WIN", "0")
    assert Routing.parse("env").win == "sdpa"  # read each time
