"""Stops a training at its first NaN or infinity, says where it came from, and keeps the step to repeat."""

from __future__ import annotations

import io
import json
import pickle
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsabench.plan import PlanError
from nsabench.plan.training import Settings
from nsabench.store.files import disk_error, replace
from nsabench.training.checkpoint import random_state, restore_random
from nsabench.training.locate import Batch, Finding, bad_gradient, locate
from nsabench.training.loop import Objective
from nsabench.training.model import ByteLM
from nsabench.training.observe import Observer, StopTraining
from nsabench.training.precision import Precision

NAN = "nan"
FORMAT, VERSION = "nsabench replay", 1
WAIT_S = 30.0
"""How long a rank waits for what the others found."""


def replay_file(rank: int) -> str:
    """Name of the file in a run's folder that holds the step of this rank."""
    return "replay.pt" if rank == 0 else f"replay.rank{rank}.pt"


class Guard(Observer):
    """Says where the first number of a step was made that is not finite.

    Told that a step ended for its loss, its gradients or an anomaly that torch detected, it does the step
    again with every tensor looked at, writes `replay_file`, and names the first bad tensor in the reason. A
    step that is fine pays nothing: its batches and the generators' states are kept until the next. An
    overflow of fp16 that the scaler skips ends no step.

    Args:
        folder: of the run.
        scaler: of fp16; None or a disabled one for the others.
        detect_anomaly: let torch find the backward function that makes a NaN. A stop by it is named the
            same way.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        scaler: torch.amp.GradScaler | None = None,
        detect_anomaly: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._folder, self._settings, self._scaler = folder, settings, scaler
        self._anomaly, self._rank, self._world = detect_anomaly, rank, world
        self._device = torch.device(settings.device)
        self._model: Any = None
        self._batches: list[Batch] = []
        self._random: dict[str, Any] = {}
        self._was_on = torch.is_anomaly_enabled()

    def begin(self, model: nn.Module, first_step: int) -> None:
        self._model = model
        (self._folder / _word_file(self._rank)).unlink(missing_ok=True)
        if self._anomaly:
            torch.autograd.set_detect_anomaly(True)

    def begin_step(self, step: int) -> None:
        self._random = random_state(self._device)
        self._batches = []

    def batch(self, step: int, micro: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        self._batches.append((tokens, mask))

    def failed(self, step: int, error: Exception) -> None:
        cause = " ".join(str(error).split())
        bad = error.status == NAN if isinstance(error, StopTraining) else _is_anomaly(error)
        if bad and self._batches:
            raise StopTraining(NAN, self._said(step, cause)) from error

    def finish(self) -> None:
        if self._anomaly:
            torch.autograd.set_detect_anomaly(self._was_on)

    def _scale(self) -> float:
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def _said(self, step: int, cause: str) -> str:
        """Locate, write what is needed to do it again, and say it in a line."""
        gradient = bad_gradient(self._model)
        try:
            found, again = self._locate(), "done again, the step is finite"
        except torch.OutOfMemoryError:
            found, again = None, "too little memory to locate it"
        path = self._folder / replay_file(self._rank)
        _save(path, self._content(step, found, cause))
        said = f"step {step}: {found}"
        if found is None:
            said = "; ".join([cause, *([] if gradient is None else [str(gradient)]), again])
        if self._world > 1:
            said = self._together(step, found, said)
        return f"{said}; to repeat it: nsabench train --replay {path}"

    def _locate(self) -> Finding | None:
        """The first bad tensor; None where doing the step again shows none."""
        model, settings = self._model, self._settings
        if self._world > 1:
            # Backward hooks of DDP are on the weights, and would wait for other ranks.
            model = ByteLM(settings.model).to(self._device)
            model.load_state_dict(self._model.state_dict())
        with torch.autograd.set_detect_anomaly(False):
            return repeat(model, settings, self._batches, self._random, self._scale())

    def _content(self, step: int, found: Finding | None, cause: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "rank": self._rank,
            "cause": cause,
            "finding": None if found is None else found.to_dict(),
            "settings": self._settings.to_dict(),
            "model": self._model.state_dict(),
            "batches": [list(batch) for batch in self._batches],
            "random": self._random,
            "scaler": {} if self._scaler is None else self._scaler.state_dict(),
            "scale": self._scale(),
        }

    def _together(self, step: int, found: Finding | None, said: str) -> str:
        """What the ranks found, for rank 0 to say: gradients that met are bad on all of them."""
        word = json.dumps({"step": step, "said": str(found) if found is not None else ""})
        _put(self._folder / _word_file(self._rank), word.encode())
        if found is not None or self._rank:
            return said if found is not None else "the gradients of another rank are not finite"
        end = time.monotonic() + WAIT_S
        waiting = list(range(1, self._world))
        while waiting and time.monotonic() < end:
            for rank in list(waiting):
                with suppress(OSError, ValueError, KeyError):
                    told = json.loads((self._folder / _word_file(rank)).read_bytes())
                    if told["step"] == step:
                        waiting.remove(rank)
                        if told["said"]:
                            return f"rank {rank}: {told['said']}"
            time.sleep(0.05)
        return said


def _is_anomaly(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "returned nan values" in str(error)


def _word_file(rank: int) -> str:
    return f"nan.rank{rank}.json"


def _put(path: Path, data: bytes) -> None:
    try:
        replace(path, data)
    except OSError as error:
        raise disk_error(f"write {path}", error) from error


def _save(path: Path, content: dict[str, Any]) -> None:
    data = io.BytesIO()
    torch.save(content, data)
    _put(path, data.getvalue())


def repeat(
    model: nn.Module, settings: Settings, batches: list[Batch], random: dict[str, Any], scale: float
) -> Finding | None:
    """Do a step's forward and backward again as `locate` does, from the generators' states before it."""
    device = torch.device(settings.device)
    restore_random(random, device)
    precision = Precision(settings.precision, device)
    objective: Any = Objective(model, settings)  # type: ignore[arg-type]
    return locate(model, objective, batches, scale=scale, autocast=precision.autocast)


@dataclass(frozen=True)
class Replayed:
    """A stored step, done again. ``recorded`` is what was found when it was stored, with its ``cause``;
    ``found`` what was found now. None where nothing was not finite.
    """

    step: int
    rank: int
    cause: str
    recorded: Finding | None
    found: Finding | None

    @property
    def same(self) -> bool:
        """Whether the place is the same as before."""
        places = [None if one is None else (one.place, one.bad) for one in (self.recorded, self.found)]
        return places[0] == places[1]


def replay(path: Path, device: str | None = None) -> Replayed:
    """Do the step in a replay file again, with every tensor looked at; on another device where one is named.

    PlanError in a line for a file that is none, and for a device that is not there.
    """
    content = _read(path)
    try:
        settings = Settings.of(content["settings"] | ({} if device is None else {"device": device}))
        if settings.device.startswith("cuda") and not torch.cuda.is_available():
            raise PlanError(
                f"{path} is of {settings.device}, and torch sees no GPU; --device cpu takes the CPU"
            )
        model = ByteLM(settings.model).to(settings.device)
        model.load_state_dict(content["model"])
        batches = [
            (tokens.to(settings.device), mask.to(settings.device)) for tokens, mask in content["batches"]
        ]
        recorded = None if content["finding"] is None else Finding.of(content["finding"])
        about = int(content["step"]), int(content["rank"]), str(content["cause"])
        random, scale = content["random"], float(content["scale"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"{path} is damaged: {' '.join(str(error).split())[:120]}") from None
    return Replayed(*about, recorded, repeat(model, settings, batches, random, scale))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror or error}") from None
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, KeyError):
        raise PlanError(f"{path} is damaged or no replay file") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{path} is no replay file of nsabench train")
    if content.get("version") != VERSION:
        raise PlanError(f"{path} has version {content.get('version')!r}; this nsabench reads {VERSION}")
    return content
