"""A scorecard on disk: what a row must hold, what is read back, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nsabench.store import SchemaError, StoreError, TableRun
from nsabench.store.scorecard import (
    KIND,
    SCORECARD_COLUMNS,
    SCORECARD_FILE,
    SCORECARD_TABLES,
    check_score,
    failed_rows,
    load_scorecard,
    store_scores,
)
from tests.nsabench.present.scorecards import score


def create(root: Path, kind: str = KIND) -> TableRun:
    return TableRun.create(
        root,
        kind=kind,
        name="verify",
        argv=["verify"],
        repro="nsabench verify",
        environment={"commit": "0123456789"},
        tables=SCORECARD_TABLES,
        peers=["fla-core 0.6.0 sel"],
    )


def test_what_is_stored_is_read(tmp_path: Path) -> None:
    rows = [
        score(),
        score("fail", rule="window_width", reason='a key too many, "w + 1"', max_abs_err=3.0, budget=0.0),
        score("unsupported", max_abs_err=None, budget=None, cases=0, worst=""),
    ]
    with create(tmp_path) as run:
        for row in rows:
            store_scores(run, row)
    card = load_scorecard(run.path)
    assert card.path == run.path
    assert card.info["peers"] == ["fla-core 0.6.0 sel"]
    assert card.rows == [{"run_id": run.run_id, **row} for row in rows]


def test_a_row_that_was_cut_off_is_not_there(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        store_scores(run, score(), score(rule="lengths"))
    with (run.path / SCORECARD_FILE).open("a") as file:
        file.write(f"{run.run_id},ties,half")
    assert [row["rule"] for row in load_scorecard(run.path).rows] == ["values", "lengths"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "ok"}, "status is 'ok'; allowed: pass, fail, unsupported, differs"),
        ({"status": "fail", "reason": ""}, "status is fail, so reason must say why; it is empty"),
        ({"status": "unsupported", "reason": " "}, "status is unsupported, so reason must say why"),
        ({"status": "differs", "reason": ""}, "status is differs, so reason must say why"),
        ({"rule": ""}, "rule is empty"),
        ({"subject": ""}, "subject is empty"),
        ({"cases": "many"}, "cases takes int, not 'many'"),
        ({"error": 1.0}, "unknown column 'error'"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_written(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with create(tmp_path) as run:
        before = (run.path / SCORECARD_FILE).read_bytes()
        with pytest.raises(SchemaError, match=said.replace("(", r"\(")):
            store_scores(run, score() | changes)
        assert (run.path / SCORECARD_FILE).read_bytes() == before


def test_a_pass_may_say_what_was_refused_of_it() -> None:
    assert check_score(score(reason="2 cases refused: no"))["reason"] == "2 cases refused: no"
    assert check_score(score())["reason"] == ""
    assert list(check_score({"rule": "a", "subject": "b", "status": "pass"})) == [
        column.name for column in SCORECARD_COLUMNS
    ]


def test_a_run_of_another_kind_is_no_scorecard(tmp_path: Path) -> None:
    with create(tmp_path, kind="train") as run:
        pass
    with pytest.raises(StoreError, match=r"is a training \(nsabench train\); wanted here: a scorecard"):
        load_scorecard(run.path)
    with pytest.raises(StoreError, match="is not a run"):
        load_scorecard(tmp_path)


def test_a_damaged_scorecard_is_said_in_one_line(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        store_scores(run, score())
    file = run.path / SCORECARD_FILE
    sound = file.read_text()
    file.write_text(sound.replace(",pass,", ",fine,"))
    with pytest.raises(StoreError, match=r"is damaged: scorecard\.csv: row 1: status is 'fine'"):
        load_scorecard(run.path)
    file.write_text(sound.replace("subject", "who", 1))
    with pytest.raises(StoreError, match=r"is damaged: scorecard\.csv"):
        load_scorecard(run.path)


def test_failures_of_peers_are_told_apart() -> None:
    rows = [score(), score("fail", subject="win:cpp"), score("fail", subject="fla-core 0.6.0 sel")]
    assert [row["subject"] for row in failed_rows(rows)] == ["win:cpp", "fla-core 0.6.0 sel"]
    assert [row["subject"] for row in failed_rows(rows, ["fla-core 0.6.0 sel"])] == ["win:cpp"]
