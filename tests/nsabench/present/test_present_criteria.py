"""GO, CONDITIONAL and NO-GO: every criterion held against rows that meet it, miss it, and are not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nsabench.measure.probe import COLDEST as ALLOWED
from nsabench.present.criteria import Check, Verdict, judge_material
from nsabench.present.limits import COLDEST
from nsabench.present.material import Material, collected, load_material
from nsabench.store import Run
from tests.nsabench.present.conftest import make_run
from tests.nsabench.present.contests import make_contest
from tests.nsabench.present.other_runs import ENVIRONMENT, make_scorecard, make_training, passing, score

RIGHT = {"max_abs_err": 1e-7, "err_budget": 1e-5, "cold_probe": 1.0}
SIZES = (1024, 2048, 4096)


def right_run(
    changes: Mapping[tuple[str, int], Mapping[str, Any]] | None = None,
    routes: Sequence[str] = ("auto", "sdpa"),
    **more: Any,
) -> Run:
    """A run whose cells are checked, cold on proof and steady."""
    good = {(arm, S): RIGHT for arm in (*routes, *more.get("baselines", ())) for S in SIZES}
    failed = more.get("failed") or {}
    merged = {
        key: {**({} if key in failed else row), **(changes or {}).get(key, {})} for key, row in good.items()
    }
    return make_run(routes=routes, changes=merged, **more)


def judged(*runs: Any, wanted: Mapping[str, Any] | None = None) -> Verdict:
    return judge_material(collected(runs), wanted, "wanted.toml")


def only(verdict: Verdict) -> Check:
    (check,) = verdict.checks
    return check


def stored(*folders: Path) -> Material:
    return load_material(folders)


def limits(verdict: Verdict, kind: str) -> list[str]:
    return [limit.text for limit in verdict.limits if limit.kind == kind]


def test_a_steady_run_is_go_by_the_defaults() -> None:
    verdict = judged(right_run())
    assert (verdict.word, verdict.limits) == ("GO", ())
    assert [check.wanted.key for check in verdict.checks] == ["max_failures", "correct", "max_rel_interval"]
    assert {check.origin for check in verdict.checks} == {"default"}


def test_unsupported_with_its_reason_is_no_failure_but_cells_must_have_run() -> None:
    refused = {("sdpa", S): ("unsupported", "needs a GPU") for S in SIZES}
    assert judged(right_run(failed=refused)).word == "GO"
    everything = refused | {("auto", S): ("unsupported", "needs a GPU") for S in SIZES}
    nothing = judged(right_run(failed=everything))
    assert nothing.word == "NO-GO"
    assert [check.found.outcome for check in nothing.checks] == ["not measured"] * 3
    assert nothing.checks[0].found.measured == "no cell is ok: 6 cells unsupported"


def test_a_failed_cell_is_no_go_and_named() -> None:
    verdict = judged(right_run(failed={("sdpa", 2048): ("oom", "18 GiB asked, 4 free")}))
    assert verdict.word == "NO-GO"
    check = verdict.checks[0]
    assert (check.found.outcome, check.found.measured) == ("not met", "1 of 6 cells failed")
    assert "decode S=2k sdpa" in check.found.evidence[0]
    assert check.found.evidence[0].endswith("is oom: 18 GiB asked, 4 free")


def test_failures_that_are_allowed_limit() -> None:
    run = right_run(failed={("sdpa", 2048): ("oom", "18 GiB asked")})
    verdict = judged(run, wanted={"max_failures": 1})
    assert verdict.word == "CONDITIONAL"
    assert limits(verdict, "not asked for") == ["decode S=2k sdpa is oom: 18 GiB asked"]
    assert judged(run, wanted={"require_ok": True}).word == "NO-GO"


def test_require_ok_takes_every_planned_cell() -> None:
    run = right_run()
    half = dataclasses.replace(run, cells=run.cells.iloc[:4])
    check = only(judged(half, wanted={"require_ok": True}))
    assert (check.found.outcome, check.met) == ("not measured", False)
    assert check.found.measured == "4 of 6 cells ok; 2 planned cells not measured"
    by_default = judged(half)
    assert by_default.word == "CONDITIONAL"
    assert limits(by_default, "left out") == [f"{run.run_id}: 2 of 6 planned cells were not measured"]


def test_wrong_and_unchecked_results() -> None:
    wrong = judged(right_run(failed={("auto", 1024): ("wrong", "off by 0.3")}), wanted={"correct": True})
    assert only(wrong).found.outcome == "not met"
    over = judged(right_run({("auto", 1024): {"max_abs_err": 2e-5}}), wanted={"correct": True})
    assert only(over).found.measured == "the largest error is 2e-05 of 1e-05 allowed, over 6 cells"
    assert not only(over).met
    bare = judged(right_run({("auto", 1024): {"max_abs_err": None}}), wanted={"correct": True})
    assert only(bare).found.outcome == "not measured"
    assert "1 ok cell without an error" in only(bare).found.measured


def test_noise_is_a_limit_first_and_then_no_go() -> None:
    noisy = {"ms_total": 1.0, "ms_lo": 0.9, "ms_hi": 1.1}
    verdict = judged(right_run({("auto", 1024): noisy}))
    assert verdict.word == "CONDITIONAL"
    assert limits(verdict, "noise") == [
        "1 of 6 times have a 95 % interval wider than 10 %; the widest, 20 %, is decode S=1k auto"
    ]
    assert judged(right_run({("auto", 1024): noisy}), wanted={"max_rel_interval": 0.1}).word == "NO-GO"
    bare = judged(right_run({("auto", 1024): {"ms_lo": None, "ms_hi": None}}))
    assert bare.word == "NO-GO"
    assert bare.checks[2].found.measured == "1 time without an interval, which takes 6 rounds"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"cold_probe": 1.77}, "cache", "a flushed marker is read at 1.77 times memory's rate, allowed 1.15"),
        ({"cold_probe": None}, "cache", "a cold cache is not proved for 1 cell, allowed 1.15"),
        ({"timers_note": "event 3 ms, graph 4 ms a step, 33 % apart"}, "clock", "33 % apart (1 cell)"),
        ({"timers_note": "the host was late in 8 % of the steps"}, "clock", "the host was late in 8 %"),
        ({"neighbour_load_pct": 40.0}, "disturbed", "other processes used 40 % of the cores beside 1 cell"),
        ({"canary_spread_pct": 3.0}, "disturbed", "the device was not steady: fixed work varied by 3.0 %"),
        ({"power_capped_pct": 12.0}, "disturbed", "1 cell under a power cap, up to 12 % of the readings"),
    ],
)
def test_doubts_about_a_row_limit(change: dict[str, Any], kind: str, said: str) -> None:
    verdict = judged(right_run({("auto", 1024): change}))
    assert verdict.word == "CONDITIONAL"
    (limit,) = verdict.limits
    assert limit.kind == kind
    assert said in limit.text


def test_a_note_about_the_cache_is_not_said_twice() -> None:
    note = f"the cache may not be cold: after a flush a marker is read at 1.77 times; allowed {COLDEST}"
    verdict = judged(right_run({("auto", 1024): {"cold_probe": 1.77, "timers_note": note}}))
    assert [limit.kind for limit in verdict.limits] == ["cache"]
    assert COLDEST == ALLOWED


def test_what_code_was_measured_limits() -> None:
    assert "changes that no commit holds" in limits(judged(right_run(dirty=True)), "code")[0]
    other = right_run(run_id="other", commit="b" * 40)
    assert limits(judged(right_run(), other), "code") == [
        "the runs are of different commits: 1a2b3c4, bbbbbbb"
    ]
    bare = right_run()
    bare.info["environment"]["commit"] = None
    assert limits(judged(bare), "code") == [f"commit unknown: {bare.run_id}"]


def speedup(ratio: float, **more: Any) -> dict[str, Any]:
    return {"speedup": [{"S": 2048, "phase": "decode", "against": "sdpa", "ratio": ratio, **more}]}


def test_a_speedup_is_the_ratio_over_paired_rounds() -> None:
    run = right_run()
    met = only(judged(run, wanted=speedup(1.8)))
    assert met.met
    assert met.found.measured.startswith("1.9")
    assert " x (95 %: " in met.found.measured
    assert "decode S=2k auto" in met.found.evidence[0]
    assert judged(run, wanted=speedup(1.8)).word == "GO"
    assert only(judged(run, wanted=speedup(2.5))).found.outcome == "not met"
    other_way = only(judged(run, wanted=speedup(0.4, route="sdpa", against="auto")))
    assert other_way.met


def test_the_slowest_of_several_shapes_counts() -> None:
    run = right_run(B=(1, 4))
    slow = next(r["cell_id"] for r in run.rows if (r["S"], r["B"], r["route"]) == (2048, 4, "auto"))
    run.samples.loc[run.samples["cell_id"] == slow, "ms"] *= 1.5
    check = only(judged(run, wanted=speedup(1.5)))
    assert check.found.outcome == "not met"
    assert check.found.measured.startswith("1.2")
    assert "decode S=2k B=4 auto" in check.found.evidence[0]


def test_an_interval_that_reaches_below_the_ratio_limits() -> None:
    run = right_run()
    words = {}
    for thousandths in range(1890, 1930, 2):
        verdict = judged(run, wanted=speedup(thousandths / 1000))
        words[verdict.word] = limits(verdict, "criterion speedup[1]")
    assert list(words) == ["GO", "CONDITIONAL", "NO-GO"]
    assert words["GO"] == words["NO-GO"] == []
    assert "reaches below" in words["CONDITIONAL"][0]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (speedup(1, against="dense"), "no run has auto beside dense, decode fwd of the module at S=2k"),
        ({"speedup": [{**speedup(1)["speedup"][0], "S": 99}]}, "no run has auto beside sdpa"),
        (speedup(1, scope="core"), "of the core at S=2k"),
        ({"max_ms": [{"S": 2048, "phase": "prefill", "ms": 5}]}, "no run has auto, prefill fwd"),
        ({"verify": "pass"}, "no scorecard was given; nsabench verify makes one"),
        ({"training": [{}]}, "no training was given; nsabench train makes one"),
        ({"training": [{"precision": "fp16"}]}, "nsabench train --precision fp16 makes one"),
        ({"comparisons": "valid"}, "no comparison was given; nsabench compare A B makes one"),
    ],
)
def test_what_nothing_measured_is_no_go_and_says_what_is_missing(wanted: dict[str, Any], said: str) -> None:
    verdict = judged(right_run(), wanted=wanted)
    assert (verdict.word, only(verdict).found.outcome) == ("NO-GO", "not measured")
    assert said in only(verdict).found.measured


def test_a_side_that_failed_has_no_speed() -> None:
    run = right_run(failed={("sdpa", 2048): ("wrong", "off by 0.3")})
    check = only(judged(run, wanted=speedup(0.1)))
    assert check.found.outcome == "not measured"
    assert "decode S=2k sdpa" in check.found.evidence[0]


def test_without_shared_rounds_there_is_a_ratio_and_a_doubt() -> None:
    run = right_run()
    alone = dataclasses.replace(run, samples=run.samples.iloc[:0])
    verdict = judged(alone, wanted=speedup(1.8))
    assert verdict.word == "CONDITIONAL"
    assert "without an interval" in only(verdict).found.measured


def test_any_run_may_meet_a_speedup_and_the_others_are_told() -> None:
    slow = right_run(run_id="20250102T030405Z-decode-slow", routes=("auto", "sdpa"))
    slow.cells.loc[slow.cells["route"] == "auto", "ms_total"] *= 4
    slow = dataclasses.replace(slow, samples=slow.samples.iloc[:0])
    verdict = judged(slow, right_run(), wanted=speedup(1.5))
    assert only(verdict).met
    assert verdict.word == "CONDITIONAL"
    (told,) = limits(verdict, "criterion speedup[1]")
    assert told.startswith("20250102T030405Z-decode-slow")
    assert told.endswith("which falls short")


def test_a_time_that_must_not_be_passed() -> None:
    run = right_run()
    row = next(r for r in run.rows if r["route"] == "auto" and r["S"] == 2048)

    def wanted(ms: float) -> dict[str, Any]:
        return {"max_ms": [{"S": 2048, "phase": "decode", "ms": ms}]}

    assert judged(run, wanted=wanted(row["ms_hi"] * 1.01)).word == "GO"
    assert only(judged(run, wanted=wanted(row["ms_total"] * 0.9))).found.outcome == "not met"
    between = judged(run, wanted=wanted((row["ms_total"] + row["ms_hi"]) / 2))
    assert (between.word, only(between).met) == ("CONDITIONAL", True)


def contest(**more: Any) -> Run:
    run = make_contest({"auto": 1.0, "sdpa": 1.5}, **more)
    for name, value in {"max_abs_err": 1e-7, "err_budget": 1e-5}.items():
        run.cells[name] = value
    return run


def test_comparisons() -> None:
    clear = judged(contest())
    assert (clear.word, [check.wanted.key for check in clear.checks][-1]) == ("GO", "comparisons")
    assert clear.checks[-1].found.measured == "1 SLOWER"
    broken = judged(contest(again=1.4))
    assert broken.word == "NO-GO"
    assert broken.checks[-1].found.measured == "1 INVALID"
    doubt = make_contest({"auto": 1.0, "sdpa": 1.012}, noise=0.05)
    assert judge_material(collected([doubt]), {"comparisons": "valid"}).word == "CONDITIONAL"
    strict = judge_material(collected([doubt]), {"comparisons": "conclusive"})
    assert strict.word == "NO-GO"
    assert strict.checks[0].found.measured == "1 INCONCLUSIVE"


def test_a_suite_says_what_its_runs_are_held_against() -> None:
    criteria = {"max_failures": 0, **speedup(1.8)}
    declared = right_run(run_id="declared")
    declared.info["suite"] = {"name": "mine", "criteria": criteria}
    verdict = judged(declared)
    assert [(c.origin, c.wanted.name) for c in verdict.checks] == [
        ("suite mine", "max_failures"),
        ("suite mine", "speedup[1]"),
    ]
    plain = right_run(run_id="plain", failed={("auto", 1024): ("oom", "much")})
    both = judged(declared, plain)
    by_origin = {(c.origin, c.wanted.key): c.met for c in both.checks}
    assert by_origin[("suite mine", "max_failures")] is True
    assert by_origin[("default", "max_failures")] is False
    given = judged(declared, wanted={"correct": True})
    assert [(c.origin, c.wanted.key) for c in given.checks] == [("wanted.toml", "correct")]


def test_two_runs_of_one_suite_are_held_against_it_once() -> None:
    runs = [right_run(run_id=name) for name in ("first", "second")]
    for run in runs:
        run.info["suite"] = {"name": "mine", "criteria": {"max_failures": 0}}
    assert only(judged(*runs)).found.measured == "12 cells ok"


def test_a_scorecard(tmp_path: Path) -> None:
    verdict = judge_material(stored(make_scorecard(tmp_path)))
    assert (verdict.word, verdict.limits) == ("GO", ())
    assert only(verdict).found.measured.endswith("1 unsupported; peers: 1 fail")


@pytest.mark.parametrize(
    ("rows", "facts", "word", "said"),
    [
        (
            [score("values", "sel:gather", status="fail", reason="off by 0.3", failed=2)],
            {},
            "NO-GO",
            "1 fail",
        ),
        ([], {}, "NO-GO", "no check of ours ran"),
        (
            [score("values", "sel:triton", status="unsupported", reason="no GPU")],
            {},
            "NO-GO",
            "no check of ours ran",
        ),
        (passing(), {"status": "interrupted"}, "NO-GO", "not finished, interrupted"),
        (passing(), {"level": "quick"}, "CONDITIONAL", "pass"),
        (passing()[:3], {}, "CONDITIONAL", "pass"),
        (passing(), {"argv": ["verify", "--subjects", "sel"]}, "CONDITIONAL", "pass"),
    ],
)
def test_scorecards_that_say_less(
    tmp_path: Path, rows: list[dict[str, Any]], facts: dict[str, Any], word: str, said: str
) -> None:
    path = make_scorecard(tmp_path, rows, **{k: v for k, v in facts.items() if k != "argv"})
    material = stored(path)
    material.scorecards[0].info.update(facts)
    verdict = judge_material(material)
    assert verdict.word == word
    assert said in only(verdict).found.measured
    assert bool(limits(verdict, "scorecard")) == (word == "CONDITIONAL" or "status" in facts or len(rows) < 9)


def test_a_peer_that_fails_is_not_ours(tmp_path: Path) -> None:
    peer = score("values", "fla-core 0.6.0 sel", status="fail", reason="w + 1 keys", branch="sel")
    assert judge_material(stored(make_scorecard(tmp_path, [*passing(), peer]))).word == "GO"
    # Only a name of a row of ours makes a row ours; without any peer declared, too.
    undeclared = make_scorecard(tmp_path, [*passing(), peer], peers=[])
    assert judge_material(stored(undeclared)).word == "GO"


def test_a_training(tmp_path: Path) -> None:
    verdict = judge_material(stored(make_training(tmp_path)))
    assert (verdict.word, verdict.limits) == ("GO", ())
    said = only(verdict).found.measured
    assert said.startswith("status ok, every loss finite, loss ")
    assert said.endswith(
        "no gate collapsed, needle 97 % of 600 past the window (chance 6.25 %), 7 % with sel off"
    )


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        (
            {"status": "hang", "reason": "no heartbeat for 300 s"},
            "not met",
            "status hang (no heartbeat for 300 s)",
        ),
        (
            {"losses": lambda step: None if step == 7 else 3.0 - step / 100},
            "not met",
            "not finite at step 7, in 1 of",
        ),
        ({"losses": lambda step: float("inf") if step == 9 else 3.0}, "not met", "not finite at step 9"),
        ({"losses": lambda step: 1.0 + step / 100}, "not met", ""),
        ({"steps": 0}, "not measured", "a loss: no step was logged"),
        ({"steps": 1}, "not measured", "whether the loss falls: one step was logged"),
        ({"collapsed": [(300, 1)]}, "not met", "gates collapsed in layer 1"),
        ({"gates": False}, "not measured", "gate shares"),
        ({"needle": 0.89}, "not met", "needle 89 % of 600 past the window"),
        ({"without": 0.2}, "not met", "20 % with sel off"),
    ],
)
def test_trainings_that_fall_short(tmp_path: Path, changes: dict[str, Any], outcome: str, said: str) -> None:
    verdict = judge_material(stored(make_training(tmp_path, **changes)))
    assert verdict.word == "NO-GO"
    assert only(verdict).found.outcome == outcome
    assert said in only(verdict).found.measured


def test_needles_count_only_where_they_were_looked_for(tmp_path: Path) -> None:
    text = judge_material(stored(make_training(tmp_path, needle=None, without=None)))
    assert text.word == "GO"
    # Trained without the selected branch: only what it can do without is looked for.
    control = judge_material(stored(make_training(tmp_path, needle=None)))
    assert "needle" not in only(control).wanted.value
    assert control.word == "GO"
    wanted = {"training": [{"needle": 0.9}]}
    missing = judge_material(stored(make_training(tmp_path, needle=None, without=None)), wanted)
    assert only(missing).found.measured == "needle accuracy past the window: none was evaluated"


def test_near_chance_allows_what_guessing_gives(tmp_path: Path) -> None:
    wanted = {"training": [{"sel_off_near_chance": True}]}
    for without, good in ((0.0, True), (1 / 16, True), (0.11, True), (0.12, False)):
        verdict = judge_material(stored(make_training(tmp_path, without=without)), wanted)
        assert only(verdict).met is good, without


def test_gates_that_opened_again_limit(tmp_path: Path) -> None:
    verdict = judge_material(stored(make_training(tmp_path, collapsed=[(100, 0)])))
    assert verdict.word == "CONDITIONAL"
    assert limits(verdict, "criterion training[1]") == ["gates had collapsed at step 100 and opened again"]


def test_every_training_by_itself_unless_one_is_wanted(tmp_path: Path) -> None:
    good = make_training(tmp_path)
    bad = make_training(tmp_path, status="nan", reason="layer 1, sel", settings={"precision": "fp16"})
    by_default = judge_material(stored(good, bad))
    assert [check.met for check in by_default.checks] == [True, False]
    declared = judge_material(stored(good, bad), {"training": [{"precision": "fp32", "steps": 300}]})
    assert declared.word == "CONDITIONAL"
    assert "status nan" in limits(declared, "not asked for")[0]
    assert not only(judge_material(stored(good, bad), {"training": [{"precision": "fp16"}]})).met
    assert not only(judge_material(stored(good), {"training": [{"steps": 301}]})).met
    assert not only(judge_material(stored(good), {"training": [{"loss": 0.1}]})).met


def test_cells_a_scorecard_and_a_training_make_one_verdict(tmp_path: Path) -> None:
    other = stored(make_scorecard(tmp_path), make_training(tmp_path))
    cells = right_run(commit=str(ENVIRONMENT["commit"]))
    everything = Material((cells,), other.scorecards, other.trainings)
    verdict = judge_material(everything)
    assert (verdict.word, len(verdict.checks)) == ("GO", 5)
    assert judge_material(Material()).word == "NO-GO"


def test_a_merged_run_is_judged_by_its_parts() -> None:
    runs = [right_run(run_id=name, S=[size]) for name, size in (("first", 1024), ("second", 2048))]
    together = dataclasses.replace(
        runs[0],
        info={**runs[0].info, "run_id": "merged", "sources": [run.info for run in runs]},
        cells=pd.concat([run.cells for run in runs], ignore_index=True),
        samples=pd.concat([run.samples for run in runs], ignore_index=True),
    )
    together.info["plan"] = [cell for run in runs for cell in run.info["plan"]]
    verdict = judged(together, wanted=speedup(1.5))
    assert only(verdict).met
    assert only(verdict).found.evidence[0].startswith("second: ")
