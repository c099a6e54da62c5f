"""A run whose rows are no cells, as a scorecard or a training: a folder with run.json and CSV tables."""

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

from nsabench.store.files import StoreError, append, csv_rows, disk_error, header, replace, truncate
from nsabench.store.journal import RUN_FILE, read_info, said_kind
from nsabench.store.runs import check_name, check_tags, create_folder, folder_stem, take_lock, utc_now
from nsabench.store.schema import SCHEMA_VERSION, Column, clean_row

Tables = Mapping[str, Sequence[Column]]
"""The columns of each CSV file, by its name."""


class TableRun:
    """A run being written, by one process at a time. Make one with `create` or `open`; a context manager.

    `path` is its folder, `run_id` its name, `info` the content of run.json, whose `kind` says what it is.
    """

    def __init__(
        self, path: Path, info: dict[str, Any], tables: Tables, lock: filelock.BaseFileLock | None
    ) -> None:
        """For `create` and `open`."""
        self.path, self.info, self.run_id = path, info, str(info["run_id"])
        self._tables, self._lock = dict(tables), lock

    @classmethod
    def create(
        cls,
        root: Path,
        *,
        kind: str,
        name: str,
        argv: Sequence[str],
        repro: str,
        environment: Mapping[str, Any],
        tables: Tables,
        tags: Sequence[str] = (),
        **facts: Any,
    ) -> "TableRun":
        """A new run in a new folder of `root`, as `RunDir.create` makes one; `facts` go into run.json.

        StoreError where `root` cannot be written or `name` or a tag is not usable, DiskError where the disk
        is full; either leaves nothing behind.
        """
        check_name(name)
        check_tags(tags)
        now = utc_now()
        info = {
            "schema_version": SCHEMA_VERSION,
            "run_id": None,
            "kind": kind,
            "name": name,
            "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "argv": list(argv),
            "repro": repro,
            "tags": list(dict.fromkeys(tags)),
            **facts,
            "environment": dict(environment),
        }
        try:
            json.dumps(info)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{RUN_FILE} cannot hold what it was given: {error}") from error
        empty = {file: header(columns) for file, columns in tables.items()}
        path = create_folder(Path(root), folder_stem(now, name, environment), info, empty)
        try:
            return cls(path, read_info(path), tables, take_lock(path))
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    @classmethod
    def open(cls, path: Path | str, kind: str, tables: Tables, wait_s: float = 0) -> "TableRun":
        """The run at `path`, to be continued: takes its lock, and cuts off lines that were left half-written.

        StoreError, with nothing changed on disk, for a folder that is no run, or none of that kind, one of
        another schema, and one that another process is still writing after `wait_s` seconds.
        """
        path = Path(path)
        info = read_info(path)
        if info.get("kind") != kind:
            raise StoreError(f"{path} is {said_kind(info)}; allowed here: {said_kind({'kind': kind})}")
        if info["schema_version"] != SCHEMA_VERSION:
            version = info["schema_version"]
            raise StoreError(f"{path} has schema {version}; this nsabench continues {SCHEMA_VERSION}")
        lock = take_lock(path, wait_s)
        try:
            info = read_info(path)  # as the one before left it
            for file in tables:
                data = (path / file).read_bytes()
                truncate(path / file, data.rfind(b"\n") + 1)
        except (StoreError, OSError) as error:
            lock.release()
            if isinstance(error, StoreError):
                raise
            raise disk_error(f"open run {path}", error) from error
        return cls(path, info, tables, lock)

    def append(self, file: str, *rows: Mapping[str, Any]) -> None:
        """Add rows to one of its tables; they are durable when this returns. A `run_id` is filled in.

        SchemaError for rows that do not fit, DiskError where the disk refuses.
        """
        clean = [clean_row({**row, "run_id": self.run_id}, self._tables[file]) for row in rows]
        self._written(file, csv_rows(clean))

    def append_text(self, file: str, line: str) -> None:
        """Add one line to a text file of its folder, made when first written to; durable."""
        if not (self.path / file).exists():
            self._put(file, b"")
        self._written(file, line.encode() + b"\n")

    def keep(self, file: str, rows: int) -> None:
        """Cut one of its tables to its first `rows` rows: the rest will be written again."""
        try:
            lines = (self.path / file).read_bytes().splitlines(keepends=True)
            truncate(self.path / file, sum(map(len, lines[: rows + 1])))
        except OSError as error:
            raise disk_error(f"write {self.path / file}", error) from error

    def note(self, **facts: Any) -> None:
        """Put facts into run.json, in place of what they were, in one step."""
        self.info |= facts
        self._put(RUN_FILE, json.dumps(self.info, indent=1).encode() + b"\n")

    def close(self) -> None:
        """Let others write the run. Closing twice is fine."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / ".pid").unlink()
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "TableRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _written(self, file: str, data: bytes) -> None:
        if self._lock is None:
            raise StoreError(f"run {self.run_id} is closed")
        try:
            append(self.path / file, data)
        except OSError as error:
            raise disk_error(f"write {self.path / file}", error) from error

    def _put(self, file: str, data: bytes) -> None:
        try:
            replace(self.path / file, data)
        except OSError as error:
            raise disk_error(f"write {self.path / file}", error) from error


def read_table(path: Path, file: str, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The whole lines of a run's table as `clean_row` has them: missing text empty, a missing number None.

    Empty where there is no such file. StoreError for a damaged one.
    """
    try:
        data = (path / file).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise disk_error(f"read {path / file}", error) from error
    convert = {"int": int, "float": float, "str": str}
    rows: list[dict[str, Any]] = []
    try:
        whole = data[: data.rfind(b"\n") + 1].decode()
        found = list(csv.reader(io.StringIO(whole, newline="")))
        names = [column.name for column in columns]
        if found and found[0] != names:
            raise ValueError("it does not have the columns of its schema")
        return [
            clean_row(
                {
                    c.name: convert[c.kind](text) if text else None
                    for c, text in zip(columns, row, strict=True)
                },
                columns,
            )
            for row in found[1:]
        ]
    except (ValueError, csv.Error) as error:
        raise StoreError(f"{path} is damaged: {file}: {error}") from error
    return rows
