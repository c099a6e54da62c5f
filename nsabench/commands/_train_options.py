"""The options of `nsabench train`: None, or off, where not given, because defaults depend on the data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from nsabench.commands import _options as o
from nsabench.plan import PlanError, parse_duration, parse_routes

LEARNING, STATE, WATCHING = "Learning", "Going on", "Watching"
_BY_DATA = "by --data"


def _text(
    *names: str, help: str, metavar: str = "INT", default: str | bool = _BY_DATA, panel: str | None = None
) -> typer.models.OptionInfo:
    return typer.Option(*names, metavar=metavar, help=help, show_default=default, rich_help_panel=panel)


def _flag(*names: str, help: str, panel: str | None = None) -> typer.models.OptionInfo:
    return typer.Option(*names, help=help, show_default=False, rich_help_panel=panel)


@dataclass(frozen=True)
class LearnOptions:
    """What is learned, and how."""

    data: Annotated[
        str | None,
        _text(
            "--data",
            metavar="synthetic|PATH",
            help="Copying and needles beyond the window, or the bytes of any file.",
            default="synthetic",
        ),
    ] = None
    steps: Annotated[str | None, _text("--steps", help="Optimizer steps.")] = None
    S: Annotated[str | None, _text("--S", help="Tokens of a sequence, as 512 or 4k.")] = None
    batch: Annotated[str | None, _text("--batch", help="Sequences of a micro-batch, on each rank.")] = None
    routes: Annotated[
        str | None,
        _text(
            "--routes",
            "--route",
            metavar="ROUTE",
            help="One route: auto, a backend, cmp=..,sel=..,win=.. (a branch may be off), or env.",
            default="auto",
        ),
    ] = None
    mode: Annotated[
        str | None,
        _text(
            "--mode",
            metavar="MODE",
            help="batched, stepwise (token by token through caches that keep gradients) or env.",
            default="batched",
        ),
    ] = None
    precision: Annotated[
        str | None,
        _text(
            "--precision",
            metavar="NAME",
            help="fp32, or bf16 or fp16 by torch.amp, the last with a GradScaler.",
            default="fp32",
        ),
    ] = None
    accumulate: Annotated[
        str | None, _text("--accumulate", help="Micro-batches of a step.", default="1", panel=LEARNING)
    ] = None
    grad_checkpoint: Annotated[
        bool,
        _flag(
            "--grad-checkpoint", help="Compute layers again backward instead of keeping them.", panel=LEARNING
        ),
    ] = False
    compile: Annotated[
        bool,
        _flag("--compile", help="torch.compile for all but the attention; a CPU needs g++.", panel=LEARNING),
    ] = False
    lr: Annotated[
        str | None,
        _text("--lr", metavar="RATE", help="Largest learning rate of AdamW.", panel=LEARNING),
    ] = None
    warmup: Annotated[
        str | None, _text("--warmup", help="Steps in which it is reached, linearly.", panel=LEARNING)
    ] = None
    schedule: Annotated[
        str | None,
        _text(
            "--schedule",
            metavar="NAME",
            help="What it does then: cosine (falls to a tenth) or constant.",
            panel=LEARNING,
        ),
    ] = None
    weight_decay: Annotated[
        str | None,
        _text("--weight-decay", metavar="RATE", help="Of matrices; vectors have none.", panel=LEARNING),
    ] = None
    clip: Annotated[
        str | None,
        _text(
            "--clip", metavar="NORM", help="Largest norm of the gradients together; 0: any.", panel=LEARNING
        ),
    ] = None
    seed: Annotated[
        str | None, _text("--seed", help="Seed of weights and data.", default="0", panel=LEARNING)
    ] = None
    device: Annotated[
        str | None,
        _text(
            "--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.", default="auto", panel=LEARNING
        ),
    ] = None


@dataclass(frozen=True)
class ModelOptions:
    """The decoder."""

    dim: Annotated[str | None, _text("--dim", help="Model width.", panel=o.SHAPE)] = None
    layers: Annotated[str | None, _text("--layers", help="Layers.", panel=o.SHAPE)] = None
    heads: Annotated[str | None, _text("--heads", help="Query heads.", panel=o.SHAPE)] = None
    groups: Annotated[str | None, _text("--groups", help="KV heads; they divide --heads.", panel=o.SHAPE)] = (
        None
    )
    dk: Annotated[str | None, _text("--dk", help="Key dim of a head.", panel=o.SHAPE)] = None
    dv: Annotated[str | None, _text("--dv", help="Value dim of a head.", panel=o.SHAPE)] = None
    l: Annotated[str | None, _text("--l", help="Compression block size, tokens.", panel=o.SHAPE)] = None
    d: Annotated[str | None, _text("--d", help="Compression stride, tokens.", panel=o.SHAPE)] = None
    l_sel: Annotated[str | None, _text("--l-sel", help="Selection block size, tokens.", panel=o.SHAPE)] = None
    n_sel: Annotated[str | None, _text("--n-sel", help="Selected blocks per query.", panel=o.SHAPE)] = None
    w: Annotated[str | None, _text("--w", help="Sliding window, tokens.", panel=o.SHAPE)] = None
    n_initial: Annotated[
        str | None, _text("--n-initial", help="First blocks, selected by every query.", panel=o.SHAPE)
    ] = None
    n_local: Annotated[
        str | None, _text("--n-local", help="Latest blocks, selected by every query.", panel=o.SHAPE)
    ] = None
    gate: Annotated[
        str | None,
        _text("--gate", metavar="NAME", help="sigmoid, or softmax over the branches.", panel=o.SHAPE),
    ] = None
    compress: Annotated[
        str | None,
        _text("--compress", metavar="NAME", help="phi: mean, conv or mlp.", panel=o.SHAPE),
    ] = None
    rope: Annotated[
        str | None,
        _text("--rope", metavar="BASE", help="Base of the rotary positions; 0: none.", panel=o.SHAPE),
    ] = None
    shared_kv: Annotated[
        bool | None,
        typer.Option(
            "--shared-kv/--separate-kv",
            help="One K and V for the three branches, or one each.",
            show_default=_BY_DATA,
            rich_help_panel=o.SHAPE,
        ),
    ] = None


@dataclass(frozen=True)
class StateOptions:
    """Checkpoints."""

    resume: Annotated[
        Path | None,
        _text(
            "--resume",
            metavar="RUN",
            help="Go on exactly where this run's last checkpoint, or a checkpoint file in it, is.",
            default=False,
            panel=STATE,
        ),
    ] = None
    checkpoint_every: Annotated[
        str | None,
        _text(
            "--checkpoint-every",
            help="Steps between checkpoints; 0: only at the end.",
            default="500",
            panel=STATE,
        ),
    ] = None
    keep: Annotated[
        str | None, _text("--keep", help="Checkpoints that are kept.", default="1", panel=STATE)
    ] = None


@dataclass(frozen=True)
class WatchOptions:
    """What is watched, and what becomes of it."""

    evaluate_every: Annotated[
        str | None,
        _text(
            "--evaluate-every",
            help="Steps between evaluations; 0: only after the last.",
            default="0",
            panel=WATCHING,
        ),
    ] = None
    log_every: Annotated[
        str | None,
        _text("--log-every", help="Steps between rows of training.csv.", default="1", panel=WATCHING),
    ] = None
    no_stats: Annotated[
        bool, _flag("--no-stats", help="Watch neither gates, routes nor selections.", panel=WATCHING)
    ] = False
    detect_anomaly: Annotated[
        bool,
        _flag("--detect-anomaly", help="torch's search for the backward that made a NaN.", panel=WATCHING),
    ] = False
    hang_timeout: Annotated[
        str | None,
        _text(
            "--hang-timeout",
            metavar="TIME",
            help="No sign of life for so long, as 90s or 5m, ends it with all stacks written; 0: never.",
            default="5m, 30m with --compile",
            panel=WATCHING,
        ),
    ] = None
    replay: Annotated[
        Path | None,
        _text(
            "--replay",
            metavar="FILE",
            help="Train nothing: repeat the step that a NaN was saved of.",
            default=False,
            panel=WATCHING,
        ),
    ] = None
    save_selection: Annotated[
        Path | None,
        _text(
            "--save-selection",
            metavar="FILE",
            help="When trained, write the blocks it selects to a new file, for --selection file=FILE.",
            default=False,
            panel=WATCHING,
        ),
    ] = None
    out: o.Out = Path("results")
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="The summary as one JSON object on stdout, the rest on stderr.",
            rich_help_panel=o.WHERE,
        ),
    ] = False
    tag: Annotated[
        list[str] | None,
        typer.Option(
            "--tag",
            metavar="WORD",
            help="A word to find the run by; may be repeated.",
            rich_help_panel=o.WHERE,
        ),
    ] = None


_WHOLE = {
    *("steps", "S", "batch", "accumulate", "warmup", "seed", "checkpoint_every", "keep", "evaluate_every"),
    *("log_every", "dim", "layers", "heads", "groups", "dk", "dv", "l", "d", "l_sel", "n_sel", "w"),
    *("n_initial", "n_local"),
}
_MAY_BE_ZERO = {"warmup", "seed", "checkpoint_every", "evaluate_every", "n_initial", "n_local"}
_NUMBERS = {"lr", "weight_decay", "clip", "rope"}
_ELSEWHERE = {"resume", "replay", "save_selection", "out", "json", "tag", "no_stats", "routes", "mode"}


def settings_given(*options: Any) -> dict[str, Any]:
    """The settings that were given, by their names in `Settings`, less the device's `auto`.

    PlanError names the option, the value and what is allowed.
    """
    given: dict[str, Any] = {}
    for part in options:
        for one in fields(part):
            value = getattr(part, one.name)
            if value is None or value is one.default or one.name in _ELSEWHERE:
                continue
            given[one.name] = _read(one.name, value)
        if getattr(part, "no_stats", False):
            given["stats"] = False
        if getattr(part, "mode", None) is not None:
            given["mode"] = o.mode_of(part.mode.strip(), os.environ)
        if getattr(part, "routes", None) is not None:
            given["route"] = _one_route(part.routes)
            if part.routes.strip() == "env":
                given = _switches(os.environ) | given
    return given


def _switches(environ: Mapping[str, str]) -> dict[str, Any]:
    """What an earlier NSA code was told by its switches, besides the route."""

    def on(name: str) -> bool:
        return environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")

    found: dict[str, Any] = {}
    if on("NSA_DETECT_ANOMALY"):
        found["detect_anomaly"] = True
    if on("NSA_DISABLE_AUX_STATS"):
        found["stats"] = False
    return found


def _read(name: str, value: Any) -> Any:
    option = o.option_of(name)
    if name in _WHOLE:
        return o.size(value, option, 0 if name in _MAY_BE_ZERO else 1)
    if name in _NUMBERS:
        try:
            return float(value)
        except ValueError:
            raise PlanError(f"{option}: {value!r} is not a number") from None
    if name == "hang_timeout":
        return 0.0 if value.strip() == "0" else parse_duration(value, name=option)
    return value


def _one_route(text: str) -> str:
    """The route in the table's own spelling."""
    from nsa import Routing

    found = parse_routes(text)
    if len(found) > 1:
        raise PlanError(f"--routes: a training takes one route, got {len(found)} in {text!r}")
    try:
        return str(Routing.parse(found[0]))
    except ValueError as error:
        raise PlanError(f"--routes: {error}") from None
