"""The chain from a cache through the attention to a step's output: each link breaks by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import KVCache
from nsabench.plan import Cell
from nsabench.run.gate import Refused, judge, refuse_other_output, refuse_wrong_cache
from nsabench.run.steps import DTYPES
from nsabench.run.workload import workload_for

MakeCell = Callable[..., Cell]
Plant = Callable[[str, Callable[..., Any]], AbstractContextManager[None]]

FEEDS: list[dict[str, Any]] = [
    {"phase": "decode"},
    {"mode": "batched"},
    {"mode": "stepwise"},
    {"mode": "chunked=9"},
    {"mode": "stepwise", "passes": "fwd_bwd"},
    {"mode": "chunked=9", "passes": "bwd"},
]


def judged(cell: Cell) -> Any:
    return judge(workload_for(cell), cell.route)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feed", FEEDS, ids=str)
def test_a_right_cache_is_taken(make_cell: MakeCell, feed: dict[str, Any], dtype: str) -> None:
    refuse_wrong_cache(workload_for(make_cell(S=61, B=2, dtype=dtype, **feed)))


def test_without_a_cache_there_is_nothing_to_check(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = workload_for(make_cell(passes="bwd"))
    monkeypatch.setattr(workload, "inputs_without_cache", None)
    refuse_wrong_cache(workload)


def shifted(branch: str, which: int) -> Callable[..., Any]:
    append = KVCache.append

    def broken(self: KVCache, *given: Any) -> Any:
        views = append(self, *given)
        pair = list(getattr(views, branch))
        pair[which] = pair[which].roll(1, 1)
        return views._replace(**{branch: tuple(pair)})

    return broken


def forgets_a_block(self: KVCache, raw: Any, compress: Any) -> None:
    """Leaves a compressed block as it was when a step completes exactly one."""
    blocks = self.num_blocks
    open_tokens = self.length - blocks * self.config.compression_stride
    tokens = self._open.append(self.length, open_tokens, self.config.compression_block_size, raw)
    new = compress(tokens, blocks)
    if new[0].shape[1] > 1:
        self._cmp.write(blocks, new)


@pytest.mark.parametrize("feed", FEEDS, ids=str)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("branch", ["cmp", "sel", "win"])
def test_a_wrong_cache_is_found(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, feed: dict[str, Any], branch: str, which: int
) -> None:
    monkeypatch.setattr(KVCache, "append", shifted(branch, which))
    with pytest.raises(Refused, match=rf"{'kv'[which]}_{branch} for token \d+ through the cache") as found:
        refuse_wrong_cache(workload_for(make_cell(S=61, dtype="bf16", **feed)))
    assert found.value.status == "wrong"
    assert ", allowed " in str(found.value)


def test_a_compressed_block_that_is_never_written_is_found(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "_append_compressed", forgets_a_block)
    with pytest.raises(Refused, match="k_cmp for token 59 through the cache differs by"):
        refuse_wrong_cache(workload_for(make_cell(phase="decode", S=60)))


@pytest.mark.parametrize("length", [40, 43])
def test_the_caches_of_both_decode_steps_are_checked(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """S = 43: a block is completed at 40 tokens and none at 43."""
    append = KVCache.append

    def broken(self: KVCache, *given: Any) -> Any:
        views = append(self, *given)
        return views._replace(sel=(views.sel[0] * 1.01, views.sel[1])) if self.length == length else views

    monkeypatch.setattr(KVCache, "append", broken)
    with pytest.raises(Refused, match=f"k_sel for token {length - 1} through the cache differs by"):
        refuse_wrong_cache(workload_for(make_cell(phase="decode", S=43)))


def test_a_window_that_is_too_short_is_found(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    append = KVCache.append

    def broken(self: KVCache, *given: Any) -> Any:
        views = append(self, *given)
        return views._replace(win=tuple(t[:, 1:] for t in views.win))

    monkeypatch.setattr(KVCache, "append", broken)
    with pytest.raises(Refused, match=r"k_win for token 59 through the cache has shape \(1, 11, 2, 8\), not"):
        refuse_wrong_cache(workload_for(make_cell(phase="decode", S=60)))


@pytest.mark.parametrize("feed", FEEDS, ids=str)
def test_the_output_of_the_checked_attention_is_the_steps(make_cell: MakeCell, feed: dict[str, Any]) -> None:
    cell = make_cell(S=61, **feed)
    verdict, outputs = judged(cell)
    assert verdict.reason == ""
    workload = workload_for(cell)
    if cell.passes != "fwd":
        return
    for variant in workload.variants(cell.route):
        expected = outputs[variant.name]
        assert torch.equal(variant.step()[:, -expected.shape[1] :], expected)
        refuse_other_output(variant.step(), expected, "")


def test_both_kinds_of_decode_step_are_checked(make_cell: MakeCell, plant: Plant) -> None:
    """S = 43: a block is completed at 40 tokens and none at 43."""
    for wrong_at in (39, 42):

        def bug(true: Any, *given: Any, q_start: int = 0, **more: Any) -> Any:
            out, lse = true(*given, q_start=q_start, **more)
            return (out * 1.01 if q_start == wrong_at else out), lse  # noqa: B023

        with plant("backends.sdpa:compressed_attention", bug):
            verdict, outputs = judged(make_cell(phase="decode", S=43))
        assert verdict.reason.startswith("output differs")
        assert outputs == {}


@pytest.mark.parametrize("mode", ["stepwise", "chunked=10"])
@pytest.mark.parametrize("wrong_at", [0, 20, 50])
def test_calls_of_a_fed_prompt_are_checked_from_first_to_last(
    make_cell: MakeCell, plant: Plant, mode: str, wrong_at: int
) -> None:
    def bug(true: Any, *given: Any, q_start: int = 0) -> Any:
        out, lse = true(*given, q_start=q_start)
        return (out * 1.01 if q_start <= wrong_at < q_start + out.shape[1] else out), lse

    cell = make_cell(S=51, mode=mode, route="sel=gather")
    assert judged(cell)[0].reason == ""
    with plant("backends.gather:selected_attention", bug):
        assert judged(cell)[0].reason.startswith("output differs from the specification by ")


def test_the_worst_verdict_and_the_least_overlap_are_kept(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsabench.run import gate, impl_nsa

    seen = []
    check_arm = impl_nsa.check_arm

    def watched(*given: Any, **more: Any) -> Any:
        found = replace(check_arm(*given, **more), overlap=1 - abs(len(seen) - 3) / 10)
        seen.append((found, more["elements"]))
        return found

    monkeypatch.setattr(impl_nsa, "check_arm", watched)
    verdict, _ = judged(make_cell(S=60, mode="chunked=10"))
    assert len(seen) == gate.CHECKED_SPANS
    assert {elements for _, elements in seen} == {gate.SPEC_ELEMENTS // gate.CHECKED_SPANS}
    assert gate.part_of_budget(verdict.error) == max(gate.part_of_budget(v.error) for v, _ in seen)
    assert verdict.overlap == 0.7


def test_another_output_is_refused() -> None:
    expected = torch.randn(1, 2, 16)
    before = torch.randn(1, 3, 16)
    refuse_other_output(torch.cat([before, expected], 1), expected, "")
    with pytest.raises(Refused, match=r"^the output of the emit step differs by \d\.\d+, allowed ") as found:
        refuse_other_output(torch.cat([expected, before], 1) + 0.001, expected, " of the emit step")
    assert found.value.status == "wrong"
    spoilt = expected.clone()
    spoilt[0, 1, 3] = float("nan")
    with pytest.raises(Refused, match=r"^the output is not finite$") as found:
        refuse_other_output(spoilt, expected, "")
    assert found.value.status == "nan"
