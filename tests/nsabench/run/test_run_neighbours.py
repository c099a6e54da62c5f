"""Other processes on the device of a group: waited for, told of, and in the row."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nsabench.measure import MeasureError, PeakMemory
from nsabench.measure.preflight import Look
from nsabench.plan import Cell
from nsabench.run import Policy, arm, neighbours, worker
from nsabench.run.executor import Doing, Done, Job, LocalExecutor, Slot
from nsabench.run.neighbours import Neighbours
from nsabench.run.session import measure_group

MakeCell = Callable[..., Cell]

POLICY = Policy(quiet_s=60.0)
LOOKS = "looking for other processes on the device"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has looked at nothing, on a machine that tells nothing."""
    monkeypatch.setattr(neighbours, "_looked_at", set())
    monkeypatch.setattr(arm, "peak_memory", lambda step, device: PeakMemory(1000, None))


class Sink:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def mark(self, cell: Cell | None) -> None:
        self.said.append("mark" if cell is None else cell.route)

    def doing(self, text: str) -> None:
        self.said.append(text)

    def done(self, row: Any, samples: Any = (), telemetry: Any = (), kernels: Any = ()) -> None:
        self.rows.append(dict(row))


def looks(patch: pytest.MonkeyPatch, name: str, *loads: float | None, notes: tuple[str, ...] = ()) -> None:
    given = iter(loads)
    patch.setattr(neighbours, name, lambda *args, **more: Look(next(given), notes))


class Watch:
    """What others used from the first round to the last."""

    loads: tuple[float | None, ...] = (None,)

    def __init__(self, root: int) -> None:
        self.root = root

    def load_pct(self) -> float | None:
        return self.loads[0]


def over_rounds(patch: pytest.MonkeyPatch, load: float | None) -> None:
    patch.setattr(neighbours, "CpuWatch", type("_Watch", (Watch,), {"loads": (load,)}))


def test_a_loud_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks(monkeypatch, "look_at_cpu", 52.0, 31.0, 4.0)
    sink = Sink()
    found = Neighbours("cpu", POLICY, sink)
    assert found.load_pct == 4.0
    assert sink.said == [
        *("mark", LOOKS),
        *("mark", "waiting: other processes use 52 % of the cores"),
        *("mark", "waiting: other processes use 31 % of the cores"),
    ], "each wait is a sign of progress"


def test_what_does_not_end_is_measured_beside_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    looks(monkeypatch, "look_at_cpu", 52.0)
    sink = Sink()
    found = Neighbours("cpu", replace(POLICY, quiet_s=1e-9), sink)
    assert found.load_pct == 52.0
    assert sink.said[-1] == "other processes use 52 % of the cores before the rounds"


@pytest.mark.parametrize(
    ("before", "during", "load"),
    [(4.0, 33.0, 33.0), (9.0, 2.0, 9.0), (9.0, None, 9.0), (None, 7.0, 7.0), (None, None, None)],
)
def test_the_larger_of_before_and_during_counts(
    monkeypatch: pytest.MonkeyPatch, before: float | None, during: float | None, load: float | None
) -> None:
    looks(monkeypatch, "look_at_cpu", before)
    over_rounds(monkeypatch, during)
    sink = Sink()
    found = Neighbours("cpu", POLICY, sink)
    with found.over_rounds():
        sink.said.clear()
    assert found.load_pct == load
    loud = ["other processes use 33 % of the cores during the rounds"] if during == 33.0 else []
    assert sink.said == loud


def test_a_sweep_on_a_cpu_does_not_look_but_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    looks(monkeypatch, "look_at_cpu")
    over_rounds(monkeypatch, 3.0)
    sink = Sink()
    for _ in range(2):
        found = Neighbours("cpu", Policy(), sink)
        with found.over_rounds():
            pass
        assert found.load_pct == 3.0
    assert sink.said == []


class Sampler:
    def __init__(self, reason: str = "") -> None:
        self.reason, self.closed = reason, False

    def close(self) -> None:
        self.closed = True


def test_a_sweep_looks_at_a_gpu_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler()
    monkeypatch.setattr(neighbours, "open_sampler", lambda device: sampler)
    looks(monkeypatch, "look_at_gpu", 40.0, notes=("2 other processes are on the GPU with 3.0 GiB",))
    sink = Sink()
    found = Neighbours("cuda", Policy(), sink)
    assert (found.load_pct, sampler.closed) == (40.0, True)
    assert sink.said[2:] == [
        "2 other processes are on the GPU with 3.0 GiB",
        "other processes use 40 % of the GPU before the rounds",
    ]
    again = Neighbours("cuda", Policy(), sink)
    with again.over_rounds():
        pass
    assert again.load_pct is None, "our own work would be taken for theirs"


def test_a_gpu_without_readings_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "open_sampler", lambda device: Sampler("NVML: no driver"))
    looks(monkeypatch, "look_at_gpu")
    assert Neighbours("cuda", POLICY, Sink()).load_pct is None


@pytest.mark.parametrize("error", [MeasureError("no CUDA device"), RuntimeError("device lost")])
def test_a_gpu_that_is_not_there_is_for_others_to_tell(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def missing(device: str) -> Sampler:
        raise error

    monkeypatch.setattr(neighbours, "open_sampler", missing)
    assert Neighbours("cuda:3", Policy(), Sink()).load_pct is None


def test_the_row_of_every_arm_has_the_load(
    make_cell: MakeCell, quick: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(monkeypatch, "look_at_cpu", 1.0)
    over_rounds(monkeypatch, 44.0)
    sink = Sink()
    cells = [make_cell(), make_cell(route="win=reference")]
    measure_group(cells, replace(quick, quiet_s=1.0), sink)
    assert [row["neighbour_load_pct"] for row in sink.rows] == [44.0, 44.0]
    assert [row["status"] for row in sink.rows] == ["ok", "ok"]
    assert sink.said.index(LOOKS) < sink.said.index("auto"), "before anything of ours runs"


def test_ours_are_the_driver_and_all_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    roots: list[int | None] = []
    monkeypatch.setattr(neighbours, "look_at_cpu", lambda root: (roots.append(root), Look(None))[1])
    Neighbours("cpu", POLICY, Sink())
    monkeypatch.setattr(worker, "_driver", 4242)
    Neighbours("cpu", POLICY, Sink())
    assert roots == [os.getpid(), 4242]


def test_a_worker_knows_its_driver(make_cell: MakeCell) -> None:
    assert worker.driver() is None
    executor = LocalExecutor((Slot(0, frozenset(["cpu"])),), measure="tests.nsabench.run.planted:tell_driver")
    events = list(executor.run(iter([Job((make_cell(),), Policy(), 0)])))
    assert f"driver {os.getpid()}" in [event.text for event in events if isinstance(event, Doing)]
    assert any(isinstance(event, Done) for event in events)


@pytest.mark.parametrize("quiet_s", [-1.0, float("nan"), 601, "5", True])
def test_a_wait_that_is_none(quiet_s: Any) -> None:
    with pytest.raises(ValueError, match=r"quiet_s is .*; allowed: 0 to 600 seconds"):
        Policy(quiet_s=quiet_s)


def test_policies_of_older_runs_do_not_look() -> None:
    stored = Policy().to_dict()
    del stored["quiet_s"]
    assert Policy.from_dict(stored).quiet_s == 0.0
