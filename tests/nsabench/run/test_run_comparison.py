"""Comparisons with made-up times: when enough is measured, what is stored, what a failure costs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from nsabench.plan import Cell
from nsabench.plan.sides import compared, parse_side
from nsabench.run import Policy, comparison
from nsabench.run.comparison import MOST_PROCESSES, Effort, run_comparison
from nsabench.run.executor import Event, Job, WorkerError
from nsabench.run.gate import Refused
from nsabench.stats import median_interval, paired_ratio
from nsabench.store import Run, RunDir, load_run
from tests.nsabench.run.planted_times import Executor

MakeCell = Callable[..., Cell]
CreateRun = Callable[[list[Cell]], RunDir]

POLICY = Policy(rounds=8, shares=False, alone=False)


class Watcher:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.processes: list[int] = []

    def activity(self, text: str) -> None:
        self.said.append(text)

    def finished(self, group: Sequence[Cell], rows: Sequence[Any], processes: int) -> None:
        self.processes.append(processes)


class Contest:
    """A comparison of `sdpa` and whatever else with `auto`, over lengths."""

    def __init__(self, make_cell: MakeCell, create_run: CreateRun, patch: pytest.MonkeyPatch) -> None:
        self._make, self._create, self._patch = make_cell, create_run, patch
        self.watcher, self.now = Watcher(), [0.0]
        self.hired: list[tuple[list[str], int]] = []
        self.hire: Callable[[Sequence[Cell], int], Any] = self.executor

    def executor(self, cells: Sequence[Cell], process: int) -> Executor:
        self.hired.append(([f"{cell.route}{cell.twin or ''}" for cell in cells], process))
        return Executor(process, self.now)

    def __call__(
        self,
        times: str,
        sides: Sequence[str] = ("auto", "sdpa"),
        S: Sequence[int] = (40,),
        policy: Policy = POLICY,
        stop: Callable[[], bool] = lambda: False,
        **more: Any,
    ) -> Run:
        self._patch.setenv("PLANTED_TIMES", times)
        shapes = [self._make(S=size) for size in S]
        self.groups = [compared(shape, [parse_side(side) for side in sides]) for shape in shapes]
        run = self._create([cell for group in self.groups for cell in group])
        self.path = run.path
        with run:
            run_comparison(
                self.groups,
                policy,
                Effort(**more),
                run,
                self.watcher,
                hire=self.hire,
                stop=stop,
                clock=lambda: self.now[0],
            )
        return load_run(run.path)


@pytest.fixture
def contest(make_cell: MakeCell, create_run: CreateRun, monkeypatch: pytest.MonkeyPatch) -> Contest:
    return Contest(make_cell, create_run, monkeypatch)


def test_rows_hold_the_samples_of_all_processes(contest: Contest) -> None:
    run = contest("sdpa=1.5")
    assert contest.watcher.processes == [3]
    assert contest.hired == [(["auto", "sdpa", "auto1"], process) for process in range(3)]
    assert contest.watcher.said[0] == "process 1: round 1"
    auto, sdpa, again = run.rows
    assert [row["status"] for row in run.rows] == ["ok"] * 3
    times = {}
    for row in run.rows:
        mine = run.samples[run.samples["cell_id"] == row["cell_id"]]
        times[row["cell_id"]] = mine.sort_values(["process", "round"])["ms"].to_numpy()
        assert list(mine["process"].value_counts().sort_index()) == [8, 8, 8]
        assert list(mine["t_s"]) == [p + 0.5 for p in range(3) for _ in range(8)]
        interval = median_interval(list(mine["ms"]))
        assert (row["ms_total"], row["ms_lo"], row["ms_hi"]) == (interval.point, interval.lo, interval.hi)
        assert (row["n_rounds"], row["n_samples"]) == (24, 24)
        assert row["tflops"] == pytest.approx(4e6 / (row["ms_total"] * 1e-3) * 1e-12)
        assert row["share_sel_pct"] == pytest.approx((60 + 70 + 60) / 3)
        assert row["ms_sel"] + row["ms_other"] == pytest.approx(row["ms_total"])
        assert (row["peak_alloc_bytes"], row["energy_j"], row["max_abs_err"]) == (102, 6.0, 3e-6)
    processes = [process for process in range(3) for _ in range(8)]
    aa = paired_ratio(times[again["cell_id"]], times[auto["cell_id"]], processes=processes)
    assert [(row["aa_lo"], row["aa_hi"]) for row in run.rows] == [(aa.lo, aa.hi)] * 3
    assert sdpa["ms_total"] == pytest.approx(1.5 * auto["ms_total"], rel=0.01)
    assert sorted(run.telemetry["t_s"].unique()) == [0.25, 1.25, 2.25]


@pytest.mark.parametrize(
    ("times", "effort", "processes"),
    [
        ("sdpa=1.5;noise=0.001", {}, 3),
        ("sdpa=1.5;noise=0.001", {"processes": 5}, 5),
        ("sdpa=1.5;noise=0.001", {"processes": 1}, 1),
        ("sdpa=1.0;noise=0.001", {}, 3),
        ("sdpa=3.0;noise=0.1", {"budget_s": 1000.0}, MOST_PROCESSES),
        ("sdpa=3.0;noise=0.1", {"budget_s": 7.5}, 7),
        ("sdpa=3.0;noise=0.1", {"budget_s": 0.5}, 3),
        ("sdpa=3.0;noise=0.1", {"budget_s": 1000.0, "width": 0.4}, 3),
    ],
)
def test_the_intervals_width_or_the_budget_decides_never_the_difference(
    contest: Contest, times: str, effort: dict[str, Any], processes: int
) -> None:
    contest(times, **effort)
    assert contest.watcher.processes == [processes]


def test_too_few_rounds_for_an_interval_are_never_narrow_enough(contest: Contest) -> None:
    contest("", policy=replace(POLICY, rounds=1), processes=1, budget_s=100.0)
    assert 6 <= contest.watcher.processes[0] < MOST_PROCESSES


def test_groups_share_what_is_left_of_the_budget(contest: Contest) -> None:
    run = contest("noise=0.1", S=(40, 48, 56), processes=1, budget_s=12.0)
    assert contest.watcher.processes == [4, 4, 4]
    assert len(run.rows) == 9
    numbers = run.samples.groupby("cell_id")["process"].unique()
    assert [min(numbers[row["cell_id"]]) for row in run.rows] == [0, 0, 0, 4, 4, 4, 8, 8, 8]


def test_a_quick_group_leaves_its_budget_to_the_next(contest: Contest) -> None:
    contest("noise=0.1;auto@0=wrong", S=(40, 48), processes=1, budget_s=12.0)
    assert contest.watcher.processes == [1, 11]


@pytest.mark.parametrize("status", ["wrong", "oom", "error"])
def test_a_side_that_fails_in_any_process_is_that_failure(contest: Contest, status: str) -> None:
    run = contest(f"sdpa@1={status}", sides=("auto", "sdpa", "gather"))
    by_route = {(row["route"], row["twin"]): row for row in run.rows}
    failed = by_route["sdpa", 0]
    assert (failed["status"], failed["reason"]) == (status, "planted in process 1")
    assert failed["ms_total"] is None
    assert list(run.samples[run.samples["cell_id"] == failed["cell_id"]]["process"].unique()) == [0, 1]
    assert contest.hired[2] == (["auto", "gather", "auto1"], 2)
    assert by_route["gather", 0]["n_rounds"] == 24


@pytest.mark.parametrize("broken", ["auto@0", "again@0", "sdpa@0"])
def test_nothing_more_is_measured_when_there_is_nothing_to_compare(contest: Contest, broken: str) -> None:
    run = contest(f"{broken}=wrong")
    assert contest.watcher.processes == [1]
    assert sorted(row["status"] for row in run.rows) == ["ok", "ok", "wrong"]


def test_the_first_side_and_its_control_are_held_against_each_other_whoever_else_fails(
    contest: Contest,
) -> None:
    run = contest("sdpa=wrong")
    assert [row["aa_lo"] is not None for row in run.rows] == [True, False, True]


def test_a_stop_keeps_what_there_is(contest: Contest) -> None:
    run = contest("", S=(40, 48), stop=lambda: contest.now[0] >= 2)
    assert contest.watcher.processes == [2]
    assert [(row["S"], row["n_rounds"]) for row in run.rows] == [(40, 16)] * 3


class Broken(Executor):
    """Its workers do not start."""

    def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
        raise WorkerError("workers do not start here: no reason")
        yield


def test_a_machine_that_fails_leaves_samples_without_times(contest: Contest) -> None:
    contest.hire = lambda cells, process: (Broken if process == 4 else Executor)(process, contest.now)
    with pytest.raises(WorkerError, match="no reason"):
        contest("", S=(40, 48, 56))
    run = load_run(contest.path)
    assert [(row["S"], row["status"]) for row in run.rows] == [(40, "ok")] * 3 + [(48, "error")] * 3
    assert run.rows[-1]["reason"] == "the machine failed: workers do not start here: no reason"
    assert run.rows[-1]["ms_total"] is None
    assert len(run.samples) == 3 * 8 * (3 + 1)


def test_a_device_that_breaks_every_cell_has_failed(contest: Contest) -> None:
    with pytest.raises(WorkerError, match="all broke in process 2, which ran before: planted in process 1"):
        contest("auto@1=error;sdpa@1=error;again@1=error")
    run = load_run(contest.path)
    assert {(row["status"], row["reason"]) for row in run.rows} == {("error", "planted in process 1")}


def test_cells_that_never_ran_are_no_fault_of_the_machine(contest: Contest) -> None:
    run = contest("auto=error;sdpa=error;again=error")
    assert {row["status"] for row in run.rows} == {"error"}


def test_an_interruption_keeps_what_is_whole(contest: Contest) -> None:
    class Interrupted(Executor):
        def run(self, jobs: Iterator[Job]) -> Generator[Event, None, None]:
            raise KeyboardInterrupt
            yield

    contest.hire = lambda cells, process: (Interrupted if process == 2 else Executor)(process, contest.now)
    with pytest.raises(KeyboardInterrupt):
        contest("")
    assert [(row["status"], row["n_rounds"]) for row in load_run(contest.path).rows] == [("ok", 16)] * 3


def test_a_replaced_worker_shares_its_number_with_none(contest: Contest) -> None:
    """A worker that was lost is replaced by one with the next number."""

    def hire(cells: Sequence[Cell], process: int) -> Executor:
        return contest.executor(cells, process + (process == 1))

    contest.hire = hire
    run = contest("", processes=3)
    assert sorted(run.samples["process"].unique()) == [0, 2, 3]


def test_a_time_that_cannot_be_true_is_no_time(contest: Contest, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(fields: dict[str, Any], peaks: object) -> dict[str, float]:
        if fields["route"] == "sdpa":
            raise Refused("invalid", "faster than memory")
        return {"pct_of_limit": 50.0}

    monkeypatch.setattr(comparison, "part_of_limit", impossible)
    run = contest("")
    assert [row["status"] for row in run.rows] == ["ok", "invalid", "ok"]
    assert [row["pct_of_limit"] for row in run.rows] == [50.0, None, 50.0]
    assert run.rows[1]["reason"] == "faster than memory"


def test_dropped_rounds_are_in_no_time_and_in_no_ratio(contest: Contest) -> None:
    """Of 24 rounds 4, in two processes; one of these alone would have lost too many."""
    run = contest("sdpa=1.5;drop@0=1;drop@1=3")
    assert contest.watcher.processes == [3]
    kept = run.samples[run.samples["dropped"] == ""]
    assert len(run.samples) == 3 * 24
    for row in run.rows:
        assert (row["status"], row["dropped_rounds"], row["n_rounds"]) == ("ok", 4, 20)
        assert row["ms_total"] == pytest.approx(kept[kept["cell_id"] == row["cell_id"]]["ms"].median())
        assert row["aa_hi"] < 1.01


def test_more_than_a_fifth_of_all_rounds_makes_every_row_invalid(contest: Contest) -> None:
    run = contest("drop@0=8;drop@1=3")
    for row in run.rows:
        assert (row["status"], row["dropped_rounds"]) == ("invalid", 11)
        assert row["reason"] == "11 of 24 rounds dropped for hw_thermal; allowed 20 %"
        assert row["ms_total"] is None
    assert len(run.samples) == 3 * 24


def test_a_gpu_that_is_always_slow_measures_nothing(contest: Contest) -> None:
    run = contest("drop=8", budget_s=4.0)
    assert {(row["status"], row["reason"]) for row in run.rows} == {
        ("invalid", "32 of 32 rounds dropped for hw_thermal; allowed 20 %")
    }


def test_a_wrong_side_is_wrong_however_hot_it_was(contest: Contest) -> None:
    run = contest("sdpa@0=wrong;drop@0=8")
    assert run.rows[1]["status"] == "wrong"


def test_the_loudest_process_is_told(contest: Contest) -> None:
    run = contest("load=3;load@1=41.5")
    assert [row["neighbour_load_pct"] for row in run.rows] == [41.5] * 3


def test_a_sum_of_energies_wants_all_of_them() -> None:
    rows = [{"energy_j": 2.0}, {"energy_j": None}]
    assert comparison._across(rows)["energy_j"] is None
    assert comparison._across(rows[:1] * 3)["energy_j"] == 6.0


def test_reasons_of_all_processes_in_nvmls_order() -> None:
    rows = [{"throttle_reasons": text} for text in ("none", "hw_thermal+gpu_idle", "", "sw_power_cap")]
    assert comparison._across(rows)["throttle_reasons"] == "gpu_idle+sw_power_cap+hw_thermal"
    assert comparison._across(rows[:1])["throttle_reasons"] == "none"
