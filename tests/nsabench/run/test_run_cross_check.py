"""What is decided about timers: when they disagree, how many steps a graph holds, what cold must prove."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsabench.measure.probe import ColdProbe
from nsabench.plan import Cell
from nsabench.run import Policy, cold
from nsabench.run.cold import prove_cold
from nsabench.run.comparison import _across
from nsabench.run.cross_check import disagreement
from nsabench.run.impl import Refused
from nsabench.run.rotation import copy_bytes, steps_in_graph
from nsabench.run.workload import workload_for

MakeCell = Callable[..., Cell]


@pytest.mark.parametrize(
    ("first_ms", "second_ms", "said"),
    [
        (1.0, 1.049, ""),
        (1.0, 1.06, "graph 1 ms, event 1.06 ms a step, 6 % apart"),
        (1.06, 1.0, "graph 1.06 ms, event 1 ms a step, 6 % apart"),
        (0.010, 0.0129, ""),  # 29 %, but not 3 us
        (0.010, 0.0131, "graph 0.01 ms, event 0.0131 ms a step, 31 % apart"),
    ],
)
def test_timers_disagree_by_more_than_five_percent_and_three_microseconds(
    first_ms: float, second_ms: float, said: str
) -> None:
    assert disagreement("graph", first_ms, "event", second_ms) == said


@pytest.mark.parametrize(
    ("step_ms", "moved", "is_cold", "steps"),
    [
        (0.011, 1e6, False, 46),  # 5 us of a graph's start in a hundredth of all its steps
        (0.011, 1e6, True, 250),  # five times 50 MB, a MB each
        (0.011, 1e8, True, 46),
        (0.11, 1e6, True, 5),  # long enough: the flush before each graph makes all of it cold
        (3.0, 1e6, True, 1),
        (0.0001, 1e3, True, 1000),
    ],
)
def test_steps_in_a_graph(step_ms: float, moved: float, is_cold: bool, steps: int) -> None:
    assert steps_in_graph(step_ms, moved, 50_000_000, cold=is_cold) == steps


@pytest.mark.parametrize(
    "what",
    [
        {"phase": "decode", "S": 43},
        {"phase": "decode", "S": 43, "impl": "dense"},
        {"phase": "decode", "S": 43, "scope": "core"},
        {"S": 40},
        {"S": 20, "passes": "bwd"},
    ],
    ids=str,
)
def test_copies_do_the_same_on_tensors_of_their_own(make_cell: MakeCell, what: dict[str, Any]) -> None:
    workload = workload_for(make_cell(**what))
    first, second, third = workload.copies(3)
    assert first is workload
    assert workload.copies(3)[1:] == [second, third], "made once, for all arms"
    assert workload.copies(2) == [first, second]
    for variants in zip(*(one.variants("auto") for one in (first, second, third)), strict=True):
        outputs = [variant.step() for variant in variants]
        assert len({variant.name for variant in variants}) == 1
        assert all(torch.equal(output, outputs[0]) for output in outputs)
    before = third.variants("auto")[0].step().clone()
    for tensor in tensors_of(second):
        tensor.data.zero_()
    assert torch.equal(third.variants("auto")[0].step(), before), "what a copy reads is its own"
    assert all(float(t.detach().double().abs().sum()) > 0 for t in tensors_of(first))
    assert copy_bytes(workload) >= sum(workload.held_bytes().values()) > 0
    workload.forget_copies()
    assert workload.copies(1) == [workload]


def tensors_of(workload: Any) -> list[torch.Tensor]:
    return [t for tensors in workload._held().values() for t in tensors if t.is_floating_point()]


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Callable[[ColdProbe], None]:
    def known(probe: ColdProbe) -> None:
        monkeypatch.setattr(cold, "known_probe", lambda device: probe)

    return known


WARM = "after a flush a marker is read at 2.00 times memory's rate; allowed 1.15"


def test_a_cpu_that_was_asked_to_be_cold_must_be(make_cell: MakeCell, probed: Any) -> None:
    probed(ColdProbe(2.0))
    fields: dict[str, Any] = {}
    with pytest.raises(Refused, match=f"^the cache is not cold: {WARM}$") as found:
        prove_cold(make_cell(phase="decode"), Policy(cache="cold"), fields)
    assert found.value.status == "invalid"
    assert fields == {"cold_probe": 2.0}


def test_a_cpu_that_nobody_asked_is_noted(make_cell: MakeCell, probed: Any) -> None:
    probed(ColdProbe(2.0))
    fields: dict[str, Any] = {}
    said = prove_cold(make_cell(phase="decode"), Policy(cache="auto"), fields)
    assert said == f"the cache may not be cold: {WARM}"
    assert fields == {"cold_probe": 2.0}


def test_a_gpu_must_be_cold_whoever_asked(make_cell: MakeCell, probed: Any) -> None:
    probed(ColdProbe(2.0))
    with pytest.raises(Refused, match="the cache is not cold"):
        prove_cold(make_cell(phase="decode", device="cuda"), Policy(cache="auto"), {})


@pytest.mark.parametrize(("probe", "note"), [(ColdProbe(1.1), ""), (ColdProbe(None, "blind"), "blind")])
def test_what_is_cold_or_not_to_be_told_is_measured(
    make_cell: MakeCell, probed: Any, probe: ColdProbe, note: str
) -> None:
    probed(probe)
    fields: dict[str, Any] = {}
    assert prove_cold(make_cell(), Policy(cache="cold"), fields) == note
    assert fields == {"cold_probe": probe.rate}


def test_a_warm_cache_needs_no_proof(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "probe_cold", None)
    fields: dict[str, Any] = {}
    assert prove_cold(make_cell(), Policy(cache="warm"), fields) == ""
    assert fields == {}


def test_a_device_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cold, "probe_cold", lambda device: asked.append(device) or ColdProbe(1.0))
    cold.known_probe.cache_clear()
    try:
        assert cold.known_probe("cpu") is cold.known_probe("cpu")
        assert asked == ["cpu"]
    finally:
        cold.known_probe.cache_clear()


def test_processes_of_a_cell_are_joined(make_cell: MakeCell) -> None:
    rows = [
        {"ms_cross": ms, "host_bound": ms, "queue_gated_pct": ms, "cold_probe": 1.0, "timers_note": note}
        for ms, note in ((1.0, ""), (3.0, "late"), (2.0, "late"))
    ]
    found = _across(rows)
    assert (found["ms_cross"], found["host_bound"], found["queue_gated_pct"]) == (2.0, 2.0, 3.0)
    assert found["timers_note"] == "late"
