"""doctor --self-test with made-up times: what is counted, what is kept, when a bound is broken."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from nsabench.commands import _self_test
from nsabench.commands._self_test import QUICK, Trial, attempt, holds, trials
from nsabench.run.executor import Began, Done, Event, Job, Over, WorkerError
from nsabench.run.self_test import plants
from nsabench.store import capture_environment

KINDS = [plant.name for plant in plants("cpu")]
FAULTS = {
    "planted:wrong": ("wrong", "output differs from the specification"),
    "planted:hang": ("hang", "no progress for 5 s"),
    "planted:crash": ("error", "the worker was killed by SIGSEGV"),
}


@dataclass
class Machine:
    """A bench that measures made-up times: ``true`` by side, the truth where not given; ``noise`` of a time,
    ``apart`` of processes. ``blind`` to faults. ``begun``: by comparison, how often it was measured.
    """

    true: dict[str, float] = field(default_factory=dict)
    noise: float = 0.002
    apart: float = 0.0
    blind: bool = False
    loud: bool = False
    before: Callable[[int], None] = lambda number: None
    begun: list[str] = field(default_factory=list)

    slots = ()

    def hire(self, cells: Any, process: int, measure: str) -> Machine:
        self.process = process
        return self

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        for job in jobs:
            side = job.cells[1]
            self.begun.append(f"{side.impl} {side.route} {side.seed}")
            self.before(len(self.begun))
            yield Began(0, job)
            for place, cell in enumerate(job.cells):
                yield Done(0, *self.measured(cell, place, job))
            yield Over(0, job, ())

    def measured(self, cell: Any, place: int, job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        row = {**cell.to_dict(), "cell_id": cell.cell_id, "status": "ok", "reason": "", "timer": "cpu"}
        row |= {"flops": 1e6, "bytes": 1e6, "cache": "warm", "regime": "latency"}
        row |= {"neighbour_load_pct": 80.0 if self.loud else 1.0, "canary_spread_pct": 0.5}
        status, reason = FAULTS.get(cell.impl, ("ok", ""))
        if "win=sdpa" in cell.route:
            status, reason = "invalid", "fell back: requested sdpa for win, ran math"
        if status != "ok" and not self.blind:
            return row | {"status": status, "reason": reason}, []
        kind = cell.impl.partition(":")[2]
        ms = self.true.get(kind, int(kind) / 100 if kind.isdigit() else 1.0)
        draw = random.Random(f"{cell.cell_id} {self.process}")
        ms *= draw.lognormvariate(0, self.apart) if self.apart else 1.0
        samples = [
            {
                "process": self.process,
                "round": number,
                "position": (place + number) % 3,
                "variant": "",
                "iters": 1,
                "ms": ms * draw.lognormvariate(0, self.noise),
                "t_s": 0.0,
            }
            for number in range(job.policy.rounds)
        ]
        return row, samples


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()

    @contextmanager
    def neighbour(device: str) -> Iterator[None]:
        before, found.loud = found.loud, True
        yield
        found.loud = before

    monkeypatch.setattr(_self_test, "hired", found.hire)
    monkeypatch.setattr(_self_test, "neighbour", neighbour)
    return found


def self_tested(call: Any, *more: str) -> Any:
    return call("doctor", "--self-test", "--device", "cpu", *more)


def by_name(done: Any) -> dict[str, dict[str, Any]]:
    return {one["plant"]: one for one in json.loads(done.out)["plants"]}


def test_a_bench_that_finds_everything(call, machine: Machine, folder: Path) -> None:  # type: ignore[no-untyped-def]
    done = self_tested(call, "--json")
    assert done.code == 0, done.err
    found = by_name(done)
    assert list(found) == KINDS
    assert {name: one["runs"] for name, one in found.items()} == {
        **dict.fromkeys(KINDS, 1),
        **dict.fromkeys(("5 % slower", "2 % slower"), QUICK // 2),
        "equal work": QUICK,
    }
    assert all(one["caught"] == one["runs"] for one in found.values()), done.err
    assert found["1 % slower"]["holds"] is None
    assert all(one["holds"] for name, one in found.items() if name != "1 % slower")
    assert found["crash"]["came"] == {"error": 1}
    assert found["neighbour"]["came"] == {"INVALID": 1}
    (kept,) = (folder / "results").glob("self-test-*.jsonl")
    head, *outcomes = map(json.loads, kept.read_text().splitlines())
    assert head["device"] == "cpu"
    assert outcomes == json.loads(done.out)["outcomes"]
    assert (
        "| 5 % slower | 2 | SLOWER | 2 of 2 (100 %) | 95 %, holds | 20 s |"
        in kept.with_suffix(".md").read_text()
    )
    assert done.err.count("] ") >= len(outcomes)
    assert "NOT as it should be" not in done.err


def test_the_table_is_printed(call, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    done = self_tested(call, "--runs", "1")
    assert done.code == 0
    for name in ("equal work", "fallback", "neighbour", "min in all"):
        assert name in done.out


@pytest.mark.parametrize(
    ("spoilt", "name"),
    [({"true": {"105": 1.0}}, "5 % slower"), ({"true": {"102": 1.001}}, "2 % slower")],
)
def test_a_slow_down_that_is_not_found_breaks_a_bound(
    call: Any, machine: Machine, spoilt: dict[str, Any], name: str
) -> None:
    machine.true = spoilt["true"]
    done = self_tested(call, "--json")
    assert done.code == 1
    broken = {one["plant"] for one in by_name(done).values() if one["holds"] is False}
    assert broken == {name}
    assert f"{name}: SAME" in done.err
    assert "NOT as it should be" in done.err


def test_false_alarms_break_a_bound(call, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    machine.true = {"100b": 1.05}
    done = self_tested(call, "--json")
    assert done.code == 1
    assert by_name(done)["equal work"]["came"] == {"SLOWER": QUICK}
    assert by_name(done)["equal work"]["holds"] is False


def test_processes_that_differ_raise_no_false_alarms(call, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    machine.apart = 0.01
    found = by_name(self_tested(call, "--json", "--runs", "8"))
    assert found["equal work"]["caught"] == 8


def test_a_blind_bench_is_caught(call, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    machine.blind = True
    done = self_tested(call, "--json", "--runs", "1")
    assert done.code == 1
    broken = {one["plant"] for one in by_name(done).values() if one["holds"] is False}
    assert broken == {"wrong result", "fallback", "hang", "crash"}


def test_a_loud_machine_is_no_quiet_one(call, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    machine.loud = True
    done = self_tested(call, "--json")
    assert done.code == 1
    assert by_name(done)["equal work"]["came"] == {"INVALID": QUICK}
    assert "other processes used 80 %" in done.err


def test_what_was_interrupted_goes_on(call, machine: Machine, folder: Path) -> None:  # type: ignore[no-untyped-def]
    machine.before = lambda number: _interrupt(number, at=8)
    done = self_tested(call, "--out", "mine/found.jsonl")
    assert done.code == 130
    assert "--self-test --out mine/found.jsonl goes on" in done.err
    assert "self-test on cpu" in done.out
    kept = folder / "mine" / "found.jsonl"
    lines = kept.read_text().splitlines()
    assert len(lines) > 1
    kept.write_text("\n".join([*lines, lines[-1][:20]]))

    machine.before = Machine().before
    done = self_tested(call, "--out", "mine/found.jsonl", "--json")
    assert done.code == 0, done.err
    wanted = {(trial.plant.name, trial.number) for trial in trials(plants("cpu"), QUICK)}
    after = kept.read_text().splitlines()
    assert after[: len(lines)] == lines
    assert {(one["plant"], one["number"]) for one in map(json.loads, after[1:])} == wanted
    assert len(after) == 1 + len(wanted) == 1 + len(json.loads(done.out)["outcomes"])

    machine.begun.clear()
    again = self_tested(call, "--out", "mine/found.jsonl", "--json")
    assert machine.begun == []
    assert by_name(again) == by_name(done)
    self_tested(call, "--out", "mine/found.jsonl", "--runs", str(QUICK + 2))
    slower = {f"planted:10{percent}" for percent in (2, 5)}
    assert {text.split()[0] for text in machine.begun} == {"planted:100b", *slower}


def _interrupt(number: int, at: int) -> None:
    if number == at:
        raise KeyboardInterrupt


def test_a_machine_that_fails_keeps_what_was_found(call, machine: Machine, folder: Path) -> None:  # type: ignore[no-untyped-def]
    def fail(number: int) -> None:
        if number == 8:
            raise WorkerError("workers do not start here")

    machine.before = fail
    done = self_tested(call, "--out", "found.jsonl")
    assert done.code == 4
    assert "workers do not start here; what was found so far is kept" in done.err
    assert len((folder / "found.jsonl").read_text().splitlines()) > 1


def test_late_is_not_found(machine: Machine) -> None:
    plant = next(plant for plant in plants("cpu") if plant.name == "5 % slower")
    for took, caught in ((19.0, True), (21.0, False)):
        times = iter([100.0, 100.0 + took])
        outcome = attempt(Trial(plant, 0), "cpu", capture_environment(), clock=lambda: next(times))  # noqa: B023
        assert (outcome["came"], outcome["caught"], outcome["seconds"]) == ("SLOWER", caught, took)
    assert "later than 20 s" in _self_test._said(outcome)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--self-test", "--runs", "0"], "--runs: 0 is not allowed; allowed: 1 to 10000"),
        (["--self-test", "--calibrate"], "--self-test: not together with --calibrate"),
        (["--self-test", "--budget", "soon"], "--budget: 'soon'"),
        (["--self-test", "--device", "tpu"], "--device: 'tpu'"),
        (["--runs", "3"], "--runs: only with --self-test"),
        (["--budget", "3s"], "--budget: only with --self-test"),
        (["--out", "x"], "--out: only with --self-test"),
        (["--self-test", "--out", "text"], "--out: text is no self-test; name another file"),
        (
            ["--self-test", "--out", "other"],
            "--out: other is of another self-test (device 'cuda:0', now 'cpu')",
        ),
        (["--self-test", "--out", "."], "--out: . cannot be used"),
    ],
)
def test_bad_usage_is_one_line(
    call: Any, folder: Path, machine: Machine, arguments: list[str], said: str
) -> None:
    head = _self_test._head("cuda:0", None, {**capture_environment(), "gpus": []})
    (folder / "other").write_text(json.dumps(head | {"commit": None}) + "\n")
    (folder / "text").write_text("hello\n")
    device = [] if "--device" in arguments else ["--device", "cpu"]
    done = call("doctor", *arguments, *device)
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith(f"nsabench: {said}")
    assert done.err.count("\n") == 1
    assert machine.begun == []


def test_kinds_are_spread_over_the_time() -> None:
    order = [trial.plant.name for trial in trials(plants("cpu"), 40)]
    assert len(order) == 40 + 2 * 20 + 4 + 5 * 2
    half = order[: len(order) // 2]
    for name in KINDS:
        assert abs(half.count(name) - order.count(name) / 2) <= 1


@given(st.integers(1, 400), st.data(), st.sampled_from([0.9, 0.95, 1.0]))
def test_a_bound_allows_for_chance_only_where_little_was_tried(runs: int, data: Any, least: float) -> None:
    caught = data.draw(st.integers(0, runs))
    if caught >= least * runs:
        assert holds(caught, runs, least)
    elif runs >= 100 or least == 1.0:
        assert not holds(caught, runs, least)
    else:
        chance = binom.cdf(caught, runs, least)
        assert holds(caught, runs, least) == (chance > 0.05 + 1e-9)
    assert holds(caught, runs, None) is None
    assert holds(0, 0, least) is None
