"""The scorecard itself: rows, refusals, declared differences, crashes; and its oracles against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from nsa import reference
from nsa.routes import TABLE
from nsabench.plan import PlanError
from nsabench.plan.checks import RULES, Choice
from nsabench.store.scorecard import check_score
from nsabench.verify import Case, brute, run_scorecard, wrong_variants
from nsabench.verify.cases import borders, draw, small
from nsabench.verify.ours import LayerSubject, RouteSubject, run_function
from nsabench.verify.scorecard import CHECKS
from nsabench.verify.selection import exchanged, specified
from nsabench.verify.subjects import LAYOUTS, Tensors, answer, placed
from nsabench.verify.trial import Oracle, Trial, run_trial


def verified(**choice: Any) -> list[dict[str, Any]]:
    return run_scorecard(Choice(**choice, peers=False), lambda row: None, lambda text: None)


def row_of(branch: str, backend: str) -> RouteSubject:
    (row,) = (r for r in TABLE if (r.branch, r.backend) == (branch, backend))
    return RouteSubject(row, "cpu")


@dataclass(frozen=True)
class Stranger:
    """Somebody else's window, off by `wrong`."""

    wrong: float = 0.0
    declared: str = ""
    refuses: str = ""
    name: str = "stranger 1.0 win"
    branch: str = "win"
    backend: str = "stranger"
    device: str = "cpu"
    ours: bool = False
    dtypes: tuple[str, ...] = ("fp32",)
    asked: list[str] = field(default_factory=list)

    def refusal(self, case: Case) -> str:
        return self.refuses

    def differs(self, rule: str) -> str:
        return self.declared

    def run(self, case: Case) -> Tensors:
        given = placed(case, self.device)
        self.asked.append(case.name)
        o, _ = reference.sliding_attention(**given, config=case.config, q_start=case.q_start)
        return answer(case, given, o + self.wrong)


def trial_of(subject: Any, rule: str = "values") -> dict[str, Any]:
    return run_trial(Trial(rule, subject, "fp32"), CHECKS[rule])


def test_every_rule_is_implemented() -> None:
    assert set(CHECKS) == set(RULES)


@pytest.mark.parametrize("branch", ["cmp", "score", "sel", "win", "layer"])
def test_the_specification_passes_every_rule_put_to_it(branch: str) -> None:
    rows = verified(subjects=(f"{branch}:reference",), dtypes=("fp32",))
    assert {row["rule"] for row in rows} == {
        name
        for name, rule in RULES.items()
        if branch in rule.branches and rule.level == "quick" and not rule.subjects
    }
    wrong = [(row["rule"], row["status"], row["reason"]) for row in rows if row["status"] != "pass"]
    assert wrong == []
    for row in rows:
        check_score(row)
        assert row["cases"] >= 1
        assert row["failed"] == 0
        assert row["worst"]


def test_rows_and_progress_come_as_they_are_made() -> None:
    seen: list[dict[str, Any]] = []
    lines: list[str] = []
    choice = Choice(subjects=("win:reference",), rules=("window_width", "ties"), peers=False)
    rows = run_scorecard(choice, seen.append, lines.append)
    assert rows == seen
    assert [row["rule"] for row in rows] == ["window_width"]  # ties are no matter of a window
    assert lines[0] == "2 rules, 1 subjects, fp32, fp16, bf16 on cpu"
    assert lines[1].startswith("1/2 window_width: ")


def test_quick_asks_a_rule_of_meaning_once_and_values_in_every_dtype() -> None:
    rows = verified(subjects=("win:reference",), rules=("values", "window_width"))
    assert [(row["rule"], row["dtype"]) for row in rows] == [
        ("values", "fp32"), ("values", "fp16"), ("values", "bf16"), ("window_width", "fp32"),
    ]  # fmt: skip
    full = verified(level="full", subjects=("win:reference",), rules=("window_width",))
    assert [row["dtype"] for row in full] == ["fp32", "fp16", "bf16", "fp64"]


def test_a_refusal_is_the_tables_own_reason() -> None:
    rows = verified(subjects=("win:fa2", "win:fa2:varlen"), rules=("sliding_fa2", "window_width"))
    assert {row["status"] for row in rows} == {"unsupported"}
    assert {row["reason"] for row in rows} == {"needs a CUDA GPU, got cpu"}
    assert {row["cases"] for row in rows} == {0}
    assert [row["max_abs_err"] for row in rows] == [None] * len(rows)
    by_rule = [row["rule"] for row in rows]
    # In every dtype where a rule asks it, else once, although every dtype was tried.
    assert (by_rule.count("sliding_fa2"), by_rule.count("window_width")) == (6, 2)


def test_the_layer_says_which_row_refuses() -> None:
    (row,) = verified(subjects=("layer:fa2",), rules=("values",), dtypes=("fp16",))
    assert row["status"] == "unsupported"
    assert row["reason"].startswith("cmp=fa2: needs a CUDA GPU, got cpu; ")


def test_a_subject_without_a_backward_is_refused_gradients_and_asked_values() -> None:
    @dataclass(frozen=True)
    class Forward(Stranger):
        def refusal(self, case: Case) -> str:
            return "computes no gradient" if case.gradients else ""

    forward = Forward()
    gradients = trial_of(forward, "gradients")
    assert (gradients["status"], gradients["reason"]) == ("unsupported", "computes no gradient")
    assert gradients["passes"] == "fwd_bwd"
    for rule in ("determinism", "group_sizes"):
        found = trial_of(forward, rule)
        assert (found["status"], found["passes"]) == ("pass", "fwd")
    assert trial_of(Stranger(), "determinism")["passes"] == "fwd_bwd"


def test_an_error_is_told_with_its_budget_and_its_worst_case() -> None:
    row = trial_of(Stranger(wrong=0.25))
    assert row["status"] == "fail"
    assert row["max_abs_err"] == pytest.approx(0.25, abs=1e-3)
    assert 0 < row["budget"] < 1e-4
    assert row["reason"].startswith("o differs by 0.25, allowed ")
    assert row["worst"] == "S=70 B=1 G=1 dk=16 dv=16: o" or row["worst"] == "S=90 B=2 G=2 dk=16 dv=32: o"
    assert row["reason"].endswith(f"({row['worst'].removesuffix(': o')})")
    assert (row["cases"], row["failed"]) == (2, 2)


def test_a_number_that_is_none_is_a_failure() -> None:
    row = trial_of(Stranger(wrong=math.nan))
    assert row["status"] == "fail"
    assert row["reason"].startswith("o is not finite (")
    assert row["max_abs_err"] is None


def test_a_declared_difference_is_named_and_its_error_kept() -> None:
    row = trial_of(Stranger(wrong=0.25, declared="its window has w + 1 keys"))
    assert row["status"] == "differs"
    assert row["reason"].startswith("its window has w + 1 keys (o differs by 0.25")
    assert row["max_abs_err"] == pytest.approx(0.25, abs=1e-3)
    assert trial_of(Stranger(declared="its window has w + 1 keys"))["status"] == "pass"


def test_an_answer_of_another_shape_is_a_failure() -> None:
    @dataclass(frozen=True)
    class Short(Stranger):
        def run(self, case: Case) -> Tensors:
            return {name: tensor[:, 1:] for name, tensor in super().run(case).items()}

    row = trial_of(Short())
    assert row["status"] == "fail"
    assert row["reason"].startswith("ValueError: shapes differ: got (")


def test_a_device_that_is_not_here_is_one_line() -> None:
    with pytest.raises(PlanError, match=r"^device 'gpu0' cannot be used: [^\n]+$"):
        verified(device="gpu0")


def test_memory_that_is_not_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsabench.verify.rules_lists._free_bytes", lambda device: 10**9)
    (row,) = verified(subjects=("win:sdpa",), rules=("int32_offsets",), dtypes=("bf16",))
    assert row["status"] == "unsupported"
    assert row["reason"] == "two buffers of 2^31 elements in bf16 need 8.6 GB; 1.0 GB are free on cpu"


@pytest.mark.parametrize("branch", ["cmp", "score", "sel", "win"])
def test_the_loop_over_queries_and_the_specification_agree(branch: str) -> None:
    case = draw(branch, small(num_heads=6, value_dim=8), 40, "fp64", q_start=torch.tensor([0, 37]))
    exact = brute.answers(case)
    if branch == "score":
        truth = specified(case)
        torch.testing.assert_close(exact["scores"], truth["scores"], rtol=1e-12, atol=1e-12)
        assert torch.equal(exact["blocks"], truth["blocks"])
        return
    name = {"cmp": "compressed_attention", "sel": "selected_attention", "win": "sliding_attention"}[branch]
    found = run_function(getattr(reference, name), case, "cpu")
    for key in ("o", "lse"):
        torch.testing.assert_close(exact[key], found[key], rtol=1e-12, atol=1e-12)


def test_a_better_block_left_out_is_measured() -> None:
    truth = {
        "blocks": torch.tensor([[[[0, 2, -1]]]]),
        "scores": torch.tensor([[[[1.0, 0.5, 2.0]]]], dtype=torch.float64),
        "eager": torch.tensor([[[[1.0, 0.5, 2.0]]]]),
    }
    gap, budget = exchanged(torch.tensor([[[[0, 1, -1]]]]), truth)
    assert gap == pytest.approx(math.log(4))
    assert 0 < budget < 1e-4
    assert exchanged(truth["blocks"], truth)[0] == 0


def test_layouts_keep_the_values() -> None:
    tensor = torch.randn(2, 5, 4, 6)
    for name in ("heads first", "sliced", "channels first"):
        laid = LAYOUTS[name](tensor)
        assert torch.equal(laid, tensor), name
        assert not laid.is_contiguous(), name
    expanded = LAYOUTS["expanded"](tensor)
    assert torch.equal(expanded[1], tensor[0])
    assert expanded.stride(0) == 0


def test_borders() -> None:
    assert borders(small()) == [1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 63, 64, 65]


def test_the_oracle_answers_once() -> None:
    oracle = Oracle()
    case = draw("win", small(), 9, "fp16")
    assert oracle.exact(case) is oracle.exact(case)
    assert oracle.exact(case)["o"].dtype == torch.float64
    assert oracle.eager(case)["o"].dtype == torch.float16
    first = oracle.exact(case)
    oracle.forget()
    assert oracle.exact(case) is not first


def test_a_layer_attends_the_blocks_it_says() -> None:
    trial = Trial("values", LayerSubject("gather", "cpu"), "bf16")
    row = run_trial(trial, CHECKS["values"])
    assert row["status"] == "pass", row["reason"]


def test_mistakes_of_the_reports_are_as_large_here() -> None:
    """The reported errors were no rounding: those mistakes give their size on any machine."""
    assert 0.6 < float(wrong_variants.pre_extracted_windows().split("alone): MAE ")[1].split(";")[0]) < 0.9
    assert 0.5 < float(wrong_variants.causal_packs().split("top-left MAE ")[1].split(",")[0]) < 0.75
    for mistake in wrong_variants.small_s().split("MAE ")[1:]:
        assert float(mistake.split(";")[0]) > 0.05
    assert "4 by a plain softmax" in wrong_variants.nan_rows()
    for mistake in wrong_variants.rectangle().split("MAE ")[1:]:
        assert float(mistake.split(",")[0]) > 0.1


@pytest.mark.gpu
def test_a_gpu_by_the_same_code() -> None:
    rows = verified(device="cuda", subjects=("layer:auto", "win", "cmp"), rules=("values", "sliding_fa2"))
    assert [row["reason"] for row in rows if row["status"] == "fail"] == []
    assert any(row["status"] == "pass" for row in rows)


def test_what_fp64_cannot_judge_is_not_judged() -> None:
    rows = verified(subjects=("sel:gather:keys",), rules=("row_maxima", "very_negative"), dtypes=("fp64",))
    assert {row["status"] for row in rows} == {"unsupported"}
    assert all("nothing is exact enough to judge by" in row["reason"] for row in rows)
