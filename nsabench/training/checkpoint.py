"""What a training needs to go on exactly, in one file that is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nsabench.plan import PlanError
from nsabench.plan.training import FREE, Settings, option_name
from nsabench.store import StoreError
from nsabench.store.files import disk_error, sync_folder

FORMAT = 1
_NAME = re.compile(r"checkpoint-([0-9]{9})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step`. `settings` is flat, as `Settings.to_dict` gives; `data` identifies what was
    learned from; `rng` has the generators' states of each rank; `observers` what they asked to keep.
    """

    step: int
    settings: dict[str, Any]
    data: str
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    overflows: int
    rng: list[dict[str, Any]]
    observers: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return folder / f"checkpoint-{step:09}.pt"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest step first."""
    return sorted(path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = 1) -> Path:
    """Write it beside the others, durably; then remove all but the last `keep`, and those of later steps,
    which are of a future that was given up. Returns its path.

    DiskError or StoreError where it cannot be written: those that were there are as they were.
    """
    path = path_of(folder, checkpoint.step)
    temporary = folder / f".{path.name}.new"
    content = {"format": FORMAT, **{one.name: getattr(checkpoint, one.name) for one in fields(checkpoint)}}
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(f"write {path}", _os_error(error)) from error
    sync_folder(folder)
    _remove_others(folder, checkpoint.step, keep)
    return path


def _os_error(error: BaseException) -> OSError:
    """What the disk said: torch's writer ends in a RuntimeError that hides it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return OSError(None, " ".join(str(error).split()))


def _remove_others(folder: Path, step: int, keep: int) -> None:
    there = {int(found[1]): path for path in checkpoints_in(folder) if (found := _NAME.fullmatch(path.name))}
    kept = sorted(number for number in there if number <= step)[-keep:]
    for number, path in there.items():
        if number not in kept:
            with contextlib.suppress(OSError):
                path.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove what a writer that was killed left behind."""
    for path in folder.glob(".checkpoint-*.pt.new"):
        with contextlib.suppress(OSError):
            path.unlink()


def find_checkpoint(where: Path) -> Path:
    """The file meant by a run's folder (its last checkpoint) or by the file itself; StoreError for none."""
    if where.is_dir():
        found = checkpoints_in(where)
        if not found:
            raise StoreError(f"{where} has no checkpoint to go on from")
        return found[-1]
    if not where.is_file():
        raise StoreError(f"{where} is neither a run's folder nor a checkpoint")
    return where


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file, its tensors on the CPU. Nothing in the file is run.

    StoreError for a file that is damaged, of another format, or not a checkpoint.
    """
    try:
        with path.open("rb") as file:
            content = _content(file, path)
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except OSError as error:
        raise disk_error(f"read {path}", error) from error
    if not isinstance(content, dict) or "format" not in content:
        raise StoreError(f"{path} is no checkpoint of nsabench train")
    if content["format"] != FORMAT:
        raise StoreError(f"{path} has format {content['format']}; this nsabench reads {FORMAT}")
    try:
        return Checkpoint(**{one.name: content[one.name] for one in fields(Checkpoint)})
    except KeyError as error:
        raise StoreError(f"{path} is damaged: it has no {error}") from None


def _content(file: BinaryIO, path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError) as error:
        if getattr(error, "errno", None) == errno.EIO:
            raise
        said = " ".join(str(error).split())[:120]
        raise StoreError(f"{path} is damaged or no checkpoint: {said}") from None


def check_fits(checkpoint: Checkpoint, settings: Settings, data: str, where: Path) -> None:
    """PlanError in one line, naming what differs, unless a training of these settings and data can go on."""
    wanted = settings.to_dict()
    for name, was in checkpoint.settings.items():
        if name in FREE or name in ("steps", "device"):
            continue
        if wanted.get(name) != was:
            raise PlanError(
                f"{option_name(name)}: is {wanted.get(name)!r}, and {where} was written with {was!r}"
            )
    if checkpoint.data != data:
        raise PlanError(f"--data: {settings.data} has other content than what {where} was trained on")
    if checkpoint.step > settings.steps:
        done = f"{where} is of step {checkpoint.step}"
        raise PlanError(f"--steps: {settings.steps} is less than what is done already: {done}")


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], where: Path) -> None:
    """Put weights into a model. StoreError names the first tensor that does not fit; none is then changed."""
    mine = model.state_dict()
    for name in dict.fromkeys([*mine, *weights]):
        if name not in weights or name not in mine:
            lacks = "has no" if name not in weights else "has a foreign"
            raise StoreError(f"{where} is of another model: it {lacks} {name}")
        if mine[name].shape != weights[name].shape:
            given, wanted = tuple(weights[name].shape), tuple(mine[name].shape)
            raise StoreError(f"{where} is of another shape: {name} is {given}, this model's is {wanted}")
    model.load_state_dict(dict(weights))


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of torch's generators that this rank draws from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: Mapping[str, Any], device: torch.device) -> None:
    """Go on drawing from where `random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
