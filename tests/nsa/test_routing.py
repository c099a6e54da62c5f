"""Routing: the grammar, how it settles, and what a refusal says."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nsa.reference
import nsa.refusals
import nsa.routes
from nsa import NSAConfig, Routing, UnsupportedRoute
from nsa.routes import BRANCHES, FUNCTIONS, TABLE, Request, Row, backends, resolve

Small = Callable[..., NSAConfig]


@pytest.fixture
def request_on_cpu(small: Small) -> Request:
    return Request(
        device="cpu", dtype=torch.float32, num_queries=32, kv_len=32, needs_grad=True, config=small()
    )


def test_auto_is_the_default() -> None:
    assert Routing.parse("auto") == Routing() == Routing("auto", "auto", "auto", "auto")
    assert str(Routing()) == "auto"


@pytest.mark.parametrize("backend", backends())
def test_a_backends_name_takes_every_branch_it_has(backend: str) -> None:
    routing = Routing.parse(backend)
    for branch in BRANCHES:
        assert getattr(routing, branch) == (backend if backend in backends(branch) else "auto")


def test_named_branches_and_the_rest_auto() -> None:
    assert Routing.parse("sel=gather") == Routing(sel="gather")
    assert Routing.parse(" sel = gather:keys , win=reference ") == Routing(sel="gather:keys", win="reference")
    assert Routing.parse("cmp=auto") == Routing()


def test_selection_off_needs_no_scores() -> None:
    for text in ("sel=off", "score=off", "sel=off,score=chunked"):
        routing = Routing.parse(text)
        assert (routing.score, routing.sel) == ("off", "off")
        assert str(routing) == "sel=off"
    assert str(Routing.parse("cmp=off,sel=off")) == "cmp=off,sel=off"


@given(st.tuples(*(st.sampled_from(["auto", "off", *backends(branch)]) for branch in BRANCHES)))
def test_text_and_routing_are_one(choice: tuple[str, str, str, str]) -> None:
    if choice[0] == choice[3] == "off" == choice[2] or (choice[0] == choice[3] == "off" == choice[1]):
        with pytest.raises(
            ValueError, match=r"^every branch is off; at least one of cmp, sel, win must run$"
        ):
            Routing(*choice)
        return
    routing = Routing(*choice)
    assert Routing.parse(str(routing)) == routing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown route ''; allowed: auto, env, "),
        ("triron", "unknown route 'triron'; allowed: auto, env, "),
        ("off", "unknown route 'off'; allowed: auto, env, "),
        ("Auto", "unknown route 'Auto'; allowed: auto, env, "),
        ("window=sdpa", "unknown branch 'window' in route 'window=sdpa'; allowed: cmp, score, sel, win"),
        ("cmp=sdpa,", "unknown branch '' in route 'cmp=sdpa,'; allowed: cmp, score, sel, win"),
        (
            "cmp=sdpa,gather",
            "unknown branch 'gather' in route 'cmp=sdpa,gather'; allowed: cmp, score, sel, win",
        ),
        ("cmp=", "unknown backend '' for cmp; allowed: auto, off, "),
        ("cmp=gather", "unknown backend 'gather' for cmp; allowed: auto, off, "),
        ("win=sdpa=sdpa", "unknown backend 'sdpa=sdpa' for win; allowed: auto, off, "),
        ("win=env", "unknown backend 'env' for win; allowed: auto, off, "),
        ("cmp=sdpa,cmp=reference", "branch cmp is given twice in route 'cmp=sdpa,cmp=reference'"),
        ("cmp=off,sel=off,win=off", "every branch is off; at least one of cmp, sel, win must run"),
        ("cmp=off,score=off,win=off", "every branch is off; at least one of cmp, sel, win must run"),
    ],
)
def test_wrong_text_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        Routing.parse(text)
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_names_those_of_the_branch() -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        Routing(win="nothing")
    assert str(caught.value).partition("allowed: ")[2].split(", ") == ["auto", "off", *backends("win")]


def test_every_row_of_the_table_is_whole() -> None:
    assert set(FUNCTIONS) == set(BRANCHES)
    assert len({(row.branch, row.backend) for row in TABLE}) == len(TABLE)
    for row in TABLE:
        assert row.branch in BRANCHES
        assert set(row.passes) <= {"fwd", "bwd"}
        assert "fwd" in row.passes
        assert row.backend not in ("auto", "off", "env")


def test_resolve_loads_what_was_named(request_on_cpu: Request) -> None:
    route = resolve("reference", request_on_cpu)
    for branch in BRANCHES:
        assert getattr(route, branch) is getattr(nsa.reference, FUNCTIONS[branch])
        assert route.backend(branch) == "reference"


def test_resolve_leaves_off_branches_out(request_on_cpu: Request) -> None:
    route = resolve("cmp=off,sel=off", request_on_cpu)
    assert (route.cmp, route.score, route.sel) == (None, None, None)
    assert [route.backend(branch) for branch in BRANCHES[:3]] == ["off"] * 3
    assert route.win is not None


def test_auto_settles_on_a_row_that_neither_refuses_nor_is_avoided(request_on_cpu: Request) -> None:
    for length in (1, 32, 10_000):
        request = replace(request_on_cpu, kv_len=length, num_queries=length)
        route = resolve("auto", request)
        for branch in BRANCHES:
            row = route.rows[branch]
            assert row is not None
            assert row.refuse(request) is None
            assert row.avoid(request) is None
            assert row.backend != "reference"


def plain(reason: str | None) -> Callable[[Request], str | None]:
    return lambda request: reason


def made_up(branch: str, backend: str, **more: Any) -> Row:
    return Row(branch, backend, f"nsa.reference:{FUNCTIONS[branch]}", **({"refuse": plain(None)} | more))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> tuple[Row, ...]:
    rows = (
        made_up("cmp", "broken", refuse=plain("the wind blows")),
        made_up("cmp", "shy", avoid=plain("not of itself")),
        made_up("cmp", "frozen", passes=("fwd",)),
        made_up("cmp", "last"),
        made_up("cmp", "spare"),
        made_up("score", "frozen", passes=("fwd",)),
        made_up("sel", "frozen", passes=("fwd",)),
        made_up("win", "last"),
    )
    monkeypatch.setattr(nsa.routes, "TABLE", rows)
    return rows


@pytest.mark.usefixtures("table")
def test_auto_takes_the_first_row_that_can(request_on_cpu: Request) -> None:
    assert resolve(Routing(sel="off"), request_on_cpu).backend("cmp") == "last"
    forward_only = replace(request_on_cpu, needs_grad=False)
    assert resolve(Routing(), forward_only).backend("cmp") == "frozen"


@pytest.mark.usefixtures("table")
def test_a_named_row_runs_though_auto_avoids_it(request_on_cpu: Request) -> None:
    assert resolve(Routing(cmp="shy", sel="off"), request_on_cpu).backend("cmp") == "shy"


@pytest.mark.usefixtures("table")
def test_a_named_row_that_refuses_says_why(request_on_cpu: Request) -> None:
    with pytest.raises(UnsupportedRoute, match=r"^cmp=broken: the wind blows$"):
        resolve(Routing(cmp="broken", sel="off"), request_on_cpu)
    with pytest.raises(UnsupportedRoute, match=r"^cmp=frozen: computes no gradient$"):
        resolve(Routing(cmp="frozen", sel="off"), request_on_cpu)


@pytest.mark.usefixtures("table")
def test_scores_need_no_gradient(request_on_cpu: Request) -> None:
    """Rule 11: a forward-only score row serves training; a forward-only selected row does not."""
    with pytest.raises(UnsupportedRoute, match=r"^sel=frozen: computes no gradient$"):
        resolve(Routing(), request_on_cpu)
    assert resolve(Routing(), replace(request_on_cpu, needs_grad=False)).backend("score") == "frozen"


def test_auto_without_any_row_gives_every_reason(
    request_on_cpu: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        made_up("cmp", "one", refuse=plain("is made of glass")),
        made_up("cmp", "two", passes=("fwd",)),
        made_up("cmp", "three", avoid=plain("only by name")),
        made_up("win", "four"),
    )
    monkeypatch.setattr(nsa.routes, "TABLE", rows)
    with pytest.raises(UnsupportedRoute) as caught:
        resolve(Routing(sel="off"), request_on_cpu)
    expected = "cmp=one: is made of glass; cmp=two: computes no gradient; cmp=three: only by name"
    assert str(caught.value) == expected


def test_a_real_row_refuses_a_device_it_does_not_know(request_on_cpu: Request) -> None:
    with pytest.raises(UnsupportedRoute, match=r"^cmp=sdpa: runs on cpu and cuda, got mps$"):
        resolve("cmp=sdpa,sel=off,win=off", replace(request_on_cpu, device="mps"))


def test_settled_before_anything_runs(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window refuses, so the compressed branch never starts."""
    ran: list[str] = []

    def watch(*args: Any, **kwargs: Any) -> None:
        ran.append("cmp")

    monkeypatch.setattr(nsa.reference, "compressed_attention", watch)
    nsa.refusals.load.cache_clear()
    rows = (made_up("cmp", "watched"), made_up("win", "closed", refuse=plain("is closed")))
    monkeypatch.setattr(nsa.routes, "TABLE", rows)
    config = small()
    q, k = torch.zeros(1, 4, 4, 16), torch.zeros(1, 4, 2, 16)
    try:
        with pytest.raises(UnsupportedRoute, match=r"^win=closed: is closed$"):
            nsa.nsa_attention(
                q, k[:, :0], k[:, :0], k, k, k, k, torch.ones(1, 4, 4, 3), config, routing=Routing(sel="off")
            )
    finally:
        nsa.refusals.load.cache_clear()
    assert ran == []
