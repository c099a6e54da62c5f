"""The run folder: created whole, appended to one finished cell at a time, reopened after any interruption."""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

from nsabench.store.files import (
    DiskError,
    StoreError,
    append,
    create,
    csv_rows,
    disk_error,
    header,
    sync_folder,
)
from nsabench.store.journal import JOURNAL_FILE, RUN_FILE, journal_line, read_info, refuse_other_kind
from nsabench.store.machine import stored_peaks
from nsabench.store.repair import inspect, repair
from nsabench.store.schema import SCHEMA_VERSION, TABLES, SchemaError, check_row, clean_row

_LOCK_FILE = ".lock"
_PID_FILE = ".pid"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:=+/-]{0,63}")

Row = Mapping[str, Any]


class RunDir:
    """A run being written, by one process at a time. Make one with `create` or `open`; a context manager.

    `path` is its folder, `run_id` its name, `info` the content of run.json, and `finished` the row of each
    finished cell by `cell_id`: every column present, missing text empty and a missing number None.
    """

    path: Path
    run_id: str
    info: dict[str, Any]
    finished: dict[str, dict[str, Any]]

    def __init__(self, path: Path, info: dict[str, Any], lock: filelock.BaseFileLock) -> None:
        """For `create` and `open`, which know the folder to be whole and hold its lock."""
        self.path = path
        self.run_id = info["run_id"]
        self.info = info
        self.finished = {}
        self._sizes: dict[str, int] = {}
        self._lock = lock
        self._torn = False

    @classmethod
    def create(
        cls,
        root: Path,
        *,
        name: str,
        argv: list[str],
        repro: str,
        plan: list[dict[str, Any]],
        environment: dict[str, Any],
        policy: dict[str, Any],
        seed: int,
        tags: Sequence[str] = (),
        suite: dict[str, Any] | None = None,
        comparison: dict[str, Any] | None = None,
    ) -> "RunDir":
        """A new run in a new folder of `root`, named after UTC time, `name` and the commit in `environment`.

        `tags` are words to find the run by, repeated ones kept once; `suite` is the suite it came from, as
        resolved; `comparison` says which cells were held against each other, and how. What this machine was
        measured to reach goes in as `peaks`, by device. The folder appears whole or not at all. StoreError
        where `root` cannot be written, or `name` cannot name a folder or a tag is no word, DiskError where
        the disk is full; either leaves nothing behind.
        """
        check_name(name)
        check_tags(tags)
        now = utc_now()
        peaks = stored_peaks(environment, (str(cell["device"]) for cell in plan if "device" in cell))
        info = {
            "schema_version": SCHEMA_VERSION,
            "run_id": None,
            "name": name,
            "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "argv": argv,
            "repro": repro,
            "seed": seed,
            "tags": list(dict.fromkeys(tags)),
            "suite": suite,
            **({} if comparison is None else {"comparison": comparison}),
            "policy": policy,
            "environment": environment,
            **({"peaks": peaks} if peaks else {}),
            "plan": plan,
        }
        try:
            json.dumps(info)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{RUN_FILE} cannot hold what it was given: {error}") from error
        empty = {file: header(columns) for file, columns in TABLES.items()} | {JOURNAL_FILE: b""}
        path = create_folder(Path(root), folder_stem(now, name, environment), info, empty)
        try:
            return cls._opened(path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    @classmethod
    def open(cls, path: Path | str) -> "RunDir":
        """The run at `path`, to be continued: takes its lock and removes what was left half-written.

        StoreError, with nothing changed on disk, for a folder that is no run, one of another schema (older
        ones too), a damaged one, and one that another process is writing.
        """
        path = Path(path)
        refuse_unless_continuable(path)
        try:
            inspect(path)
        except OSError as error:
            raise disk_error(f"open run {path}", error) from error
        return cls._opened(path)

    @classmethod
    def _opened(cls, path: Path) -> "RunDir":
        lock = take_lock(path)
        try:
            run = cls(path, read_info(path), lock)
            journal = inspect(path)
            repair(path, journal)
            run.finished = dict(journal.rows)
            run._sizes = dict(journal.sizes)
            with contextlib.suppress(OSError):
                (path / _PID_FILE).write_text(f"{os.getpid()}\n")
            return run
        except OSError as error:
            lock.release()
            raise disk_error(f"open run {path}", error) from error
        except BaseException:
            lock.release()
            raise

    def append(
        self,
        row: Row,
        samples: Sequence[Row],
        telemetry: Sequence[Row] = (),
        kernels: Sequence[Row] = (),
    ) -> None:
        """Add one finished cell; it is durable when this returns. Ids left out of other rows are filled in.

        SchemaError for rows that do not fit, StoreError for a cell already finished or a run already closed:
        nothing is written. DiskError where the disk refuses: the run takes no more cells, and `open`
        continues it.
        """
        if not self._lock.is_locked:
            raise StoreError(f"run {self.run_id} is closed")
        if self._torn:
            raise StoreError(f"run {self.run_id} was interrupted while writing; resume it to go on")
        cell_id = row.get("cell_id")
        if not isinstance(cell_id, str) or not cell_id:
            raise SchemaError(f"cell_id is {cell_id!r}; a row needs the id of its cell")
        if cell_id in self.finished:
            raise StoreError(f"cell {cell_id} is already finished in run {self.run_id}")
        check_row(row)
        given = {
            "cells.csv": [row],
            "samples.csv": samples,
            "telemetry.csv": telemetry,
            "kernels.csv": kernels,
        }
        clean = {file: [self._own(r, cell_id, file) for r in rows] for file, rows in given.items()}
        self._write(clean)
        self.finished[cell_id] = clean["cells.csv"][0]

    def close(self) -> None:
        """Let others write the run. Closing twice is fine."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                (self.path / _PID_FILE).unlink()
            self._lock.release()

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _own(self, row: Row, cell_id: str, file: str) -> dict[str, Any]:
        ids = {"run_id": self.run_id, "cell_id": cell_id}
        for name, mine in ids.items():
            if row.get(name) not in (None, "", mine):
                raise SchemaError(f"{file}: {name} is {row[name]!r} in a row of {mine!r}")
        return clean_row({**row, **ids}, TABLES[file])

    def _write(self, clean: Mapping[str, Sequence[Row]]) -> None:
        sizes = dict(self._sizes)
        # Until the journal has its line, whatever ends this: a half-written cell may be last on disk.
        self._torn = True
        try:
            # The cell's row last: a row in cells.csv without its samples is never seen.
            for file in reversed(TABLES):
                if clean[file]:
                    sizes[file] = append(self.path / file, csv_rows(clean[file]))
            append(self.path / JOURNAL_FILE, journal_line(clean["cells.csv"][0], sizes))
        except OSError as error:
            goes_on = "" if "comparison" in self.info else ", resume to go on"
            safe = f"{len(self.finished)} finished cells are safe{goes_on}"
            raise DiskError(f"cannot write {self.path}: {error.strerror or error}; {safe}") from error
        self._torn = False
        self._sizes = sizes


def check_name(name: str) -> None:
    """StoreError for a name that cannot be part of a folder's."""
    if not _NAME.fullmatch(name):
        raise StoreError(f"run name {name!r} is not usable; allowed: letters, digits and _.-, up to 64")


def folder_stem(now: datetime, name: str, environment: Mapping[str, Any]) -> str:
    """What a run's folder is called: UTC time, name and commit."""
    commit = str(environment.get("commit") or "nogit")[:7]
    dirty = "-dirty" if environment.get("dirty") else ""
    return f"{now:%Y%m%dT%H%M%SZ}-{name}-{commit}{dirty}"


def check_tags(tags: Sequence[str]) -> None:
    """StoreError for a tag that is not one word."""
    for tag in tags:
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise StoreError(f"tag {tag!r} is not usable; allowed: letters, digits and _.:=+/-, up to 64")


def create_folder(root: Path, stem: str, info: dict[str, Any], files: Mapping[str, bytes]) -> Path:
    """A new folder in `root` that holds run.json and `files`; makes `root` too. On failure neither is left.

    `stem` gets a number where the name is taken; the name becomes the `run_id` of run.json.
    """
    made = _missing_folders(root)
    temporary = root / f".{stem}.{os.getpid()}.new"
    try:
        if root.is_file():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        root.mkdir(parents=True, exist_ok=True)
        while True:
            path = _free_name(root, stem)
            _fill_folder(temporary, {**info, "run_id": path.name}, files)
            with contextlib.suppress(FileExistsError):
                _rename_new(temporary, path)
                sync_folder(root)
                return path
            shutil.rmtree(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError, ValueError):
                folder.rmdir()
        if isinstance(error, OSError | ValueError):
            raise disk_error(f"create a run in {root}", error) from error
        raise


def _fill_folder(path: Path, info: dict[str, Any], files: Mapping[str, bytes]) -> None:
    path.mkdir()
    create(path / RUN_FILE, json.dumps(info, indent=1).encode() + b"\n")
    for file, data in files.items():
        create(path / file, data)
    sync_folder(path)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a folder; FileExistsError where the name was taken since it was seen free."""
    try:
        source.rename(target)
    except OSError as error:
        if target.exists():
            raise FileExistsError(str(target)) from error
        raise


def _free_name(root: Path, stem: str) -> Path:
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(root / name for name in names if not (root / name).exists())


def _missing_folders(path: Path) -> list[Path]:
    """The folders that making `path` would make, the innermost first."""
    with contextlib.suppress(OSError):
        return [p for p in (path, *path.parents) if not p.exists()]
    return []


def refuse_unless_continuable(path: Path) -> None:
    """StoreError for a folder that is no run, a merged run, and one of another schema."""
    info = read_info(path)
    refuse_other_kind(path, info)
    if "sources" in info:
        raise StoreError(f"{path} is merged from {len(info['sources'])} runs; continue those, then merge")
    version = info["schema_version"]
    if version < SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {version}, which can be read but not continued; "
            f"this nsabench writes {SCHEMA_VERSION}: measure anew"
        )


def take_lock(path: Path, wait_s: float = 0) -> filelock.BaseFileLock:
    """The run's lock, held; StoreError where another process still writes the run after `wait_s`."""
    lock = filelock.FileLock(path / _LOCK_FILE, timeout=wait_s, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise StoreError(f"run {path} is being written by another process{_holder(path)}") from None
    except OSError as error:
        raise disk_error(f"lock run {path}", error) from error
    return lock


def _holder(path: Path) -> str:
    try:
        return f" (pid {int((path / _PID_FILE).read_text())})"
    except (OSError, ValueError):
        return ""


def utc_now() -> datetime:
    return datetime.now(UTC)
