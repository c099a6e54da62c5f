"""What looking into one cell left beside its rows: a file in the run's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsabench.store.files import StoreError, disk_error, replace

PROFILE_FILE = "profile.json"
"""`cell_id`; `failed`, why there is nothing else; `step_ms`, of a profiled step, and `idle_ms` of it; `note`,
why kernels have no branch, or are not there; `stages`, the counted `flops` and `bytes` of each; `kernels`,
what this project's own declare to do in a step, each with `branch`, `kernel`, `flops`, `l2_bytes` and
`dram_bytes` (older runs have none); `files`, by what they hold."""


def save_profile(folder: Path, told: Mapping[str, Any]) -> None:
    """Keep it in a run's folder, whole or not at all; StoreError or DiskError where it cannot be."""
    try:
        replace(folder / PROFILE_FILE, json.dumps(told, indent=1).encode() + b"\n")
    except OSError as error:
        raise disk_error(f"write {folder / PROFILE_FILE}", error) from error


def load_profile(folder: Path) -> dict[str, Any] | None:
    """What is kept in a run's folder; None where there is nothing. StoreError for a damaged file."""
    path = folder / PROFILE_FILE
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise disk_error(f"read {path}", error) from error
    except ValueError:
        raise StoreError(f"{path} is damaged: profile the cell anew") from None
    if not isinstance(found, dict) or "cell_id" not in found:
        raise StoreError(f"{path} is damaged: profile the cell anew")
    return found
