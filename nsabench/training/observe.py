"""What watches a training: the moments at which it is told, and the word with which it stops one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

STAGES = ("data", "forward", "backward", "optimizer", "eval", "checkpoint")
"""The stages of a step, as `Observer.stage` is told them."""


class StopTraining(Exception):
    """Raised by an observer to end the training: `status` (nan, hang, oom, error), a `reason` in one line,
    and whether the `machine` is to blame.

    No checkpoint of the present step is written; the last one stays.
    """

    def __init__(self, status: str, reason: str, *, machine: bool = False) -> None:
        super().__init__(reason)
        self.status, self.reason, self.machine = status, reason, machine


@dataclass(frozen=True)
class StepStats:
    """What is known of a finished step. `loss` and `grad_norm` (before clipping) are of all ranks together.

    `scale` is the GradScaler's after the step, None without one; `overflowed` says that the scaler skipped
    the step, `overflows` how many it has skipped so far. `peak_alloc_bytes` is the device allocator's since
    the start, None on a CPU; `rss_bytes` the process's own. `seconds` is the step's wall time.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens_per_s: float
    seconds: float
    scale: float | None = None
    overflowed: bool = False
    overflows: int = 0
    peak_alloc_bytes: int | None = None
    rss_bytes: int | None = None


class Observer:
    """Told what a training does; every method may be left as it is.

    In the order of a step: `begin_step`, `stage("data")`, then for each of the `--accumulate` micro-batches
    `batch`, `stage("forward")`, `after_forward`, `stage("backward")`; then `after_backward`,
    `stage("optimizer")`, `after_step`. Steps count from 1. Any of them may raise StopTraining.
    """

    def begin(self, model: nn.Module, first_step: int) -> None:
        """Before the first step of this process, with the bare model on its device: no DDP around it."""

    def begin_step(self, step: int) -> None:
        """Before anything of the step."""

    def stage(self, name: str) -> None:
        """One of STAGES begins; also told outside steps, for evaluation and checkpoints."""

    def batch(self, step: int, micro: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """The micro-batch about to go in: tokens `(B,S+1)` int64, mask `(B,S)` bool, on the device."""

    def after_forward(self, step: int, loss: torch.Tensor) -> None:
        """The micro-batch's loss, fp32 and on the device, unscaled; its backward comes next."""

    def after_backward(self, model: nn.Module, step: int, overflowed: bool) -> None:
        """All gradients are there: summed over micro-batches and ranks, unscaled, not yet clipped.

        `overflowed`: they are not finite because of fp16, and the scaler will skip the step.
        """

    def after_step(self, step: int, loss: float, stats: StepStats) -> None:
        """The step is done, and its row is in training.csv."""

    def failed(self, step: int, error: Exception) -> None:
        """An exception ended the step, or a StopTraining, as the loop's own for what is not finite: the
        weights are those before the step. May raise a StopTraining in its place that says more.
        """

    def state(self) -> dict[str, Any]:
        """What a resumed training needs of this observer: plain values and tensors; goes into checkpoints."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; before `begin`."""

    def finish(self) -> None:
        """The training ends, however it ends: write what is left, stop threads. Raises no StopTraining."""


class Observers(Observer):
    """Several observers as one, each told in the order given; `finish` in the reverse order, all of them."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self.members = tuple(observers)

    def begin(self, model: nn.Module, first_step: int) -> None:
        for one in self.members:
            one.begin(model, first_step)

    def begin_step(self, step: int) -> None:
        for one in self.members:
            one.begin_step(step)

    def stage(self, name: str) -> None:
        for one in self.members:
            one.stage(name)

    def batch(self, step: int, micro: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        for one in self.members:
            one.batch(step, micro, tokens, mask)

    def after_forward(self, step: int, loss: torch.Tensor) -> None:
        for one in self.members:
            one.after_forward(step, loss)

    def after_backward(self, model: nn.Module, step: int, overflowed: bool) -> None:
        for one in self.members:
            one.after_backward(model, step, overflowed)

    def after_step(self, step: int, loss: float, stats: StepStats) -> None:
        for one in self.members:
            one.after_step(step, loss, stats)

    def failed(self, step: int, error: Exception) -> None:
        """In the reverse order: one that watches stops before one that does the step again."""
        for one in reversed(self.members):
            one.failed(step, error)

    def state(self) -> dict[str, Any]:
        """By the observers' class names, of those that have any."""
        return {type(one).__name__: state for one in self.members if (state := one.state())}

    def restore(self, state: dict[str, Any]) -> None:
        for one in self.members:
            if (mine := state.get(type(one).__name__)) is not None:
                one.restore(mine)

    def finish(self) -> None:
        """Every observer is told, even when one before it failed; the first failure is raised at the end."""
        failed: Exception | None = None
        for one in reversed(self.members):
            try:
                one.finish()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed
