"""NSA and dense attention, whole layers and cores: the same gate, the same steps, each its own counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import nsa_attention
from nsabench.peers import dense_sdpa
from nsabench.peers.dense import DenseCache
from nsabench.plan import Cell, PlanError
from nsabench.run import Policy, arm
from nsabench.run.arm import Arm
from nsabench.run.gate import Refused, judge, refuse_other_output, refuse_wrong_cache
from nsabench.run.steps import steps_of
from nsabench.run.work import count_dense_work, count_work
from nsabench.run.workload import PART_TOKENS, CoreWorkload, LayerWorkload, prompt, workload_for
from nsabench.store.schema import STAGES, check_row

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]

KINDS = [(impl, scope) for impl in ("nsa", "dense") for scope in ("module", "core")]
MODES = ["batched", "stepwise", "chunked=7", "chunked=40", "chunked=99"]


def kind(cell: Cell, impl: str, scope: str) -> Cell:
    return replace(cell, impl=impl, scope=scope)


def measured(cell: Cell, policy: Policy) -> Arm:
    workload = workload_for(cell)
    refuse_wrong_cache(workload)
    made = Arm(cell, workload, policy)
    made.prepare()
    for number in range(policy.rounds):
        made.sample(number, 0)
    made.finish()
    check_row(made.fields)
    return made


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "what",
    [
        {"phase": "decode"},
        {"phase": "decode", "S": 1},
        {},
        {"S": 1},
        {"mode": "chunked=9"},
        {"mode": "stepwise", "S": 20},
        {"passes": "bwd", "dv": 8},
        {"passes": "fwd_bwd", "mode": "chunked=17"},
        {"heads": 5, "groups": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("impl", "scope"), KINDS)
def test_every_kind_passes_the_gate(
    make_cell: MakeCell, impl: str, scope: str, what: dict[str, Any], dtype: str
) -> None:
    cell = kind(make_cell(**{"S": 41, "B": 2, **what}, dtype=dtype), impl, scope)
    workload = workload_for(cell)
    refuse_wrong_cache(workload)
    verdict, outputs = judge(workload, "auto")
    assert verdict.reason == ""
    for variant in workload.variants("auto"):
        first = variant.step()
        assert torch.equal(variant.step(), first)
        if cell.passes == "fwd":
            refuse_other_output(first, outputs[variant.name], "")


@pytest.mark.parametrize("passes", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize(("impl", "scope"), KINDS)
def test_every_mode_gives_the_same(make_cell: MakeCell, impl: str, scope: str, passes: str) -> None:
    results = []
    for mode in MODES:
        cell = kind(make_cell(mode=mode, passes=passes, B=2, dtype="fp64"), impl, scope)
        (variant,) = workload_for(cell).variants("auto")
        results.append(variant.step())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["module", "core"])
def test_a_dense_decode_step_is_the_last_row_of_the_prompt(make_cell: MakeCell, scope: str) -> None:
    decode = kind(make_cell(phase="decode", B=2, S=43, dtype="fp64"), "dense", scope)
    (variant,) = workload_for(decode).variants("auto")
    assert (variant.name, variant.weight) == ("", 1.0)
    (whole,) = workload_for(replace(decode, phase="prefill")).variants("auto")
    torch.testing.assert_close(variant.step(), whole.step()[:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_core_is_the_attention_on_what_the_layer_gives_it(make_cell: MakeCell, phase: str) -> None:
    cell = make_cell(phase=phase, S=43, dtype="fp64")
    module, core = workload_for(cell), workload_for(replace(cell, scope="core"))
    assert isinstance(module, LayerWorkload)
    assert isinstance(core, CoreWorkload)
    truth = nsa_attention(**module.inputs_without_cache(), config=module.config)
    (variant,) = core.variants("auto")
    torch.testing.assert_close(variant.step(), truth[:, -variant.step().shape[1] :], rtol=0, atol=1e-12)
    assert core.parameters == 0
    assert core.cache_bytes() == {}
    for name, tensor in core.given.items():
        assert not isinstance(tensor, torch.Tensor) or tensor.is_contiguous(), name


def test_the_window_of_a_core_is_no_longer_than_a_cache_keeps(make_cell: MakeCell) -> None:
    core = workload_for(make_cell(phase="decode", S=43, scope="core"))
    assert isinstance(core, CoreWorkload)
    assert core.given["k_win"].shape[1] == core.config.window_size
    assert core.given["win_start"] == 43 - core.config.window_size


def bug(what: str) -> Callable[..., torch.Tensor]:
    true = dense_sdpa.dense_attention

    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if what == "sees the future":
            o = true(q, k.flip(1), v.flip(1))
        elif what == "another scale":
            o = true(q * 1.01, k, v)
        elif what == "another head":
            o = true(q, k.roll(1, 2), v.roll(1, 2))
        elif what == "nan":
            o = true(q, k, v) / 0
        else:
            o = true(q, k, v.detach())
        return o

    return broken


@pytest.mark.parametrize(
    ("phase", "what"),
    [
        ("prefill", "sees the future"),  # one query alone sees every key: their order is nothing to it
        *((p, what) for p in ("decode", "prefill") for what in ("another scale", "another head", "nan")),
    ],
)
@pytest.mark.parametrize("scope", ["module", "core"])
def test_a_wrong_dense_attention_gets_no_number(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, quick: Policy, scope: str, phase: str, what: str
) -> None:
    cell = kind(make_cell(phase=phase), "dense", scope)
    monkeypatch.setattr(dense_sdpa, "dense_attention", bug(what))
    made = Arm(cell, workload_for(cell), quick)
    with pytest.raises(Refused, match=r"^output (differs from the specification|is not finite)") as found:
        made.prepare()
    assert found.value.status == ("nan" if what == "nan" else "wrong")
    assert made.samples == []


def test_a_wrong_gradient_of_the_baseline_is_found(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_sdpa, "dense_attention", bug("no gradient of v"))
    cell = kind(make_cell(passes="bwd"), "dense", "core")
    verdict, _ = judge(workload_for(cell), "auto")
    assert verdict.reason.startswith("gradient of v differs from the specification")


@pytest.mark.parametrize("what", [{"phase": "decode"}, {"mode": "chunked=9"}, {"mode": "batched"}], ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_cache_of_the_baseline_is_found(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, what: dict[str, Any], which: int
) -> None:
    append = DenseCache.append

    def broken(self: DenseCache, *given: Any) -> Any:
        views = list(append(self, *given))
        views[which] = views[which].roll(1, 1)
        return tuple(views)

    monkeypatch.setattr(DenseCache, "append", broken)
    with pytest.raises(Refused, match=rf"^{'kv'[which]} for token \d+ through the cache differs by"):
        refuse_wrong_cache(workload_for(kind(make_cell(**what, dtype="bf16"), "dense", "module")))


@pytest.mark.parametrize("factor", [1.0, 1.5, 8.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cache_may_differ_by_roundings_and_no_more(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, dtype: str, factor: float
) -> None:
    """What the budget allows is measured: noise far below a rounding passes, a few roundings do not."""
    append = DenseCache.append
    eps = torch.finfo(torch.float32 if dtype == "fp32" else torch.bfloat16).eps

    def broken(self: DenseCache, k: torch.Tensor, v: torch.Tensor) -> Any:
        keys, values = append(self, k, v)
        shift = keys.abs().max() * eps * (64 if dtype == "fp32" else 4) * (factor - 1)
        return keys + shift, values

    monkeypatch.setattr(DenseCache, "append", broken)
    workload = workload_for(kind(make_cell(dtype=dtype, mode="chunked=9"), "dense", "module"))
    if factor == 1.0:
        refuse_wrong_cache(workload)
        return
    with pytest.raises(Refused, match=r"^k for token"):
        refuse_wrong_cache(workload)


@pytest.mark.parametrize("S", [1, 7, 40])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_dense_work_is_every_causal_pair(make_cell: MakeCell, phase: str, S: int) -> None:
    cell = make_cell(phase=phase, S=S, B=3)
    queries = range(S - 1, S) if phase == "decode" else range(S)
    pairs = sum(t + 1 for t in queries)
    work = count_dense_work(cell, 1000)
    assert work.flops == 3 * pairs * 4 * (8 + 4) * 2 + 2 * 3 * len(queries) * 1000
    assert work.bytes == 4 * (3 * 2 * S * (8 + 4) + 3 * len(queries) * 2 * 16 + 1000)
    assert (work.reads_tokens, work.reads_tokens_dense) == (S, S)
    backward = count_dense_work(replace(cell, passes="bwd"), 0)
    assert backward.flops == 3 * pairs * 4 * (8 + 4) * 2 * 5 // 2
    assert backward.bytes == 2 * count_dense_work(cell, 0).bytes


def test_a_core_moves_queries_gates_and_outputs_and_no_weights(make_cell: MakeCell) -> None:
    cell = make_cell(scope="core")
    branches = ("cmp", "sel", "win")
    module, core = count_work(replace(cell, scope="module"), branches, 0), count_work(cell, branches, 0)
    assert core.flops == module.flops
    assert core.bytes - module.bytes == 4 * 40 * (4 * (8 + 4 + 3) - 2 * 16)
    dense = count_dense_work(cell, 0).bytes - count_dense_work(replace(cell, scope="module"), 0).bytes
    assert dense == 4 * 40 * (4 * (8 + 4) - 2 * 16)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_row_of_a_baseline_names_what_ran(make_cell: MakeCell, quick: Policy, phase: str) -> None:
    cell = kind(make_cell(phase=phase, S=30), "dense", "module")
    made = measured(cell, replace(quick, alone=True))
    fields = made.fields
    assert fields["route_proof"] == "operators: _scaled_dot_product_flash_attention_for_cpu"
    called = f"torch {torch.__version__} scaled_dot_product_attention"
    assert fields["provider"] == f"{called}; values padded from 4 to 8 channels"
    assert not any(name in fields for name in ("cmp_backend", "ms_alone_win"))
    assert fields["selection_overlap"] is None
    assert fields["kv_cache_bytes"] == 30 * 2 * (8 + 4) * 4
    assert fields["kv_cache_sel_bytes"] is None
    assert fields["flops"] == count_dense_work(cell, made.workload.parameters).flops
    assert fields["ms_total"] > 0
    assert fields["peak_alloc_bytes"] > 0


@pytest.mark.parametrize("passes", ["fwd", "bwd", "fwd_bwd"])
def test_a_dense_layer_has_projections_and_the_rest(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    monkeypatch.setattr(arm, "SHARES_WITHIN", 1000.0)  # a busy machine may take its time
    fields = measured(
        kind(make_cell(passes=passes), "dense", "module"), replace(quick, shares=True, share_runs=5)
    ).fields
    if "shares_note" in fields:
        assert "the forward took" in fields["shares_note"]
        return
    shares = {stage: fields[f"share_{stage}_pct"] for stage in STAGES}
    assert shares["proj"] + shares["other"] == pytest.approx(100)
    assert min(shares["proj"], shares["other"]) > 0


def test_a_dense_core_has_no_stages_and_an_nsa_core_no_projections(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm, "SHARES_WITHIN", 1000.0)
    policy = replace(quick, shares=True, share_runs=5)
    dense = measured(kind(make_cell(), "dense", "core"), policy).fields
    assert dense["shares_note"] == "the core of dense is one stage"
    nsa = measured(kind(make_cell(), "nsa", "core"), policy).fields
    shares = {stage: nsa[f"share_{stage}_pct"] for stage in STAGES}
    assert sum(shares.values()) == pytest.approx(100)
    assert shares["proj"] == shares["compress"] == 0
    assert min(shares[stage] for stage in ("cmp", "score", "sel", "win", "gate")) > 0


def test_only_an_nsa_layer_has_steps_that_complete_a_block(make_cell: MakeCell) -> None:
    cell = make_cell(phase="decode", S=43)
    assert [step.name for step in steps_of(cell)] == ["emit", "plain"]
    for impl, scope in KINDS[1:]:
        (step,) = steps_of(kind(cell, impl, scope))
        assert (step.name, step.weight, step.spans) == ("", 1.0, ((42, 43),))


def test_a_route_that_cannot_run_is_refused_in_a_core_too(make_cell: MakeCell, quick: Policy) -> None:
    cell = make_cell(scope="core", route="win=fa2")
    with pytest.raises(Refused, match=r"^win=fa2: needs a CUDA GPU, got cpu") as found:
        Arm(cell, workload_for(cell), quick).prepare()
    assert found.value.status == "unsupported"


def test_an_unknown_implementation_is_refused(make_cell: MakeCell) -> None:
    with pytest.raises(PlanError, match="impl is 'fla'; known: nsa, dense, dense:flash"):
        workload_for(make_cell(impl="fla"))


def test_a_prompt_is_drawn_in_parts_that_differ_and_come_again(make_cell: MakeCell) -> None:
    S = 2 * PART_TOKENS + 100
    workload = workload_for(make_cell(phase="decode", S=S, dim=4, seed=5))
    whole = prompt(workload.impl)
    assert whole.shape == (1, S, 4)
    assert not torch.equal(whole[:, :PART_TOKENS], whole[:, PART_TOKENS : 2 * PART_TOKENS])
    assert abs(float(whole.mean())) < 0.05
    assert float(whole.std()) == pytest.approx(1, abs=0.05)
    for start, end in ((0, 3), (PART_TOKENS - 1, PART_TOKENS + 1), (S - 1, S), (7, S)):
        assert torch.equal(prompt(workload.impl, start, end), whole[:, start:end])


def test_decode_keeps_no_prompt(make_cell: MakeCell) -> None:
    decode, prefill = (workload_for(make_cell(phase=phase, S=43)) for phase in ("decode", "prefill"))
    assert decode.held_bytes()["inputs"] == 0
    assert prefill.held_bytes()["inputs"] == 43 * 16 * 4
    assert decode.held_bytes()["weights"] == 4 * decode.parameters
