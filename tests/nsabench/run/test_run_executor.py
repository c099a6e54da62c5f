"""Workers that crash, hang, flood and fork: each costs its own row, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import psutil
import pytest

from nsabench.plan import Cell
from nsabench.run import Policy, desk, executor
from nsabench.run.executor import Began, Doing, Done, Event, Job, LocalExecutor, Over, Slot, WorkerError
from nsabench.run.process import TAIL_BYTES, WorkerProcess

MakeCell = Callable[..., Cell]

ROOT = Path(__file__).resolve().parents[3]
PLANTED = "tests.nsabench.run.planted"
ON_CPU = Slot(0, frozenset({"cpu"}))


@pytest.fixture(autouse=True)
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where planted cells leave what a test looks at. No test may leave a process behind."""
    monkeypatch.setenv("PLANTED", str(tmp_path))
    yield tmp_path
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture
def job(make_cell: MakeCell) -> Callable[..., Job]:
    def make(*routes: str, timeout_s: float = 60.0, number: int = 0, **more: Any) -> Job:
        seconds = more.pop("seconds", None)
        cells = tuple(make_cell(route=route, **more) for route in routes)
        return Job(cells, Policy(timeout_s=timeout_s), number, seconds)

    return make


def local(
    name: str = "measure", slots: Sequence[Slot] = (ON_CPU,), module: str = PLANTED, **more: Any
) -> LocalExecutor:
    return LocalExecutor(slots, measure=f"{module}:{name}", **more)


def events(jobs: Sequence[Job], name: str = "measure", **more: Any) -> list[Event]:
    return list(local(name, **more).run(iter(jobs)))


def rows(found: Sequence[Event]) -> dict[str, tuple[str, str]]:
    done = [event.row for event in found if isinstance(event, Done)]
    assert len({row["cell_id"] for row in done}) == len(done)
    return {row["route"]: (row["status"], row["reason"]) for row in done}


def gone(pid: int) -> bool:
    """Whether the process ends within a few seconds; what nobody waits for counts as ended."""
    for _ in range(300):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def appears(path: Path) -> bool:
    for _ in range(1000):
        if path.exists():
            return True
        time.sleep(0.02)
    return False


Makes = Callable[..., Job]


def test_jobs_go_through_one_worker_in_order(job: Makes) -> None:
    found = events([job("a", "b", number=0), job("c", number=1)], process=4)
    assert [type(event).__name__ for event in found] == [
        *("Doing", "Began", "Doing", "Done", "Doing", "Done", "Over"),
        *("Began", "Doing", "Done", "Over"),
    ]
    assert [event.text for event in found if isinstance(event, Doing)] == [
        "starting a worker",
        *(f"measuring {route}" for route in "abc"),
    ]
    assert [(e.job.number, e.left) for e in found if isinstance(e, Over)] == [(0, ()), (1, ())]
    samples = [sample for event in found if isinstance(event, Done) for sample in event.samples]
    assert [sample["process"] for sample in samples] == [4, 4, 4]
    times = [sample["t_s"] for sample in samples]
    assert 0 < times[0] < times[1] < times[2] < 60


@pytest.mark.parametrize(
    ("route", "status", "reason"),
    [
        (
            "segfault",
            "error",
            "the worker was killed by SIGSEGV at ctypes/__init__.py:* in string_at; "
            "it last printed: about to read address 0",
        ),
        ("killed", "error", "the worker was killed by SIGKILL"),
        ("leave", "error", "the worker ended with exit code 3"),
        ("raise", "error", "the worker ended with exit code 1; it last printed: ValueError: planted"),
        ("flood-and-leave", "error", "the worker ended with exit code 1; it last printed: the last line"),
        ("fork-and-leave", "error", "the worker ended with exit code 4"),
    ],
)
def test_a_cell_that_ends_its_worker_costs_one_row(job: Makes, route: str, status: str, reason: str) -> None:
    found = events([job("a", route, "b"), job("c", number=1)])
    assert list(rows(found)) == ["a", route, "b", "c"]
    assert [rows(found)[name] for name in "abc"] == [("ok", "")] * 3
    got_status, got = rows(found)[route]
    start, star, end = reason.partition("*")
    assert (got_status, got[: len(start)], got[len(got) - len(end) :]) == (status, start, end), got
    assert star or got == reason
    processes = [sample["process"] for event in found if isinstance(event, Done) for sample in event.samples]
    assert processes == [0, 1, 1]  # b was measured again, by another worker
    assert sum(isinstance(event, Began) for event in found) == 2


def test_no_progress_for_half_the_limit_is_a_hang(job: Makes) -> None:
    found = events([job("a", "hang", "b", timeout_s=1.0)])
    assert list(rows(found)) == ["a", "hang", "b"]
    status, reason = rows(found)["hang"]
    assert status == "hang"
    assert reason.startswith("no progress for 0.5 s, half of its limit of 1 s; it was at run/planted.py:")
    assert reason.endswith(" in _hang")


def test_a_hang_that_keeps_the_interpreter_is_seen_too(job: Makes) -> None:
    found = rows(events([job("hang-with-the-interpreter", "b", timeout_s=1.0)]))
    assert found["hang-with-the-interpreter"][0] == "hang"
    assert found["hang-with-the-interpreter"][1].endswith(" in _hang_with_the_interpreter")
    assert found["b"] == ("ok", "")


def test_progress_without_end_is_a_timeout_of_the_cell_alone(job: Makes) -> None:
    found = rows(events([job("a", "crawl", "b", timeout_s=1.0)]))
    status, reason = found["crawl"]
    assert status == "timeout"
    assert reason.startswith("not finished within its limit of 1 s; it was at run/planted.py:")
    assert found["a"] == found["b"] == ("ok", "")


def test_a_slow_consumer_is_not_the_workers_fault(job: Makes) -> None:
    found = []
    for event in local().run(iter([job("a", "b", timeout_s=0.8)])):
        found.append(event)
        if isinstance(event, Doing | Done):
            time.sleep(0.5)
    assert rows(found) == {"a": ("ok", ""), "b": ("ok", "")}


def test_a_kill_by_the_kernel_for_memory_is_said_so(job: Makes, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter(range(100))
    monkeypatch.setattr(desk, "oom_kills", lambda: next(counter))
    found = rows(events([job("killed", "leave", "b")]))
    assert found["killed"] == ("oom", "the kernel killed the worker: out of memory")
    assert found["leave"][0] == "error"
    assert found["b"] == ("ok", "")


def test_death_while_nobody_in_particular_is_at_work_costs_the_group(job: Makes) -> None:
    found = rows(events([job("a", "b"), job("c", number=1)], name="broken_build"))
    assert set(found) == {"a", "b", "c"}
    for status, reason in found.values():
        assert status == "error"
        assert reason.startswith("the worker was killed by SIGABRT at run/planted.py:")


def test_a_lost_device_costs_its_cell_and_a_fresh_worker_does_the_rest(job: Makes) -> None:
    found = events([job("lost", "b", "c")], name="lost_device")
    assert rows(found) == {"lost": ("error", "illegal memory access"), "b": ("ok", ""), "c": ("ok", "")}
    assert sum(event == Doing(0, "starting a worker") for event in found) == 2


def test_a_cell_that_gets_no_row_says_so(job: Makes) -> None:
    found = events([job("a", "b"), job("c", "d", number=1)], name="forgetful")
    assert rows(found)["b"] == rows(found)["d"] == ("error", "its measurement ended without a row")
    assert [event.left for event in found if isinstance(event, Over)] == [(), ()]


def test_megabytes_of_prints_harm_nobody(job: Makes) -> None:
    assert rows(events([job("flood", "b")])) == {"flood": ("ok", ""), "b": ("ok", "")}
    worker = WorkerProcess(f"{PLANTED}:measure", 0)
    worker.begin(job("flood-and-leave").cells, None, 0, 0.0)
    assert wait_for(worker, "doing")
    worker.send("go on")
    while not worker.ended():
        worker.read()
    assert worker.kill() == 1
    assert len(worker.printed) <= TAIL_BYTES
    assert worker.printed.endswith("flood \nthe last line\n")


def wait_for(worker: WorkerProcess, what: str) -> bool:
    for _ in range(1000):
        if any(message[0] == what for message in worker.read()):
            return True
        time.sleep(0.02)
    return False


def test_a_worker_without_output_does_not_keep_its_driver_busy(job: Makes) -> None:
    before = time.process_time()
    assert rows(events([job("mute", "b")])) == {"mute": ("ok", ""), "b": ("ok", "")}
    assert time.process_time() - before < 0.2  # the cell sleeps 0.3 s


def test_a_forked_child_never_speaks_for_the_worker(job: Makes) -> None:
    found = events([job("fork", "b"), job("c", number=1)])
    assert rows(found) == {"fork": ("ok", ""), "b": ("ok", ""), "c": ("ok", "")}
    assert sum(isinstance(event, Over) for event in found) == 2


@pytest.mark.parametrize("route", ["fork-sleeping", "fork-and-leave"])
def test_a_forked_child_ends_with_the_worker(job: Makes, left: Path, route: str) -> None:
    events([job(route)])
    assert gone(int((left / "child").read_text()))


def test_closing_the_events_ends_what_runs(job: Makes, left: Path) -> None:
    running = local().run(iter([job("fork-sleeping", "hang"), job("b", number=1)]))
    for event in running:
        if isinstance(event, Done):
            break
    (worker,) = psutil.Process().children()
    running.close()
    assert gone(worker.pid)
    assert gone(int((left / "child").read_text()))
    assert list(running) == []


def test_the_measurement_waits_until_its_row_is_dealt_with(job: Makes, left: Path) -> None:
    running = local().run(iter([job("mark-after")]))
    for event in running:
        if isinstance(event, Done):
            time.sleep(0.3)
            assert not (left / "after").exists()
    assert (left / "after").exists()


def test_a_job_is_stopped_when_its_time_is_up(job: Makes) -> None:
    found = events([job("a", "hang", "b", seconds=1.0), job("c", number=1)])
    assert rows(found) == {"a": ("ok", ""), "c": ("ok", "")}
    first, second = [event for event in found if isinstance(event, Over)]
    assert [cell.route for cell in first.left] == ["hang", "b"]
    assert second.left == ()


def test_jobs_are_taken_when_a_worker_is_free(job: Makes) -> None:
    taken: list[int] = []

    def jobs() -> Iterator[Job]:
        for number in range(3):
            taken.append(number)
            yield job("a", "b", number=number)

    for event in local().run(jobs()):
        if isinstance(event, Done):
            assert len(taken) == taken[-1] + 1
        if isinstance(event, Over):
            assert taken[-1] == event.job.number


def test_workers_that_do_not_start_are_the_machines_fault(job: Makes) -> None:
    with pytest.raises(WorkerError, match=r"^workers do not start here: .*No module named 'nowhere'$"):
        list(LocalExecutor((ON_CPU,), measure="nowhere:measure").run(iter([job("a")])))


def test_a_worker_that_never_starts_is_not_waited_for(job: Makes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "STARTS_WITHIN_S", 0.0)
    with pytest.raises(WorkerError, match="a worker has not started within 0 s"):
        events([job("a")])


def test_an_idle_worker_that_dies_is_replaced(job: Makes) -> None:
    def jobs() -> Iterator[Job]:
        yield job("a")
        (worker,) = psutil.Process().children()
        worker.kill()
        yield job("b", number=1)

    found = list(local().run(jobs()))
    assert rows(found) == {"a": ("ok", ""), "b": ("ok", "")}
    assert [event.samples[0]["process"] for event in found if isinstance(event, Done)] == [0, 1]


def test_gpus_are_measured_on_at_the_same_time(job: Makes) -> None:
    slots = [Slot(number, frozenset({f"cuda:{number}"})) for number in range(2)]
    jobs = [job("meet", device="cuda:0"), job("meet", device="cuda:1", number=1)]
    jobs.append(job("a", device="cuda:1", number=2))
    found = events(jobs, slots=slots)
    assert [event.worker for event in found if isinstance(event, Began)] in ([0, 1, 1], [1, 0, 1])
    assert {(event.row["device"], event.worker) for event in found if isinstance(event, Done)} == {
        ("cuda:0", 0),
        ("cuda:1", 1),
    }


ALIKE = [Slot(number, frozenset({"cuda"}), (f"GPU-{number}",), alone=True) for number in range(2)]


def test_one_sweep_has_all_gpus_each_worker_one(
    job: Makes, monkeypatch: pytest.MonkeyPatch, left: Path
) -> None:
    monkeypatch.setattr(desk.tempfile, "gettempdir", lambda: str(left))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    found = events([job("meet-alone", device="cuda", number=n) for n in range(2)], slots=ALIKE)
    assert [event.worker for event in found if isinstance(event, Began)] in ([0, 1], [1, 0])
    assert [event.row["status"] for event in found if isinstance(event, Done)] == ["ok", "ok"]
    assert {path.name for path in left.glob("sees-*")} == {"sees-GPU-0", "sees-GPU-1"}


def test_a_sweep_goes_on_beside_a_gpu_in_use(job: Makes, monkeypatch: pytest.MonkeyPatch, left: Path) -> None:
    monkeypatch.setattr(desk.tempfile, "gettempdir", lambda: str(left))
    with filelock.FileLock(desk.lock_file("GPU-0")):
        found = events([job("a", device="cuda", number=n) for n in range(3)], slots=ALIKE)
    assert [event.worker for event in found if isinstance(event, Done)] == [1, 1, 1]
    assert next(event.text for event in found if isinstance(event, Doing)) == "starting a worker"


def test_a_gpu_in_use_is_waited_for(job: Makes, monkeypatch: pytest.MonkeyPatch, left: Path) -> None:
    monkeypatch.setattr(desk.tempfile, "gettempdir", lambda: str(left))
    slot = Slot(0, frozenset({"cuda"}), ("GPU-7",))
    other = filelock.FileLock(desk.lock_file("GPU-7"))
    other.acquire()
    said = []
    for event in local(slots=[slot]).run(iter([job("a", device="cuda"), job("b", device="cuda", number=1)])):
        if isinstance(event, Doing):
            said.append(event.text)
        if isinstance(event, Doing) and event.text.startswith("waiting"):
            assert psutil.Process().children() == []
            other.release()
        elif isinstance(event, Done):
            with pytest.raises(filelock.Timeout):
                filelock.FileLock(desk.lock_file("GPU-7"), timeout=0).acquire()
    assert said == [
        "waiting for GPU-7: another nsabench measures on it",
        "starting a worker",
        "measuring a",
        "measuring b",
    ]
    with filelock.FileLock(desk.lock_file("GPU-7"), timeout=0):
        pass


def test_a_lock_that_cannot_be_had_is_said(job: Makes, monkeypatch: pytest.MonkeyPatch, left: Path) -> None:
    monkeypatch.setattr(desk.tempfile, "gettempdir", lambda: str(left / "file"))
    (left / "file").touch()
    slot = Slot(0, frozenset({"cuda"}), ("GPU-7",))
    with pytest.raises(WorkerError, match=r"^cannot lock .*nsabench-GPU-7.lock: "):
        events([job("a", device="cuda")], slots=[slot])


def test_systems_without_pidfd_and_memfd_do_as_well(job: Makes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.delattr(os, "memfd_create")
    found = rows(events([job("a", "fork-and-leave", "hang", "b", timeout_s=2.0)]))
    assert {route: status for route, (status, _) in found.items()} == {
        "a": "ok",
        "fork-and-leave": "error",
        "hang": "hang",
        "b": "ok",
    }


def test_slots_are_gpus_or_one_for_all(make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = {"cuda": "GPU-a", "cuda:0": "GPU-a", "cuda:1": "GPU-b"}
    monkeypatch.setattr(executor, "_uuid", uuids.get)

    def slots(*devices: str) -> list[tuple[int, set[str], tuple[str, ...]]]:
        cells = [make_cell(device=device) for device in devices]
        return [(slot.number, set(slot.devices), slot.gpus) for slot in executor.local_slots(cells)]

    assert slots("cpu") == [(0, {"cpu"}, ())]
    assert slots("cuda:1", "cuda", "cuda:0") == [
        (0, {"cuda:1"}, ("GPU-b",)),
        (1, {"cuda", "cuda:0"}, ("GPU-a",)),
    ]
    assert slots("cuda:1", "cpu") == [(0, {"cpu", "cuda:1"}, ("GPU-b",))]
    assert slots("cuda:7", "cuda:1") == [(0, {"cuda:7", "cuda:1"}, ("GPU-b",))]


@pytest.mark.parametrize(
    ("alike", "expected"),
    [
        ([], [(0, {"cuda"}, (), False)]),
        (["GPU-a"], [(0, {"cuda"}, ("GPU-a",), False)]),
        (["GPU-a", "GPU-b"], [(0, {"cuda"}, ("GPU-a",), True), (1, {"cuda"}, ("GPU-b",), True)]),
    ],
)
def test_cells_of_no_particular_gpu_go_to_all(
    make_cell: MakeCell, monkeypatch: pytest.MonkeyPatch, alike: list[str], expected: list[object]
) -> None:
    monkeypatch.setattr(executor, "_gpus_alike", lambda: alike)
    monkeypatch.setattr(executor, "_uuid", lambda device: alike[0] if alike else None)
    slots = executor.local_slots([make_cell(device="cuda"), make_cell(device="cuda", S=96)])
    assert [(slot.number, set(slot.devices), slot.gpus, slot.alone) for slot in slots] == expected
    both = executor.local_slots([make_cell(device="cuda"), make_cell(device="cpu")])
    assert [(set(slot.devices), slot.alone) for slot in both] == [({"cuda", "cpu"}, False)]


def test_a_worker_has_what_its_driver_has(job: Makes, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("PLANTED_MARK", "here")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 3)
    try:
        found = events([job("a")], name="report", module=f"{PLANTED}_torch")
        expected = [torch.get_num_threads(), torch.get_num_interop_threads()]
    finally:
        torch.set_num_threads(threads)
    (said,) = [json.loads(e.text) for e in found if isinstance(e, Doing) and e.text.startswith("{")]
    for size in ("LINES", "COLUMNS"):  # readline sets these behind Python's back
        said["environment"].pop(size, None)
    assert said == {
        "threads": expected,
        "environment": {k: v for k, v in os.environ.items() if k not in ("LINES", "COLUMNS")},
        "affinity": sorted(os.sched_getaffinity(0)),
        "folder": os.getcwd(),
        "path": sys.path,
        "stdin": "",
    }


DRIVER = """
import sys
sys.path[:] = {path!r}
from nsabench.plan import Cell
from nsabench.run import Policy
from nsabench.run.executor import Job, LocalExecutor, Slot
job = Job((Cell.from_dict({cell!r}),), Policy(), 0)
for event in LocalExecutor((Slot(0, frozenset(["cpu"])),), measure={measure!r}).run(iter([job])):
    print(event, flush=True)
"""


@pytest.mark.parametrize("route", ["hang", "hang-with-the-interpreter"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_its_driver(job: Makes, left: Path, route: str, number: signal.Signals) -> None:
    (cell,) = job(route).cells
    code = DRIVER.format(path=[str(ROOT), *sys.path], cell=cell.to_dict(), measure=f"{PLANTED}:measure")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as driver:
        assert appears(left / "hanging")
        (worker,) = psutil.Process(driver.pid).children()
        driver.send_signal(number)
        assert driver.wait(20) == -number
    assert gone(worker.pid)
    if route == "hang-with-the-interpreter":
        assert gone(int((left / "child").read_text()))


@pytest.mark.slow
def test_a_crash_a_hang_and_no_memory_in_one_sweep_leave_a_complete_table(make_cell: MakeCell) -> None:
    routes = ("auto", "win=reference", "sel=gather", "sel=reference", "cmp=reference", "score=reference")
    policy = Policy(rounds=2, sample_ms=0.01, shares=False, alone=False, timeout_s=20.0)
    jobs = [Job(tuple(make_cell(route=route) for route in routes), policy, 0)]
    found = rows(events(jobs, name="real_with_faults", module=f"{PLANTED}_torch"))
    assert {route: status for route, (status, _) in found.items()} == {
        "auto": "ok",
        "win=reference": "error",
        "sel=gather": "ok",
        "sel=reference": "hang",
        "cmp=reference": "oom",
        "score=reference": "ok",
    }
    assert "killed by SIGSEGV at ctypes/__init__.py" in found["win=reference"][1]
    assert found["sel=reference"][1].startswith("no progress for 10 s, half of its limit of 20 s; it was at ")
    assert "can't allocate memory" in found["cmp=reference"][1]
