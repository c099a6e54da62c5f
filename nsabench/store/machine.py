"""What was measured of a machine once and serves every later run: a file per device in the user's cache."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsabench.store.files import StoreError, disk_error, replace


def peaks_file(environment: Mapping[str, Any], device: str, folder: Path | None = None) -> Path:
    """Where the peaks of `device` lie on the machine of `environment` (as `capture_environment` gives it).

    They belong to the GPU and its driver, or to the CPU and the number of threads, and to the torch that
    measured them. `folder` defaults to `nsabench` in the user's cache (`XDG_CACHE_HOME`, `~/.cache`).
    """
    about = environment.get("torch") or {}
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        gpus = environment.get("gpus") or []
        if index >= len(gpus):
            raise StoreError(f"peaks of {device}: this machine has {len(gpus)} GPU(s)")
        key = ["cuda", gpus[index].get("uuid"), about.get("driver"), about.get("version")]
    else:
        cpu = environment.get("cpu") or {}
        key = ["cpu", cpu.get("model"), cpu.get("affinity"), about.get("threads"), about.get("version")]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsabench"
    return folder / f"peaks-{key[0]}-{name}.json"


def save_peaks(path: Path, peaks: Mapping[str, Any]) -> None:
    """Keep peaks at `path`, whole or not at all; StoreError or DiskError where they cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps(peaks, indent=1).encode() + b"\n")
    except OSError as error:
        raise disk_error(f"keep peaks in {path}", error) from error


def load_peaks(path: Path) -> dict[str, Any] | None:
    """The peaks kept at `path`; None where there are none. StoreError for a damaged file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise disk_error(f"read peaks in {path}", error) from error
    except ValueError:
        raise StoreError(f"{path} is damaged: nsabench doctor --calibrate writes it anew") from None
    if not isinstance(found, dict):
        raise StoreError(f"{path} is damaged: nsabench doctor --calibrate writes it anew")
    return found


def stored_peaks(environment: Mapping[str, Any], devices: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By device, the peaks kept of it on this machine; a device without any that can be read is left out."""
    found = {}
    for device in dict.fromkeys(devices):
        with suppress(StoreError):
            peaks = load_peaks(peaks_file(environment, device))
            if peaks:
                found[device] = peaks
    return found
