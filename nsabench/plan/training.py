"""What a training may say: the model and, around it, every option of `nsabench train`. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nsabench.plan.axes import PlanError

GATES = ("sigmoid", "softmax")
COMPRESSIONS = ("mean", "conv", "mlp")
VOCABULARY = 256
"""Tokens are bytes."""


@dataclass(frozen=True)
class ModelSettings:
    """The byte-level decoder: width, depth, and the geometry of its attention.

    Args:
        dim: width of the token stream, channels.
        layers: blocks of attention and feed-forward.
        heads, groups: query heads and KV heads; ``groups`` divides ``heads``.
        dk, dv: key and value dim of a head, channels.
        l, d: compression block size and stride, tokens; ``d`` divides ``l`` and ``l_sel``.
        l_sel, n_sel: selection block size, tokens (at least ``l``), and blocks a query selects.
        w: sliding window, tokens, the query's own included.
        n_initial, n_local: first blocks and last blocks that are always selected, counted in ``n_sel``.
        gate: ``sigmoid`` or ``softmax`` over the three branches.
        compress: ``mean``, ``conv`` or ``mlp``.
        rope: base of the rotary positions; 0 for none.
        shared_kv: one K and V for the three branches of a layer, instead of one each.
        hidden: width of the feed-forward; 8/3 of ``dim``, rounded up to a multiple of 16, when 0.
        tied: the head shares the embedding's weights.
        embedding_std: standard deviation that the weights of an embedding of its own start with.

    Raises:
        PlanError: one line naming the setting, the value given and what is allowed.
    """

    dim: int = 128
    layers: int = 2
    heads: int = 4
    groups: int = 2
    dk: int = 32
    dv: int = 32
    l: int = 16
    d: int = 8
    l_sel: int = 32
    n_sel: int = 4
    w: int = 32
    n_initial: int = 1
    n_local: int = 1
    gate: str = "sigmoid"
    compress: str = "mean"
    rope: float = 10000.0
    shared_kv: bool = False
    hidden: int = 0
    tied: bool = False
    embedding_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "groups", "dk", "dv", "l", "d", "l_sel", "n_sel", "w"):
            self._at_least(name, 1)
        for name in ("n_initial", "n_local", "hidden"):
            self._at_least(name, 0)
        for name, allowed in (("gate", GATES), ("compress", COMPRESSIONS)):
            if getattr(self, name) not in allowed:
                raise PlanError(f"{name}: {getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        if self.n_sel < self.n_initial + self.n_local:
            raise PlanError(
                f"n_sel: {self.n_sel} is too few for the {self.n_initial} first and {self.n_local} latest "
                f"blocks that are always selected (n_initial, n_local)"
            )
        if not 0 < self.embedding_std < math.inf:
            raise PlanError(f"embedding_std: {self.embedding_std!r} is not allowed; it must be above 0")
        if self.rope and not self.rope > 1:
            raise PlanError(f"rope: {self.rope!r} is not allowed; allowed: 0 for none, or a base above 1")
        if self.rope and self.dk % 2:
            raise PlanError(
                f"dk: {self.dk} is odd; rotary positions need an even key dim (rope 0 needs none)"
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < least:
            raise PlanError(
                f"{name}: {value!r} is not allowed; it must be a whole number of at least {least}"
            )

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward layer, channels."""
        return self.hidden or -(-8 * self.dim // 48) * 16


MODES = ("batched", "stepwise")
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "cosine")
SYNTHETIC_DATA = "synthetic"
LEAST_RATE = 0.1
"""Where a cosine schedule ends, as part of ``lr``."""


@dataclass(frozen=True)
class Settings:
    """Every option of a training. Those in FREE change nothing that is learned.

    Args:
        data: ``synthetic``, or the path of a file whose bytes are learned.
        model: the decoder.
        S, batch: tokens of a sequence, and sequences of a micro-batch on each rank.
        steps: optimizer steps.
        accumulate: micro-batches of a step.
        route: one route, in the grammar of ``nsa.routes``.
        mode: ``batched``, or ``stepwise``: token by token through caches that keep gradients.
        precision: ``fp32``, or what ``torch.amp`` computes products in.
        grad_checkpoint: compute each layer again in the backward pass instead of keeping it.
        compile: everything around the attention through ``torch.compile``; the backends of the route run as
            they are.
        lr, warmup, schedule: the largest learning rate of AdamW, the steps in which it is reached linearly,
            and what it does then: stays (``constant``), or falls to LEAST_RATE of it (``cosine``).
        weight_decay: of matrices; vectors have none.
        clip: largest norm of all gradients together; 0 for no limit.
        seed: of weights and data.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        world: ranks that share a step.
        checkpoint_every, keep: steps between checkpoints (0: only the last), and how many are kept.
        evaluate_every: steps between evaluations (0: only after the last).
        log_every: steps between rows of training.csv.
        stats: watch gates, routes and the selection's overlap.
        detect_anomaly: torch's own search for the backward function that made a NaN.
        hang_timeout: seconds without a heartbeat that count as a hang; 0 for no watchdog.

    Raises:
        PlanError: one line naming the option, the value given and what is allowed.
    """

    data: str = SYNTHETIC_DATA
    model: ModelSettings = field(default_factory=ModelSettings)
    S: int = 256
    batch: int = 16
    steps: int = 1000
    accumulate: int = 1
    route: str = "auto"
    mode: str = "batched"
    precision: str = "fp32"
    grad_checkpoint: bool = False
    compile: bool = False
    lr: float = 1e-3
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    device: str = "cpu"
    world: int = 1
    checkpoint_every: int = 500
    keep: int = 1
    evaluate_every: int = 0
    log_every: int = 1
    stats: bool = True
    detect_anomaly: bool = False
    hang_timeout: float = 300.0

    def __post_init__(self) -> None:
        if not self.data:
            raise PlanError(f"--data: names nothing; allowed: {SYNTHETIC_DATA}, or the path of a file")
        for name in ("S", "batch", "steps", "accumulate", "keep", "log_every", "world"):
            self._whole(name, 1)
        for name in ("warmup", "seed", "checkpoint_every", "evaluate_every"):
            self._whole(name, 0)
        for name, allowed in (("mode", MODES), ("precision", PRECISIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise PlanError(f"{option_name(name)}: {given!r} is unknown; allowed: {', '.join(allowed)}")
        self._number("lr", above=True)
        for name in ("weight_decay", "clip", "hang_timeout"):
            self._number(name)
        if self.mode == "stepwise" and self.grad_checkpoint:
            raise PlanError("--grad-checkpoint: not with --mode stepwise, which keeps every step")
        if self.mode == "stepwise" and self.compile:
            raise PlanError("--compile: not with --mode stepwise, in which every token has another shape")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value < 2**63:
            what = f"{value!r} is not allowed; it must be a whole number of at least {least}"
            raise PlanError(f"{option_name(name)}: {what}")

    def _number(self, name: str, *, above: bool = False) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and (value > 0 if above else value >= 0)):
            least = "above 0" if above else "of at least 0"
            raise PlanError(f"{option_name(name)}: {value!r} is not allowed; it must be a number {least}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from a flat mapping, as `to_dict` gives; what is left out has its default.

        PlanError for what is not allowed and for an unknown name.
        """
        shape = {one.name for one in fields(ModelSettings)}
        mine = {one.name for one in fields(cls)} - {"model"}
        unknown = sorted(set(given) - shape - mine)
        if unknown:
            raise PlanError(f"{unknown[0]} is no setting of a training")
        try:
            model = ModelSettings(**{name: value for name, value in given.items() if name in shape})
        except PlanError as error:
            name, _, rest = str(error).partition(":")
            raise PlanError(f"{option_name(name)}:{rest}" if name in shape else str(error)) from None
        return cls(model=model, **{name: value for name, value in given.items() if name in mine})

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, the model's among them, as JSON can hold them; `of` reads it."""
        flat = asdict(self)
        return {**flat.pop("model"), **flat}


FREE = frozenset(
    {"checkpoint_every", "keep", "evaluate_every", "log_every", "stats", "detect_anomaly", "hang_timeout"}
)
"""Settings that a resumed training may change."""


def option_name(setting: str) -> str:
    """The option that gives a setting: ``--l-sel``, ``--routes``."""
    return {"route": "--routes", "world": "--nproc-per-node"}.get(setting, f"--{setting.replace('_', '-')}")


def resumed(stored: Settings, given: Mapping[str, Any], where: str) -> Settings:
    """The settings of a training that goes on: those stored, and of those given what may change.

    More steps may be given where the learning rate does not depend on their number. PlanError names the first
    option that differs; ``where`` is the run, as the error should call it.
    """
    before = stored.to_dict()
    unknown = sorted(set(given) - set(before))
    if unknown:
        raise PlanError(f"{unknown[0]} is no setting of a training")
    for name, value in given.items():
        alike = name == "device" and _kind(value) == _kind(before[name])
        if name in FREE or value == before[name] or alike:
            continue
        differs = f"{option_name(name)}: is {value!r}, and {where} was trained with {before[name]!r}"
        if name == "world":
            raise PlanError(f"{differs}; start it with torchrun --nproc-per-node {before[name]}")
        if name != "steps":
            raise PlanError(f"{differs}; leave it out to go on, or begin a new run")
        if stored.schedule != "constant":
            raise PlanError(f"{differs}, on which its cosine schedule depends; leave it out to go on")
        if value < stored.steps:
            raise PlanError(f"{differs}; allowed: more steps")
    return Settings.of(before | dict(given))


def _kind(device: str) -> str:
    return device.partition(":")[0]


def rate_of(settings: Settings, step: int) -> float:
    """The learning rate of a step, counted from 1."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    if settings.schedule == "constant" or settings.steps <= settings.warmup:
        return settings.lr
    done = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.lr * (LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * done)) / 2)


SYNTHETIC: Mapping[str, Any] = {
    "S": 192,
    "batch": 32,
    "steps": 1000,
    "lr": 3e-3,
    "warmup": 30,
    "weight_decay": 1.0,
    "dim": 64,
    "layers": 1,
    "heads": 1,
    "groups": 1,
    "dv": 64,
    "l": 8,
    "d": 4,
    "l_sel": 8,
    "n_sel": 12,
    "w": 16,
    "n_initial": 0,
    "n_local": 5,
    "rope": 0.0,
    "shared_kv": True,
    "embedding_std": 0.02,
}
"""What a training on the synthetic task has that is not as in `Settings`.

No gradient reaches a block's score but through the compressed branch, and a mean over ``l`` bytes tells no
answer here. With one K for the three branches the scores are made of the keys that the other two learn. Their
mean shows that the asked one is among them where the others are little noise: hence no positions, much
weight decay, and an embedding that starts small, so that what bytes have in common is learned as directions.
"""

TEXT: Mapping[str, Any] = {
    "S": 512,
    "batch": 8,
    "dim": 192,
    "layers": 4,
    "heads": 6,
    "l_sel": 64,
    "w": 64,
    "weight_decay": 0.1,
}
"""The same, of a training on a file."""


def defaults_of(data: str | None) -> Mapping[str, Any]:
    """What is not as in `Settings` where data is learned, None being the synthetic task."""
    return SYNTHETIC if data in (None, SYNTHETIC_DATA) else TEXT
