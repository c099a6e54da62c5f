"""Suites as files: found, written, described, and those that ship."""

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsabench.plan import (
    AXES,
    PlanError,
    Suite,
    cells_of,
    find_suite,
    groups,
    json_schema,
    load_suite,
    parse_suite,
    save_suite,
    suite_files,
    to_toml,
    unmeasured,
)
from nsabench.plan.declaration import CRITERIA, POLICY, SUITE
from nsabench.plan.kinds import Choice, Duration, Flag, Number, Sizes, Whole

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ["crossover", "decode", "groups", "h200", "h200-quick", "kernels", "paper", "quick", "routing"]
MINIMAL = "about = 'x'\n[[sweep]]\nphase = 'decode'\n"


def defaults(device: str) -> dict[str, Any]:
    sizes = {"dim": 64, "heads": 64, "groups": 4, "dk": 16, "dtype": "fp32"}
    return {**sizes, "device": "cpu" if device == "auto" else device}


def test_suites_are_found_here_and_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(suite_files()) == SHIPPED
    assert find_suite("quick") == ROOT / "suites" / "quick.toml"
    mine = tmp_path / "suites"
    mine.mkdir()
    (mine / "quick.toml").write_text(MINIMAL)
    (mine / "own.toml").write_text(MINIMAL)
    assert find_suite("quick") == mine / "quick.toml"
    assert list(suite_files()) == sorted([*SHIPPED, "own"])
    assert find_suite("elsewhere/own.toml") == Path("elsewhere/own.toml")
    assert find_suite("own.toml") == Path("own.toml")


def test_suites_of_an_installed_copy_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "share" / "nsabench" / "suites"
    folder.mkdir(parents=True)
    (folder / "installed.toml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sysconfig.get_path", lambda name: {"data": str(tmp_path)}[name])
    assert find_suite("installed") == folder / "installed.toml"


def test_an_unknown_suite_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=r"^'quik' is no suite; did you mean quick\?$"):
        find_suite("quik")
    with pytest.raises(PlanError, match=r"^'zzz' is no suite; known: crossover, decode, "):
        find_suite("zzz")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^cannot read \S+none\.toml: No such file or directory$"):
        load_suite(tmp_path / "none.toml")
    with pytest.raises(PlanError, match=r"^cannot read .*: Is a directory$"):
        load_suite(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"about = '\xff'")
    with pytest.raises(PlanError, match=r"bad\.toml: not UTF-8 text$"):
        load_suite(bad)
    bad.write_text("about = 'x'\n[[sweep]]\nphase = 'encode'")
    with pytest.raises(PlanError, match=r"bad\.toml: sweep\[1\]\.phase: 'encode' is unknown"):
        load_suite(bad)


def test_a_saved_suite_is_a_new_file(tmp_path: Path) -> None:
    suite = parse_suite(MINIMAL, name="mine")
    save_suite(suite, tmp_path / "mine.toml")
    assert load_suite(tmp_path / "mine.toml") == suite
    with pytest.raises(PlanError, match=r"mine\.toml exists; name another file$"):
        save_suite(suite, tmp_path / "mine.toml")
    with pytest.raises(PlanError, match=r"^cannot write \S+: No such file or directory$"):
        save_suite(suite, tmp_path / "nowhere" / "mine.toml")


sizes = st.lists(st.integers(1, 2**40), min_size=1, max_size=4, unique=True)
texts = st.text(min_size=1, max_size=20).filter(lambda text: bool(text.strip()) and "\n" not in text)
tags = st.lists(st.text(string.ascii_letters + "_.:/=+-", min_size=1, max_size=6), min_size=1, unique=True)
axis_values: dict[str, st.SearchStrategy[Any]] = {
    axis: sizes if isinstance(kind, Sizes) else st.just(kind.default[0])
    for axis, kind in AXES.items()
    if isinstance(kind, Sizes) or getattr(kind, "default", None)
}
policy_values: dict[str, st.SearchStrategy[Any]] = {
    name: {
        Whole: st.integers(1, 10_000),
        Number: st.floats(1e-3, 1e4),
        Choice: st.sampled_from(getattr(kind, "words", ("",))),
        Flag: st.booleans(),
        Duration: st.floats(0.5, 1e6),
    }[type(kind)]
    for name, kind in POLICY.items()
}
sweeps = st.fixed_dictionaries(
    {"phase": st.just("prefill")}, optional={**axis_values, "headline": st.booleans()}
)
speedups = st.fixed_dictionaries(
    {
        "S": st.integers(1, 2**40),
        "phase": st.sampled_from(["decode", "prefill"]),
        "against": texts,
        "ratio": st.floats(1e-3, 1e5),
    }
)
times = st.fixed_dictionaries(
    {"S": st.integers(1, 2**40), "phase": st.just("prefill"), "ms": st.floats(1e-3, 1e5)},
    optional={"passes": st.just("bwd"), "route": texts},
)
trainings = st.fixed_dictionaries(
    {},
    optional={"precision": st.sampled_from(["fp32", "bf16", "fp16"]), "needle": st.floats(0.1, 1)},
)
suites = st.fixed_dictionaries(
    {"about": texts, "sweep": st.lists(sweeps, min_size=1, max_size=3)},
    optional={
        "tags": tags,
        "policy": st.fixed_dictionaries({}, optional=policy_values),
        "shape": st.fixed_dictionaries({}, optional={"dk": sizes, "dtype": st.just(["fp32", "bf16"])}),
        "criteria": st.fixed_dictionaries(
            {},
            optional={
                "require_ok": st.booleans(),
                "max_rel_interval": st.floats(1e-3, 1),
                "verify": st.just("pass"),
                "speedup": st.lists(speedups, min_size=1, max_size=2),
                "max_ms": st.lists(times, min_size=1, max_size=2),
                "training": st.lists(trainings, min_size=1, max_size=2),
            },
        ),
    },
)


@given(suites)
def test_what_is_written_reads_back_the_same(declared: dict[str, Any]) -> None:
    suite = Suite.read("s", declared)
    assert parse_suite(to_toml(suite), name="s") == suite
    assert Suite.read("s", json.loads(json.dumps(suite.to_dict()))) == suite


def test_the_schema_says_what_the_reader_knows() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(SUITE.keys)
    assert schema["required"] == ["about", "sweep"]
    assert schema["additionalProperties"] is False
    sweep = schema["properties"]["sweep"]["items"]
    assert set(sweep["properties"]) == {"phase", "headline", *AXES}
    assert sweep["properties"]["S"]["default"] == [512, 1024, 2048]
    assert set(schema["properties"]["policy"]["properties"]) == set(POLICY)
    assert set(schema["properties"]["criteria"]["properties"]) == set(CRITERIA)


def described(schema: dict[str, Any], path: str = "") -> list[str]:
    """Places of a schema without a description."""
    missing = [] if schema.get("description") else [path]
    for key, inner in schema.get("properties", {}).items():
        missing += described(inner, f"{path}.{key}")
    return missing


def test_every_key_is_described() -> None:
    assert described(json_schema()) == []


def matches(schema: dict[str, Any], value: Any) -> bool:
    """The part of JSON Schema that the schema of suites uses."""
    if "anyOf" in schema:
        return any(matches(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "string":
            return isinstance(value, str) and re.search(schema.get("pattern", ""), value) is not None
        case "boolean":
            return isinstance(value, bool)
        case "integer" | "number" as kind:
            number = isinstance(value, int) or (kind == "number" and isinstance(value, float))
            low, high = schema.get("minimum", float("-inf")), schema.get("maximum", float("inf"))
            above = schema.get("exclusiveMinimum", float("-inf"))
            return number and not isinstance(value, bool) and low <= value <= high and value > above
        case "array":
            items = isinstance(value, list) and len(value) >= schema["minItems"]
            return items and all(matches(schema["items"], item) for item in value)
        case "object":
            known = isinstance(value, dict) and set(value) <= set(schema["properties"])
            return (
                known
                and set(schema.get("required", ())) <= set(value)
                and all(matches(schema["properties"][key], inner) for key, inner in value.items())
            )
    raise AssertionError(schema)


@given(suites)
def test_the_schema_takes_what_the_reader_takes(declared: dict[str, Any]) -> None:
    assert matches(json_schema(), declared)
    assert matches(json_schema(), Suite.read("s", declared).to_dict())


WRONG: list[tuple[str, Any]] = [
    ("S", 0),
    ("S", []),
    ("S", 1.5),
    ("S", "1k:"),
    ("S", True),
    ("dtype", "fp8"),
    ("dtype", []),
    ("device", "gpu"),
    ("selection", "overlap=0.96"),
    ("mode", "chunked=0"),
    ("baselines", "sparse"),
    ("headline", 1),
    ("phase", "train"),
    ("rutes", "auto"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_the_schema_refuses_what_the_reader_refuses(key: str, value: Any) -> None:
    declared = {"about": "x", "sweep": [{"phase": "prefill", key: value}]}
    assert not matches(json_schema(), declared)
    with pytest.raises(PlanError):
        Suite.read("s", declared)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_can_be_planned(name: str) -> None:
    suite = load_suite(ROOT / "suites" / f"{name}.toml")
    cells = cells_of(suite, defaults)
    assert unmeasured(suite, cells) == []
    assert matches(json_schema(), suite.to_dict())
    assert 4 < len(groups(cells)) < 80
    assert len({cell.cell_id for cell in cells}) == len(cells)


def test_the_quick_suite_of_an_H200_begins_with_the_ends_of_its_headline() -> None:
    suite = load_suite(ROOT / "suites" / "h200-quick.toml")
    first = groups(cells_of(suite, defaults, coarse_first=True))[:8]
    assert [(g[0].phase, g[0].passes, g[0].S, g[0].selection) for g in first] == [
        ("prefill", passes, S, selection)
        for S in (4096, 65536)
        for selection in ("random", "overlap=0.9")
        for passes in ("fwd", "bwd")
    ]
    assert all([c.impl for c in group] == ["nsa", "dense", "dense:cudnn"] for group in first)
    assert suite.policy["budget"] == 540


def test_the_paper_suite_holds_the_papers_ratios() -> None:
    suite = load_suite(ROOT / "suites" / "paper.toml")
    wanted = {(c["phase"], c["passes"]): [] for c in suite.criteria["speedup"]}
    for criterion in suite.criteria["speedup"]:
        wanted[criterion["phase"], criterion["passes"]].append(criterion["ratio"])
    assert wanted == {
        ("prefill", "fwd"): [2.1, 3.8, 6.3, 9.0],
        ("prefill", "bwd"): [1.1, 2.0, 3.4, 6.0],
        ("decode", "fwd"): [4.0, 6.4, 9.1, 11.6],
    }
