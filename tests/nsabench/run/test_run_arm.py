"""The row of an arm: what its samples add up to, and what makes it stop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nsa.refusals
import nsa.routes
from nsabench.measure import Shares
from nsabench.measure.probe import ColdProbe
from nsabench.plan import Cell
from nsabench.run import Policy, arm, cold
from nsabench.run.arm import Arm
from nsabench.run.gate import Refused
from nsabench.run.work import count_work
from nsabench.run.workload import workload_for
from nsabench.store.schema import STAGES, check_row

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]

SLIDING = "backends.sdpa:sliding_attention"


def measured(cell: Cell, policy: Policy) -> Arm:
    made = Arm(cell, workload_for(cell), policy)
    made.prepare()
    for number in range(policy.rounds):
        made.sample(number, 0)
    made.finish()
    check_row(made.fields)
    return made


class Clockwork:
    """A timer that runs the step and answers from a list; `made` are all of them, in order."""

    made: list[Clockwork]
    answers: Callable[[int, int], float]
    """By number of the timer and of its sample; sample 0 only chooses the steps of the rest."""

    def __init__(self, kind: str, device: Any, cache: str, regime: str) -> None:
        self.name, self.cache, self.output, self.asked = kind, cache, None, []
        self.number = len(self.made)
        self.made.append(self)

    def prepare(self, step: Callable[[], object]) -> None:
        self.step = step
        self.output = step()

    def sample(self, iters: int) -> float:
        self.asked.append(iters)
        self.output = self.step()
        return type(self).answers(self.number, len(self.asked) - 1)


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> type[Clockwork]:
    monkeypatch.setattr(Clockwork, "made", [], raising=False)
    monkeypatch.setattr(Clockwork, "answers", staticmethod(lambda timer, sample: 1.0), raising=False)
    monkeypatch.setattr(arm, "make_timer", Clockwork)
    return Clockwork


@pytest.mark.parametrize("d", [4, 1])
def test_the_time_is_the_median_round_of_the_weighted_steps(
    make_cell: MakeCell, clockwork: type[Clockwork], quick: Policy, d: int
) -> None:
    times = np.random.default_rng(0).uniform(1, 2, (2, 9))
    times[:, 0] = 7.0  # the sample that chooses the steps counts for nothing
    clockwork.answers = staticmethod(lambda timer, sample: times[timer, sample])
    cell = make_cell(phase="decode", S=43, B=3, d=d)
    fields = measured(cell, replace(quick, rounds=8)).fields
    rounds = times[0, 1:] / d + times[1, 1:] * (1 - 1 / d)
    ordered = np.sort(rounds)
    assert fields["ms_total"] == pytest.approx(np.median(rounds), rel=1e-12)
    assert (fields["ms_lo"], fields["ms_hi"]) == pytest.approx((ordered[0], ordered[7]))
    assert fields["ms_min"] == pytest.approx(ordered[0])
    assert fields["ms_p95"] == pytest.approx(ordered[7])
    assert (fields["n_rounds"], fields["n_samples"]) == (8, 8 if d == 1 else 16)
    assert fields["ms_emit"] == pytest.approx(np.median(times[0, 1:]))
    assert fields["ms_plain"] == (None if d == 1 else pytest.approx(np.median(times[1, 1:])))
    seconds = fields["ms_total"] / 1e3
    assert fields["tokens_per_s"] == pytest.approx(3 / seconds)
    assert fields["tflops"] == pytest.approx(fields["flops"] / seconds / 1e12)
    assert fields["gbps"] == pytest.approx(fields["bytes"] / seconds / 1e9)


def test_prefill_has_one_step_and_counts_every_token(
    make_cell: MakeCell, clockwork: type[Clockwork], quick: Policy
) -> None:
    clockwork.answers = staticmethod(lambda timer, sample: 4.0 + sample)
    fields = measured(make_cell(B=2), replace(quick, rounds=5)).fields
    assert (fields["ms_total"], fields["ms_lo"], fields["ms_hi"]) == (7.0, None, None)
    assert (fields["ms_emit"], fields["ms_plain"]) == (None, None)
    assert fields["tokens_per_s"] == pytest.approx(2 * 40 / 7e-3)
    assert (fields["timer"], fields["regime"], fields["cache"]) == ("cpu", "latency", "warm")


@pytest.mark.parametrize(
    ("cache", "ms", "iters"), [("warm", 0.5, 40), ("warm", 1e-9, 10_000), ("cold", 0.5, 5), ("cold", 30.0, 1)]
)
def test_a_sample_fills_its_time_and_a_cold_one_few_steps(
    make_cell: MakeCell,
    clockwork: type[Clockwork],
    quick: Policy,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    ms: float,
    iters: int,
) -> None:
    monkeypatch.setattr(cold, "known_probe", lambda device: ColdProbe(1.0))
    clockwork.answers = staticmethod(lambda timer, sample: ms)
    made = measured(make_cell(), replace(quick, cache=cache, sample_ms=20.0, rounds=2))
    assert clockwork.made[0].cache == cache
    assert clockwork.made[0].asked == [1, iters, iters]
    assert [s["iters"] for s in made.samples] == [iters, iters]


def test_samples_say_when_where_and_by_whom(
    make_cell: MakeCell, clockwork: type[Clockwork], quick: Policy
) -> None:
    cell = make_cell(phase="decode", S=43)
    seconds = iter(range(100))
    made = Arm(cell, workload_for(cell), quick, clock=lambda: float(next(seconds)), process=2)
    made.prepare()
    made.sample(0, 1)
    made.sample(1, 0)
    keys = ("process", "round", "position", "variant", "t_s")
    assert [tuple(s[k] for k in keys) for s in made.samples] == [
        (2, 0, 1, "emit", 0.0),
        (2, 0, 1, "plain", 1.0),
        (2, 1, 0, "emit", 2.0),
        (2, 1, 0, "plain", 3.0),
    ]


@pytest.mark.parametrize(
    "what",
    [
        {"phase": "decode", "S": 43},
        {"phase": "decode", "S": 5},
        {"S": 40},
        {"S": 40, "mode": "chunked=11"},
        {"S": 40, "passes": "bwd"},
        {"S": 40, "passes": "fwd_bwd"},
        {"S": 20, "passes": "fwd_bwd", "mode": "chunked=11"},
        {"S": 40, "route": "cmp=off"},
        {"S": 40, "route": "sel=off,win=off"},
    ],
    ids=str,
)
def test_shares_add_up(
    make_cell: MakeCell, quick: Policy, what: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm, "SHARES_WITHIN", 1000.0)  # a busy machine may take its time
    cell = make_cell(**what)
    fields = measured(cell, replace(quick, shares=True)).fields
    if "shares_note" in fields:
        assert "the forward took" in fields["shares_note"]
        return
    shares = [fields[f"share_{stage}_pct"] for stage in STAGES]
    assert sum(shares) == pytest.approx(100, abs=1e-6)
    assert min(shares) >= 0
    assert sum(fields[f"ms_{stage}"] for stage in STAGES) == pytest.approx(fields["ms_total"], rel=1e-9)
    ran = {"cmp", "score", "sel", "win"} - ({"cmp"} if cell.route == "cmp=off" else set())
    if "win=off" in cell.route:
        ran = {"cmp"}
    if cell.passes == "bwd":
        ran -= {"score"}
    for stage in ("cmp", "score", "sel", "win"):
        assert (fields[f"share_{stage}_pct"] > 0) == (stage in ran)


def test_without_shares_alone_and_intervals_their_columns_are_empty(
    make_cell: MakeCell, quick: Policy
) -> None:
    fields = measured(make_cell(), quick).fields
    empty = [f"ms_{s}" for s in STAGES] + [f"share_{s}_pct" for s in STAGES] + ["shares_note"]
    assert not any(name in fields for name in [*empty, "ms_alone_cmp", "ms_alone_sel", "ms_alone_win"])
    assert fields["ms_total"] > 0
    assert fields["peak_alloc_bytes"] > 0
    assert fields["peak_reserved_bytes"] is None


@pytest.mark.parametrize(
    ("route", "on"),
    [
        ("auto", {"cmp", "sel", "win"}),
        ("cmp=sdpa,score=reference,sel=gather,win=reference", {"cmp", "sel", "win"}),
        ("cmp=off", {"sel", "win"}),
        ("sel=off", {"cmp", "win"}),
        ("cmp=off,sel=off", {"win"}),
    ],
)
def test_each_branch_that_is_on_is_measured_alone(
    make_cell: MakeCell, quick: Policy, plant: Plant, route: str, on: set[str]
) -> None:
    cell = make_cell(phase="decode", S=43, route=route)
    fields = measured(cell, replace(quick, alone=True)).fields
    assert {b for b in ("cmp", "sel", "win") if fields.get(f"ms_alone_{b}")} == on


def test_alone_the_selected_branch_scores_as_the_route_says(
    make_cell: MakeCell, quick: Policy, plant: Plant
) -> None:
    counts = []
    for alone in (False, True):
        calls: list[int] = []

        def counted(true: Any, *given: Any, **more: Any) -> Any:
            calls.append(1)  # noqa: B023
            return true(*given, **more)

        with plant("reference:select_blocks", counted):
            cell = make_cell(phase="decode", S=43, route="score=reference")
            measured(cell, replace(quick, alone=alone, sample_ms=1e-6))
        counts.append(len(calls))
    assert counts[1] - counts[0] == 2 * (3 + 5)  # for each kind of step: warm-up and samples


def test_alone_is_the_weighted_median_of_the_branchs_own_steps(
    make_cell: MakeCell, clockwork: type[Clockwork], quick: Policy
) -> None:
    # Timers: emit and plain of the whole step, then of each branch.
    clockwork.answers = staticmethod(lambda timer, sample: float([10, 10, 1, 2, 3, 4, 5, 6][timer]))
    fields = measured(make_cell(phase="decode", S=43), replace(quick, alone=True)).fields
    assert fields["ms_total"] == 10
    alone = [fields[f"ms_alone_{b}"] for b in ("cmp", "sel", "win")]
    assert alone == pytest.approx([1 / 4 + 2 * 3 / 4, 3 / 4 + 4 * 3 / 4, 5 / 4 + 6 * 3 / 4])


def test_a_backward_has_no_branch_alone_and_no_cache(make_cell: MakeCell, quick: Policy) -> None:
    fields = measured(make_cell(passes="fwd_bwd"), replace(quick, alone=True)).fields
    assert not any(name.startswith("ms_alone") for name in fields)
    assert fields["kv_cache_bytes"] is None


def test_the_row_says_what_was_planned_what_ran_and_what_it_should_cost(
    make_cell: MakeCell, quick: Policy
) -> None:
    cell = make_cell(phase="decode", S=43, route="cmp=reference,win=off")
    made = measured(cell, quick)
    fields, workload = made.fields, made.workload
    assert {name: fields[name] for name in cell.to_dict()} == cell.to_dict()
    assert fields["cell_id"] == cell.cell_id
    backends = [fields[f"{b}_backend"] for b in ("cmp", "score", "sel", "win")]
    assert backends == ["reference", "chunked", "gather", "off"]
    assert fields["route_proof"] == (
        "cmp: math (einsum, bmm); score: math (bmm); sel: math (_ByKeys, matmul, bmm)"
    )
    assert fields["provider"] == ""
    work = count_work(cell, ("cmp", "sel"), workload.parameters)
    assert (fields["flops"], fields["bytes"]) == (work.flops, work.bytes)
    assert (fields["reads_tokens"], fields["reads_tokens_dense"]) == (work.reads_tokens, 43)
    sizes = workload.cache_bytes()
    assert [fields[f"kv_cache_{b}_bytes"] for b in ("cmp", "sel", "win")] == list(sizes.values())
    assert fields["kv_cache_bytes"] == sum(sizes.values())
    assert 0 <= fields["max_abs_err"] <= fields["err_budget"] < 1e-4
    assert 0 <= fields["rel_err"] < 1e-5
    assert fields["selection_overlap"] == 1.0


def test_backends_that_change_on_the_way_are_both_named(make_cell: MakeCell, quick: Policy) -> None:
    fields = measured(make_cell(S=60, mode="chunked=20"), quick).fields
    assert fields["sel_backend"] == "sdpa+gather"
    assert fields["win_backend"] == "sdpa"


def test_the_library_behind_a_row_is_stored(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "some_library", SimpleNamespace(version=lambda: "flash_attn 2.8.3"))
    table = [
        replace(row, library="some_library:version") if row.backend == "sdpa" else row
        for row in nsa.routes.TABLE
    ]
    monkeypatch.setattr(nsa.routes, "TABLE", tuple(table))
    try:
        assert measured(make_cell(), quick).fields["provider"] == "flash_attn 2.8.3"
    finally:
        nsa.refusals.load.cache_clear()


def test_a_route_that_cannot_run_says_why(make_cell: MakeCell, quick: Policy) -> None:
    with pytest.raises(Refused, match=r"^win=fa2: needs a CUDA GPU, got cpu") as found:
        measured(make_cell(route="win=fa2"), quick)
    assert found.value.status == "unsupported"


def test_a_wrong_result_is_refused_with_its_error_on_record(
    make_cell: MakeCell, quick: Policy, plant: Plant
) -> None:
    def bug(true: Any, *given: Any, **more: Any) -> Any:
        out, lse = true(*given, **more)
        return out * 1.5, lse

    cell = make_cell()
    made = Arm(cell, workload_for(cell), quick)
    with plant(SLIDING, bug), pytest.raises(Refused, match="output differs") as found:
        made.prepare()
    assert found.value.status == "wrong"
    assert made.fields["max_abs_err"] > made.fields["err_budget"] > 0
    assert made.samples == []


def test_what_is_not_finite_has_no_error_to_store(make_cell: MakeCell, quick: Policy, plant: Plant) -> None:
    cell = make_cell()
    made = Arm(cell, workload_for(cell), quick)
    with (
        plant(SLIDING, lambda true, *a, **k: (true(*a, **k)[0] / 0, None)),
        pytest.raises(Refused, match=r"^output is not finite$") as found,
    ):
        made.prepare()
    assert found.value.status == "nan"
    assert (made.fields["max_abs_err"], made.fields["rel_err"]) == (None, None)


def calls_later(first_wrong: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    count = 0

    def bug(true: Any, *given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        out, lse = true(*given, **more)
        return (change(out) if count >= first_wrong else out), lse

    return bug


def test_a_backend_that_is_right_only_while_it_is_checked_is_refused(
    make_cell: MakeCell, quick: Policy, plant: Plant
) -> None:
    cell = make_cell()
    with (
        plant(SLIDING, calls_later(2, lambda out: out * 1.01)),
        pytest.raises(Refused, match=r"^the output differs by .* from the one outside the timer$") as found,
    ):
        Arm(cell, workload_for(cell), quick).prepare()
    assert found.value.status == "wrong"


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (lambda out: out * 1.5, "wrong", r"^the output moved by 0\.\d+ while timed; allowed "),
        (lambda out: out / 0, "nan", "^the last timed output is not finite$"),
    ],
)
def test_a_result_that_changes_while_it_is_timed_is_refused(
    make_cell: MakeCell, quick: Policy, plant: Plant, change: Any, status: str, message: str
) -> None:
    cell = make_cell()
    made = Arm(cell, workload_for(cell), quick)
    with plant(SLIDING, calls_later(7, change)):
        made.prepare()
        for number in range(6):
            made.sample(number, 0)
        with pytest.raises(Refused, match=message) as found:
            made.finish()
    assert found.value.status == status


def test_one_pause_does_not_spoil_the_shares(
    make_cell: MakeCell, clockwork: type[Clockwork], quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = iter([1.0, 1.2, 60.0, 1.1, 0.9])

    class Recorder:
        def __init__(self, device: Any, cache: str) -> None:
            assert cache == "warm"

        def run(self, step: Any, hook: Any, n: int) -> Shares:
            assert n == 4
            total = next(totals)
            cmp = 0.5 if total == 60 else 0.25
            return Shares(total, {"cmp": cmp * total, "other": (1 - cmp) * total})

    monkeypatch.setattr(arm, "StageRecorder", Recorder)
    fields = measured(make_cell(), replace(quick, shares=True, share_runs=20)).fields
    assert fields["share_cmp_pct"] == pytest.approx(30)
    assert fields["share_other_pct"] == pytest.approx(70)


def forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, forward: Shares, backward: Shares | None = None
) -> None:
    class Recorder:
        def __init__(self, device: Any, cache: str) -> None: ...

        def run(self, step: Any, hook: Any, n: int = 5) -> Shares:
            return forward

    monkeypatch.setattr(arm, "StageRecorder", Recorder)
    monkeypatch.setattr(arm, "backward_shares", lambda step, hook, device, n: backward)


def test_a_backward_gets_the_time_the_forward_leaves(
    make_cell: MakeCell, clockwork: type[Clockwork], quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profiled backward of 40 ms in a step of 10 ms: its shares count, its time does not."""
    forward = Shares(4.0, {"proj": 1.0, "cmp": 2.0, "other": 1.0})
    forward_and_backward(monkeypatch, forward, Shares(40.0, {"proj": 10.0, "sel": 20.0, "other": 10.0}))
    clockwork.answers = staticmethod(lambda timer, sample: 10.0)
    fields = measured(make_cell(passes="fwd_bwd"), replace(quick, shares=True)).fields
    shares = {stage: fields[f"share_{stage}_pct"] for stage in STAGES}
    assert shares == pytest.approx(
        {"proj": 25, "cmp": 20, "sel": 30, "other": 25, "compress": 0, "score": 0, "win": 0, "gate": 0}
    )


@pytest.mark.parametrize(
    ("what", "forward", "backward", "note"),
    [
        (
            {"passes": "fwd_bwd"},
            Shares(11.0, {"proj": 11.0}),
            Shares(1.0, {"proj": 1.0}),
            "the forward took 11 ms of a step of 10 ms",
        ),
        ({"passes": "fwd_bwd"}, Shares(4.0, {"proj": 4.0}), Shares(1.0, None, "no node"), "no node"),
        ({}, Shares(21.0, {"proj": 21.0}), None, "the instrumented step took 21 ms, the timed one 10 ms"),
        ({}, Shares(4.9, {"proj": 4.9}), None, "the instrumented step took 4.9 ms, the timed one 10 ms"),
        ({}, Shares(10.0, None, "borders would hold launch gaps"), None, "borders would hold launch gaps"),
        (
            {"passes": "bwd", "mode": "chunked=10"},
            Shares(1.0, None),
            None,
            "the backward of 4 calls is too long to profile",
        ),
    ],
)
def test_where_there_are_no_shares_a_note_says_why(
    make_cell: MakeCell,
    clockwork: type[Clockwork],
    quick: Policy,
    monkeypatch: pytest.MonkeyPatch,
    what: dict[str, Any],
    forward: Shares,
    backward: Shares | None,
    note: str,
) -> None:
    monkeypatch.setattr(arm, "PROFILED_CALLS", 3)
    forward_and_backward(monkeypatch, forward, backward)
    clockwork.answers = staticmethod(lambda timer, sample: 10.0)
    fields = measured(make_cell(**what), replace(quick, shares=True)).fields
    assert fields["shares_note"] == note
    assert not any(name.startswith("share_") for name in fields)
    assert fields["ms_total"] == 10.0


def test_peak_memory_is_measured_unless_only_time_is_wanted(make_cell: MakeCell, quick: Policy) -> None:
    assert measured(make_cell(), quick).fields["peak_alloc_bytes"] > 0
    assert "peak_alloc_bytes" not in measured(make_cell(), replace(quick, memory=False)).fields
