"""Kernels of an arm's steps: their rows, the shares they give in a CUDA graph, and what is not profiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from nsabench.measure import MeasureError
from nsabench.measure.attribution import Attribution, KernelTime
from nsabench.plan import Cell
from nsabench.run import Policy, arm, kernels
from nsabench.run.arm import Arm
from nsabench.run.kernels import attributed, graph_shares, kernel_rows
from nsabench.run.workload import Workload, workload_for

MakeCell = Callable[..., Cell]


def seen(*times: KernelTime, idle: float = 0.0, note: str = "") -> Attribution:
    return Attribution(times, sum(k.ms for k in times) + idle, idle, note)


EMIT = seen(KernelTime("gemm", "sel", 2.0, 3.0), KernelTime("copy", "compress", 1.0, 1.0), idle=1.0)
PLAIN = seen(KernelTime("gemm", "sel", 2.0, 2.0), KernelTime("gemm", "win", 1.0, 4.0))


def test_rows_are_means_over_the_steps_by_weight() -> None:
    assert kernel_rows([(0.25, EMIT), (0.75, PLAIN)]) == [
        {"kernel": "gemm", "branch": "win", "calls": 0.75, "ms": 3.0},
        {"kernel": "gemm", "branch": "sel", "calls": 2.0, "ms": 2.25},
        {"kernel": "copy", "branch": "compress", "calls": 0.25, "ms": 0.25},
    ]
    assert kernel_rows([]) == []


def test_shares_of_a_graph() -> None:
    assert graph_shares(EMIT).ms == pytest.approx({"compress": 1.0, "sel": 3.0, "other": 1.0})
    refused = graph_shares(seen(KernelTime("gemm", "", 2.0, 3.0), note="the graph runs 2 kernels"))
    assert (refused.ms, refused.note) == (None, "the graph runs 2 kernels")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `attribute` was asked for, in order; it answers EMIT, then PLAIN."""
    calls: list[dict[str, Any]] = []

    def attribute(step: Callable[[], object], hook: object, device: object, **how: Any) -> Attribution:
        calls.append({"step": step, **how})
        return (EMIT, PLAIN)[(len(calls) - 1) % 2]

    monkeypatch.setattr(kernels, "attribute", attribute)
    return calls


def of(workload: Workload, step_ms: float = 1.0, **fields: Any) -> list[tuple[float, Attribution]]:
    known = {"cache": "warm", "timer": "cpu", **fields}
    return attributed(workload, workload.variants("auto"), "auto", known, step_ms)


def test_every_step_is_profiled_with_its_weight(make_cell: MakeCell, asked: list[dict[str, Any]]) -> None:
    found = of(workload_for(make_cell(phase="decode", S=44)))
    assert found == [(0.25, EMIT), (0.75, PLAIN)]
    assert [(how["runs"], how["graph"]) for how in asked] == [(3, None)] * 2


@pytest.mark.parametrize(("step_ms", "runs"), [(0.01, 3), (100.0, 3), (150.0, 2), (301.0, 1), (9e9, 1)])
def test_a_long_step_is_profiled_fewer_times(
    make_cell: MakeCell, asked: list[dict[str, Any]], step_ms: float, runs: int
) -> None:
    of(workload_for(make_cell()), step_ms)
    assert asked[0]["runs"] == runs


def test_a_cold_step_is_profiled_cold(
    make_cell: MakeCell, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes: list[str] = []
    monkeypatch.setattr(kernels, "cache_flush", lambda device: lambda: flushes.append(str(device)))
    of(workload_for(make_cell()), cache="cold")
    asked[0]["before"]()
    assert flushes == ["cpu"]


def test_a_backward_is_profiled_behind_its_forward(
    make_cell: MakeCell, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    workload = workload_for(make_cell(passes="bwd"))
    steps = (lambda: done.append("forward"), lambda: done.append("backward"))
    monkeypatch.setattr(workload, "backward_step", lambda route: steps)
    of(workload)
    asked[0]["before"]()
    asked[0]["step"]()
    assert done == ["forward", "backward"]


@pytest.mark.parametrize("passes", ["fwd", "bwd"])
def test_a_graph_is_profiled_as_a_graph(
    make_cell: MakeCell, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    class Graph:
        def __init__(self, device: object) -> None: ...

        def captured(self, step: object) -> tuple[str, object]:
            return "replay of", step

    monkeypatch.setattr(kernels, "GraphTimer", Graph)
    workload = workload_for(make_cell(passes=passes))
    (variant,) = workload.variants("auto")
    attributed(workload, [variant], "auto", {"cache": "warm", "timer": "graph"}, 1.0)
    assert asked[0]["graph"] == ("replay of", variant.step)


def test_a_profiler_that_cannot_run_costs_no_row(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attribute(*args: object, **how: object) -> Attribution:
        raise MeasureError("torch.profiler cannot start")

    monkeypatch.setattr(kernels, "attribute", attribute)
    assert of(workload_for(make_cell())) == []


def test_steps_of_many_calls_are_not_profiled(make_cell: MakeCell, asked: list[dict[str, Any]]) -> None:
    assert of(workload_for(make_cell(S=65, mode="stepwise"))) == []
    assert asked == []


def measured(cell: Cell, policy: Policy) -> Arm:
    made = Arm(cell, workload_for(cell), policy)
    made.prepare()
    made.sample(0, 0)
    made.finish()
    return made


@pytest.mark.parametrize(("shares", "listed", "rows"), [(True, True, 3), (True, False, 0), (False, True, 0)])
def test_kernels_are_listed_where_stages_are_measured(
    make_cell: MakeCell,
    quick: Policy,
    asked: list[dict[str, Any]],
    shares: bool,
    listed: bool,
    rows: int,
) -> None:
    policy = replace(quick, rounds=1, shares=shares, kernels=listed)
    made = measured(make_cell(phase="decode", S=44), policy)
    assert len(made.kernels) == rows


def test_dense_attention_has_kernels_too(make_cell: MakeCell, quick: Policy) -> None:
    policy = replace(quick, rounds=1, shares=True)
    made = measured(make_cell(impl="dense", scope="core"), policy)
    names = {row["kernel"] for row in made.kernels if row["branch"] == "other"}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


def test_shares_of_a_graph_come_from_its_kernels(
    make_cell: MakeCell, quick: Policy, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The borders of stages are the host's, and a graph has none."""

    @contextmanager
    def no_recorder(*args: object, **how: object) -> Iterator[None]:
        raise AssertionError("the step was instrumented")
        yield

    monkeypatch.setattr(arm, "StageRecorder", no_recorder)
    made = Arm(make_cell(phase="decode", S=44), workload_for(make_cell(phase="decode", S=44)), replace(quick))
    made.prepare()
    made.sample(0, 0)
    made._profiled = [(0.25, EMIT), (0.75, PLAIN)]
    made.fields |= {"timer": "graph", "ms_total": 5.0}
    made._shares()
    shares = {stage: made.fields[f"share_{stage}_pct"] for stage in ("compress", "sel", "win", "other")}
    # 0.25 of 5 ms and 0.75 of 6 ms.
    expected = {"compress": 0.25, "sel": 2.25, "win": 3.0, "other": 0.25}
    assert shares == pytest.approx({stage: 100 * ms / 5.75 for stage, ms in expected.items()})
