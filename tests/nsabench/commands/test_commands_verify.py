"""`nsabench verify`: what it asks for, stores, shows, and how it ends; with planted rows, and for real."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nsabench.commands import _verify
from nsabench.commands._verify import ScorecardProgress
from nsabench.peers import registry
from nsabench.plan.checks import Choice
from nsabench.store.scorecard import SCORECARD_COLUMNS, load_scorecard
from tests.nsabench.present.scorecards import score

GOOD_ROWS = [score(), score("unsupported", subject="win:fa2"), score(rule="lengths", dtype="fp16")]
BAD_ROW = score("fail", subject="sel:gather", rule="ties", reason="the wrong of equal blocks")
PEER_ROW = score("fail", subject="fla-core:naive 0.6.0 sel", branch="sel", backend="fla-core:naive")


@pytest.fixture(autouse=True)
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no peer installed, whatever this one has."""
    monkeypatch.setattr(registry.Peer, "version", lambda peer: None)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Choice]]:
    """In place of the checks, rows; returns where the choice that was asked goes."""

    def plant(*rows: dict[str, Any], then: BaseException | None = None) -> list[Choice]:
        asked: list[Choice] = []

        def run(choice: Choice, on_row: Callable[[Any], None], told: Callable[[str], None]) -> list[Any]:
            asked.append(choice)
            told("planted rows")
            for row in rows:
                on_row(row)
            if then is not None:
                raise then
            return list(rows)

        monkeypatch.setattr(_verify, "run_scorecard", run)
        return asked

    return plant


@pytest.fixture
def stored(folder: Path) -> Callable[[], Any]:
    def load() -> Any:
        (path,) = (folder / "results").iterdir()
        return load_scorecard(path)

    return load


def test_all_good_is_stored_and_shown(call, planted, stored) -> None:  # type: ignore[no-untyped-def]
    asked = planted(*GOOD_ROWS)
    done = call("verify", "--device", "cpu", "--tag", "before")
    assert (done.code, done.err) == (0, "")
    assert asked == [Choice(level="quick", device="cpu")]
    assert "values: 1 pass, 1 unsupported in 0s" in done.out
    assert "sliding window (win)" in done.out
    assert "win:fa2: needs a CUDA GPU" in done.out
    assert "fla-core, lucidrains: not installed: pip install 'nsabench[peers]'" in " ".join(done.out.split())
    card = stored()
    assert card.info["kind"] == "verify"
    assert (card.info["status"], card.info["tags"], card.info["device"]) == ("done", ["before"], "cpu")
    peers = ["fla-core", "lucidrains", "xunhaolai", "sfnsa"]
    assert card.info["summary"] == f"2 pass, 1 unsupported; peers: {len(peers)} unsupported"
    assert card.info["peers"] == peers
    assert [row["subject"] for row in card.rows[:3]] == ["win:sdpa", "win:fa2", "win:sdpa"]
    assert [row["rule"] for row in card.rows[3:]] == ["installed"] * len(peers)
    assert f"results: {card.path.parent.name}/{card.path.name}" in done.out


def test_the_options_make_the_choice(call, planted) -> None:  # type: ignore[no-untyped-def]
    asked = planted(*GOOD_ROWS)
    arguments = "--full --device cpu --dtype fp64,fp32 --subjects sel:gather,layer --rules ties,values"
    assert call("verify", *arguments.split(), "--no-peers").code == 0
    assert asked == [
        Choice("full", "cpu", ("fp64", "fp32"), ("sel:gather", "layer"), ("ties", "values"), peers=False)
    ]


def test_a_failure_of_ours_is_exit_code_1(call, planted, stored) -> None:  # type: ignore[no-untyped-def]
    planted(*GOOD_ROWS, BAD_ROW)
    done = call("verify", "--device", "cpu")
    assert done.code == 1
    assert "ties sel:gather fp32: FAIL: the wrong of equal blocks" in done.out
    assert "1 of 4 cases; 0.5 > 1e-06; the wrong of equal blocks" in " ".join(done.out.split())
    assert stored().info["summary"].startswith("2 pass, 1 fail, 1 unsupported")


@pytest.mark.parametrize(("more", "code"), [([], 0), (["--strict-peers"], 1)])
def test_a_peers_failure_counts_where_that_is_wanted(  # type: ignore[no-untyped-def]
    more, code, call, planted, monkeypatch
) -> None:
    planted(*GOOD_ROWS, PEER_ROW)
    monkeypatch.setattr(registry.Peer, "version", lambda peer: "0.6.0" if peer.name == "fla-core" else None)
    done = call("verify", "--device", "cpu", *more)
    assert done.code == code
    assert "peers that failed" in done.out


def test_json_is_a_row_a_line(call, planted) -> None:  # type: ignore[no-untyped-def]
    planted(*GOOD_ROWS, score("fail", max_abs_err=None))
    done = call("verify", "--device", "cpu", "--json", "--no-peers")
    assert [row["status"] for row in done.rows] == ["pass", "unsupported", "pass", "fail"]
    assert list(done.rows[0]) == [column.name for column in SCORECARD_COLUMNS]
    assert (done.rows[0]["reason"], done.rows[3]["max_abs_err"]) == (None, None)
    assert "results: " in done.err
    assert done.code == 1


def test_markdown_and_csv_have_stdout_alone(call, planted) -> None:  # type: ignore[no-untyped-def]
    planted(*GOOD_ROWS)
    done = call("verify", "--device", "cpu", "--format", "markdown", "--no-peers")
    assert done.out.startswith("2 pass, 1 unsupported.\n\n**Sliding window** (`win`)\n\n| rule | `sdpa` |\n")
    assert "results: " in done.err
    done = call("verify", "--device", "cpu", "--format", "csv", "--no-peers")
    found = list(csv.DictReader(io.StringIO(done.out)))
    assert [row["subject"] for row in found] == ["win:sdpa", "win:fa2", "win:sdpa"]
    assert found[0]["run_id"].endswith("-verify-nogit") or "-verify" in found[0]["run_id"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--format html", "--format: 'html' is unknown; allowed: table, markdown, csv"),
        ("--format csv --json", "--json and --format csv both want stdout; give one"),
        ("--rules casuality", "unknown rule 'casuality'; did you mean causality?"),
        ("--subjects sel:gathr", "unknown subject 'sel:gathr'; did you mean sel:gather?"),
        ("--subjects ,", "--subjects: no name given"),
        ("--subjects fla-core", "fla-core is not installed: pip install 'nsabench[peers]'"),
        ("--subjects fla-core:naive", "fla-core is not installed: pip install 'nsabench[peers]'"),
        ("--dtype fp31", "unknown dtype 'fp31'; did you mean fp32?"),
        ("--device cuda:99", "--device: "),
        ("--tag two,words", "--tag"),
    ],
)
def test_bad_usage_is_one_line_and_leaves_nothing(  # type: ignore[no-untyped-def]
    arguments, said, call, planted, folder: Path
) -> None:
    asked = planted(*GOOD_ROWS)
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = call("verify", *device, *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not asked
    assert not (folder / "results").exists()


def test_what_was_checked_before_ctrl_c_is_kept(call, planted, stored) -> None:  # type: ignore[no-untyped-def]
    planted(*GOOD_ROWS, then=KeyboardInterrupt())
    done = call("verify", "--device", "cpu")
    assert done.code == 130
    assert "interrupted; what was checked is in results" in done.err
    card = stored()
    assert (card.info["status"], len(card.rows)) == ("interrupted", 3)


def test_a_terminal_shows_one_line_that_changes_and_every_failure() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    talk = Console(file=screen, force_terminal=True, width=80, no_color=True)
    with ScorecardProgress(talk, clock=lambda: 0.0) as view:
        view.told("3/44 ties")
        view.row({"run_id": "r", **score()})
        view.row({"run_id": "r", **BAD_ROW})
    text = screen.getvalue()
    assert "1 rows, 0 failed, 0s: 3/44 ties" in text
    assert "ties sel:gather fp32: FAIL: the wrong of equal blocks" in text
    assert "values: 1 pass" not in text


def test_one_branch_for_real(call, stored) -> None:  # type: ignore[no-untyped-def]
    done = call("verify", "--device", "cpu", "--subjects", "win", "--rules", "window_width", "--json")
    assert done.code == 0
    assert {row["subject"] for row in done.rows} >= {"win:sdpa", "win:reference", "win:fa2"}
    by_subject = {row["subject"]: row["status"] for row in stored().rows}
    assert (by_subject["win:sdpa"], by_subject["win:fa2"]) == ("pass", "unsupported")
    assert json.loads((stored().path / "run.json").read_text())["repro"].startswith("nsabench verify ")


def test_a_window_with_a_key_too_many_is_found(call, plant) -> None:  # type: ignore[no-untyped-def]
    def wider(true, q, k, v, config, **more):  # type: ignore[no-untyped-def]
        return true(
            q, k, v, config.__class__(**(vars(config) | {"window_size": config.window_size + 1})), **more
        )

    plant("backends.sdpa:sliding_attention", wider)
    done = call("verify", "--device", "cpu", "--subjects", "win:sdpa", "--rules", "window_width,determinism")
    assert done.code == 1
    assert "window_width win:sdpa fp32: FAIL" in done.out
    assert "determinism: 1 pass" in done.out
