"""Criteria about scorecards and trainings, held against stored rows."""

from collections.abc import Mapping
from typing import Any

from nsabench.plan.criteria import percent
from nsabench.present.evidence import MET, NOT_MEASURED, NOT_MET, Found, first_of, held, missing, several
from nsabench.present.material import (
    Material,
    ends_of,
    far_needles,
    id_of,
    is_finished,
    is_finite,
    is_ours,
    last_gates,
    last_step,
    losses_of,
    near_chance,
    scorecard_line,
    setting_of,
    total_accuracy,
    training_status,
)
from nsabench.store.training import Training


def judge_verify(wanted: str, everything: Material) -> Found:
    """Every scorecard there is, and nothing of ours fails in any."""
    if not everything.scorecards:
        return missing("no scorecard was given; nsabench verify makes one")
    failed, lacking = [], []
    for card in everything.scorecards:
        ours = [row for row in card.rows if is_ours(row, card.info)]
        failed += [
            f"{id_of(card)}: {row['rule']} of {row['subject']} in {row['dtype']}: {row['reason']}"
            for row in ours
            if row["status"] == "fail"
        ]
        if not any(row["status"] in ("pass", "fail") for row in ours):
            lacking.append(f"{id_of(card)}: no check of ours ran")
        elif not is_finished(card):
            lacking.append(f"{id_of(card)}: not finished, {card.info.get('status') or 'status unknown'}")
    said = "; ".join(map(scorecard_line, everything.scorecards))
    if failed:
        return held(False, said, first_of(failed))
    if lacking:
        return missing("; ".join(lacking), [id_of(card) for card in everything.scorecards])
    return held(True, said, [id_of(card) for card in everything.scorecards])


def judge_training(wanted: Mapping[str, Any], everything: Material) -> Found:
    """The training that comes nearest to what is wanted; one that has it all, where there is one."""
    precision = wanted.get("precision")
    fitting = [
        training
        for training in everything.trainings
        if precision is None or setting_of(training, "precision") == precision
    ]
    if not fitting:
        what = f" in {precision}" if precision else ""
        option = f" --precision {precision}" if precision else ""
        return missing(f"no training{what} was given; nsabench train{option} makes one")
    order = (MET, NOT_MET, NOT_MEASURED)
    return min((_one(wanted, training) for training in fitting), key=lambda one: order.index(one.outcome))


def _one(wanted: Mapping[str, Any], training: Training) -> Found:
    """Every part of the criterion, held against one training."""
    parts = [_status(training), *_losses(wanted, training)]
    if "steps" in wanted:
        steps = last_step(training)
        parts.append(held(steps >= wanted["steps"], several(steps, "step")))
    if wanted.get("open_gates"):
        parts.append(_gates(training))
    if "needle" in wanted:
        parts.append(_needle(wanted["needle"], training))
    if wanted.get("sel_off_near_chance"):
        parts.append(_without_sel(training))
    evidence = [id_of(training), *(text for part in parts for text in part.evidence)]
    for outcome in (NOT_MET, NOT_MEASURED):
        if bad := [part.measured for part in parts if part.outcome == outcome]:
            return Found(outcome, "; ".join(bad), tuple(evidence))
    limits = [text for part in parts for text in part.limits]
    return held(True, ", ".join(part.measured for part in parts), evidence, limits)


def _status(training: Training) -> Found:
    status = training_status(training)
    if not status:
        return missing("a status of the training")
    reason = training.info.get("reason")
    said = f"status {status}" + (f" ({reason})" if reason and status != "ok" else "")
    return held(status == "ok", said)


def _losses(wanted: Mapping[str, Any], training: Training) -> list[Found]:
    losses = losses_of(training)
    if not losses:
        return [missing("a loss: no step was logged")]
    bad = [row["step"] for row in training.steps if not is_finite(row["loss"])]
    if bad:
        return [held(False, f"loss not finite at step {bad[0]}, in {len(bad)} of {len(losses)} logged steps")]
    found = [held(True, "every loss finite")]
    known = [loss for loss in losses if loss is not None]
    first, last = ends_of(known)
    if "loss" in wanted:
        found.append(held(last <= wanted["loss"], f"final loss {last:.4g} nats"))
    if wanted.get("loss_falls"):
        said = f"loss {first:.4g} to {last:.4g} nats"
        if len(known) < 2:
            found.append(missing("whether the loss falls: one step was logged"))
        else:
            found.append(held(last < first, said))
    return found


def _gates(training: Training) -> Found:
    gates = last_gates(training)
    if not gates or any(row["collapsed"] is None for row in gates):
        return missing("gate shares: the training did not look at them (--no-stats?)")
    shut = [str(row["layer"]) for row in gates if row["collapsed"]]
    before = {row["step"] for row in training.gates if row["collapsed"]} - {gates[0]["step"]}
    limits = [f"gates had collapsed at step {min(before)} and opened again"] if before and not shut else []
    said = f"gates collapsed in layer {', '.join(shut)}" if shut else "no gate collapsed"
    return held(not shut, said, limits=limits)


def _needle(least: float, training: Training) -> Found:
    rows = far_needles(training, sel=True)
    if not rows:
        return missing("needle accuracy past the window: none was evaluated")
    accuracy, chance, count = total_accuracy(rows)
    said, guessed = percent(round(accuracy, 4)), percent(round(chance, 4))
    return held(accuracy >= least, f"needle {said} of {count} past the window (chance {guessed})")


def _without_sel(training: Training) -> Found:
    rows = far_needles(training, sel=False)
    if not rows:
        return missing("needle accuracy with sel off: none was evaluated")
    accuracy, chance, count = total_accuracy(rows)
    said = f"{percent(round(accuracy, 4))} with sel off"
    return held(near_chance(accuracy, chance, count), said)
