"""--find-max-S: what it is given, what it prints, what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsabench.commands import _capacity
from nsabench.commands._capacity import FILE, find_max_S, parse_memory, parts_text
from nsabench.plan import Cell, PlanError
from nsabench.run.capacity import Capacity, Try

MIB = 2**20


def cell(**changes: Any) -> Cell:
    fields: dict[str, Any] = {
        "phase": "decode", "passes": "fwd", "mode": "batched", "S": 512, "B": 1, "dim": 32, "heads": 4,
        "groups": 2, "dk": 8, "dv": 8, "l": 8, "d": 4, "l_sel": 8, "n_sel": 4, "w": 12, "dtype": "fp32",
        "device": "cpu", "seed": 3, "route": "auto",
    }  # fmt: skip
    return Cell(**{**fields, **changes})


CELLS = [cell(S=S, impl=impl) for S in (1024, 512) for impl in ("nsa", "dense")]


def answer(asked: Cell, **changes: Any) -> Capacity:
    parts = {"cache sel": 80 * MIB, "temporaries": 10 * MIB, "x": 0}
    best = Try(4096, "ok", need_bytes=90 * MIB, parts=parts, stage="win")
    failed = Try(4224, "oom", "needs 101.0 MiB, most in win; 100.0 MiB may be used", need_bytes=101 * MIB)
    given = {"best": best, "failed": failed, "exact": True, "tries": (best, failed), **changes}
    return Capacity(cell=asked, limit_bytes=100 * MIB, **given)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Have the search answer so; what it was asked."""

    def use(**changes: Any) -> list[Any]:
        asked: list[Any] = []

        def fake(cell: Cell, executor: Any, **more: Any) -> Capacity:
            asked.append((cell, more))
            if changes.get("stop_at") == len(asked):
                raise KeyboardInterrupt
            return answer(cell, **{k: v for k, v in changes.items() if k != "stop_at"})

        monkeypatch.setattr(_capacity, "find_capacity", fake)
        return asked

    return use


def search(tmp_path: Path, cells: list[Cell] = CELLS, **more: Any) -> int:
    given = {"memory_limit": "100MiB", "timeout_s": 60.0, "json_lines": False, **more}
    return find_max_S(cells, out=tmp_path / "results", **given)


def stored(tmp_path: Path) -> dict[str, Any]:
    (path,) = (tmp_path / "results").glob(f"*-decode-capacity-*/{FILE}")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["run_id"] == path.parent.name
    return found


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("1.5 GiB", 3 * 2**29),
        ("2g", 2**31),
        ("800MB", 800 * 10**6),
        ("64k", 2**16),
        ("2048", 2048),
        ("10b", 10),
        (" 1TiB ", 2**40),
    ],
)
def test_an_amount_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "2 apples", "GiB", "1e9", "0.0001", "2GiB2", "1..5g"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(PlanError, match=r"^--memory-limit: .* is not an amount of memory; allowed: 2GiB"):
        parse_memory(text)


def test_each_arm_is_searched_once_from_its_smallest_length(
    tmp_path: Path, answers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answers()
    assert search(tmp_path) == 0
    assert [(c.impl, c.S) for c, _ in asked] == [("nsa", 512), ("dense", 512)]
    assert {more["limit_bytes"] for _, more in asked} == {100 * MIB}
    assert {more["timeout_s"] for _, more in asked} == {60.0}
    out = " ".join(capsys.readouterr().out.split())
    assert "longest S of decode on cpu: dim 32, 4 heads, 2 KV heads" in out
    assert "memory: 100.0 MiB, and never more than 90% of the free memory" in out
    assert "largest S is known to 128 tokens" in out
    for word in ("auto", "dense", "4096", "90.00 MiB", "cache sel", "4224:"):
        assert word in out


def test_what_is_stored(tmp_path: Path, answers: Any) -> None:
    answers()
    search(tmp_path, memory_limit=None)
    found = stored(tmp_path)
    assert found["memory_limit_bytes"] is None
    nsa, dense = found["capacities"]
    assert (nsa["impl"], nsa["route"], nsa["largest_S"], nsa["exact"]) == ("nsa", "auto", 4096, True)
    assert (nsa["resolution_tokens"], nsa["limit_bytes"]) == (128, 100 * MIB)
    assert nsa["best"]["parts"]["cache sel"] == 80 * MIB
    assert nsa["failed"]["reason"].startswith("needs 101.0 MiB")
    assert [t["S"] for t in nsa["tries"]] == [4096, 4224]
    assert dense["impl"] == "dense"


def test_json_lines_are_alone_on_stdout(
    tmp_path: Path, answers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answers()
    search(tmp_path, json_lines=True)
    streams = capsys.readouterr()
    assert [json.loads(line)["largest_S"] for line in streams.out.splitlines()] == [4096, 4096]
    assert "largest S" in streams.err


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"exact": False}, 0, "at least 4096"),
        ({"best": None, "failed": Try(512, "oom", "needs more")}, 3, "512: needs more"),
        ({"best": None, "failed": Try(512, "unsupported", "cannot")}, 3, "512: cannot"),
        ({"best": None, "failed": Try(512, "wrong", "output differs")}, 1, "512: output differs"),
        (
            {"exact": False, "failed": Try(8192, "error", "RuntimeError: index")},
            1,
            "8192: RuntimeError: index",
        ),
        ({"exact": False, "failed": Try(8192, "timeout", "too long")}, 0, "8192: too long"),
    ],
    ids=str,
)
def test_how_it_ended(
    tmp_path: Path,
    answers: Any,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    code: int,
    text: str,
) -> None:
    answers(**changes)
    assert search(tmp_path, [cell()]) == code
    assert text in " ".join(capsys.readouterr().out.split())


def test_an_interruption_keeps_what_was_found(
    tmp_path: Path, answers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(stop_at=2)
    with pytest.raises(BaseException) as stopped:  # noqa: PT011
        search(tmp_path)
    assert getattr(stopped.value, "exit_code", None) == 130
    assert len(stored(tmp_path)["capacities"]) == 1
    streams = capsys.readouterr()
    assert "interrupted; 1 of 2 searches are finished and kept" in " ".join(streams.err.split())
    assert "4096" in streams.out


def test_bad_usage_leaves_nothing(tmp_path: Path, answers: Any) -> None:
    answers()
    with pytest.raises(PlanError, match="is not an amount of memory"):
        search(tmp_path, memory_limit="lots")
    assert not (tmp_path / "results").exists()


def test_parts_say_the_most_first_and_the_stage_once() -> None:
    assert parts_text(answer(cell())) == "cache sel 80.00 MiB, temporaries 10.00 MiB; peak in win"
    built = replace(answer(cell()), best=Try(1, "ok", need_bytes=5, parts={"building": 5}, stage="building"))
    assert parts_text(built) == "building 5 bytes"
    assert parts_text(replace(built, best=None)) == "-"


def test_arms_are_named_by_what_tells_them_apart(
    tmp_path: Path, answers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answers()
    cells = [cell(B=B, scope=scope) for B in (1, 4) for scope in ("module", "core")]
    search(tmp_path, cells, json_lines=False)
    out = capsys.readouterr().out
    assert "auto, core, B 4" in " ".join(out.split())
