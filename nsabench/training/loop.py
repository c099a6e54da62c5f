"""The training itself: steps from data to optimizer, their rows, checkpoints, and how it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nsa import Routing
from nsabench.plan.training import Settings, rate_of
from nsabench.store import DiskError, TableRun
from nsabench.store.training import TRAINING_FILE
from nsabench.training.checkpoint import (
    Checkpoint,
    load_weights,
    random_state,
    restore_random,
    save_checkpoint,
)
from nsabench.training.distributed import Failure, World
from nsabench.training.model import ByteLM
from nsabench.training.observe import Observer, Observers, StepStats, StopTraining
from nsabench.training.precision import Precision

LEAST_SCALE = 2.0**-10
"""A GradScaler that came down to this will not find a scale."""


class Batches(Protocol):
    """Data as a pure function of the seed: the same number gives the same batch on every call."""

    def batch(self, step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `(B,S+1)` int64 and mask `(B,S)` bool of the targets that count, on the CPU."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended: `status` as in run.json, why unless it is ok, the last step done, and whether the
    machine is to blame (a GPU that was lost).
    """

    status: str
    reason: str
    step: int
    machine: bool = False


class Objective(nn.Module):
    """Summed cross-entropy, nats, of the target positions that count: one module, so that DDP sees one call
    whatever the mode.
    """

    def __init__(self, model: ByteLM, settings: Settings) -> None:
        super().__init__()
        self.model, self._mode = model, settings.mode
        self._routing = Routing.parse(settings.route)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`tokens (B,S+1) int64, mask (B,S) bool -> () fp32`."""
        logits = self.model(tokens[:, :-1], self._routing, mode=self._mode)
        targets = tokens[:, 1:].masked_fill(~mask, -100)
        # As ignored targets: a boolean index would wait for the device.
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


class Trainer:
    """A training of one rank. `train` runs it to its end.

    Args:
        run: where rows and checkpoints go; None on ranks that write nothing.
        observers: makes what is told of every step, once the model is there. The loop itself only stops at a
            loss or gradient that is not finite.
        start: the state to go on from; None for the beginning.
        evaluate: called with the bare model and the step, on rank 0, every `evaluate_every` steps and at the
            end. Draws from generators of its own.

    Raises:
        PlanError: settings that cannot run. StoreError: a `start` of another model.
    """

    def __init__(
        self,
        settings: Settings,
        data: Batches,
        run: TableRun | None = None,
        observers: Callable[[Trainer], Observer] | None = None,
        *,
        world: World | None = None,
        start: Checkpoint | None = None,
        start_path: Path = Path("checkpoint"),
        data_id: str = "",
        evaluate: Callable[[ByteLM, int], object] | None = None,
    ) -> None:
        self.settings, self.data, self.run = settings, data, run
        self.world = world or World()
        self.device = torch.device(settings.device)
        self.precision = Precision(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        self.model = ByteLM(settings.model, grad_checkpoint=settings.grad_checkpoint)
        if start is not None:
            load_weights(self.model, start.model, start_path)
        self.model.to(self.device)
        self.scaler = self.precision.scaler()
        self.optimizer = _optimizer(self.model, settings)
        self.step = self.overflows = 0
        self._data_id, self._judge = data_id, evaluate
        self._process = psutil.Process()
        self.observers = Observers() if observers is None else observers(self)
        if start is not None:
            self._restore(start)
        self.objective: nn.Module = Objective(self.model, settings)
        if settings.compile:
            self._compile()
        if self.world.size > 1:
            self.objective = self._shared(self.objective)

    def _compile(self) -> None:
        """Everything but the attention, whose backends are what is trained and must not be replaced."""
        for layer in self.model.layers:
            attention: Any = layer.attention
            attention.forward = torch.compiler.disable(attention.forward)
        # One shape: symbolic ones cost minutes.
        self.objective.compile(dynamic=False)

    def _shared(self, objective: nn.Module) -> nn.Module:
        routing = Routing.parse(self.settings.route)
        return DistributedDataParallel(
            objective,
            device_ids=None if self.device.type == "cpu" else [self.device],
            # A branch that is off leaves weights of its own without a gradient.
            find_unused_parameters="off" in (routing.cmp, routing.sel, routing.win),
        )

    def _restore(self, start: Checkpoint) -> None:
        self.optimizer.load_state_dict(start.optimizer)
        self.scaler.load_state_dict(start.scaler)
        self.step, self.overflows = start.step, start.overflows
        self.observers.restore(start.observers)
        if self.world.rank < len(start.rng):
            restore_random(start.rng[self.world.rank], self.device)

    def probe(self, tokens: torch.Tensor) -> torch.Tensor:
        """A forward of the bare model on tokens `(B,S+1)`, as a step does it, without gradients."""
        with torch.no_grad(), self.precision.autocast():
            settings = self.settings
            logits: torch.Tensor = self.model(tokens[:, :-1], settings.route, mode=settings.mode)
            return logits

    def train(self, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Do the steps that are left, and write the last checkpoint. `stop` is asked before each step; once
        it says True, on any rank, the training ends there, as interrupted, and can be resumed.

        DiskError where the disk refuses: the last checkpoint and the rows before are safe.
        """
        settings = self.settings
        try:
            self.observers.begin(self.model, self.step + 1)
            while self.step < settings.steps:
                with self._explained(self.step + 1):
                    done = self._step(self.step + 1, stop)
                if not done:
                    self.save()
                    return Outcome("interrupted", f"stopped after step {self.step}", self.step)
                last = self.step == settings.steps
                if not last and _due(self.step, settings.evaluate_every):
                    self._evaluate()
                if last or _due(self.step, settings.checkpoint_every):
                    self.save()
            self._evaluate()
        except StopTraining as end:
            if not isinstance(end.__cause__, _OfOthers):
                self.world.tell_failure(Failure(end.status, end.reason))
            return Outcome(end.status, end.reason, self.step, end.machine)
        finally:
            self.observers.finish()
        return Outcome("ok", "", self.step)

    def _step(self, step: int, stop: Callable[[], bool]) -> bool:
        """One step; False where it was not begun because a rank is to stop."""
        settings, observers = self.settings, self.observers
        began = time.perf_counter()
        observers.begin_step(step)
        observers.stage("data")
        batches = list(self._batches(step))
        count = self._count(batches, stop())
        if count is None:
            return False
        lr = rate_of(settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = float(self.world.sum(self._gradients(step, batches, count))) / count
        # Of fp16 too: the scaler can help gradients, not what overflows going forward.
        if not math.isfinite(loss):
            raise StopTraining("nan", f"the loss of step {step} is {loss}")
        norm, overflowed = self._finish_gradients(step)
        observers.stage("optimizer")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.overflows = step, self.overflows + overflowed
        seconds = time.perf_counter() - began
        stats = self._stats(loss, norm, lr, seconds, overflowed)
        if self.run is not None and (step % settings.log_every == 0 or step in (1, settings.steps)):
            self.run.append(TRAINING_FILE, _row(step, stats))
        observers.after_step(step, loss, stats)
        return True

    def _count(self, batches: list[tuple[torch.Tensor, torch.Tensor]], stop: bool) -> float | None:
        """Targets that count, of all micro-batches and ranks, at least 1; None where any rank is to stop."""
        mine = torch.tensor([sum(int(mask.sum()) for _, mask in batches), int(stop)], device=self.device)
        counted, stopping = self.world.sum(mine).tolist()
        return None if stopping else float(max(1, counted))

    def _batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for micro in range(self.settings.accumulate):
            number = (step - 1) * self.settings.accumulate + micro
            tokens, mask = self.data.batch(number, self.world.rank, self.world.size)
            yield tokens.to(self.device), mask.to(self.device)

    def _gradients(
        self, step: int, batches: list[tuple[torch.Tensor, torch.Tensor]], count: float
    ) -> torch.Tensor:
        """Add up the gradients of the mean over the `count` targets of all micro-batches and ranks; returns
        this rank's summed loss, fp64.
        """
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro, (tokens, mask) in enumerate(batches):
            self.observers.batch(step, micro, tokens, mask)
            self.observers.stage("forward")
            with self._sync(last=micro + 1 == len(batches)):
                with self.precision.autocast():
                    loss = self.objective(tokens, mask)
                self.observers.after_forward(step, loss.detach() / mask.sum().clamp(min=1))
                self.observers.stage("backward")
                # DDP averages over ranks what is a sum over them.
                self.scaler.scale(loss * (self.world.size / count)).backward()
            summed += loss.detach()
        return summed

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Gradients meet those of other ranks in the last micro-batch only."""
        if last or not isinstance(self.objective, DistributedDataParallel):
            return nullcontext()
        found: AbstractContextManager[None] = self.objective.no_sync()
        return found

    def _finish_gradients(self, step: int) -> tuple[float, bool]:
        """Unscale, show and clip them; their norm before that, and whether fp16 overflowed."""
        self.scaler.unscale_(self.optimizer)
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        total = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        norm = float(total)
        finite = math.isfinite(norm)
        overflowed = self.scaler.is_enabled() and not finite
        self.observers.after_backward(self.model, step, overflowed)
        if not finite and not overflowed:
            raise StopTraining("nan", f"the gradients of step {step} have norm {norm}")
        if overflowed and self.scaler.get_scale() < LEAST_SCALE:
            raise StopTraining("nan", f"the gradients of step {step} overflow fp16 at every scale")
        if self.settings.clip and finite:
            nn.utils.clip_grads_with_norm_(weights, self.settings.clip, total)
        return norm, overflowed

    def _stats(self, loss: float, norm: float, lr: float, seconds: float, overflowed: bool) -> StepStats:
        settings, scaled = self.settings, self.scaler.is_enabled()
        tokens = settings.batch * settings.S * settings.accumulate * self.world.size
        gpu = self.device.type == "cuda"
        return StepStats(
            loss=loss,
            grad_norm=norm,
            lr=lr,
            tokens_per_s=tokens / seconds,
            seconds=seconds,
            scale=float(self.scaler.get_scale()) if scaled else None,
            overflowed=overflowed,
            overflows=self.overflows,
            peak_alloc_bytes=torch.cuda.max_memory_allocated(self.device) if gpu else None,
            rss_bytes=self._process.memory_info().rss,
        )

    def _evaluate(self) -> None:
        """On rank 0; the others meet it in the next step."""
        if self._judge is None or not self.world.first:
            return
        self.observers.stage("eval")
        with self._explained(self.step):
            self._judge(self.model, self.step)

    def save(self) -> Path | None:
        """Write a checkpoint of the present step; its path on the rank that wrote it."""
        self.observers.stage("checkpoint")
        rng = self.world.gather(random_state(self.device))
        if self.run is None:
            return None
        checkpoint = Checkpoint(
            step=self.step,
            settings=self.settings.to_dict(),
            data=self._data_id,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            overflows=self.overflows,
            rng=rng,
            observers=self.observers.state(),
        )
        return save_checkpoint(self.run.path, checkpoint, self.settings.keep)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Errors of a step as StopTraining, where what they mean is known."""
        try:
            yield
        except DiskError:
            raise
        except StopTraining as end:
            self.observers.failed(step, end)
            raise
        except Exception as error:
            self.observers.failed(step, error)
            elsewhere = self.world.failure_of_others()
            if elsewhere is not None:
                raise StopTraining(elsewhere.status, elsewhere.reason) from _OfOthers()
            raise _stopped(step, error, self.settings) from error


class _OfOthers(Exception):
    """The reason came from another rank."""


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _stopped(step: int, error: Exception, settings: Settings) -> StopTraining:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return StopTraining("oom", f"step {step}: {said}")
    if isinstance(error, torch.AcceleratorError):
        return StopTraining("error", f"the GPU failed in step {step}: {said}", machine=True)
    if isinstance(error, RuntimeError) and "returned nan values" in said:
        return StopTraining("nan", f"the backward of step {step}: {said}")
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return StopTraining("error", f"--compile: torch.compile failed in step {step}: {said[:300]}")
    return StopTraining("error", f"step {step}: {type(error).__name__}: {said}")


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW: matrices decay, vectors (norms, biases, positions of one number) do not."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def _row(step: int, stats: StepStats) -> dict[str, Any]:
    return {
        "step": step,
        "loss": stats.loss,
        "tokens_per_s": stats.tokens_per_s,
        "grad_norm": stats.grad_norm,
        "lr": stats.lr,
        "scale": stats.scale,
        "overflows": None if stats.scale is None else stats.overflows,
        "peak_alloc_bytes": stats.peak_alloc_bytes,
        "rss_bytes": stats.rss_bytes,
        "seconds": stats.seconds,
    }
