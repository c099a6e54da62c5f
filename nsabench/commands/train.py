"""`nsabench train`: a byte-level decoder on NSA learns, and is watched."""

from __future__ import annotations

import typer

from nsabench.commands._console import one_line_errors
from nsabench.commands._train_options import (
    LearnOptions,
    ModelOptions,
    StateOptions,
    WatchOptions,
    settings_given,
)


def train(learn: LearnOptions, model: ModelOptions, state: StateOptions, watch: WatchOptions) -> None:
    """Train a byte-level decoder on NSA: loss, speed, gate health, NaN and hang guards, checkpoints.

    Without options it learns to copy and to find needles beyond the window, and says what is left of that
    without each branch. On several GPUs: torchrun --nproc-per-node 8 -m nsabench train.
    """
    with one_line_errors():
        given = settings_given(learn, model, state, watch)
        if watch.replay is not None:
            from nsabench.commands._train_replay import replay_of

            code = replay_of(watch.replay, given, state.resume, as_json=watch.json)
        else:
            from nsabench.commands._train import train_of

            code = train_of(given, state.resume, watch)
    raise typer.Exit(code)
