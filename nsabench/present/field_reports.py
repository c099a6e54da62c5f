"""What five field reports on an earlier NSA code saw, beside what the stored runs say of the same thing.

Theirs are the reports' own figures; ours are read from the runs given, and where no run has one, the command
that measures it stands in its place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from nsabench.plan.checks import NAMED, RULES
from nsabench.present.frame import Row, cell_rows
from nsabench.present.material import (
    Material,
    device_of,
    ends_of,
    id_of,
    is_finite,
    is_ours,
    last_gates,
    last_step,
    losses_of,
    setting_of,
    training_status,
)
from nsabench.present.naming import machine_of
from nsabench.present.scorecard import named_checks
from nsabench.present.wording import digits, value_text
from nsabench.store.schema import STAGES
from nsabench.store.training import Training


class Answer(NamedTuple):
    """Our figure in words, the run it is of, and what the report's mistake gives here, where it was made."""

    ours: str = ""
    run_id: str = ""
    mistake: str = ""


@dataclass(frozen=True)
class Asked:
    """One thing a report says. `find` looks for ours; `command` measures it."""

    report: str
    what: str
    reported: str
    find: Callable[[Material], Answer | None] = field(compare=False)
    command: str


@dataclass(frozen=True)
class Beside:
    """A figure of a report and ours; `ours` is empty where no run has one."""

    asked: Asked
    ours: str
    run_id: str
    mistake: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "report": self.asked.report,
            "what": self.asked.what,
            "reported": self.asked.reported,
            "ours": self.ours or None,
            "mistake": self.mistake or None,
            "run_id": self.run_id or None,
            "command": self.asked.command,
        }


def field_reports(material: Material) -> list[Beside]:
    """Every figure of the reports beside ours."""
    return [Beside(asked, *(asked.find(material) or Answer())) for asked in ASKED]


def answers_reports(material: Material) -> bool:
    """Whether the runs hold any of the checks that are named for the reports."""
    return any(row["rule"] in NAMED for card in material.scorecards for row in card.rows)


def _check(rule: str, device: str = "") -> Callable[[Material], Answer | None]:
    """The largest error of our rows of a check, in each dtype that ran, on that device or any."""

    def find(material: Material) -> Answer | None:
        for card in material.scorecards:
            rows = [row for row in card.rows if row["rule"] == rule and is_ours(row, card.info)]
            ran = any(row["status"] in ("pass", "fail") for row in rows)
            if ran and (not device or device_of(card).startswith(device)):
                for said in named_checks(rows):
                    return Answer(said.ours, id_of(card), said.mistake)
        return None

    return find


def _prefill(size: int) -> Callable[[Material], Answer | None]:
    def find(material: Material) -> Answer | None:
        for row, machine in _ok_rows(material, "prefill", size):
            return Answer(f"{digits(row['ms_total'])} ms ({row['dtype']}, {machine})", row["run_id"])
        return None

    return find


def _decode(size: int) -> Callable[[Material], Answer | None]:
    """The time of a step, the shares of the three branches, and what all stages add up to."""

    def find(material: Material) -> Answer | None:
        for row, machine in _ok_rows(material, "decode", size):
            shares = {stage: row[f"share_{stage}_pct"] for stage in STAGES}
            known = [share for share in shares.values() if share is not None]
            if not known or any(shares[branch] is None for branch in ("cmp", "sel", "win")):
                continue
            three = " + ".join(f"{shares[branch]:.1f}" for branch in ("cmp", "sel", "win"))
            total = math.fsum(known)
            said = f"cmp + sel + win = {three} %, all stages {total:.1f} %"
            where = f"{row['dtype']}, {machine}"
            return Answer(f"{digits(row['ms_total'])} ms: {said} ({where})", row["run_id"])
        return None

    return find


def _ok_rows(material: Material, phase: str, size: int) -> list[tuple[Row, str]]:
    """Forward cells of the layer at B = 1 that are ok, by the route auto before others, and the machines."""
    wanted = {"phase": phase, "S": size, "B": 1, "passes": "fwd", "scope": "module", "impl": "nsa", "twin": 0}
    found = [
        (row, machine_of(part.info, row["device"]))
        for part in material.parts
        for row in cell_rows(part.cells)
        if row["status"] == "ok"
        and row["mode"] == "batched"
        and all((row[name] or 0) == value for name, value in wanted.items())
    ]
    return sorted(found, key=lambda item: value_text(item[0], "route") != "auto")


def _training(what: Callable[[Training], str], **wanted: str) -> Callable[[Material], Answer | None]:
    """What is said of the first training with these settings."""

    def find(material: Material) -> Answer | None:
        for training in material.trainings:
            fits = all(setting_of(training, name) == value for name, value in wanted.items())
            if fits and (said := what(training)):
                return Answer(said, id_of(training))
        return None

    return find


def _finite(training: Training) -> str:
    losses = losses_of(training)
    if not losses:
        return ""
    finite = sum(map(is_finite, losses))
    said = f"status {training_status(training)}, {last_step(training)} steps, "
    said += "every loss finite" if finite == len(losses) else f"{len(losses) - finite} losses not finite"
    overflows = max((row["overflows"] or 0 for row in training.steps), default=0)
    return said + (f", {overflows} overflows handled by the scaler" if overflows else "")


def _smoke(training: Training) -> str:
    losses = [loss for loss in losses_of(training) if loss is not None and is_finite(loss)]
    speeds = [row["tokens_per_s"] for row in training.steps if row["tokens_per_s"] is not None]
    if not losses or not speeds:
        return ""
    first, last = ends_of(losses)
    parts = [
        f"{median(speeds):.0f} tokens/s",
        f"loss {first:.2f} to {last:.2f} in {last_step(training)} steps",
    ]
    entropies = [row["entropy"] for row in last_gates(training) if row["entropy"] is not None]
    if entropies:
        parts.append(f"gate entropy {math.fsum(entropies) / len(entropies):.3f} nats")
    return ", ".join(parts)


_SMALL, _NAN, _FA2 = "small-S equivalence", "batched prefill NaN", "FA2 routing"
_PACKED, _STEP5 = "selection varlen v2", "step-5 hang, fp16 NaN"


def _verify(rule: str, device: str = "") -> str:
    return f"nsabench verify --full --rules {rule}" + (f" --device {device}" if device else "")


def _mae(rule: str) -> str:
    return f"MAE {RULES[rule].reported:g}"


_PREFILL_MS = {128: 417.83, 256: 831.65, 512: 1672.25, 1024: 3363.94}
_DECODE = {
    512: (5.96, 103.9, 101.1, 101.0),
    1024: (5.95, 100.1, 100.1, 99.8),
    2048: (6.33, 100.5, 102.5, 103.1),
}


def _decode_text(ms: float, *shares: float) -> str:
    three = " + ".join(f"{share:.1f}" for share in shares)
    return f"{ms:g} ms: cmp + sel + win = {three} %, {math.fsum(shares):.1f} % together"


ASKED: tuple[Asked, ...] = (
    Asked(
        _SMALL,
        "smallS_equivalence: window only, against full attention",
        f"{_mae('smallS_equivalence')}, waved through as numerical precision",
        _check("smallS_equivalence"),
        _verify("smallS_equivalence"),
    ),
    Asked(
        _NAN,
        "no_nan_rows: queries that see nothing",
        "rows become NaN, laid to boolean masks",
        _check("no_nan_rows"),
        _verify("no_nan_rows"),
    ),
    Asked(
        _NAN,
        "phi_mlp_matches_avg: mlp and conv that average, against mean",
        "fails in prefill with NaN",
        _check("phi_mlp_matches_avg"),
        _verify("phi_mlp_matches_avg"),
    ),
    Asked(
        _FA2,
        "sliding_fa2: the window through FA2's window_size",
        f"{_mae('sliding_fa2')}, called a fundamental limitation",
        _check("sliding_fa2"),
        _verify("sliding_fa2"),
    ),
    Asked(
        _FA2,
        "compressed_fa2: a length for each row",
        "passes, with causal=True on a rectangle",
        _check("compressed_fa2"),
        _verify("compressed_fa2"),
    ),
    Asked(
        _PACKED,
        "selection_packed: packed rows, on a CPU",
        f"{_mae('selection_packed')}, called production ready",
        _check("selection_packed", "cpu"),
        _verify("selection_packed", "cpu"),
    ),
    Asked(
        _PACKED,
        "selection_packed: packed rows, on CUDA",
        "MAE 0.325, called production ready",
        _check("selection_packed", "cuda"),
        _verify("selection_packed", "cuda"),
    ),
    *(
        Asked(
            _PACKED,
            f"prefill, S={size}",
            f"{ms:.2f} ms (A100)",
            _prefill(size),
            f"nsabench prefill --S {','.join(map(str, _PREFILL_MS))}",
        )
        for size, ms in _PREFILL_MS.items()
    ),
    Asked(
        _PACKED,
        "training smoke test",
        "345 to 352 tokens/s, loss 5.69 to 5.67 in 40 steps, gate entropy 1.098",
        _training(_smoke),
        "nsabench train --data synthetic",
    ),
    Asked(
        _STEP5,
        "training, prefill fed token by token",
        "hangs at step 5",
        _training(_finite, mode="stepwise"),
        "nsabench train --data synthetic --mode stepwise --steps 20",
    ),
    Asked(
        _STEP5,
        "training in fp16, batched",
        "loss NaN after step 1",
        _training(_finite, precision="fp16", mode="batched"),
        "nsabench train --data synthetic --precision fp16 --steps 1000 --device cuda",
    ),
    Asked(
        _STEP5,
        "batched_equals_stepwise: one prefill, two ways to feed it",
        "sequential hangs, batched goes on with NaN",
        _check("batched_equals_stepwise"),
        _verify("batched_equals_stepwise"),
    ),
    *(
        Asked(
            "all: decode shares",
            f"decode, S={size}",
            _decode_text(*figures),
            _decode(size),
            f"nsabench decode --S {','.join(map(str, _DECODE))}",
        )
        for size, figures in _DECODE.items()
    ),
)
"""What the reports say, in their order."""
