"""One cell looked into: its row as in a sweep, its kernels, and what is left in the folder of its run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from nsabench.plan import Cell
from nsabench.run import Policy, profile
from nsabench.run.jobs import Began, Done, Job, Over
from nsabench.run.profile import Here, ProfilePolicy, measure_profile
from nsabench.store.profile import load_profile
from nsabench.store.schema import check_row

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]


class Rows:
    """A sink that keeps what is finished."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.done_rows: list[tuple[dict[str, Any], Sequence[Any], Sequence[dict[str, Any]]]] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None:
        self.said.append(text)

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.done_rows.append((dict(row), samples, kernels))


def policy_for(folder: Path, quick: Policy) -> ProfilePolicy:
    return ProfilePolicy(**{**quick.to_dict(), "shares": True}, folder=str(folder))


def look(cell: Cell, folder: Path, quick: Policy) -> tuple[dict[str, Any], Sequence[dict[str, Any]], Any]:
    rows = Rows()
    measure_profile([cell], policy_for(folder, quick), rows)
    ((row, samples, kernels),) = rows.done_rows
    check_row(row)
    assert bool(samples) == (row["status"] == "ok")
    return row, kernels, load_profile(folder)


@pytest.mark.parametrize("changes", [{}, {"phase": "decode"}, {"passes": "bwd"}, {"mode": "chunked=16"}])
def test_a_cell_is_looked_into(
    make_cell: MakeCell, tmp_path: Path, quick: Policy, changes: dict[str, str]
) -> None:
    cell = make_cell(**changes)
    row, kernels, told = look(cell, tmp_path, quick)
    assert (row["status"], told["failed"], told["cell_id"]) == ("ok", "", cell.cell_id)
    inside = sum(one["ms"] for one in kernels) + told["idle_ms"]
    assert told["note"] or inside == pytest.approx(told["step_ms"], rel=0.02)
    assert [one["ms"] for one in kernels] == sorted((one["ms"] for one in kernels), reverse=True)
    assert sum(part["flops"] for part in told["stages"].values()) == row["flops"]
    assert sum(part["bytes"] for part in told["stages"].values()) == row["bytes"]
    assert told["files"] == {"trace": "trace.json.gz", "memory": "memory.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", *told["files"].values()}
    assert json.loads((tmp_path / "memory.json").read_text())["events"]


def test_dense_attention_has_no_stages_of_its_own(make_cell: MakeCell, tmp_path: Path, quick: Policy) -> None:
    row, kernels, told = look(make_cell(impl="dense"), tmp_path, quick)
    assert (row["status"], told["stages"]) == ("ok", {})
    assert kernels


def test_a_cell_that_cannot_run_is_its_row_alone(make_cell: MakeCell, tmp_path: Path, quick: Policy) -> None:
    row, kernels, told = look(make_cell(route="fa2"), tmp_path, quick)
    assert (row["status"], kernels, told) == ("unsupported", (), None)


def test_a_wrong_result_is_not_looked_into(
    make_cell: MakeCell, tmp_path: Path, quick: Policy, plant: Plant
) -> None:
    def off(true: Callable[..., Any], *given: Any, **more: Any) -> Any:
        out, lse = true(*given, **more)
        return out + 1, lse

    with plant("backends.sdpa:sliding_attention", off):
        row, _, told = look(make_cell(route="sdpa"), tmp_path, quick)
    assert (row["status"], told) == ("wrong", None)


def test_what_cannot_be_looked_into_keeps_its_row(
    make_cell: MakeCell, tmp_path: Path, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise RuntimeError("another profiler is active\nmore")

    monkeypatch.setattr(profile, "write_trace", broken)
    row, _, told = look(make_cell(), tmp_path, quick)
    assert row["status"] == "ok"
    assert row["ms_total"] > 0
    assert told["failed"] == "RuntimeError: another profiler is active"


def test_an_executor_in_this_process(make_cell: MakeCell, tmp_path: Path, quick: Policy) -> None:
    cell = make_cell()
    job = Job((cell,), policy_for(tmp_path, quick), 0)
    first, *_, done, last = Here([cell]).run(iter([job]))
    assert first == Began(0, job)
    assert isinstance(done, Done)
    assert done.row["status"] == "ok"
    assert last == Over(0, job, ())
