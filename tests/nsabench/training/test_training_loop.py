"""The training loop: steps, rows, precision, how it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nsa.testing import assert_matches, error_budget
from nsabench.plan import PlanError
from nsabench.plan.training import Settings, rate_of
from nsabench.store import read_table
from nsabench.store.training import TRAINING_COLUMNS, TRAINING_FILE, load_training
from nsabench.training import loop, precision
from nsabench.training.checkpoint import checkpoints_in
from nsabench.training.loop import Outcome, Trainer
from nsabench.training.model import token_loss
from nsabench.training.observe import Observer, Observers, StepStats, StopTraining
from nsabench.training.precision import DTYPES, Precision
from tests.nsabench.training.small import new_run, settings

CPU = torch.device("cpu")


class Rows:
    """Batch `number` has the rows from `number * world * B` on of one endless table; some targets count."""

    def __init__(self, settings: Settings) -> None:
        self._batch, self._S = settings.batch, settings.S

    def batch(self, step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = (step * world + rank) * self._batch
        rows = [self._row(first + row) for row in range(self._batch)]
        return torch.stack([tokens for tokens, _ in rows]), torch.stack([mask for _, mask in rows])

    def _row(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(256, (self._S + 1,), generator=generator)
        return tokens, torch.rand(self._S, generator=generator) < 0.3


class Gradients(Observer):
    """Keeps what gradients a step had, and what it was told."""

    def __init__(self, told: list[Any] | None = None) -> None:
        self.told = [] if told is None else told
        self.first: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []
        self.stats: list[StepStats] = []

    def begin(self, model: nn.Module, first_step: int) -> None:
        self.told.append(("begin", first_step))

    def begin_step(self, step: int) -> None:
        self.told.append(("begin_step", step))

    def stage(self, name: str) -> None:
        self.told.append(name)

    def batch(self, step: int, micro: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        self.told.append(("batch", micro))

    def after_forward(self, step: int, loss: torch.Tensor) -> None:
        self.told.append("after_forward")

    def after_backward(self, model: nn.Module, step: int, overflowed: bool) -> None:
        self.told.append(("after_backward", overflowed))
        if not self.first:
            self.first = {
                name: weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }

    def after_step(self, step: int, loss: float, stats: StepStats) -> None:
        self.told.append(("after_step", step))
        self.losses.append(loss)
        self.stats.append(stats)

    def finish(self) -> None:
        self.told.append("finish")


def train(
    folder: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    change: Callable[[Trainer], object] = lambda trainer: None,
    **given: Any,
) -> tuple[Outcome, Gradients, Trainer]:
    wanted, seen = settings(**given), Gradients()
    run = None if folder is None else new_run(folder, settings=wanted.to_dict())
    trainer = Trainer(wanted, Rows(wanted), run, observers=lambda made: seen)
    change(trainer)
    outcome = trainer.train(stop)
    if run is not None:
        run.close()
    return outcome, seen, trainer


def test_a_loss_falls_where_there_is_something_to_learn() -> None:
    class Same(Rows):
        def batch(self, step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
            return super().batch(0, rank, world)

    wanted, seen = settings(steps=12, lr=2e-2, layers=1), Gradients()
    assert Trainer(wanted, Same(wanted), observers=lambda made: seen).train() == Outcome("ok", "", 12)
    assert seen.losses[0] > math.log(256)
    assert seen.losses[-1] < 0.2 * seen.losses[0]


def test_a_step_is_told_in_order() -> None:
    _, seen, _ = train(steps=1, accumulate=2)
    micro = ["forward", "after_forward", "backward"]
    assert seen.told == [
        *(("begin", 1), ("begin_step", 1), "data"),
        *(("batch", 0), *micro, ("batch", 1), *micro),
        *(("after_backward", False), "optimizer", ("after_step", 1), "checkpoint", "finish"),
    ]


def truth_of(**given: Any) -> dict[str, torch.Tensor]:
    """Gradients of the first step in fp64, with one batch of four sequences."""
    wanted, seen = settings(**given, batch=4), Gradients()
    trainer = Trainer(wanted, Rows(wanted), observers=lambda made: seen)
    trainer.model.double()
    tokens, mask = Rows(wanted).batch(0, 0, 1)
    (trainer.objective(tokens, mask) / mask.sum()).backward()
    return {
        name: weight.grad.clone()
        for name, weight in trainer.model.named_parameters()
        if weight.grad is not None
    }


def assert_same_gradients(found: Gradients, eager: Gradients, truth: dict[str, torch.Tensor]) -> None:
    largest = max(float(grad.abs().max()) for grad in truth.values())
    assert found.first.keys() == truth.keys()
    for name, exact in truth.items():
        budget = error_budget(exact, eager.first[name], largest)
        assert_matches(found.first[name], exact, budget, name)


@pytest.mark.parametrize(
    "way",
    [
        {"batch": 2, "accumulate": 2},
        {"batch": 1, "accumulate": 4},
        {"batch": 4, "mode": "stepwise"},
        {"batch": 4, "grad_checkpoint": True},
    ],
    ids=["2x2", "1x4", "stepwise", "grad_checkpoint"],
)
def test_ways_to_the_same_gradients(way: dict[str, Any]) -> None:
    """Micro-batches hold different numbers of targets that count: the mean is over all of them."""
    given = {"S": 24, "steps": 1, "layers": 1}
    _, eager, _ = train(**given, batch=4)
    _, found, _ = train(**{**given, **way})
    assert_same_gradients(found, eager, truth_of(**given))


def test_rows_are_stored_as_they_come(tmp_path: Path) -> None:
    outcome, seen, trainer = train(tmp_path, steps=5, log_every=2, clip=0.5)
    assert trainer.run is not None
    rows = read_table(trainer.run.path, TRAINING_FILE, TRAINING_COLUMNS)
    assert outcome.status == "ok"
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert [row["loss"] for row in rows] == [seen.losses[step - 1] for step in (1, 2, 4, 5)]
    assert all(row["rss_bytes"] > 2**20 and row["seconds"] > 0 for row in rows)
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * 48 / row["seconds"])
        assert (row["scale"], row["overflows"], row["peak_alloc_bytes"]) == (None, None, None)
        assert row["grad_norm"] > 0.5  # before clipping
    assert len(load_training(trainer.run.path).steps) == 4


def test_clipping_bounds_what_the_optimizer_sees() -> None:
    norms: list[float] = []

    def watch(trainer: Trainer) -> None:
        before = trainer.optimizer.step

        def step(*args: Any, **named: Any) -> Any:
            grads = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
            norms.append(float(nn.utils.get_total_norm(grads)))
            return before(*args, **named)

        trainer.optimizer.step = step  # type: ignore[method-assign]

    _, seen, _ = train(steps=2, clip=0.25, change=watch)
    assert all(0.24 < norm <= 0.25 for norm in norms)
    assert len(norms) == 2
    norms.clear()
    _, seen, _ = train(steps=2, clip=0.0, change=watch)
    assert norms == pytest.approx([one.grad_norm for one in seen.stats])


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("compress", ["mean", "mlp"])
def test_reduced_precision_trains(name: str, compress: str) -> None:
    wanted = settings(compress=compress)
    tokens, mask = Rows(wanted).batch(0, 0, 1)

    def loss_in(dtype: torch.dtype) -> torch.Tensor:
        model = Trainer(wanted, Rows(wanted)).model.to(dtype)
        return token_loss(model(tokens[:, :-1]), tokens[:, 1:], mask).detach()

    exact, eager = loss_in(torch.float64), loss_in(DTYPES[name]).to(DTYPES[name])
    outcome, seen, _ = train(steps=4, precision=name, compress=compress)
    assert outcome.status == "ok"
    assert_matches(torch.tensor(seen.losses[0]), exact, error_budget(exact, eager))
    assert seen.losses != train(steps=4, compress=compress)[1].losses
    assert all(one.scale == (65536.0 if name == "fp16" else None) for one in seen.stats)
    assert all(one.overflows == 0 and not one.overflowed for one in seen.stats)


def test_an_overflow_is_counted_and_its_step_left_out(tmp_path: Path) -> None:
    """A scale that makes fp16 overflow is halved until it does not; nothing is called NaN."""

    def too_large(trainer: Trainer) -> None:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36)

    before: list[torch.Tensor] = []

    def first_weights(trainer: Trainer) -> None:
        too_large(trainer)
        before.append(trainer.model.embedding.weight.detach().clone())

    outcome, seen, trainer = train(tmp_path, steps=1, precision="fp16", change=first_weights)
    assert outcome.status == "ok"
    assert torch.equal(trainer.model.embedding.weight, before[0])
    assert ("after_backward", True) in seen.told
    outcome, seen, trainer = train(tmp_path, steps=30, precision="fp16", change=too_large)
    assert outcome == Outcome("ok", "", 30)
    overflows = [one.overflows for one in seen.stats]
    assert overflows[0] == 1
    assert 1 < overflows[-1] < 30
    assert not seen.stats[-1].overflowed
    assert trainer.run is not None
    last = load_training(trainer.run.path).steps[-1]
    assert (last["overflows"], last["scale"]) == (overflows[-1], 2.0 ** (36 - overflows[-1]))


def test_what_is_not_finite_ends_it(tmp_path: Path) -> None:
    """Without any guard; nothing of the step is kept."""

    def poison(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.head.weight[3, 3] = math.nan

    outcome, seen, trainer = train(tmp_path, change=poison)
    assert outcome == Outcome("nan", "the loss of step 1 is nan", 0)
    assert seen.told[-1] == "finish"
    assert trainer.run is not None
    assert checkpoints_in(trainer.run.path) == []
    assert load_training(trainer.run.path).steps == []


def test_a_gradient_that_is_not_finite_ends_it() -> None:
    def poison(trainer: Trainer) -> None:
        trainer.model.embedding.weight.register_hook(lambda grad: grad * math.inf)

    outcome, _, _ = train(change=poison)
    assert (outcome.status, outcome.step) == ("nan", 0)
    assert outcome.reason in (
        "the gradients of step 1 have norm nan",
        "the gradients of step 1 have norm inf",
    )


def test_an_observer_ends_it() -> None:
    class Ends(Observer):
        def after_step(self, step: int, loss: float, stats: StepStats) -> None:
            if step == 2:
                raise StopTraining("hang", "it hangs")

    seen, wanted = Gradients(), settings(steps=5)
    trainer = Trainer(wanted, Rows(wanted), observers=lambda made: Observers([Ends(), seen]))
    assert trainer.train() == Outcome("hang", "it hangs", 2)
    assert seen.told[-1] == "finish"


@pytest.mark.parametrize(
    ("error", "status", "machine"),
    [
        (torch.OutOfMemoryError("no memory\nleft"), "oom", False),
        (torch.AcceleratorError("CUDA error: lost"), "error", True),
        (RuntimeError("Function 'MulBackward0' returned nan values in its 0th output."), "nan", False),
        (ZeroDivisionError("division by zero"), "error", False),
    ],
)
def test_an_error_of_a_step_has_a_status(error: Exception, status: str, machine: bool) -> None:
    def failing(*inputs: Any) -> None:
        raise error

    outcome, seen, _ = train(change=lambda trainer: setattr(trainer.objective, "forward", failing))
    assert (outcome.status, outcome.machine, outcome.step) == (status, machine, 0)
    assert " ".join(str(error).split()) in outcome.reason
    assert "\n" not in outcome.reason
    assert seen.told[-1] == "finish"


def test_an_observer_may_know_better_what_an_error_means() -> None:
    class Knows(Observer):
        def failed(self, step: int, error: Exception) -> None:
            raise StopTraining("nan", f"step {step}: {error} is a NaN")

    def failing(*inputs: Any) -> None:
        raise ValueError("this")

    wanted = settings()
    trainer = Trainer(wanted, Rows(wanted), observers=lambda made: Knows())
    setattr(trainer.objective, "forward", failing)  # noqa: B010
    assert trainer.train() == Outcome("nan", "step 1: this is a NaN", 0)


def test_a_wish_to_stop_leaves_a_checkpoint(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    outcome, seen, trainer = train(tmp_path, lambda: next(asked), steps=9)
    assert outcome == Outcome("interrupted", "stopped after step 2", 2)
    assert trainer.run is not None
    assert [path.name for path in checkpoints_in(trainer.run.path)] == ["checkpoint-000000002.pt"]
    assert seen.told[-2:] == ["checkpoint", "finish"]


def test_it_is_evaluated_when_due_and_at_the_end() -> None:
    wanted, judged = settings(steps=5, evaluate_every=2), list[int]()
    trainer = Trainer(wanted, Rows(wanted), evaluate=lambda model, step: judged.append(step))
    trainer.train()
    assert judged == [2, 4, 5]


def test_only_matrices_decay() -> None:
    wanted = settings(weight_decay=0.3, compress="mlp")
    trainer = Trainer(wanted, Rows(wanted))
    decays, stays = trainer.optimizer.param_groups
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.3, 0.0)
    assert {weight.dim() for weight in stays["params"]} == {1}
    assert min(weight.dim() for weight in decays["params"]) == 2
    count = sum(1 for _ in trainer.model.parameters())
    assert len(decays["params"]) + len(stays["params"]) == count


def test_the_rate_rises_and_falls() -> None:
    cosine = settings(lr=1.0, warmup=4, steps=14, schedule="cosine")
    rates = [rate_of(cosine, step) for step in range(1, 15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[3:]))
    constant = settings(lr=1.0, warmup=4, steps=14, schedule="constant")
    assert [rate_of(constant, step) for step in (2, 5, 14)] == [0.5, 1.0, 1.0]
    assert rate_of(settings(lr=1.0, warmup=0, steps=1), 1) == pytest.approx(0.1)
    _, seen, _ = train(lr=1e-3, warmup=2, steps=3, schedule="constant")
    assert [one.lr for one in seen.stats] == [5e-4, 1e-3, 1e-3]


def test_a_precision_that_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(wanted: Precision) -> None:
        raise RuntimeError('"baddbmm" not implemented\nfor Half')

    Precision("fp16", CPU).check()
    monkeypatch.setattr(precision, "_small_step", refuses)
    Precision("fp32", CPU).check()
    with pytest.raises(PlanError) as refused:
        Precision("fp16", CPU).check()
    assert str(refused.value) == (
        '--precision: fp16 cannot run on this CPU: "baddbmm" not implemented for Half'
    )


def test_a_precision_that_is_slow_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_native", lambda name: False)
    assert "AVX512_FP16" in Precision("fp16", CPU).note()
    assert Precision("fp32", CPU).note() == ""
    monkeypatch.setattr(precision, "_native", lambda name: True)
    assert Precision("fp16", CPU).note() == ""


def test_a_scale_that_is_never_found_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that overflow at every scale are not called an overflow for ever."""
    monkeypatch.setattr(loop, "LEAST_SCALE", 2.0**15)

    def poison(trainer: Trainer) -> None:
        trainer.model.embedding.weight.register_hook(lambda grad: grad * math.inf)

    outcome, _, _ = train(steps=9, precision="fp16", change=poison)
    assert (outcome.status, outcome.step) == ("nan", 2)
    assert "overflow fp16 at every scale" in outcome.reason
