"""A file system that cannot be written, and a clock that goes backwards."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nsabench.store import DiskError, RunDir, StoreError, find_runs, load_cells, load_run, runs
from nsabench.store.schema import TABLES

Create = Callable[..., RunDir]
Make = Callable[[int], Any]


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes every file system read-only from now on."""
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        def only_reading(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                refuse()
            return opened(path, flags, *more, **named)

        opened = os.open

        def mount() -> None:
            patch.setattr(os, "open", only_reading)
            for name in ("mkdir", "rename", "replace", "unlink", "truncate", "ftruncate"):
                patch.setattr(os, name, refuse)

        yield mount


def test_a_read_only_file_system_can_be_read(
    create_run: Create, make_cell: Make, read_only: Callable[[], None]
) -> None:
    run = create_run()
    run.append(*make_cell(0))
    run.close()
    before = snapshot(run.path)
    read_only()
    assert len(load_run(run.path).cells) == len(load_cells(run.path).cells) == 1
    assert find_runs(run.path.parent) == [run.path]
    with pytest.raises(StoreError, match=f"cannot lock run {run.path}: Read-only file system"):
        RunDir.open(run.path)
    with pytest.raises(StoreError, match=r"cannot create a run in .*: Read-only file system"):
        create_run(root=run.path.parent)
    with pytest.raises(StoreError, match=r"cannot create a run in .*: Read-only file system"):
        create_run(root=run.path.parent / "deeper")
    assert snapshot(run.path) == before


def test_a_file_system_that_becomes_read_only_loses_nothing(
    create_run: Create, make_cell: Make, tmp_path: Path, read_only: Callable[[], None]
) -> None:
    """As Linux mounts a disk anew after an error."""
    run = create_run()
    run.append(*make_cell(0))
    before = snapshot(run.path)
    read_only()
    with pytest.raises(DiskError, match="Read-only file system; 1 finished cells are safe, resume to go on"):
        run.append(*make_cell(1))
    assert snapshot(run.path) == before
    assert list(load_run(run.path).cells["cell_id"]) == [f"{0:012x}"]


def test_a_clock_that_is_set_back_harms_nothing(
    create_run: Create, make_cell: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs keep names of their own, and what was finished first stays first."""
    moments = iter(datetime(2026, 11, 20, hour, 0, 0, tzinfo=UTC) for hour in (12, 11, 12, 11))
    monkeypatch.setattr(runs, "utc_now", lambda: next(moments))
    made = [create_run() for _ in range(4)]
    stems = [f"20261120T{hour}0000Z-decode-0123456" for hour in (12, 11)]
    assert [run.run_id for run in made] == [*stems, f"{stems[0]}-2", f"{stems[1]}-2"]
    assert [run.info["created"][11:13] for run in made] == ["12", "11", "12", "11"]
    now = time.time()
    for i, shift in enumerate((0, -86400, -5)):
        made[0].append(*make_cell(i))
        for file in TABLES:
            os.utime(made[0].path / file, (now + shift, now + shift))
    made[0].close()
    with RunDir.open(made[0].path) as again:
        assert list(again.finished) == [f"{i:012x}" for i in range(3)]
        again.append(*make_cell(3))
    assert list(load_run(made[0].path).cells["S"]) == [1, 2, 4, 8]
