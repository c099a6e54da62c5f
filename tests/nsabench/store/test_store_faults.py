"""What can go wrong while a run is written or reopened: no finished cell is lost, none repeated."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.store import DiskError, RunDir, StoreError, load_run
from nsabench.store.schema import SCHEMA_VERSION, TABLES

Create = Callable[..., RunDir]
Make = Callable[[int], Any]

WRITER = """
import sys
from nsabench.store import RunDir
print("start", flush=True)
with RunDir.open(sys.argv[1]) as run:
    for i in range(len(run.finished), 10**6):
        cell = f"{i:012x}"
        assert cell not in run.finished
        samples = [{"process": 0, "round": r, "position": 0, "iters": 1, "ms": i + r / 64} for r in range(64)]
        run.append({"cell_id": cell, "S": i, "status": "ok", "ms_total": i + 0.5}, samples)
        print(cell, flush=True)
"""


class Killed(BaseException):
    """Stands for the end of the process."""


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def tables(path: Path) -> dict[str, bytes]:
    return {file: (path / file).read_bytes() for file in [*TABLES, "journal.jsonl"]}


def test_a_writer_killed_at_any_moment_loses_and_repeats_nothing(create_run: Create) -> None:
    run = create_run()
    run.close()
    moments = random.Random(0)
    acknowledged: list[str] = []
    for _ in range(20):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, run.path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "start\n"
        acknowledged += [writer.stdout.readline().strip() for _ in range(moments.randrange(4))]
        time.sleep(moments.uniform(0.0, 0.03))
        writer.kill()
        acknowledged += writer.stdout.read().split()
        writer.stdout.close()
        assert writer.wait() == -9
        stored = load_run(run.path)
        assert set(acknowledged) <= set(stored.cells["cell_id"])
    assert len(set(acknowledged)) == len(acknowledged)

    with RunDir.open(run.path) as again:
        count = len(again.finished)
        assert list(again.finished) == [f"{i:012x}" for i in range(count)]
        again.append({"cell_id": "f" * 12, "status": "ok"}, [])
    stored = load_run(run.path)
    assert list(stored.cells["cell_id"]) == [*(f"{i:012x}" for i in range(count)), "f" * 12]
    assert list(stored.samples["cell_id"]) == [f"{i:012x}" for i in range(count) for _ in range(64)]
    assert list(stored.samples["ms"]) == [i + r / 64 for i in range(count) for r in range(64)]
    lines = (run.path / "cells.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == list(stored.cells["cell_id"])


class Disk:
    """os.write that has room for `room` bytes more, then fails the way `failure` says."""

    def __init__(self, room: int, failure: BaseException) -> None:
        self.room, self.failure = room, failure
        self.real = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        done = self.real(descriptor, bytes(data)[: self.room]) if self.room else 0
        self.room -= done
        if not self.room:
            raise self.failure
        return done


def start(create_run: Create, make_cell: Make, tmp_path: Path) -> tuple[RunDir, Path, dict[str, bytes]]:
    """A run with one finished cell, a copy of its folder, and its files once two more are finished."""
    run = create_run()
    run.append(*make_cell(0))
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    run.append(*make_cell(1))
    run.append(*make_cell(2))
    run.close()
    return run, copy, tables(run.path)


@pytest.mark.parametrize("kind", ["killed", "disk full"])
def test_a_write_cut_at_any_byte_leaves_the_run_resumable(
    create_run: Create, make_cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, before, complete = start(create_run, make_cell, tmp_path)
    lines = (run.path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    first, second = (sum(json.loads(line)["sizes"].values()) for line in lines[:2])
    total = second - first + len(lines[1])
    for room in [*range(0, total, 23), *range(total - 3, total)]:
        path = tmp_path / "cut"
        shutil.copytree(before, path)
        failure = Killed() if kind == "killed" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with RunDir.open(path) as cut:
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", Disk(room, failure).write)
                with pytest.raises(Killed if kind == "killed" else DiskError):
                    cut.append(*make_cell(1))
            with pytest.raises(StoreError, match=r"interrupted while writing; resume"):
                cut.append(*make_cell(2))
            assert list(cut.finished) == [f"{0:012x}"]
        assert list(load_run(path).cells["cell_id"]) == [f"{0:012x}"]
        assert len(load_run(path).samples) == 3
        with RunDir.open(path) as again:
            assert list(again.finished) == [f"{0:012x}"]
            again.append(*make_cell(1))
            again.append(*make_cell(2))
        assert tables(path) == complete
        shutil.rmtree(path)


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(
    create_run: Create, make_cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, complete = start(create_run, make_cell, tmp_path)
    write = os.write
    with RunDir.open(path) as run, monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:7]))
        run.append(*make_cell(1))
        run.append(*make_cell(2))
    assert tables(path) == complete


@pytest.mark.parametrize("failing", range(5))
def test_a_disk_that_refuses_to_sync_loses_nothing(
    create_run: Create, make_cell: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The last sync is the journal's: then the cell may have made it, and is kept if it has."""
    _, path, complete = start(create_run, make_cell, tmp_path)
    calls = iter(range(100))
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    with RunDir.open(path) as run, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DiskError, match=r"Input/output error; 1 finished cells are safe, resume"):
            run.append(*make_cell(1))
    with RunDir.open(path) as again:
        for i in (1, 2):
            if f"{i:012x}" not in again.finished:
                again.append(*make_cell(i))
    assert tables(path) == complete


def test_the_journal_is_written_after_everything_else_is_safe(
    create_run: Create, make_cell: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run()
    events: list[tuple[str, str]] = []
    write, sync = os.write, os.fsync

    def name(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").resolve().name

    def spy_write(descriptor: int, data: bytes) -> int:
        events.append(("write", name(descriptor)))
        return write(descriptor, data)

    def spy_sync(descriptor: int) -> None:
        events.append(("sync", name(descriptor)))
        sync(descriptor)

    monkeypatch.setattr(os, "write", spy_write)
    monkeypatch.setattr(os, "fsync", spy_sync)
    run.append(*make_cell(1))
    assert [what for what, _ in events] == ["write", "sync"] * 5
    assert [where for _, where in events[::2]] == [where for _, where in events[1::2]]
    assert {where for _, where in events[:8]} == set(TABLES)
    assert events[8:] == [("write", "journal.jsonl"), ("sync", "journal.jsonl")]


@pytest.mark.parametrize("cut", [1, 2, 10, 40])
def test_a_journal_line_cut_short_is_dropped_with_its_rows(
    create_run: Create, make_cell: Make, tmp_path: Path, cut: int
) -> None:
    run, _, complete = start(create_run, make_cell, tmp_path)
    journal = run.path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with RunDir.open(run.path) as again:
        assert len(again.finished) == 2
        assert [len(f) for f in (load_run(run.path).cells, load_run(run.path).samples)] == [2, 6]
        again.append(*make_cell(2))
    assert tables(run.path) == complete


@pytest.mark.parametrize("tail", [b"garbage\n", b'{"event":"cell"}\n', b"\0" * 512, b"[]\n", b"\n"])
def test_a_last_journal_line_of_garbage_is_dropped(
    create_run: Create, make_cell: Make, tmp_path: Path, tail: bytes
) -> None:
    run, _, complete = start(create_run, make_cell, tmp_path)
    with (run.path / "journal.jsonl").open("ab") as stream:
        stream.write(tail)
    assert len(load_run(run.path).cells) == 3
    RunDir.open(run.path).close()
    assert tables(run.path) == complete


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-7],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: data.replace(b"ok", b"OK", 1),
        lambda data: data + b"half a row,",
        lambda data: None,
    ],
    ids=["cut", "cut in header", "empty", "edited", "orphan tail", "gone"],
)
def test_cells_csv_is_rebuilt_from_the_journal(
    create_run: Create, make_cell: Make, tmp_path: Path, damage: Callable[[bytes], bytes | None]
) -> None:
    run, _, complete = start(create_run, make_cell, tmp_path)
    file = run.path / "cells.csv"
    damaged = damage(file.read_bytes())
    file.unlink()
    if damaged is not None:
        file.write_bytes(damaged)
    assert len(load_run(run.path).cells) == 3
    RunDir.open(run.path).close()
    assert tables(run.path) == complete


@pytest.mark.parametrize("file", ["samples.csv", "telemetry.csv", "kernels.csv"])
def test_an_orphan_tail_is_cut_off(create_run: Create, make_cell: Make, tmp_path: Path, file: str) -> None:
    run, _, complete = start(create_run, make_cell, tmp_path)
    whole = load_run(run.path)
    with (run.path / file).open("a") as stream:
        stream.write(f"{run.run_id},{3:012x},0,0\n{run.run_id},half")
    stored = load_run(run.path)
    assert stored.samples.equals(whole.samples)
    assert stored.telemetry.equals(whole.telemetry)
    assert stored.kernels.equals(whole.kernels)
    RunDir.open(run.path).close()
    assert tables(run.path) == complete


def test_an_orphan_tail_before_the_first_cell_is_cut_off(create_run: Create) -> None:
    run = create_run()
    run.close()
    complete = tables(run.path)
    with (run.path / "samples.csv").open("a") as stream:
        stream.write("orphan,row\n")
    (run.path / "kernels.csv").unlink()
    (run.path / ".cells.csv.new").write_text("left over")
    RunDir.open(run.path).close()
    assert tables(run.path) == complete
    assert not (run.path / ".cells.csv.new").exists()


def set_info(path: Path, **changes: Any) -> None:
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, **changes}))


def edit(path: Path, file: str, change: Callable[[bytes], bytes]) -> None:
    (path / file).write_bytes(change((path / file).read_bytes()))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run.json": (lambda p: (p / "run.json").unlink(), "is not a run: it has no run.json"),
    "broken run.json": (lambda p: (p / "run.json").write_text('{"schema'), "run.json is not JSON"),
    "binary run.json": (lambda p: (p / "run.json").write_bytes(b"\xff\xfe\x00"), "run.json is not JSON"),
    "foreign run.json": (lambda p: (p / "run.json").write_text('{"id": 3}'), "run.json is not nsabench's"),
    "list in run.json": (lambda p: (p / "run.json").write_text("[1]"), "run.json is not nsabench's"),
    "newer schema": (
        lambda p: set_info(p, schema_version=SCHEMA_VERSION + 1),
        f"has schema {SCHEMA_VERSION + 1}; this nsabench reads {SCHEMA_VERSION}: upgrade nsabench",
    ),
    "older schema": (lambda p: set_info(p, schema_version=0), "is not a run: there never was a schema 0"),
    "odd schema": (lambda p: set_info(p, schema_version="1"), "run.json is not nsabench's"),
    "no journal": (lambda p: (p / "journal.jsonl").unlink(), "is damaged: it has no journal.jsonl"),
    "lost journal": (
        lambda p: (p / "journal.jsonl").write_text(""),
        "cells.csv has 3 cells, journal.jsonl only 0",
    ),
    "garbage inside": (lambda p: edit(p, "journal.jsonl", lambda d: b"x" + d), "line 1 of journal.jsonl"),
    "a line in two halves": (
        lambda p: edit(p, "journal.jsonl", lambda d: d.replace(b'"cell",', b'"cell"\n', 1)),
        "line 1 of journal.jsonl",
    ),
    "a line in two halves, two lines in one": (
        lambda p: edit(
            p, "journal.jsonl", lambda d: d.replace(b'"cell",', b'"cell"\n', 1).replace(b"}\n{", b"},{", 1)
        ),
        "line 1 of journal.jsonl",
    ),
    "two lines in one": (
        lambda p: edit(p, "journal.jsonl", lambda d: d.replace(b"}\n{", b"},{", 1)),
        "line 1 of journal.jsonl",
    ),
    "no record": (lambda p: edit(p, "journal.jsonl", lambda d: b"7\n" + d), "line 1 of journal.jsonl"),
    "a cell that is no name": (
        lambda p: edit(p, "journal.jsonl", lambda d: d.replace(b'"cell_id":"', b'"cell_id":["x"],"":"', 1)),
        "line 1 of journal.jsonl repeats or mixes up",
    ),
    "repeated cell": (lambda p: edit(p, "journal.jsonl", lambda d: d + d), "line 4 of journal.jsonl repeats"),
    "unknown column": (
        lambda p: edit(p, "journal.jsonl", lambda d: d.replace(b'"S":4', b'"Z":4')),
        "line 3 of journal.jsonl: unknown column 'Z'",
    ),
    "short samples": (lambda p: edit(p, "samples.csv", lambda d: d[:-1]), "samples.csv has"),
    "no samples": (lambda p: (p / "samples.csv").unlink(), "samples.csv has 0 of"),
    "other columns": (
        lambda p: edit(p, "kernels.csv", lambda d: d.replace(b"branch", b"flower")),
        "other columns",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_foreign_or_damaged_run_is_refused_and_left_alone(
    create_run: Create, make_cell: Make, tmp_path: Path, case: str
) -> None:
    run, _, _ = start(create_run, make_cell, tmp_path)
    damage, message = DAMAGES[case]
    damage(run.path)
    (run.path / ".lock").unlink(missing_ok=True)
    before = snapshot(run.path)
    with pytest.raises(StoreError) as caught:
        RunDir.open(run.path)
    assert message in str(caught.value)
    assert str(run.path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(run.path) == before
    if "run.json" in case or "schema" in case:
        with pytest.raises(StoreError) as caught:
            load_run(run.path)
        assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "file", "empty folder"])
def test_what_is_no_run_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("hello")
    elif kind == "empty folder":
        path.mkdir()
    for read in (RunDir.open, load_run):
        with pytest.raises(StoreError, match=r"is not a run: it has no run.json"):
            read(path)
    assert path.exists() == (kind != "missing")
    assert not path.is_dir() or not list(path.iterdir())


def test_a_csv_with_other_columns_is_not_read(create_run: Create, make_cell: Make, tmp_path: Path) -> None:
    run, _, _ = start(create_run, make_cell, tmp_path)
    edit(run.path, "samples.csv", lambda data: data.replace(b"round", b"count", 1))
    with pytest.raises(StoreError, match=r"samples.csv, row 1: it does not have the columns"):
        load_run(run.path)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (b",oops\n", "could not convert string to float: 'oops'"),
        (b"0.1\n", "it has 9 values, not 10"),
        (b",2,3\n", "it has 11 values, not 10"),
        (b'"0.1,2"\n', "it has 9 values, not 10"),
    ],
)
def test_a_csv_with_broken_values_is_not_read(
    create_run: Create, make_cell: Make, tmp_path: Path, last: bytes, said: str
) -> None:
    run, _, _ = start(create_run, make_cell, tmp_path)
    (run.path / "journal.jsonl").unlink()
    edit(run.path, "samples.csv", lambda data: b",".join([*data.split(b",")[:-2], last]))
    with pytest.raises(StoreError, match=f"is damaged: samples.csv, row 9: {said}") as caught:
        load_run(run.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("below", ["file", "file/results", "file/a/b"])
def test_a_root_that_is_or_lies_below_a_file_is_refused(
    create_run: Create, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("here first")
    with pytest.raises(StoreError, match=r"cannot create a run in .*: Not a directory") as caught:
        create_run(root=tmp_path / below)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == {"file": b"here first"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_root_that_not_even_root_may_write_is_refused(create_run: Create) -> None:
    for root in (Path("/proc"), Path("/proc/results")):
        with pytest.raises(StoreError, match=f"cannot create a run in {root}: "):
            create_run(root=root)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 10, 400, 1500])
@pytest.mark.parametrize("existing", [True, False])
def test_a_run_that_cannot_be_made_leaves_nothing(
    create_run: Create, root: Path, monkeypatch: pytest.MonkeyPatch, number: int, room: int, existing: bool
) -> None:
    if existing:
        root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", Disk(room, OSError(number, os.strerror(number))).write)
        with pytest.raises(StoreError, match=r"cannot create a run in .*: ") as caught:
            create_run(root=root if existing else root / "deep" / "er")
    assert isinstance(caught.value, DiskError) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert os.strerror(number) in str(caught.value)
    assert root.exists() == existing
    assert not existing or not list(root.iterdir())
    assert create_run().finished == {}


def test_a_run_that_cannot_be_locked_is_not_made(
    create_run: Create, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("filelock.FileLock.acquire", refuse)
        with pytest.raises(StoreError, match=r"cannot lock run .*: No locks available"):
            create_run()
    assert not list(root.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_root_without_permission_is_refused(create_run: Create, root: Path) -> None:
    root.mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"Permission denied"):
        create_run()
    assert not list(root.iterdir())


def test_a_second_driver_in_this_process_is_refused(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(0))
    before = snapshot(run.path)
    with pytest.raises(StoreError, match=rf"is being written by another process \(pid {os.getpid()}\)"):
        RunDir.open(run.path)
    assert snapshot(run.path) == before
    run.append(*make_cell(1))
    run.close()
    with RunDir.open(run.path) as again:
        assert len(again.finished) == 2


def test_a_driver_in_another_process_keeps_this_one_out(create_run: Create, make_cell: Make) -> None:
    run = create_run()
    run.append(*make_cell(0))
    run.close()
    holder = (
        "import sys, nsabench.store as s; r = s.RunDir.open(sys.argv[1]); print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holder, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=rf"is being written by another process \(pid {other.pid}\)"):
            RunDir.open(run.path)
        assert len(load_run(run.path).cells) == 1
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()
    with RunDir.open(run.path) as again:
        assert len(again.finished) == 1


def test_the_lock_holder_may_be_unknown(create_run: Create) -> None:
    run = create_run()
    (run.path / ".pid").write_text("who knows")
    with pytest.raises(StoreError, match=r"is being written by another process$"):
        RunDir.open(run.path)


def test_a_refused_open_gives_the_lock_back(
    create_run: Create, make_cell: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run()
    run.append(*make_cell(0))
    run.close()
    edit(run.path, "cells.csv", lambda data: data[:-3])
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", Disk(5, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).write)
        with pytest.raises(DiskError, match=r"cannot open run .*: No space left on device"):
            RunDir.open(run.path)
    with RunDir.open(run.path) as again:
        assert len(again.finished) == 1


def test_a_run_deleted_while_it_is_written_is_an_error_of_the_disk(
    create_run: Create, make_cell: Make
) -> None:
    run = create_run()
    shutil.rmtree(run.path)
    with pytest.raises(DiskError, match=r"No such file or directory"):
        run.append(*make_cell(0))
    assert not run.path.exists()
