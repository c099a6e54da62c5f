"""Bytes on disk: CSV encoding, writes that are durable when they return, and the errors they end in."""

import contextlib
import csv
import errno
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nsabench.store.schema import Column

_MACHINE_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENODEV, errno.ESTALE}


class StoreError(ValueError):
    """A run that cannot be created, opened, read or written, said in one line."""


class DiskError(StoreError):
    """The disk failed (full, over quota, gone): what was written before is safe."""


def disk_error(doing: str, error: OSError | ValueError) -> StoreError:
    """`error` as one line: DiskError when the machine is to blame, else StoreError."""
    kind = DiskError if getattr(error, "errno", None) in _MACHINE_FAILED else StoreError
    return kind(f"cannot {doing}: {getattr(error, 'strerror', None) or error}")


def header(columns: Iterable[Column]) -> bytes:
    """First line of a CSV file."""
    return (",".join(c.name for c in columns) + "\n").encode()


def csv_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Cleaned rows as CSV lines: one line each, floats to the last digit, missing values empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(row.values())
    return text.getvalue().encode()


def append(path: Path, data: bytes) -> int:
    """Append to an existing file, durably; its size afterwards. OSError leaves a tail of unknown length."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        _write(descriptor, data)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def create(path: Path, data: bytes) -> None:
    """Write a new file, durably; FileExistsError where there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write(descriptor, data)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Put `data` in place of the file in one step: a crash leaves the old content or the new."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        create(temporary, data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def truncate(path: Path, size: int) -> None:
    """Cut the file to `size` bytes, durably, if it is longer."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make names in the folder durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
