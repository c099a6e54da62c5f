"""What is to be trained, from the options given: checked before anything is written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nsa import Routing, UnsupportedRoute
from nsa.routes import Request, resolve
from nsabench.commands._sweep import device_of
from nsabench.plan import PlanError
from nsabench.plan.training import SYNTHETIC_DATA, Settings, defaults_of, resumed
from nsabench.store import StoreError
from nsabench.store.journal import read_info, said_kind
from nsabench.store.training import KIND
from nsabench.training.checkpoint import Checkpoint, check_fits, find_checkpoint, load_checkpoint
from nsabench.training.data import FileData, SyntheticData, open_data
from nsabench.training.distributed import World
from nsabench.training.model import attention_config
from nsabench.training.precision import Precision

Data = FileData | SyntheticData

COMPILING_S = 1800.0
"""What counts as a hang with `--compile`, by default: a compiler gives no sign of life in the first step."""


@dataclass(frozen=True)
class Job:
    """What is to be trained: settings of this rank, its data, whose content `data_id` tells from any other,
    and where it goes on, if it does.
    """

    settings: Settings
    data: Data
    data_id: str
    start: Checkpoint | None = None
    start_path: Path = field(default_factory=Path)


def job_of(given: Mapping[str, Any], resume: Path | None, world: World) -> Job:
    """The training that the settings given mean, or that goes on from `resume`.

    PlanError and StoreError for what cannot be; nothing is written.
    """
    return _new(given, world) if resume is None else _resumed(given, resume, world)


def _new(given: Mapping[str, Any], world: World) -> Job:
    wanted = dict(given)
    device = device_of(wanted.pop("device", "auto"))
    wanted |= {"device": device, "world": world.size}
    if wanted.get("compile"):
        wanted.setdefault("hang_timeout", COMPILING_S)
    settings = Settings.of({**defaults_of(wanted.get("data")), **wanted})
    return Job(*_checked(settings, world))


def _resumed(given: Mapping[str, Any], where: Path, world: World) -> Job:
    path = find_checkpoint(where)
    info = read_info(path.parent)
    if info.get("kind") != KIND:
        raise StoreError(f"{path.parent} is {said_kind(info)}; allowed here: {said_kind({'kind': KIND})}")
    wanted = {name: value for name, value in given.items() if (name, value) != ("device", "auto")}
    settings = resumed(Settings.of(info["settings"]), wanted | {"world": world.size}, str(path.parent))
    if world.size > 1:
        # What is stored is the GPU of rank 0.
        settings = replace(settings, device=settings.device.partition(":")[0])
    device_of(settings.device)
    start = load_checkpoint(path)
    settings, data, data_id = _checked(settings, world)
    check_fits(start, settings, data_id, path)
    return Job(settings, data, data_id, start, path)


def _checked(settings: Settings, world: World) -> tuple[Settings, Data, str]:
    """The settings of this rank, its data, and which it is; PlanError for what cannot run here."""
    config = attention_config(settings.model)
    settings = replace(settings, device=world.device_of(settings.device))
    precision = Precision(settings.precision, torch.device(settings.device))
    if settings.compile and settings.device == "cpu" and _no_compiler():
        raise PlanError("--compile: torch.compile needs a C++ compiler on a CPU, and there is no g++ here")
    precision.check()
    request = Request(
        device=precision.device.type,
        dtype=precision.dtype,
        num_queries=1 if settings.mode == "stepwise" else settings.S,
        kv_len=settings.S,
        needs_grad=True,
        config=config,
    )
    try:
        resolve(Routing.parse(settings.route), request)
    except UnsupportedRoute as error:
        raise PlanError(f"--routes: {settings.route} cannot train here: {error}") from None
    return settings, open_data(settings), _identity(settings.data)


def _identity(data: str) -> str:
    """A hash of the file's content; empty for the synthetic task, which its settings tell."""
    if data == SYNTHETIC_DATA:
        return ""
    try:
        with Path(data).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PlanError(f"--data: cannot read {data}: {error.strerror or error}") from None


def _no_compiler() -> bool:
    return not any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++"))
