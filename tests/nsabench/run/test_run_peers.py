"""Other implementations as cells: inputs, check and rounds are ours, refusals come before a timer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsabench.peers import fla, sfnsa, xunhaolai
from nsabench.plan import Cell
from nsabench.run import Policy, arm
from nsabench.run.gate import Refused, judge
from nsabench.run.impl import impl_for
from nsabench.run.session import measure_group
from nsabench.run.work import config_of
from nsabench.run.workload import workload_for
from nsabench.store.schema import check_row, without_performance
from tests.nsabench.peers import clones_emulator

MakeCell = Callable[..., Cell]
CLONES = ("peer:xunhaolai", "peer:sfnsa")
SHAPE = {"scope": "core", "S": 40, "B": 2, "dk": 16, "dv": 16, "l": 16, "d": 8, "l_sel": 32, "n_sel": 4}
LONG = SHAPE | {"S": 170, "B": 1}


class Sink:
    """Keeps the rows."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: dict[str, Any], samples: Sequence[Any] = (), *more: Sequence[Any]) -> None:
        row = row if row["status"] == "ok" else without_performance(row)
        check_row({"run_id": "r", **row})
        self.rows[f"{row['impl']} {row['route']}"] = {**row, "samples": len(samples)}


@pytest.fixture
def on_cpu(clone_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins of the clones and of flash-attn, which run on a CPU and in fp32."""
    for module in (xunhaolai, sfnsa):
        monkeypatch.setattr(module, "needs_gpu", lambda request: "")
    monkeypatch.setattr(arm, "SHARES_WITHIN", 1000.0)  # a busy machine may take its time
    return clone_folder(flash=True)


def measured(*cells: Cell, **policy: Any) -> dict[str, dict[str, Any]]:
    sink = Sink()
    measure_group(
        cells, Policy(**{"rounds": 2, "sample_ms": 0.1, "share_runs": 5, "alone": False} | policy), sink
    )
    return sink.rows


@pytest.mark.parametrize("selection", ["natural", "random", "overlap=0.5"])
@pytest.mark.parametrize("route", ["auto", "win=off", "sel=off,win=off", "cmp=off,sel=off"])
def test_each_is_right_on_the_inputs_of_nsa(
    make_cell: MakeCell, on_cpu: Path, route: str, selection: str
) -> None:
    ours = make_cell(**LONG, selection=selection, route=route)
    inputs = {name: t for name, t in workload_for(ours).given.items() if isinstance(t, torch.Tensor)}
    for impl in CLONES:
        workload = workload_for(replace(ours, impl=impl))
        fields = workload.settle(route)
        assert fields["provider"].startswith(f"{impl.partition(':')[2]} sources ")
        assert all(torch.equal(workload.given[name], t) for name, t in inputs.items())
        verdict, _ = judge(workload, route)
        assert verdict.reason == ""
        assert verdict.overlap == (None if "sel=off" in route else 1.0)
        assert workload.work(route) == workload_for(ours).work(route)
        off = {part.partition("=")[0] for part in route.split(",") if part != "auto"}
        assert {b for b in ("cmp", "sel", "win") if fields[f"{b}_backend"] == "off"} == off


def test_they_are_timed_in_the_same_rounds(make_cell: MakeCell, on_cpu: Path) -> None:
    ours = make_cell(**SHAPE, selection="random", route="win=off")
    dense = replace(ours, impl="dense", route="auto")
    rows = measured(ours, *(replace(ours, impl=impl) for impl in CLONES), dense, alone=True)
    assert [row["status"] for row in rows.values()] == ["ok"] * 4
    assert len({row["samples"] for row in rows.values()}) == 1
    for impl in CLONES:
        row = rows[f"{impl} win=off"]
        assert row["ms_total"] > 0
        assert (row["sel_backend"], row["win_backend"]) == (impl.partition(":")[2], "off")
        assert row["flops"] == rows["nsa win=off"]["flops"]
        assert row["ms_alone_cmp"] > 0
        assert row.get("ms_alone_win") is None
        assert row.get("ms_alone_sel") is None  # its choice computes the compressed branch, too
        shares = {stage: row[f"share_{stage}_pct"] for stage in ("cmp", "score", "sel", "win", "gate")}
        assert shares["sel"] > 0
        assert shares["win"] == 0


@pytest.mark.parametrize("selection", ["natural", "random"])
@pytest.mark.parametrize("impl", CLONES)
def test_a_wrong_result_has_no_time(
    make_cell: MakeCell, on_cpu: Path, impl: str, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = type(impl_for(make_cell(**SHAPE, impl=impl)).core)  # type: ignore[attr-defined]
    right = core.selected
    monkeypatch.setattr(core, "selected", lambda *given: right(*given) * 1.01)
    (row,) = measured(make_cell(**SHAPE, impl=impl, selection=selection)).values()
    assert row["status"] == "wrong"
    assert row["reason"].startswith("output differs from the specification")
    assert not row.get("ms_total")


@pytest.mark.parametrize("selection", ["natural", "random"])
def test_blocks_that_it_would_not_choose_are_wrong(
    make_cell: MakeCell, on_cpu: Path, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = clones_emulator._by_block
    monkeypatch.setattr(clones_emulator, "_by_block", lambda *given: -right(*given))
    cell = make_cell(**LONG, impl="peer:xunhaolai", selection=selection)
    (row,) = measured(cell).values()
    assert row["status"] == "wrong"
    assert row["reason"].startswith("a query selects a")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phase": "decode"}, "a peer is timed in batched prefill fwd core only: phase is decode"),
        ({"passes": "bwd"}, "a peer is timed in batched prefill fwd core only: passes is bwd"),
        ({"scope": "module"}, "a peer is timed in batched prefill fwd core only: scope is module"),
        ({"mode": "chunked=9"}, "a peer is timed in batched prefill fwd core only: mode is chunked=9"),
        ({"dk": 8}, "xunhaolai: takes one head dim up to 128"),
        (
            {"route": "cmp=off,win=off"},
            "xunhaolai: chooses blocks only with its compressed branch, "
            "which would be timed too; leave cmp on",
        ),
    ],
)
def test_what_a_peer_is_not_timed_in_is_a_row(
    make_cell: MakeCell, on_cpu: Path, changes: dict[str, Any], said: str
) -> None:
    (row,) = measured(make_cell(**SHAPE | changes, impl="peer:xunhaolai")).values()
    assert (row["status"], row["reason"]) == ("unsupported", said)


def test_without_a_gpu_it_says_so(make_cell: MakeCell, clone_folder: Callable[..., Path]) -> None:
    clone_folder(flash=False)
    for impl in CLONES:
        cell = make_cell(**SHAPE, impl=impl)
        with pytest.raises(Refused, match="need a CUDA GPU, got cpu") as found:
            impl_for(cell).settle("auto", [(0, cell.S)])
        assert found.value.status == "unsupported"


def test_a_branch_that_it_lacks_is_asked_to_be_off(
    make_cell: MakeCell, clone_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clone_folder(flash=False)
    monkeypatch.setattr(xunhaolai, "needs_gpu", lambda request: "")
    cell = make_cell(**SHAPE, impl="peer:xunhaolai")
    whole, less = measured(cell, replace(cell, route="win=off")).values()
    assert whole["status"] == "unsupported"
    assert whole["reason"].endswith("which is not installed; ask with win=off")
    assert less["status"] == "ok"


def test_what_is_not_installed_says_how_to_get_it(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    impl = impl_for(make_cell(**SHAPE, impl="peer:sfnsa"))
    monkeypatch.setattr(type(impl.peer), "version", lambda self: None)  # type: ignore[attr-defined]
    with pytest.raises(Refused, match="sfnsa is not installed: git clone https"):
        impl.settle("win=off", [(0, 40)])


def test_plain_functions_and_kernels_of_one_peer_have_their_own_names(make_cell: MakeCell) -> None:
    naive = impl_for(make_cell(**SHAPE, impl="peer:fla-core:naive"))
    kernels = impl_for(make_cell(**SHAPE, impl="peer:fla-core"))
    assert isinstance(naive.core, fla.Naive)  # type: ignore[attr-defined]
    assert isinstance(kernels.core, fla.Fused)  # type: ignore[attr-defined]
    assert config_of(naive.cell) == naive.config
