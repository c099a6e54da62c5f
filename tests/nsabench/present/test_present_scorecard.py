"""The scorecard for people: from made-up rows to a matrix, lists and Markdown."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from rich.console import Console

from nsabench.plan.checks import RULES
from nsabench.present.scorecard import (
    counts_text,
    differing_lines,
    error_text,
    failure_lines,
    head_of,
    named_checks,
    ordered,
    parts_of,
    refusal_lines,
    row_line,
    scorecard_view,
)
from nsabench.present.scorecard_markdown import scorecard_csv, scorecard_markdown
from nsabench.store.scorecard import SCORECARD_COLUMNS
from tests.nsabench.present.scorecards import score

PEER = "fla-core:naive 0.6.0 sel"


def shown(rows: list[dict[str, Any]], width: int = 80, peers: tuple[str, ...] = ()) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    for part in scorecard_view(rows, peers=peers, width=width):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_all_dtypes_of_a_check_stand_in_one_place() -> None:
    rows = [
        score(),
        score(dtype="fp16", max_abs_err=3e-3, budget=2e-3, status="fail", reason="too far"),
        score(dtype="bf16", max_abs_err=9e-3, budget=2e-3, status="fail", reason="farther"),
        score(rule="lengths"),
        score("unsupported", rule="lengths", dtype="fp16"),
        score("unsupported", rule="decode"),
        score(rule="causality", reason="3 cases refused: no place"),
    ]
    (part,) = parts_of(rows)
    assert (part.branch, part.subjects, part.nowhere) == ("win", ["win:sdpa"], [])
    assert part.rules == ["values", "lengths", "decode", "causality"]
    said = {rule: cell.lines for (rule, _), cell in part.cells.items()}
    assert said == {
        "values": ["FAIL bf16", "0.009 > 0.002"],
        "lengths": ["pass*"],
        "decode": ["–"],
        "causality": ["pass*"],
    }


def test_what_refuses_everything_has_no_column_but_a_reason() -> None:
    rows = [score(), score("unsupported", subject="win:fa2"), score("unsupported", subject="win:fa3")]
    (part,) = parts_of(rows)
    assert (part.subjects, part.nowhere) == (["win:sdpa"], ["win:fa2", "win:fa3"])
    assert refusal_lines(rows) == ["win:fa2, win:fa3: needs a CUDA GPU"]
    text = shown(rows)
    assert "win:fa2, win:fa3: needs a CUDA GPU" in text
    assert text.count("CUDA") == 1


def test_branches_and_rules_have_one_order() -> None:
    rows = [score(subject="win:sdpa", rule="made_up"), score(subject="cmp:sdpa"), score(subject="layer:auto")]
    assert [part.branch for part in parts_of(rows)] == ["cmp", "win", "layer"]
    assert ordered({"made_up", *list(RULES)[:2]}) == [*list(RULES)[:2], "made_up"]


def test_a_layers_reason_is_told_once() -> None:
    why = "cmp=fa2: needs a CUDA GPU; sel=fa2: needs a CUDA GPU; win=fa2: needs a CUDA GPU"
    rows = [score("unsupported", subject="layer:fa2", reason=why), score("unsupported", subject="cmp:fa2")]
    assert refusal_lines(rows) == ["layer:fa2, cmp:fa2: needs a CUDA GPU"]
    partly = [score(reason="2 cases refused: no fp64"), score("unsupported", reason="no fp64", rule="ties")]
    assert refusal_lines(partly) == ["win:sdpa: no fp64"]
    many = [score("unsupported", subject=f"win:{n}") for n in range(9)]
    assert refusal_lines(many) == ["win:0, win:1, win:2, win:3, win:4, win:5 and 3 more: needs a CUDA GPU"]


def test_failures_say_error_budget_and_worst_case() -> None:
    row = score("fail", reason="o is wrong", failed=2, worst="S=65 G=3: o", passes="fwd_bwd")
    assert failure_lines([row, score()]) == [
        "values win:sdpa fp32 fwd_bwd: 2 of 4 cases; 0.5 > 1e-06; o is wrong; worst: S=65 G=3: o"
    ]
    known = score("fail", reason="o differs by 0.5 (S=65 G=3)", worst="S=65 G=3: o")
    assert failure_lines([known])[0].endswith("o differs by 0.5 (S=65 G=3)")
    assert row_line(row) == "values win:sdpa fp32: FAIL: o is wrong"
    assert row_line(score()) == "values win:sdpa fp32: pass"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_abs_err": 0.1534, "budget": 1.94e-5}, "0.15 > 1.9e-05"),
        ({"max_abs_err": 3.0, "budget": 0.0}, "3 > 0"),
        ({"max_abs_err": None}, "not finite"),
        ({"max_abs_err": None, "cases": 0}, "crashed"),
    ],
)
def test_errors_against_budgets(changes: dict[str, Any], text: str) -> None:
    assert error_text(score("fail") | changes) == text


def test_an_error_that_is_no_number_is_the_worst() -> None:
    rows = [score("fail", max_abs_err=1e9), score("fail", dtype="fp16", max_abs_err=None)]
    (part,) = parts_of(rows)
    assert part.cells["values", "win:sdpa"].lines == ["FAIL fp16", "not finite"]


def test_differences_by_declaration_are_told_once() -> None:
    how = "own scores (mean), not the sum"
    rows = [
        score("differs", subject="x 1 score", rule="values", reason=f"{how} (o differs by 1 (S=65 (B=2)))"),
        score("differs", subject="x 1 score", rule="ties", reason=f"{how} (o differs by 3 (S=9))"),
    ]
    assert differing_lines(rows) == [f"x 1 score: {how} (seen in values, ties)"]


def test_counts_tell_peers_apart() -> None:
    rows = [score(), score("fail"), score("unsupported"), score("fail", subject=PEER)]
    assert counts_text(rows, [PEER]) == "1 pass, 1 fail, 1 unsupported; peers: 1 fail"
    assert counts_text(rows) == "1 pass, 2 fail, 1 unsupported"
    assert counts_text([]) == "nothing checked"
    assert counts_text([score(subject=PEER)], [PEER]) == "nothing checked; peers: 1 pass"


def test_reports_stand_beside_the_mistake_and_ours() -> None:
    report = RULES["sliding_fa2"].report
    named: dict[str, Any] = {"rule": "sliding_fa2", "reported": 0.766}
    noted = f"{report}; what top-left gives here: MAE 0.75; one key too many: 0.02; ours: MAE 5e-08"
    rows = [
        score(**named, dtype="fp16", max_abs_err=1e-3, reported_note=report),
        score(**named, reported_note=noted),
        score("unsupported", **named, subject="win:fa2", reported_note=report, max_abs_err=None),
        score("fail", **named, subject="win:theirs 1", reported_note=report),
    ]
    (found,) = named_checks(rows, ["win:theirs 1"])
    assert (found.rule, found.reported, found.report, found.passed) == ("sliding_fa2", 0.766, report, True)
    assert found.mistake == "what top-left gives here: MAE 0.75; one key too many: 0.02"
    assert found.ours == "MAE 5e-08; all 8 cases right; largest error: fp16 1.0e-03, fp32 1.0e-07"
    (wrong,) = named_checks([*rows, score("fail", **named, reported_note=report)])
    assert not wrong.passed
    assert wrong.ours.startswith("MAE 5e-08; 2 of 16 cases wrong")
    (nowhere,) = named_checks([score("unsupported", **named, reported_note=report)])
    assert (nowhere.ours, nowhere.passed) == ("cannot run here", False)
    assert named_checks([score()]) == []


@pytest.mark.parametrize(
    ("subject", "head"),
    [
        ("sel:gather:keys", ["gather", ":keys"]),
        ("sel:sdpa", ["sdpa"]),
        (PEER, ["fla-core", ":naive", "0.6.0"]),
    ],
)
def test_a_column_is_headed_without_its_branch(subject: str, head: list[str]) -> None:
    assert head_of("sel", subject) == head


def many() -> list[dict[str, Any]]:
    subjects = [f"sel:backend{n}:variant" for n in range(12)]
    rows = [score(subject=subject, rule=rule) for subject in subjects for rule in RULES]
    wrong = score("fail", subject="sel:backend7:variant", rule="batched_equals_stepwise")
    named = score(rule="sliding_fa2", reported=0.766, reported_note=RULES["sliding_fa2"].report)
    return [*rows, wrong, named, score("unsupported", subject="sel:fa2", reason="no " * 60 + "GPU")]


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_shows_all_of_it(width: int) -> None:
    text = shown(many(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "selected (sel), 1 of" in text
    assert all(f"backend{n}" in text for n in range(12))
    assert "0.5 > 1e-06" in text
    assert "…" not in text


def test_markdown_holds_the_matrix_the_lists_and_the_rules() -> None:
    rows = [*many(), score("fail", subject=PEER, branch="sel", reason="empty lists | NaN")]
    text = scorecard_markdown(rows, peers=[PEER])
    lines = text.splitlines()
    assert lines[0] == f"{len(RULES) * 12 + 1} pass, 1 fail, 1 unsupported; peers: 1 fail."
    (heads,) = [line for line in lines if line.startswith("| rule | `backend0:variant` |")]
    assert heads.endswith("| `fla-core:naive 0.6.0` |")
    assert any(line.startswith("| `batched_equals_stepwise` |") and "**FAIL fp32" in line for line in lines)
    assert "Peers that failed:" in text
    assert "empty lists \\| NaN" in text
    assert "| `sliding_fa2` | sliding window through FA2" in text
    assert "| `values` | output equals the specification's | rules 1 to 9 |" in text
    for table in text.split("\n\n"):
        found = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in found}) <= 1


def test_csv_is_the_stored_table() -> None:
    (head, first) = csv.reader(io.StringIO(scorecard_csv([{"run_id": "r", **score(reason='a, "b"')}])))
    assert head == [column.name for column in SCORECARD_COLUMNS]
    row = dict(zip(head, first, strict=True))
    assert (row["reason"], row["reported"], row["cases"]) == ('a, "b"', "", "4")
