"""The stored run: its schema, its files, and what is recorded about the machine. Imports no torch."""

from nsabench.store.environment import capture_environment, git_revision
from nsabench.store.files import DiskError, StoreError
from nsabench.store.reading import Run, load_run
from nsabench.store.runs import RunDir
from nsabench.store.schema import SchemaError

__all__ = [
    "DiskError",
    "Run",
    "RunDir",
    "SchemaError",
    "StoreError",
    "capture_environment",
    "git_revision",
    "load_run",
]
