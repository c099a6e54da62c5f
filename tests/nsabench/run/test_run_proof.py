"""Route proof: names of operators and kernels, the rules of the route table, and planted fallbacks."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa import NSAConfig, reference
from nsa.backends import chunked, gather, sdpa
from nsa.routes import BRANCHES, TABLE, Request, Row, refusal
from nsabench.measure.trace import Seen
from nsabench.plan import Cell
from nsabench.run import Policy, proof
from nsabench.run.arm import Arm
from nsabench.run.impl import Refused
from nsabench.run.proof import RULES, Proof, idle_branches, observed, prove
from nsabench.run.session import measure_group
from nsabench.run.workload import workload_for
from nsabench.store.schema import PERFORMANCE_COLUMNS, without_performance

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]

FA3 = "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloop> > >"
FA4 = "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensor000"
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
EFFICIENT = "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<gemm>::Params)"
TORCH_FA2 = "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 64> >(Params)"
FA2 = "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128> >(flash::Flash_fwd_params)"
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off"
SOFTMAX = "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false>(float*, int)"


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ([TORCH_FA2], "flash"),
        ([FA2], "fa2"),
        ([FA3], "fa3"),
        (["void flash::prepare_varlen_num_blocks_kernel<1, true>(int)", FA3], "fa3"),
        ([FA4], "fa4"),
        ([CUDNN], "cudnn"),
        ([EFFICIENT], "efficient"),
        (["triton_tem_fused_flex_attention_0"], "flex"),
        (["triton_tem_fused_0"], "flex"),
        (["_union_kernel", "_mark_kernel", "_compact_kernel"], "triton"),
        (["_attention_kernel", "void at::native::vectorized_elementwise_kernel<4>"], "triton"),
        (["_some_other_attention_kernel"], ""),
        ([GEMM, SOFTMAX], "math"),
        (["nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT"], "math"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], "flash"),
        (["_scaled_dot_product_flash_attention_for_cpu"], "flash"),
        (["aten::_scaled_dot_product_efficient_attention"], "efficient"),
        (["aten::_scaled_dot_product_cudnn_attention"], "cudnn"),
        (["aten::_flash_attention_forward"], "flash"),
        (["flash_attn::_flash_attn_varlen_forward"], "fa2"),
        (["flash_attn_3::fwd"], "fa3"),
        (["aten::_scaled_dot_product_attention_math", "aten::bmm", "aten::_softmax"], "math"),
        (["aten::matmul", "aten::bmm", "aten::_softmax"], "math"),
        (["aten::_flash_attention_forward", FA3], "fa3"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu", "aten::bmm"], "flash+math"),
        ([FA3, TORCH_FA2], "flash+fa3"),
        (["aten::scaled_dot_product_attention", "aten::add", "void vectorized_elementwise_kernel<4>"], ""),
        (["triton_tem_fused_mm_0", "aten::addcmul", "aten::lift_fresh"], ""),
        ([], ""),
    ],
)
def test_the_library_behind_names(names: list[str], word: str) -> None:
    assert observed(names) == word
    assert observed([*names, *names]) == word


def test_every_backend_of_the_table_has_a_rule() -> None:
    assert {row.backend for row in TABLE} <= set(RULES)


def on_cpu(row: Row) -> bool:
    request = Request("cpu", torch.float32, 60, 60, False, NSAConfig(4, 2, 8))
    return refusal(row, request) is None


SHAPES: dict[str, dict[str, Any]] = {
    "prefill": {"S": 140},
    "short": {"S": 20},
    "tiny": {"S": 5},
    "chunks": {"S": 140, "mode": "chunked=70"},
    "decode": {"S": 140, "phase": "decode"},
}
ROWS = [pytest.param(row, id=f"{row.branch}={row.backend}") for row in TABLE if on_cpu(row)]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_that_runs_here_shows_itself(make_cell: MakeCell, row: Row, shape: str) -> None:
    cell = make_cell(**SHAPES[shape], route=f"{row.branch}={row.backend}")
    workload = workload_for(cell)
    for step in workload.steps:
        for span, inputs in workload.inputs(step, step.spans):
            found = workload.check(inputs, span, cell.route, elements=1000)
            assert found.reason == ""
            assert row.branch in found.proof


OTHERS: dict[str, dict[str, Callable[..., Any]]] = {
    "cmp": {"sdpa": sdpa.compressed_attention, "reference": reference.compressed_attention},
    "score": {"chunked": chunked.select_blocks, "reference": reference.select_blocks},
    "sel": {
        "sdpa": sdpa.selected_attention,
        "gather:keys": gather.selected_attention_by_keys,
        "gather:queries": gather.selected_attention_by_queries,
        "reference": reference.selected_attention,
    },
    "win": {"sdpa": sdpa.sliding_attention, "reference": reference.sliding_attention},
}
PAIRS = [
    pytest.param(branch, asked, ran, id=f"{branch}: {asked} by {ran}")
    for branch, rows in OTHERS.items()
    for asked in rows
    for ran in rows
    if asked != ran
]


def target_of(branch: str, backend: str) -> str:
    (row,) = (row for row in TABLE if (row.branch, row.backend) == (branch, backend))
    return row.target.removeprefix("nsa.")


@pytest.mark.parametrize(("branch", "asked", "ran"), PAIRS)
def test_a_backend_that_calls_another_is_caught(
    make_cell: MakeCell, plant: Plant, quick: Policy, branch: str, asked: str, ran: str
) -> None:
    cell = make_cell(S=140, route=f"{branch}={asked}")

    def other(true: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return OTHERS[branch][ran](*args, **kwargs)

    with plant(target_of(branch, asked), other), pytest.raises(Refused) as refused:
        Arm(cell, workload_for(cell), quick).prepare()
    assert refused.value.status == "invalid"
    assert str(refused.value).startswith(f"fell back: requested {asked} for {branch}, ran ")


class Rows:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.kernels: list[dict[str, Any]] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.rows.append({**row})
        self.kernels += kernels


def test_a_fallback_has_a_reason_and_no_time(make_cell: MakeCell, plant: Plant, quick: Policy) -> None:
    cell, sink = make_cell(S=140, route="win=sdpa"), Rows()

    def other(true: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return reference.sliding_attention(*args, **kwargs)

    with plant("backends.sdpa:sliding_attention", other):
        measure_group([cell], quick, sink)
    (row,) = sink.rows
    assert row["status"] == "invalid"
    assert row["reason"] == "fell back: requested sdpa for win, ran math (einsum, bmm)"
    assert not [name for name in PERFORMANCE_COLUMNS if row.get(name) is not None]


def test_a_fallback_of_the_timed_steps_alone_is_caught(
    make_cell: MakeCell, plant: Plant, quick: Policy
) -> None:
    """The check passes, and then the backend changes its mind."""
    cell, sink = make_cell(S=140, route="win=sdpa"), Rows()
    calls = 0

    def other(true: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        fn = true if calls <= 1 else reference.sliding_attention
        return fn(*args, **kwargs)

    with plant("backends.sdpa:sliding_attention", other):
        measure_group([cell], replace(quick, shares=True), sink)
    (row,) = sink.rows
    assert (row["status"], row["reason"][:38]) == ("invalid", "fell back: requested sdpa for win, ran")
    assert sink.kernels == []
    assert not [name for name in PERFORMANCE_COLUMNS if without_performance(row).get(name) is not None]


def test_what_was_seen_stands_in_the_row(make_cell: MakeCell, quick: Policy) -> None:
    sink = Rows()
    measure_group([make_cell(S=140, route="cmp=sdpa,score=chunked,sel=gather:keys,win=off")], quick, sink)
    assert sink.rows[0]["route_proof"] == (
        "cmp: flash (_Pieces, _scaled_dot_product_flash_attention_for_cpu); score: math (bmm); "
        "sel: math (_ByKeys, matmul, bmm)"
    )


def test_nothing_is_claimed_where_nothing_is_seen(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(act: Callable[[], Any], hook: Any, device: Any) -> tuple[Any, Seen | None]:
        return act(), None

    monkeypatch.setattr(proof, "observe", blind)
    sink = Rows()
    measure_group([make_cell(S=140)], quick, sink)
    assert (sink.rows[0]["status"], sink.rows[0]["route_proof"]) == ("ok", "resolved")


def test_a_first_call_that_compiles_is_looked_at_again(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = proof.observe
    calls = 0

    def compiling(act: Callable[[], Any], hook: Any, device: Any) -> tuple[Any, Seen | None]:
        nonlocal calls
        calls += 1
        out, seen = true(act, hook, device)
        return out, {**(seen or {}), "win": ("aten::bmm", "dynamo")} if calls == 1 else seen

    monkeypatch.setattr(proof, "observe", compiling)
    sink = Rows()
    measure_group([make_cell(S=140)], quick, sink)
    assert (sink.rows[0]["status"], calls) == ("ok", 2)


SEEN: dict[str, dict[str, tuple[str, ...]]] = {
    "fa2": {"win": ("FlashAttnFunc", "flash_attn::_flash_attn_forward", FA2)},
    "fa2:varlen": {"win": ("torch_attn::_varlen_attn", TORCH_FA2)},
    "fa3": {"win": ("flash_attn_3::fwd", FA3)},
    "fa4": {"win": (FA4,)},
    "flex": {"win": ("Torch-Compiled Region: 0/0", "triton_tem_fused_flex_attention_0")},
    "triton": {"win": ("_attention_kernel",)},
    "sdpa": {"win": ("_Pieces", "aten::_scaled_dot_product_efficient_attention", EFFICIENT)},
}


@pytest.mark.parametrize("asked", SEEN)
@pytest.mark.parametrize("ran", SEEN)
def test_kernels_of_a_gpu(asked: str, ran: str) -> None:
    found = prove({"win": asked}, SEEN[ran], "cuda")
    if asked.partition(":")[0] == ran.partition(":")[0]:
        assert found.fell_back == ""
        assert found.text.startswith("win: ")
    else:
        assert found.fell_back.startswith(f"fell back: requested {asked} for win, ran ")
        assert found.text == ""


def test_variants_of_triton_are_told_apart() -> None:
    seen = {
        "triton:union": ("aten::zeros", "_mark_kernel", "_compact_kernel", "_union_kernel"),
        "triton:kv_outer": (
            "_mark_kernel",
            "_rank_kernel",
            "_place_kernel",
            "_block_kernel",
            "_merge_kernel",
        ),
        "triton:query_major": ("_query_kernel",),
    }
    for asked in seen:
        for ran, names in seen.items():
            found = prove({"sel": asked}, {"sel": names}, "cuda")
            assert (found.fell_back == "") == (asked == ran)
            assert prove({"sel": "triton"}, {"sel": names}, "cuda").fell_back == ""
    interpreted = prove({"sel": "triton:union"}, {"sel": ("aten::zeros",)}, "cpu")
    assert interpreted == Proof("sel: no operator of torch")


def test_the_kernels_of_the_package_are_known() -> None:
    """Every kernel under its name: none may look as though nothing had run."""
    spec = importlib.util.find_spec("nsa.kernels")
    assert spec is not None
    assert spec.origin is not None
    names = [
        name
        for file in Path(spec.origin).parent.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    ]
    assert len(names) > 5
    assert {observed([name]) for name in names} == {"triton"}


def test_the_text_is_short() -> None:
    found = prove({"win": "fa2", "cmp": "fa2"}, {"win": (FA2,), "cmp": (FA2,), "other": (GEMM,)}, "cuda")
    assert found == Proof("win, cmp: fa2 (flash::flash_fwd_splitkv_kernel)")


def test_a_branch_without_names_is_not_judged() -> None:
    assert prove(dict.fromkeys(BRANCHES, "sdpa"), {}, "cpu") == Proof()
    assert prove({"win": "off"}, {"win": ("aten::bmm",)}, "cpu") == Proof()
    assert prove({"win": "of the future"}, {"win": ("aten::bmm",)}, "cpu") == Proof("win: math (bmm)")


def test_compiled_code_shows_as_no_operator() -> None:
    seen = {"win": ("aten::split", "aten::lift_fresh")}
    assert prove({"win": "cpp"}, seen, "cpu") == Proof("win: no operator of torch")
    assert prove({"win": "sdpa"}, seen, "cpu") == Proof(
        fell_back="fell back: requested sdpa for win, ran no operator of torch"
    )
    assert prove({"win": "cpp"}, {"win": ("aten::bmm",)}, "cpu").fell_back


def test_branches_with_nothing_to_compute_may_show_nothing() -> None:
    config = NSAConfig(
        4, 2, 8, compression_block_size=8, compression_stride=4, selection_block_size=8, num_selected_blocks=4
    )
    assert idle_branches(7, config) == ("cmp", "score")
    assert idle_branches(32, config) == ("score",)
    assert idle_branches(33, config) == ()
    asked = {"cmp": "sdpa", "score": "chunked"}
    seen: Seen = {"cmp": ("aten::empty",), "score": ()}
    assert prove(asked, seen, "cpu", idle_branches(7, config)) == Proof("cmp, score: nothing to compute")
    assert prove(asked, seen, "cpu", idle_branches(32, config)).fell_back


@pytest.mark.parametrize("passes", ["fwd", "bwd", "fwd_bwd"])
@pytest.mark.parametrize("route", ["auto", "reference", "sel=gather:queries"])
def test_timed_steps_prove_their_route(make_cell: MakeCell, quick: Policy, passes: str, route: str) -> None:
    sink = Rows()
    measure_group([make_cell(S=70, passes=passes, route=route)], replace(quick, shares=True, rounds=1), sink)
    (row,) = sink.rows
    assert (row["status"], row["reason"]) == ("ok", "")
    assert {kernel["branch"] for kernel in sink.kernels} >= {"proj", "compress", "cmp", "sel", "win"}
