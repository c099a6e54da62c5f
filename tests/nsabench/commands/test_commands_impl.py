"""`--impl` and `--baseline`: what is measured, what stands beside it, and what cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.peers import dense_flex
from nsabench.plan import BASELINES
from nsabench.store import Run

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_flex, "why_not_compiled", lambda *_: "a test does not wait for a compiler")


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("impl", ["dense", "dense:flash", "dense:math", "dense:flex"])
def test_an_implementation_is_measured_instead(call: Call, tiny: list[str], phase: str, impl: str) -> None:
    done = call(phase, *tiny, "--impl", impl, "--json")
    assert done.code == 0
    (row,) = done.rows
    assert (row["impl"], row["route"], row["status"]) == (impl, "auto", "ok")


def test_beside_nsa_it_is_a_baseline(call: Call, tiny: list[str], the_run: Callable[[], Run]) -> None:
    done = call("prefill", *tiny, "--impl", "nsa,dense:flash", "--json")
    assert done.code == 0
    assert [(row["impl"], row["status"]) for row in done.rows] == [("nsa", "ok"), ("dense:flash", "ok")]
    assert [cell["impl"] for cell in the_run().info["plan"]] == ["nsa", "dense:flash"]


def test_all_is_every_dense_attention_and_those_that_cannot_run_are_rows(call: Call, tiny: list[str]) -> None:
    done = call("decode", *tiny, "--baseline", "all", "--json")
    assert done.code == 0
    rows = {row["impl"]: row for row in done.rows}
    assert set(rows) == {"nsa", *BASELINES}
    for impl, row in rows.items():
        runs = impl in ("nsa", "dense", "dense:flash", "dense:math", "dense:flex")
        assert row["status"] == ("ok" if runs else "unsupported")
        assert runs or row["reason"].endswith("runs on cuda, not on cpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--baseline", "dense:flsh"), "--baseline: 'dense:flsh' is unknown; did you mean dense:flash?"),
        (("--impl", "dense:efficent"), "--impl: 'dense:efficent' is unknown; did you mean dense:efficient?"),
        (("--impl", "dense:fa3"), "--impl: 'dense:fa3' cannot run here: fa3 runs on cuda, not on cpu"),
        (
            ("--impl", "dense:flash", "--routes", "sdpa"),
            "--routes: dense:flash has no routes; leave it out, or add nsa",
        ),
    ],
)
def test_bad_usage_is_one_line(
    call: Call, folder: Path, tiny: list[str], given: tuple[str, ...], said: str
) -> None:
    done = call("decode", *tiny, *given)
    assert (done.code, done.out, done.err) == (2, "", f"nsabench: {said}\n")
    assert list(folder.iterdir()) == []


def test_a_side_that_cannot_run_here_or_anywhere(call: Call, folder: Path) -> None:
    for side, said in (
        ("dense:fa4", "side 'dense:fa4' cannot run here: fa4 runs on cuda, not on cpu"),
        ("dense:fa5", "side 'dense:fa5': no implementation 'dense:fa5'; did you mean dense:fa4?"),
    ):
        done = call("compare", "auto", side, "--device", "cpu", "--S", "64")
        assert (done.code, done.out, done.err) == (2, "", f"nsabench: {said}\n")
    assert list(folder.iterdir()) == []


def test_what_a_suite_says_is_what_options_say(call: Call, tiny: list[str], folder: Path) -> None:
    saved = folder / "mine.toml"
    more = ["--impl", "dense:math", "--baseline", "dense", "--save-suite", str(saved), "--dry-run"]
    assert call("decode", *tiny, *more).code == 0
    shown = call("suite", "show", str(saved))
    assert shown.code == 0
    said = " ".join(shown.out.split())
    assert "--impl dense:math --baseline dense" in said
