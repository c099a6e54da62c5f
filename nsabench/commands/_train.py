"""From settings to a trained, stored and shown model, on one rank or on several."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer
from rich.console import Console

from nsabench.commands._console import (
    BAD_USAGE,
    CHECK_FAILED,
    GOOD,
    INCONCLUSIVE,
    INTERRUPTED,
    MACHINE_FAILED,
    complain,
    console,
)
from nsabench.commands._train_job import Job, job_of
from nsabench.commands._train_options import WatchOptions
from nsabench.commands._train_view import TrainView, tables_of
from nsabench.plan import PlanError, tags_of
from nsabench.store import StoreError, TableRun, capture_environment
from nsabench.store.journal import read_info
from nsabench.store.training import (
    EVAL_FILE,
    KIND,
    TRAINING_TABLES,
    load_training,
    rewind,
    summary_of,
)
from nsabench.training.capture import check_target, save_selection
from nsabench.training.checkpoint import remove_unfinished
from nsabench.training.distributed import RankFailed, World, WrongRank, started_by_torchrun
from nsabench.training.evaluate import evaluate
from nsabench.training.guard import Guard
from nsabench.training.heartbeat import Heartbeat
from nsabench.training.loop import Outcome, Trainer
from nsabench.training.model import ByteLM
from nsabench.training.observe import Observer, Observers
from nsabench.training.watch import Watch
from nsabench.training.watchdog import Watchdog

EXIT_CODES = {"ok": GOOD, "interrupted": INTERRUPTED, "oom": INCONCLUSIVE}
"""Of a training's status; every other is a failed check."""


def train_of(given: Mapping[str, Any], resume: Path | None, watch: WatchOptions) -> int:
    """Train what the settings mean, or go on with `resume`; returns the exit code.

    PlanError and StoreError for what cannot be: before anything is written.
    """
    world = World.of(os.environ)
    try:
        job = job_of(given, resume, world)
        if watch.save_selection is not None:
            check_target(watch.save_selection, job.settings)
        if _finished(job):
            return _nothing_left(job, watch, world)
        world.join(job.settings.device)
        try:
            return _with_run(job, world, watch)
        finally:
            world.leave()
    except RankFailed:
        return BAD_USAGE
    except WrongRank as error:
        complain(f"rank {world.rank}: {error}")
        return BAD_USAGE
    except (PlanError, StoreError):
        if world.first:
            raise
        return BAD_USAGE  # rank 0 has said it


def _finished(job: Job) -> bool:
    if job.start is None or job.start.step < job.settings.steps:
        return False
    return read_info(job.start_path.parent).get("status") == "ok"


def _nothing_left(job: Job, watch: WatchOptions, world: World) -> int:
    folder = job.start_path.parent
    if world.first:
        console(stderr=watch.json).print(f"nothing left to do: all {job.settings.steps} steps are done")
        _show(folder, watch)
    return GOOD


def _with_run(job: Job, world: World, watch: WatchOptions) -> int:
    """Train into the run: a new one, or the one that goes on. Rank 0 writes it; all know its folder."""
    run: TableRun | None = None

    def opened() -> Path:
        nonlocal run
        run = _created(job, watch) if job.start is None else _reopened(job)
        return run.path

    folder = world.from_first(opened)
    try:
        code = _train(job, world, watch, folder, run)
        if run is not None:
            _show(folder, watch)
        return code
    finally:
        if run is not None:
            run.close()


def _created(job: Job, watch: WatchOptions) -> TableRun:
    argv = sys.argv[1:]
    return TableRun.create(
        watch.out,
        kind=KIND,
        name="train",
        argv=argv,
        repro=shlex.join(["nsabench", *argv]),
        environment=capture_environment(),
        tables=TRAINING_TABLES,
        tags=tags_of(watch.tag or [], "--tag"),
        status="running",
        reason="",
        settings=job.settings.to_dict(),
        seed=job.settings.seed,
        data=job.data_id,
    )


def _reopened(job: Job) -> TableRun:
    assert job.start is not None
    run = TableRun.open(job.start_path.parent, KIND, TRAINING_TABLES)
    try:
        remove_unfinished(run.path)
        rewind(run, job.start.step, ended=job.start.step == job.settings.steps)
        before = [*run.info.get("resumed", []), {"step": job.start.step, "argv": sys.argv[1:]}]
        run.note(status="running", reason="", settings=job.settings.to_dict(), resumed=before)
    except BaseException:
        run.close()
        raise
    return run


def _train(job: Job, world: World, watch: WatchOptions, folder: Path, run: TableRun | None) -> int:
    talk = console(stderr=watch.json)
    view = TrainView(talk, job.settings.steps)
    try:
        with stoppable(world) as stop:
            trainer = _trainer(job, world, folder, run, view)
            if run is not None:
                run.note(parameters=trainer.model.num_parameters())
                _headline(job, trainer, run, talk)
            outcome = trainer.train(stop)
            if watch.save_selection is not None and outcome.status == "ok" and world.first:
                _save_selection(trainer, job, watch.save_selection, talk)
    except torch.OutOfMemoryError as error:
        outcome = Outcome("oom", " ".join(str(error).split()), 0 if job.start is None else job.start.step)
    except BaseException as error:
        # The disk may be what failed: the status then stays `running`, with no process that holds the lock.
        with suppress(StoreError):
            if run is not None:
                said = " ".join(str(error).split()) or type(error).__name__
                interrupted = isinstance(error, KeyboardInterrupt)
                run.note(status="interrupted" if interrupted else "error", reason=said)
        raise
    if run is not None:
        found = summary_of(load_training(folder))
        run.note(status=outcome.status, reason=outcome.reason, summary=found)
        _say_end(outcome, folder)
    return MACHINE_FAILED if outcome.machine else EXIT_CODES.get(outcome.status, CHECK_FAILED)


def _save_selection(trainer: Trainer, job: Job, path: Path, talk: Console) -> None:
    head = save_selection(trainer.model, job.settings, job.data, path)
    shared = f"{head['neighbour_overlap']:.3f}" if head.get("neighbour_overlap") is not None else "unknown"
    talk.print(
        f"selection: {path} ({path.stat().st_size} bytes), neighbour overlap {shared}",
        soft_wrap=True,
        markup=False,
    )


def _trainer(job: Job, world: World, folder: Path, run: TableRun | None, view: TrainView) -> Trainer:
    def judge(model: ByteLM, step: int) -> None:
        assert run is not None
        with torch.random.fork_rng(devices=[]), trainer.precision.autocast():
            rows = evaluate(model, job.settings, job.data)
        run.append(EVAL_FILE, *({"step": step, **row} for row in rows))

    trainer = Trainer(
        job.settings,
        job.data,
        run,
        world=world,
        start=job.start,
        start_path=job.start_path,
        data_id=job.data_id,
        evaluate=judge,
        observers=lambda made: _observers(made, world, folder, run, view),
    )
    return trainer


def _observers(
    trainer: Trainer, world: World, folder: Path, run: TableRun | None, view: TrainView
) -> Observers:
    """Guards on every rank; what is stored and shown, on rank 0."""
    settings = trainer.settings
    heartbeat = Heartbeat(folder, rank=world.rank, device=settings.device, inside=not settings.compile)
    members: list[Observer] = [heartbeat]
    if settings.hang_timeout:

        def note(status: str, reason: str) -> None:
            assert run is not None
            run.note(status=status, reason=reason)

        members.append(
            Watchdog(
                heartbeat,
                settings.hang_timeout,
                None if run is None else note,
                rank=world.rank,
                world=world.size,
            )
        )
    members.append(
        Guard(
            folder,
            settings,
            scaler=trainer.scaler,
            detect_anomaly=settings.detect_anomaly,
            rank=world.rank,
            world=world.size,
        )
    )
    if run is not None:
        if settings.stats:
            probe = trainer.probe if settings.compile else None
            members.append(Watch(run, settings.route, probe=probe))
        members.append(view)
    return Observers(members)


@contextmanager
def stoppable(world: World) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM is a wish, which the function that this gives tells of: the step is
    finished, and a checkpoint written. Ctrl-C again stops at once; under torchrun, which passes each on, the
    third.
    """
    heard = 0
    patience = 2 if started_by_torchrun() else 1

    def hear(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        if heard == 1 and world.first:
            # Past any buffer: whatever was printing when the signal came is in the middle of it.
            os.write(2, b"nsabench: finishing the step and writing a checkpoint; Ctrl-C again stops now\n")
        if number == signal.SIGINT and heard > patience:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: heard > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _headline(job: Job, trainer: Trainer, run: TableRun, talk: Console) -> None:
    settings, model = job.settings, job.settings.model
    ranks = f", {settings.world} ranks" if settings.world > 1 else ""
    size = f"{trainer.model.num_parameters():,} parameters, {model.layers} layers, dim {model.dim}"
    heads = f"{model.heads} heads, {model.groups} KV heads, dk {model.dk}, dv {model.dv}"
    blocks = f"blocks l {model.l}, d {model.d}, l' {model.l_sel}, n {model.n_sel}, w {model.w}"
    batch = f"S {settings.S}, batch {settings.batch} x {settings.accumulate}"
    lines = [
        f"train on {settings.device}{ranks}, {settings.precision}: {size}, {heads}",
        f"{blocks}; route {settings.route}; {settings.data}, {batch}, seed {settings.seed}",
    ]
    if job.start is not None:
        lines.append(f"goes on after step {job.start.step}, from {job.start_path}")
    if note := trainer.precision.note():
        lines.append(f"note: {note}")
    lines.append(f"results: {run.path}")
    talk.print(*lines, sep="\n", soft_wrap=True, markup=False)


def _say_end(outcome: Outcome, folder: Path) -> None:
    """One line on stderr for what did not go to its end."""
    if outcome.status == "ok":
        return
    goes_on = f"nsabench train --resume {shlex.quote(str(folder))}"
    if outcome.status == "interrupted":
        complain(f"interrupted after step {outcome.step}; {goes_on} goes on")
    else:
        complain(f"{outcome.status}: {outcome.reason}")


def _show(folder: Path, watch: WatchOptions) -> None:
    """The tables, or with --json the summary as an object."""
    training = load_training(folder)
    if watch.json:
        names = ("run_id", "status", "reason", "settings", "parameters", "summary")
        found = {name: training.info.get(name) for name in names}
        typer.echo(json.dumps({**found, "path": str(folder)}, allow_nan=False))
        return
    talk = console()
    for table in tables_of(training):
        talk.print(table)
    talk.print(f"results: {folder}", soft_wrap=True, markup=False)
