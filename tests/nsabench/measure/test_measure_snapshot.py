"""Files about a step: a trace with its stages, and its memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsabench.measure.snapshot import TRACED_STEPS, allocations, write_memory, write_trace

Factory = Callable[[str], AbstractContextManager[object]]


class Staged:
    """A step with two stages, and the hook that shows them."""

    def __init__(self) -> None:
        self.factory: Factory | None = None
        self.held: list[torch.Tensor] = []

    @contextmanager
    def hook(self, factory: Factory) -> Iterator[None]:
        self.factory = factory
        yield
        self.factory = None

    def step(self) -> None:
        assert self.factory is not None
        with self.factory("proj"):
            kept = torch.zeros(1000)  # 4000 bytes
            torch.zeros(2000)  # gone at once
        with self.factory("sel"):
            self.held = [kept, torch.ones(250)]


def test_allocations_belong_to_the_stage_that_makes_them() -> None:
    staged = Staged()
    found = allocations(staged.step, staged.hook)
    assert found["stages"]["proj"] == {"allocations": 2, "bytes": 12000, "most_live_bytes": 12000}
    assert found["stages"]["sel"] == {"allocations": 1, "bytes": 1000, "most_live_bytes": 5000}
    assert [event[1:] for event in found["events"]] == [
        (4000, 4000, "proj"),
        (8000, 12000, "proj"),
        (-8000, 4000, "proj"),
        (1000, 5000, "sel"),
    ]
    assert "CPU" in found["what"]


def test_what_was_there_before_the_step_is_not_freed_by_it() -> None:
    staged = Staged()
    staged.held = [torch.zeros(5000)]
    events = allocations(staged.step, staged.hook)["events"]
    assert min(event[2] for event in events) == 4000


def test_a_trace_shows_steps_and_stages(tmp_path: Path) -> None:
    staged = Staged()
    path = write_trace({"emit": staged.step, "plain": staged.step}, staged.hook, "cpu", tmp_path)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert path.name == "trace.json.gz"
    assert {name: names.count(name) for name in ("step emit", "step plain", "nsa::proj", "nsa::sel")} == {
        "step emit": TRACED_STEPS,
        "step plain": TRACED_STEPS,
        "nsa::proj": 2 * TRACED_STEPS,
        "nsa::sel": 2 * TRACED_STEPS,
    }


def test_memory_on_a_cpu_is_json(tmp_path: Path) -> None:
    staged = Staged()
    path = write_memory(staged.step, staged.hook, "cpu", tmp_path)
    assert path.name == "memory.json"
    assert json.loads(path.read_text())["stages"]["sel"]["bytes"] == 1000


def test_memory_on_a_gpu_is_the_allocators_snapshot(tmp_path: Path, fake_cuda) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    fake_cuda.memory = SimpleNamespace(
        _record_memory_history=lambda enabled="all", **more: said.append(f"record {enabled}"),
        _dump_snapshot=lambda path: said.append(f"dump {Path(path).name}"),
    )
    staged = Staged()

    def step() -> None:
        said.append("step")
        staged.step()

    path = write_memory(step, staged.hook, "cuda", tmp_path, api=fake_cuda)
    assert path == tmp_path / "memory.pickle"
    assert said == ["record all", "step", "dump memory.pickle", "record None"]

    def broken() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        write_memory(broken, staged.hook, "cuda", tmp_path, api=fake_cuda)
    assert said[-1] == "record None"
