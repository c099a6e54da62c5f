"""Criteria as declared: read, refused with their place, and said in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nsabench.plan import PlanError
from nsabench.plan.criteria import DEFAULTS, load_criteria, read_criteria, wanted_of
from nsabench.plan.declaration import CRITERIA

STEP = {"S": 2048, "phase": "prefill", "scope": "core"}
ALL: dict[str, Any] = {
    "require_ok": True,
    "max_failures": 0,
    "correct": True,
    "max_rel_interval": 0.05,
    "comparisons": "conclusive",
    "verify": "pass",
    "speedup": [{**STEP, "against": "dense", "ratio": 1.5}],
    "max_ms": [{**STEP, "passes": "bwd", "route": "sdpa", "ms": 35}],
    "training": [
        {"precision": "bf16", "steps": 1000, "loss": 1.5, "needle": 0.9, "sel_off_near_chance": True},
        {"loss_falls": True, "open_gates": True},
    ],
}
SAID = {
    "require_ok": "every cell ok",
    "max_failures": "no failed cell",
    "correct": "every ok cell within its error budget",
    "max_rel_interval": "no 95 % interval wider than 5 % of its time",
    "comparisons": "no verdict INVALID or INCONCLUSIVE",
    "verify": "a scorecard in which nothing of ours fails",
    "speedup[1]": "auto at least 1.5 x the speed of dense, prefill fwd of the core at S=2048",
    "max_ms[1]": "sdpa at most 35 ms, prefill bwd of the core at S=2048",
    "training[1]": (
        "a training in bf16: status ok, every loss finite, at least 1000 steps, final loss at most 1.5 nats, "
        "needle accuracy past the window at least 90 %, near chance with sel off"
    ),
    "training[2]": "a training: status ok, every loss finite, loss falls, no gate collapsed",
}


def test_every_criterion_is_said_in_words() -> None:
    assert {wanted.name: wanted.words for wanted in wanted_of(read_criteria(ALL))} == SAID
    assert set(ALL) == set(CRITERIA)


def test_a_flag_that_is_off_is_no_criterion() -> None:
    assert wanted_of({"require_ok": False, "correct": False}) == []
    assert [wanted.name for wanted in wanted_of({"max_failures": 0})] == ["max_failures"]


def test_the_defaults_may_be_declared() -> None:
    for kind in ("cells", "comparison", "verify", "train"):
        assert wanted_of(read_criteria(DEFAULTS[kind])), kind
    read_criteria({"training": [DEFAULTS["needle"]]})


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({}, "criteria: nothing is wanted; allowed: require_ok, "),
        ({"require_ok": False}, "criteria: nothing is wanted"),
        ({"verify": "fail"}, "criteria.verify: 'fail' is unknown; allowed: pass"),
        ({"comparisons": "good"}, "criteria.comparisons: 'good' is unknown; allowed: valid, conclusive"),
        ({"max_rel_interval": 0}, "criteria.max_rel_interval: 0 is not allowed; allowed: above 0"),
        (
            {"training": [{"needle": 90}]},
            "criteria.training[1].needle: 90 is not allowed; allowed: above 0, up to 1",
        ),
        ({"training": [{"neadle": 0.9}]}, "criteria.training[1].neadle: unknown key; did you mean needle?"),
        ({"training": [{"precision": "fp8"}]}, "'fp8' is unknown; allowed: fp32, bf16, fp16"),
        (
            {"max_ms": [{"S": 1, "phase": "decode"}]},
            "criteria.max_ms[1].ms is missing; it is longest time, ms",
        ),
        ({"max_ms": {"S": 1}}, "write [[criteria.max_ms]] above each"),
    ],
)
def test_what_no_criterion_may_say(declared: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_criteria(declared)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_criteria_of_a_file_of_its_own_and_of_a_suite(tmp_path: Path) -> None:
    file = tmp_path / "wanted.toml"
    file.write_text("[criteria]\nverify = 'pass'\n[[criteria.training]]\nneedle = 0.9\n")
    assert load_criteria(file) == {"verify": "pass", "training": [{"needle": 0.9}]}
    file.write_text("about = 'x'\n[[sweep]]\nphase = 'decode'\n[criteria]\nrequire_ok = true\n")
    assert load_criteria(file) == {"require_ok": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = ", "wanted.toml: not TOML: "),
        ("about = 'x'", "wanted.toml: no [criteria] in it"),
        ("[criterea]\nverify = 'pass'", "wanted.toml: criterea: unknown key; did you mean criteria?"),
        ("[criteria]", "wanted.toml: criteria: nothing is wanted"),
        ("[criteria]\nratio = 2", "wanted.toml: criteria.ratio: unknown key; known: "),
        ("criteria = 3", "wanted.toml: criteria: 3 is not a table of: "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "wanted.toml"
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        load_criteria(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^cannot read \S+none\.toml: No such file or directory$"):
        load_criteria(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"about = '\xff'")
    with pytest.raises(PlanError, match=r"bad\.toml: not UTF-8 text$"):
        load_criteria(tmp_path / "bad.toml")
