"""Dense implementations as cells: through the gate, refused before a timer, caught when they fall back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsabench.peers import dense_flex, dense_sdpa
from nsabench.plan import BASELINES, Cell, PlanError
from nsabench.run import Policy
from nsabench.run.arm import Arm
from nsabench.run.gate import Refused, judge, refuse_other_output, refuse_wrong_cache
from nsabench.run.impl import impl_for
from nsabench.run.session import measure_group
from nsabench.run.workload import least_bytes, workload_for
from nsabench.store.schema import check_row, without_performance

MakeCell = Callable[..., Cell]

ON_CPU = ("dense", "dense:flash", "dense:math", "dense:flex")


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_flex, "why_not_compiled", lambda *_: "a test does not wait for a compiler")


class Sink:
    """Keeps the rows."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.samples: dict[str, int] = {}

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: dict[str, Any], samples: Sequence[Any] = (), *more: Sequence[Any]) -> None:
        row = row if row["status"] == "ok" else without_performance(row)
        check_row({"run_id": "r", **row})
        self.rows[row["impl"]] = row
        self.samples[row["impl"]] = len(samples)


@pytest.mark.parametrize(
    "what",
    [
        {"phase": "decode"},
        {"phase": "decode", "S": 1},
        {},
        {"mode": "chunked=9"},
        {"mode": "stepwise", "S": 20},
        {"passes": "bwd", "dv": 8},
        {"passes": "fwd_bwd", "mode": "chunked=17"},
        {"heads": 5, "groups": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scope", ["module", "core"])
@pytest.mark.parametrize("impl", ON_CPU[1:])
def test_each_passes_the_gate(make_cell: MakeCell, impl: str, scope: str, what: dict[str, Any]) -> None:
    cell = replace(make_cell(**{"S": 41, "B": 2, **what}), impl=impl, scope=scope)
    if impl == "dense:flex" and cell.passes != "fwd":
        with pytest.raises(Refused, match=r"^torch's FlexAttention has no backward on cpu$") as found:
            workload_for(cell)
        assert found.value.status == "unsupported"
        return
    workload = workload_for(cell)
    refuse_wrong_cache(workload)
    verdict, outputs = judge(workload, "auto")
    assert verdict.reason == ""
    for variant in workload.variants("auto"):
        first = variant.step()
        if cell.passes == "fwd":
            refuse_other_output(first, outputs[variant.name], "")


def test_what_cannot_run_is_a_row_and_is_never_timed(make_cell: MakeCell, quick: Policy) -> None:
    cells = [replace(make_cell(S=24), impl=impl) for impl in ("nsa", *BASELINES)]
    sink = Sink()
    measure_group(cells, quick, sink)
    assert {impl for impl, row in sink.rows.items() if row["status"] == "ok"} == {"nsa", *ON_CPU}
    for impl in set(BASELINES) - set(ON_CPU):
        row = sink.rows[impl]
        assert (row["status"], sink.samples[impl]) == ("unsupported", 0)
        assert row["reason"].endswith("runs on cuda, not on cpu")


def test_the_row_says_what_ran(make_cell: MakeCell, quick: Policy) -> None:
    cell = replace(make_cell(S=24), impl="dense:flash")
    made = Arm(cell, workload_for(cell), quick)
    made.prepare()
    assert made.fields["route_proof"] == "operators: _scaled_dot_product_flash_attention_for_cpu"
    assert made.fields["provider"] == (
        f"torch {torch.__version__} scaled_dot_product_attention, flash only; "
        "values padded from 4 to 8 channels"
    )


@pytest.mark.parametrize("what", [{"phase": "decode"}, {}, {"mode": "chunked=9"}, {"passes": "bwd"}], ids=str)
@pytest.mark.parametrize("scope", ["module", "core"])
@pytest.mark.parametrize(
    ("impl", "other", "ran"),
    [
        ("dense:flash", SDPBackend.MATH, "_scaled_dot_product_attention_math"),
        ("dense:math", SDPBackend.FLASH_ATTENTION, "_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_a_kernel_that_falls_back_has_no_number(
    make_cell: MakeCell,
    monkeypatch: pytest.MonkeyPatch,
    quick: Policy,
    what: dict[str, Any],
    scope: str,
    impl: str,
    other: SDPBackend,
    ran: str,
) -> None:
    monkeypatch.setattr(dense_sdpa, "sdpa_kernel", lambda backend: sdpa_kernel(other))
    cell = replace(make_cell(**what, dv=8), impl=impl, scope=scope)
    sink = Sink()
    measure_group([cell], quick, sink)
    row = sink.rows[impl]
    assert (row["status"], sink.samples[impl]) == ("invalid", 0)
    assert row["reason"].startswith(f"fell back: requested {impl}, ran {ran}")


def test_a_kernel_that_shows_nothing_has_no_number(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, quick: Policy
) -> None:
    def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        logits = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        return torch.einsum("bhts,bshd->bthd", logits.masked_fill(future, float("-inf")).softmax(-1), v)

    monkeypatch.setattr(dense_sdpa, "causal_sdpa", by_hand)
    cell = replace(make_cell(), impl="dense:flash", scope="core")
    with pytest.raises(
        Refused, match=r"^fell back: requested dense:flash, ran no operator that is known for it$"
    ):
        Arm(cell, workload_for(cell), quick).prepare()


@pytest.mark.parametrize(("mode", "pairs"), [("batched", 64 * 64), ("chunked=16", 16 * 64), ("stepwise", 64)])
def test_scores_that_do_not_fit_are_refused_early(make_cell: MakeCell, mode: str, pairs: int) -> None:
    cell = make_cell(S=64, B=3, mode=mode)
    fused, whole = (least_bytes(replace(cell, impl=impl)) for impl in ("dense:flash", "dense:math"))
    assert whole - fused == 3 * cell.heads * pairs * 4


def test_copies_of_a_workload_share_the_kernel(make_cell: MakeCell) -> None:
    workload = workload_for(replace(make_cell(phase="decode"), impl="dense:flash"))
    first, second = workload.copies(2)
    (a,), (b,) = first.variants("auto"), second.variants("auto")
    assert torch.equal(a.step(), b.step())
    assert first.impl.kernel is second.impl.kernel  # type: ignore[attr-defined]


def test_an_unknown_implementation_is_told_the_nearest(make_cell: MakeCell) -> None:
    with pytest.raises(PlanError, match=r"^impl is 'dense:flsh'; did you mean dense:flash\?$"):
        impl_for(replace(make_cell(), impl="dense:flsh"))
