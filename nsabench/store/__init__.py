"""The stored run: its schema, its files, and what is recorded about the machine. Imports no torch."""

from nsabench.store.environment import capture_environment, git_revision
from nsabench.store.files import DiskError, StoreError
from nsabench.store.merge import merge_runs
from nsabench.store.reading import Run, RunCells, find_runs, load_cells, load_run
from nsabench.store.runs import RunDir
from nsabench.store.schema import SchemaError
from nsabench.store.tables import TableRun, read_table

__all__ = [
    "DiskError",
    "Run",
    "RunCells",
    "RunDir",
    "SchemaError",
    "StoreError",
    "TableRun",
    "capture_environment",
    "find_runs",
    "git_revision",
    "load_cells",
    "load_run",
    "merge_runs",
    "read_table",
]
