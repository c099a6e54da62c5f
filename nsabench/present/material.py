"""Stored runs of every kind, as a report takes them, and what each says of itself in a line."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nsabench.store import Run, RunCells, load_run
from nsabench.store.journal import read_info
from nsabench.store.scorecard import KIND as VERIFY
from nsabench.store.scorecard import Scorecard, load_scorecard
from nsabench.store.training import KIND as TRAIN
from nsabench.store.training import Training, load_training

Info = Mapping[str, Any]
Stored = Run | Scorecard | Training
ALL_FAR_NEEDLES = "needle past the window"
"""What an evaluation calls all needles from beyond the window together."""

AnyCells = TypeVar("AnyCells", bound=RunCells)

_OURS = re.compile(r"(cmp|score|sel|win|layer|all):")


@dataclass(frozen=True, eq=False)
class Material:
    """What there is to report on: runs of cells, scorecards and trainings, each in the order given."""

    cells: tuple[Run, ...] = ()
    scorecards: tuple[Scorecard, ...] = ()
    trainings: tuple[Training, ...] = ()

    @property
    def runs(self) -> list[Stored]:
        """All of them."""
        return [*self.cells, *self.scorecards, *self.trainings]

    @property
    def infos(self) -> list[Info]:
        """run.json of all, a merged run's replaced by those it was made from."""
        found: list[Info] = []
        for run in self.runs:
            found += run.sources if isinstance(run, Run) else [run.info]
        return found

    @property
    def parts(self) -> list[Run]:
        """The runs of cells, a merged one as those it was made from."""
        return [part for run in self.cells for part in run.parts()]


def load_material(folders: Iterable[Path]) -> Material:
    """The runs in these folders, whatever their kind. StoreError for one that cannot be read."""
    return collected([load_any(folder) for folder in folders])


def collected(runs: Iterable[Stored]) -> Material:
    """Loaded runs, sorted by their kind."""
    given = list(runs)
    return Material(
        tuple(run for run in given if isinstance(run, Run)),
        tuple(run for run in given if isinstance(run, Scorecard)),
        tuple(run for run in given if isinstance(run, Training)),
    )


def load_any(folder: Path) -> Stored:
    """The run in the folder, whatever its kind."""
    return load_kind(folder, load_run)


def load_kind(folder: Path, load: Callable[[Path], AnyCells]) -> AnyCells | Scorecard | Training:
    """The run in the folder, whatever its kind; one of cells as `load` has it."""
    kind = read_info(folder).get("kind")
    if kind == VERIFY:
        return load_scorecard(folder)
    return load_training(folder) if kind == TRAIN else load(folder)


def id_of(run: Stored) -> str:
    """The name the run was created with."""
    return str(run.info["run_id"])


def is_ours(row: Mapping[str, Any], info: Info) -> bool:
    """Whether a row of a scorecard is of our own code, not of a peer."""
    return row["subject"] not in (info.get("peers") or ()) and _OURS.match(row["subject"]) is not None


def device_of(card: Scorecard) -> str:
    """Where a scorecard was checked, as torch names it; empty where it does not say."""
    return str(card.info.get("device") or (card.info.get("choice") or {}).get("device") or "")


def is_finite(value: float | None) -> bool:
    """Whether a stored number is there and finite: one that is not a number is stored as missing."""
    return value is not None and math.isfinite(value)


def losses_of(training: Training) -> list[float | None]:
    """The loss of every logged step, nats."""
    return [row["loss"] for row in training.steps]


def ends_of(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and of the last tenth of the values, at least one each."""
    part = max(1, len(values) // 10)
    return math.fsum(values[:part]) / part, math.fsum(values[-part:]) / part


def last_step(training: Training) -> int:
    """The last logged step, counted from 1; 0 without any."""
    return max((row["step"] for row in training.steps), default=0)


def setting_of(training: Training, *names: str) -> Any:
    """An option of the training by any of its names, be it the model's; None where it is not stored."""
    settings = training.info.get("settings") or {}
    model = settings.get("model")
    places = [settings, *([model] if isinstance(model, Mapping) else [])]
    return next((place[name] for name in names for place in places if name in place), None)


def last_gates(training: Training) -> list[dict[str, Any]]:
    """The gates of every layer when they were last looked at."""
    step = max((row["step"] for row in training.gates), default=None)
    return [row for row in training.gates if row["step"] == step]


def trained_route(training: Training) -> str:
    """The route that an evaluation puts first: as trained. Others have a branch switched off."""
    return str(training.evaluation[0]["route"]) if training.evaluation else ""


def far_needles(training: Training, *, sel: bool) -> list[dict[str, Any]]:
    """The last evaluation of needle retrieval from beyond the window: by the route as trained, or with the
    selected branch off. Either is empty where it was not evaluated, or trained so.
    """
    trained, window = trained_route(training), setting_of(training, "w")
    rows = [
        row
        for row in training.evaluation
        if row["what"].startswith("needle")
        and row["accuracy"] is not None
        and _has_sel(row["route"]) is sel
        and (not sel or row["route"] == trained)
        and (window is None or row["distance"] is None or row["distance"] > window)
    ]
    step = max((row["step"] or 0 for row in rows), default=0)
    rows = [row for row in rows if (row["step"] or 0) == step]
    # One row has all of them; those by distance are parts of it.
    return [row for row in rows if row["what"] == ALL_FAR_NEEDLES] or rows


def _has_sel(route: str) -> bool:
    return "sel=off" not in route.split(",")


def total_accuracy(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, int]:
    """Accuracy and chance over all answers of these evaluations, and how many answers there were."""
    weights = [row["count"] or 1 for row in rows]
    total = sum(weights)
    means = [
        math.fsum((row[name] or 0.0) * weight for row, weight in zip(rows, weights, strict=True)) / total
        for name in ("accuracy", "chance")
    ]
    return means[0], means[1], total


def near_chance(accuracy: float, chance: float, count: int) -> bool:
    """Whether an accuracy may be that of guessing: within 0.05 or three standard errors above it."""
    return accuracy <= chance + max(0.05, 3 * math.sqrt(max(chance * (1 - chance), 0.0) / max(count, 1)))


def scorecard_line(card: Scorecard) -> str:
    """The scorecard in a line: "120 pass, 3 unsupported; peers: 4 pass, 1 fail"."""
    parts = [_counts(row for row in card.rows if is_ours(row, card.info)) or "no check"]
    if peers := _counts(row for row in card.rows if not is_ours(row, card.info)):
        parts.append(f"peers: {peers}")
    return "; ".join(parts)


def scorecard_status(card: Scorecard) -> str:
    """pass, or fail where a check of ours failed, unsupported where none ran; running or interrupted before
    its end.
    """
    if not is_finished(card):
        return str(card.info.get("status") or "")
    ran = {row["status"] for row in card.rows if is_ours(row, card.info)} & {"pass", "fail"}
    return "fail" if "fail" in ran else "pass" if ran else "unsupported"


def is_finished(card: Scorecard) -> bool:
    """Whether all was checked that was to be: a scorecard that was cut off says less than it seems to."""
    return card.info.get("status") in ("done", "ok")


def training_status(training: Training) -> str:
    """What became of the training."""
    return str(training.info.get("status") or "")


def training_line(training: Training) -> str:
    """The training in a line: "fp32, 1000 steps, loss 5.55 to 0.31 nats, needle 98 % (chance 6 %)"."""
    losses = [loss for loss in losses_of(training) if is_finite(loss)]
    parts = [str(setting_of(training, "precision") or ""), f"{last_step(training)} steps"]
    if losses:
        first, last = ends_of([loss for loss in losses if loss is not None])
        parts.append(f"loss {first:.3g} to {last:.3g} nats")
    needles = far_needles(training, sel=True)
    if needles:
        accuracy, chance, _ = total_accuracy(needles)
        parts.append(f"needle {100 * accuracy:.0f} % (chance {100 * chance:.2g} %)")
        if without := far_needles(training, sel=False):
            parts.append(f"{100 * total_accuracy(without)[0]:.0f} % without sel")
    reason = training.info.get("reason")
    if reason and training_status(training) != "ok":
        parts.append(str(reason))
    return ", ".join(filter(None, parts))


def _counts(rows: Iterable[Mapping[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=_ORDER.index))


_ORDER = ("pass", "fail", "differs", "unsupported")
