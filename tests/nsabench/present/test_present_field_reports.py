"""The field reports' figures beside ours: theirs as written, ours only from the runs given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nsabench.plan.checks import NAMED
from nsabench.present.field_reports import Beside, answers_reports, field_reports
from nsabench.present.material import Material, collected, load_material
from nsabench.present.report_tables import reports_grid
from tests.nsabench.present.conftest import make_run
from tests.nsabench.present.other_runs import make_scorecard, make_training, score

PREFILL = {"prefill, S=128": "417.83 ms", "prefill, S=256": "831.65 ms"} | {
    "prefill, S=512": "1672.25 ms",
    "prefill, S=1024": "3363.94 ms",
}
DECODE = {"decode, S=512": 306.0, "decode, S=1024": 300.0, "decode, S=2048": 306.1}


def found(material: Material) -> dict[str, Beside]:
    return {one.asked.what: one for one in field_reports(material)}


def by_rule(material: Material, rule: str) -> Beside:
    return next(one for what, one in found(material).items() if what.startswith(f"{rule}:"))


def test_without_runs_nothing_of_ours_is_said_and_every_figure_has_its_command() -> None:
    everything = field_reports(Material())
    assert not any(one.ours or one.run_id or one.mistake for one in everything)
    assert all(one.asked.command.startswith("nsabench ") for one in everything)
    lines = reports_grid(everything).lines
    assert all(
        line[3] == f"not measured; {one.asked.command}" for line, one in zip(lines, everything, strict=True)
    )
    assert len({one.asked.report for one in everything}) == 6  # five reports, and what all of them say


def test_the_reports_figures_are_as_written() -> None:
    said = {one.asked.what: one.asked.reported for one in field_reports(Material())}
    whole = "\n".join(said.values())
    for figure in ("MAE 0.152", "MAE 0.766", "MAE 0.629", "MAE 0.325", "hangs at step 5", "NaN after step 1"):
        assert figure in whole, figure
    for what, ms in PREFILL.items():
        assert said[what].startswith(ms)
    for what, total in DECODE.items():
        assert said[what].endswith(f"{total:.1f} % together")


def test_named_checks_are_read_from_a_scorecard(tmp_path: Path) -> None:
    rows = [
        score("smallS_equivalence", "layer:auto", max_abs_err=3.2e-7, cases=40),
        score("smallS_equivalence", "layer:sdpa", max_abs_err=1.1e-6, cases=2),
        score("sliding_fa2", "win:fa2", status="unsupported", reason="needs a CUDA GPU", max_abs_err=None),
        score(
            "selection_packed", "sel:gather", status="fail", reason="off by 0.3", max_abs_err=0.3, failed=4
        ),
        score("compressed_fa2", "fla-core 0.6.0 cmp", branch="cmp"),
    ]
    material = load_material([make_scorecard(tmp_path, rows, peers=["fla-core 0.6.0 cmp"])])
    small = by_rule(material, "smallS_equivalence")
    assert small.ours == "all 42 cases right; largest error: fp32 1.1e-06"
    assert small.run_id == material.scorecards[0].info["run_id"]
    packed = found(material)["selection_packed: packed rows, on a CPU"]
    assert packed.ours == "4 of 12 cases wrong; largest error: fp32 3.0e-01"
    # On another device, refused, or a peer's: no figure of ours.
    assert not found(material)["selection_packed: packed rows, on CUDA"].ours
    assert not by_rule(material, "sliding_fa2").ours
    assert not by_rule(material, "compressed_fa2").ours


def test_what_the_mistake_gives_here_stands_beside(tmp_path: Path) -> None:
    report = score("smallS_equivalence", "layer:auto")["reported_note"]
    row = score(
        "smallS_equivalence", "layer:auto", reported_note=f"{report}; an inverted mask gives MAE 0.149"
    )
    one = by_rule(load_material([make_scorecard(tmp_path, [row])]), "smallS_equivalence")
    assert one.mistake == "an inverted mask gives MAE 0.149"
    assert one.to_dict()["mistake"] == one.mistake


def test_times_and_shares_are_read_from_cells() -> None:
    changes = {("auto", S): {"share_cmp_pct": 20.0, "share_sel_pct": 30.0} for S in (512, 2048)}
    decode = make_run(S=(512, 2048), routes=("sdpa", "auto"), changes=changes)
    prefill = make_run(
        S=(256, 1024), routes=("auto",), phase="prefill", run_id="20250102T030405Z-prefill-1a2b3c4"
    )
    ours = found(collected([decode, prefill]))
    row = next(r for r in decode.rows if (r["S"], r["route"]) == (512, "auto"))
    total = sum(row[name] for name in row if name.startswith("share_") and name.endswith("_pct"))
    assert f"cmp + sel + win = 20.0 + 30.0 + {row['share_win_pct']:.1f} %" in ours["decode, S=512"].ours
    assert f"all stages {total:.1f} %" in ours["decode, S=512"].ours
    assert not ours["decode, S=1024"].ours
    assert ours["prefill, S=256"].ours.endswith(" ms (fp32, AMD EPYC 7B13)")
    assert ours["prefill, S=256"].run_id == prefill.run_id
    assert not ours["prefill, S=128"].ours


@pytest.mark.parametrize(
    "other",
    [
        {"passes": ("bwd",)},
        {"B": (4,)},
        {"scope": "core"},
        {"mode": "stepwise"},
        {"failed": {("auto", 1024): ("oom", "much")}},
    ],
)
def test_other_cells_are_not_taken_for_it(other: dict[str, Any]) -> None:
    run = make_run(S=(1024,), routes=("auto",), phase="prefill", **other)
    assert not found(collected([run]))["prefill, S=1024"].ours


def test_trainings(tmp_path: Path) -> None:
    fp16 = make_training(tmp_path, steps=40, settings={"precision": "fp16"})
    stepwise = make_training(
        tmp_path, steps=4, status="hang", reason="no heartbeat", settings={"mode": "stepwise"}
    )
    ours = found(load_material([fp16, stepwise]))
    assert ours["training in fp16, batched"].ours == "status ok, 40 steps, every loss finite"
    assert ours["training, prefill fed token by token"].ours == "status hang, 4 steps, every loss finite"
    smoke = ours["training smoke test"].ours
    assert smoke.startswith("50")
    assert "tokens/s, loss 5." in smoke
    assert smoke.endswith("in 40 steps, gate entropy 1.050 nats")
    broken = make_training(
        tmp_path, steps=6, settings={"precision": "fp16"}, losses=lambda s: None if s > 1 else 5.0
    )
    assert found(load_material([broken]))["training in fp16, batched"].ours == (
        "status ok, 6 steps, 5 losses not finite"
    )


def test_they_are_shown_where_a_run_answers_one(tmp_path: Path) -> None:
    assert not answers_reports(Material())
    assert not answers_reports(load_material([make_scorecard(tmp_path, [score("values", "sel:gather")])]))
    assert not answers_reports(collected([make_run()]))
    assert answers_reports(load_material([make_scorecard(tmp_path, [score(NAMED[0], "layer:auto")])]))
