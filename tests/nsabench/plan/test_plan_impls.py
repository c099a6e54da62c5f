"""What is measured, and beside what: one declaration for files, options and cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from nsabench.plan import (
    BASELINES,
    IMPLS,
    PEERS,
    PlanError,
    Suite,
    cells_of,
    json_schema,
    parse_suite,
    to_toml,
)
from nsabench.plan.sides import parse_side

Said = dict[str, Any]


def defaults(device: str) -> Mapping[str, Any]:
    return {"device": "cpu", "dim": 32, "heads": 2, "groups": 1, "dk": 16, "dtype": "fp32"}


def option(axis: str) -> str:
    return f"--{axis}"


def arms(**given: str) -> list[str]:
    suite = Suite.of_options("decode", {"S": "64", **given}, option)
    return [cell.route if cell.impl == "nsa" else cell.impl for cell in cells_of(suite, defaults)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["auto"]),
        ({"impl": "nsa", "routes": "auto;sdpa"}, ["auto", "sdpa"]),
        ({"impl": "dense:flash"}, ["dense:flash"]),
        ({"impl": "dense:flash, dense"}, ["dense:flash", "dense"]),
        ({"impl": "nsa,dense:flash"}, ["auto", "dense:flash"]),
        ({"baselines": "dense:flash"}, ["auto", "dense:flash"]),
        ({"baselines": "dense:flash,dense:math"}, ["auto", "dense:flash", "dense:math"]),
        ({"baselines": "all"}, ["auto", *BASELINES]),
        ({"impl": "all"}, list(BASELINES)),
        ({"impl": "nsa,all", "routes": "sdpa"}, ["sdpa", *BASELINES]),
        ({"impl": "dense:math", "baselines": "dense:math,dense"}, ["dense:math", "dense"]),
        ({"baselines": "dense,all"}, ["auto", *BASELINES]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_measured(given: dict[str, str], expected: list[str]) -> None:
    assert arms(**given) == expected


PEER = "peer:sfnsa"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"impl": PEER}, [PEER]),
        ({"impl": f"nsa,{PEER},dense"}, ["auto", PEER, "dense"]),
        ({"impl": f"nsa,{PEER}", "routes": "sdpa;auto"}, ["sdpa", "auto", PEER]),
        (
            {"impl": f"nsa,{PEER}", "routes": "cmp=fa2,win=off;win=off,cmp=sdpa;score=off;sel=off,win=sdpa"},
            ["cmp=fa2,win=off", "win=off,cmp=sdpa", "score=off", "sel=off,win=sdpa", f"{PEER} win=off",
             f"{PEER} sel=off"],
        ),
        ({"impl": PEER, "routes": "win=off, cmp=off;auto"}, [f"{PEER} cmp=off,win=off", PEER]),
        ({"impl": f"{PEER},dense", "routes": "win=off"}, [f"{PEER} win=off", "dense"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_peer_does_the_work_of_each_route(given: dict[str, str], expected: list[str]) -> None:
    suite = Suite.of_options("prefill", {"S": "64", **given}, option)
    assert [cell.arm for cell in cells_of(suite, defaults)] == expected


def test_a_peer_is_no_baseline() -> None:
    assert set(PEERS).isdisjoint(BASELINES)
    assert set(PEERS).isdisjoint(arms(impl="nsa,all"))
    with pytest.raises(PlanError, match="--baselines: 'peer:sfnsa' is unknown"):
        arms(baselines=PEER)


def test_measuring_peers_keeps_of_a_files_routes_what_is_off() -> None:
    routes = '["auto", "sdpa", "cmp=fa2,win=off"]'
    text = f'about = "x"\n[[sweep]]\nphase = "prefill"\nS = 64\nroutes = {routes}'
    changed = parse_suite(text, name="x").overridden({"impl": PEER}, option)
    assert [cell.arm for cell in cells_of(changed, defaults)] == [PEER, f"{PEER} win=off"]


def test_an_impl_beside_nsa_is_a_baseline() -> None:
    def cells(**given: str) -> Any:
        return cells_of(Suite.of_options("prefill", given, option), defaults)

    assert cells(impl="nsa,dense:flash") == cells(baselines="dense:flash")
    assert cells(impl="nsa,all") == cells(baselines="all")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"baselines": "dense:flsh"}, "--baselines: 'dense:flsh' is unknown; did you mean dense:flash?"),
        ({"impl": "dnse"}, "--impl: 'dnse' is unknown; did you mean dense?"),
        ({"impl": "none"}, f"--impl: 'none' is unknown; known: {', '.join(IMPLS)}, all"),
        ({"impl": ""}, f"--impl: ''; allowed: {', '.join(IMPLS)}, all"),
        (
            {"impl": "dense:flash", "routes": "auto"},
            "--routes: dense:flash has no routes; leave it out, or add nsa",
        ),
        (
            {"impl": "peer:sfnsa,dense", "routes": "win=off;sdpa"},
            "--routes: peer:sfnsa has no backends, only branches that are off, such as win=off; "
            "leave it out, or add nsa",
        ),
        ({"impl": "peer:sfns"}, "--impl: 'peer:sfns' is unknown; did you mean peer:sfnsa?"),
        ({"baselines": "none,dense"}, "--baselines: 'none,dense'; none goes alone"),
    ],
    ids=str,
)
def test_what_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(PlanError) as caught:
        Suite.of_options("decode", given, option)
    assert str(caught.value) == said


def test_a_file_says_the_same_as_options() -> None:
    text = """
about = "x"
[[sweep]]
phase = "decode"
S = 64
impl = ["dense:flash", "dense:fa3"]
baselines = "all"
"""
    suite = parse_suite(text, name="x")
    assert [c.impl for c in cells_of(suite, defaults)] == list(
        dict.fromkeys(["dense:flash", "dense:fa3", *BASELINES])
    )
    assert parse_suite(to_toml(suite), name="x").sweeps == suite.sweeps
    (sweep,) = suite.resolved()
    assert (sweep.text("impl"), sweep.text("baselines")) == ("dense:flash,dense:fa3", "all")
    said = json_schema()["properties"]["sweep"]["items"]["properties"]
    assert all(name in str(said["impl"]) for name in (*IMPLS, "all"))
    assert all(name in str(said["baselines"]) for name in (*BASELINES, "all", "none"))


def test_measuring_something_else_drops_a_files_routes() -> None:
    text = 'about = "x"\n[[sweep]]\nphase = "decode"\nS = 64\nroutes = ["auto", "sdpa"]'
    changed = parse_suite(text, name="x").overridden({"impl": "dense:flash"}, option)
    assert [c.impl for c in cells_of(changed, defaults)] == ["dense:flash"]
    kept = parse_suite(text, name="x").overridden({"impl": "nsa,dense"}, option)
    assert [c.route for c in cells_of(kept, defaults)] == ["auto", "sdpa", "auto"]
    with pytest.raises(PlanError, match="--routes: dense:flash has no routes"):
        parse_suite(text, name="x").overridden({"impl": "dense:flash", "routes": "auto"}, option)


def test_ids_of_cells_outlive_the_new_names() -> None:
    """As stored by runs made when ``nsa`` and ``dense`` were all there was."""
    suite = Suite.of_options("decode", {"S": "64", "baselines": "dense"}, option)
    assert [cell.cell_id for cell in cells_of(suite, defaults)] == ["c36c37160dea", "599e8a785bda"]


@pytest.mark.parametrize("name", BASELINES)
def test_a_side_is_any_of_them(name: str) -> None:
    assert parse_side(name).changes == (("impl", name), ("route", "auto"))
    assert parse_side(f"{name},dtype=bf16").changes == (("dtype", "bf16"), ("impl", name), ("route", "auto"))


def test_a_peer_is_a_side_and_may_have_branches_off() -> None:
    assert parse_side(PEER).changes == (("impl", PEER), ("route", "auto"))
    assert parse_side(f"{PEER},win=off,score=off").changes == (("impl", PEER), ("route", "sel=off,win=off"))


@pytest.mark.parametrize("route", ["sdpa", "win=off,sel=off", "cmp=off,sel=off,win=off", "score=off"])
def test_a_peers_cell_has_no_other_route(route: str) -> None:
    (cell,) = cells_of(Suite.of_options("prefill", {"S": "64", "impl": PEER}, option), defaults)
    assert replace(cell, route="sel=off,win=off").arm == f"{PEER} sel=off,win=off"
    with pytest.raises(PlanError, match="cell: route is"):
        replace(cell, route=route)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "peer:sfnsa,sdpa",
            "side 'peer:sfnsa,sdpa': peer:sfnsa has no backends, only branches that are off, such as win=off",
        ),
        ("peer:sfns", "side 'peer:sfns': no implementation 'peer:sfns'; did you mean peer:sfnsa?"),
        ("dense:flsh", "side 'dense:flsh': no implementation 'dense:flsh'; did you mean dense:flash?"),
        ("impl=dens", "side 'impl=dens': no implementation 'dens'; did you mean dense?"),
        ("dense:flash,sdpa", "side 'dense:flash,sdpa': dense:flash has no routes"),
        ("dense,dense:flash", "side 'dense,dense:flash': impl is given twice"),
    ],
)
def test_a_side_that_is_none(text: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_side(text)
    assert str(caught.value) == said
