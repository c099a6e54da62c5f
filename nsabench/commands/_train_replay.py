"""`nsabench train --replay FILE`: the step that was not finite, done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from nsabench.commands._console import CHECK_FAILED, GOOD, console
from nsabench.commands._sweep import device_of
from nsabench.plan import PlanError
from nsabench.plan.training import option_name
from nsabench.training.guard import Replayed, replay


def replay_of(path: Path, given: Mapping[str, Any], resume: Path | None, *, as_json: bool) -> int:
    """Do the step again, and say what was found then and now; returns the exit code: 1 where something is
    still not finite.

    PlanError for other options than `--device`: the file has them all.
    """
    for name in given:
        if name != "device":
            raise PlanError(f"{option_name(name)}: not with --replay, which repeats a step as it was")
    if resume is not None:
        raise PlanError("--resume: not with --replay, which trains nothing")
    device = given.get("device")
    found = replay(path, None if device is None else device_of(device))
    if as_json:
        typer.echo(json.dumps(_object(found), allow_nan=False))
    else:
        for line in _lines(found):
            console().print(line, soft_wrap=True, markup=False)
    return GOOD if found.found is None else CHECK_FAILED


def _lines(found: Replayed) -> list[str]:
    where = f"step {found.step}" + (f" of rank {found.rank}" if found.rank else "")
    then = str(found.recorded) if found.recorded is not None else "found nowhere"
    now = str(found.found) if found.found is not None else "everything is finite"
    return [
        f"{where}, which ended because {found.cause}",
        f"then: {then}",
        f"now:  {now}" + (" (the same place)" if found.same and found.found is not None else ""),
    ]


def _object(found: Replayed) -> dict[str, Any]:
    both = {"recorded": found.recorded, "found": found.found}
    return {
        "step": found.step,
        "rank": found.rank,
        "cause": found.cause,
        **{name: None if one is None else one.to_dict() for name, one in both.items()},
        "same": found.same,
    }
