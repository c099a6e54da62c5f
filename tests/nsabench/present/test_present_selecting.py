"""--where, --tag and --since: which cells and runs they name, and what they refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsabench.present.frame import PresentError
from nsabench.present.selecting import has_tags, in_time, parse_since, parse_where
from nsabench.store import Run

MakeRun = Callable[..., Run]

LONG = "cmp=fa2,sel=triton,win=sdpa"


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    failed = {("sdpa", 1024): ("oom", "x")}
    return make_run(S=(1024, 2048, 4096), routes=("sdpa", "gather", LONG), failed=failed)


@pytest.mark.parametrize(
    ("texts", "expression"),
    [
        ([], "S > 0"),
        (["S=1024"], "S == 1024"),
        (["S=1k,4k"], "S in [1024, 4096]"),
        (["S=1k:4k:x2"], "S > 0"),
        (["S!=1k"], "S != 1024"),
        (["S<2k"], "S < 2048"),
        (["S<=2k", "S>1k"], "S == 2048"),
        (["S>=2k,route=gather"], "S >= 2048 and route == 'gather'"),
        (["route=sdpa,gather"], "route in ['sdpa', 'gather']"),
        ([f"route={LONG}"], f"route == '{LONG}'"),
        ([f"route={LONG},S=1k"], f"route == '{LONG}' and S == 1024"),
        ([f"route=gather,status=ok,route!={LONG}"], "route == 'gather'"),
        (["status!=ok"], "status != 'ok'"),
        (["status=oom,wrong"], "status == 'oom'"),
        (["ms_total>0"], "status == 'ok'"),
        (["ms_total="], "status == 'oom'"),
        (["ms_total!="], "status == 'ok'"),
        (["reason="], "status == 'ok'"),
        (["power_w>1"], "S < 0"),
        ([" S = 1k , route = gather "], "S == 1024 and route == 'gather'"),
    ],
)
def test_conditions(run: Run, texts: list[str], expression: str) -> None:
    where = parse_where(texts)
    assert list(run.cells[where(run.cells)].index) == list(run.cells.query(expression).index)
    assert bool(where) == bool(texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no condition; allowed: COLUMN=VALUE, with = != < <= > or >="),
        ("S", "'S' is no condition"),
        ("1024", "'1024' is no condition"),
        ("rout=auto", "unknown column 'rout'; did you mean route?"),
        ("S=1k,rout=auto", "unknown column 'rout'; did you mean route?"),
        ("route=auto,state=ok", "unknown column 'state'"),
        ("cmp=fa2", "'cmp=fa2' is no condition"),
        ("zzzzzz=1", "unknown column 'zzzzzz'; nsabench results RUN --format csv shows all columns"),
        ("S=many", "--where S: 'many' is not a size"),
        ("S=-1", "--where S"),
        ("ms_total=fast", "ms_total takes numbers, not 'fast'"),
        ("S<1k,2k", "S<1k,2k: < takes a number column and one value"),
        ("route<auto", "route<auto: < takes a number column and one value"),
        ("ms_total>", "> takes a number column and one value"),
        ("status=okay", "status 'okay' is unknown; allowed: ok, unsupported"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, message: str) -> None:
    with pytest.raises(PresentError) as caught:
        parse_where([text])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BACKENDS = st.sampled_from(["sdpa", "fa2", "triton", "gather:keys"])


@given(st.dictionaries(st.sampled_from(["cmp", "score", "sel", "win"]), BACKENDS, min_size=1))
def test_any_route_can_be_asked_for(parts: dict[str, str]) -> None:
    route = ",".join(f"{branch}={backend}" for branch, backend in parts.items())
    for text in (f"route={route}", f"route={route},S=1k", f"S=1k,route={route}"):
        found = {c.column.name: c.values for c in parse_where([text]).conditions}
        assert found["route"] == (route,)


@given(st.text(max_size=30))
def test_anything_is_a_condition_or_refused(text: str) -> None:
    with contextlib.suppress(PresentError):
        assert parse_where([text]).conditions


NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-19", datetime(2026, 11, 19, tzinfo=UTC)),
        ("2026-11-19T08:30", datetime(2026, 11, 19, 8, 30, tzinfo=UTC)),
        ("2026-11-19T08:30:00Z", datetime(2026, 11, 19, 8, 30, tzinfo=UTC)),
        ("2026-11-19T08:30+02:00", datetime(2026, 11, 19, 6, 30, tzinfo=UTC)),
        ("20261119", datetime(2026, 11, 19, tzinfo=UTC)),
        ("36h", NOW - timedelta(hours=36)),
        ("7d", NOW - timedelta(days=7)),
        ("2w", NOW - timedelta(days=14)),
        ("1h30m", NOW - timedelta(minutes=90)),
    ],
)
def test_since(text: str, moment: datetime) -> None:
    assert parse_since(text, NOW) == moment


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "7", "7x", "99999999w", "-1d", "1e9d"])
def test_since_of_no_time_is_refused(text: str) -> None:
    with pytest.raises(PresentError, match=r"is no day or moment .* and no age") as caught:
        parse_since(text, NOW)
    assert "\n" not in str(caught.value)


def test_runs_by_time_and_tag() -> None:
    info: dict[str, Any] = {"created": "2026-11-20T12:00:00Z", "tags": ["cpu", "night"]}
    assert in_time(info, None)
    assert in_time(info, NOW)
    assert not in_time(info, NOW + timedelta(seconds=1))
    assert not in_time({}, NOW)
    assert in_time({}, None)
    assert not in_time({"created": "soon"}, NOW)
    assert has_tags(info, [])
    assert has_tags(info, ["night", "cpu"])
    assert not has_tags(info, ["night", "gpu"])
    assert not has_tags({}, ["cpu"])
    assert not has_tags({"tags": None}, ["cpu"])
