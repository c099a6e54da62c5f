from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nsa import routes
from nsa.routes import Row
from nsabench.plan import PlanError
from nsabench.plan.training import Settings
from nsabench.training.guard import Guard, replay, replay_file
from nsabench.training.locate import BACKWARD, FORWARD, Place, locate, projected
from nsabench.training.loop import LEAST_SCALE, Objective, Outcome, Trainer
from nsabench.training.model import ByteLM
from nsabench.training.observe import Observer, Observers, StopTraining
from tests.nsabench.training.plants import BROKEN, POSITION, plant  # noqa: F401
from tests.nsabench.training.small import RandomBytes, settings

Change = Callable[[Any], object]


class At(Observer):
    """Does something to the model at the beginning of a step."""

    def __init__(self, step: int, change: Change) -> None:
        self._step, self._change = step, change

    def begin(self, model: nn.Module, first_step: int) -> None:
        self._model = model

    def begin_step(self, step: int) -> None:
        if step == self._step:
            with torch.no_grad():
                self._change(self._model)


def train(
    folder: Path, change: Change = lambda model: None, *, step: int = 2, scale: float = 2.0**16, **given: Any
) -> Outcome:
    """Train with a guard, and a change to the model before ``step``."""
    options = settings(**given)

    def observers(trainer: Trainer) -> Observer:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=options.precision == "fp16")
        guard = Guard(folder, options, scaler=trainer.scaler, detect_anomaly=options.detect_anomaly)
        return Observers([At(step, change), guard])

    return Trainer(options, RandomBytes(options), observers=observers).train()


def found_by(model: ByteLM, options: Settings, **named: Any) -> Any:
    """The first bad tensor of one step."""
    batch = RandomBytes(options).batch(1, 0, 1)
    return locate(model, Objective(model, options), [batch], **named)


def new_model(**given: Any) -> tuple[ByteLM, Settings]:
    options = settings(compress="mlp", **given)
    return ByteLM(options.model), options


def every_weight() -> list[str]:
    return [name for name, _ in new_model()[0].named_parameters()]


def test_nothing_is_found_in_a_step_that_is_finite() -> None:
    model, options = new_model()
    model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
    assert found_by(model, options) is None
    assert model.embedding.weight.grad.eq(1).all()
    assert model.head.weight.grad is None


@pytest.mark.parametrize("name", every_weight())
def test_a_bad_weight_is_named(name: str) -> None:
    model, options = new_model()
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.view(-1)[-1] = math.inf
    found = found_by(model, options)
    assert found.place.passes == FORWARD
    assert found.place.tensor.partition(",")[0] == name
    assert (found.bad, found.count) == ("inf", 1)


@pytest.mark.parametrize("name", every_weight())
def test_a_bad_gradient_is_named(name: str) -> None:
    model, options = new_model()
    model.get_parameter(name).register_hook(lambda grad: grad * torch.nan)
    found = found_by(model, options)
    assert found.place.passes == BACKWARD
    assert found.place.tensor.partition(",")[0] == f"gradient of {name}"
    assert (found.bad, found.index) == ("nan", (0,) * len(found.index))


def test_the_parts_that_weights_belong_to() -> None:
    model, options = new_model()
    parts = {}
    for name in every_weight():
        model, options = new_model()
        with torch.no_grad():
            model.get_parameter(name).fill_(torch.nan)
        place = found_by(model, options).place
        parts[name] = place.layer, place.part, place.branch
    assert parts["embedding.weight"] == (None, "embedding", "")
    assert parts["layers.1.attention_norm.weight"] == (1, "norm", "")
    assert parts["layers.0.attention.proj.weight"] == (0, "proj", "")
    assert parts["layers.1.attention.compress_k.up.weight"] == (1, "compress", "cmp")
    assert parts["layers.0.attention.gate_out.bias"] == (0, "gate", "")
    assert parts["layers.1.attention.out.weight"] == (1, "out", "")
    assert parts["layers.0.feed_forward.down.weight"] == (0, "mlp", "")
    assert parts["norm.weight"] == (None, "norm", "")
    assert parts["head.weight"] == (None, "head", "")


@pytest.mark.parametrize("mode", ["batched", "stepwise"])
@pytest.mark.parametrize(
    ("what", "branch"),
    [
        ("q", ""),
        *((f"k_{branch}", branch) for branch in ("cmp", "sel", "win")),
        *((f"v_{branch}", branch) for branch in ("cmp", "sel", "win")),
        ("the gates' hidden layer", ""),
    ],
)
def test_the_rows_of_a_projection_are_those_it_attends_with(what: str, branch: str, mode: str) -> None:
    """A huge weight overflows in what it makes: the name of its rows is the name of that."""
    model, options = new_model(mode=mode, S=10)
    attention: Any = model.layers[1].attention
    sizes = projected(attention)
    first = sum(list(sizes.values())[: list(sizes).index((what, branch))])
    with torch.no_grad():
        attention.proj.weight[first] = 3e38
    assert found_by(model, options).place == Place(1, "proj", branch, FORWARD, what)
    with torch.no_grad():
        attention.proj.weight[first] = 1e20
    inputs = attention.attention_inputs(torch.randn(1, 10, options.model.dim))
    huge = [name for name in inputs if name[:2] in ("q", "k_", "v_") and inputs[name].abs().max() > 1e18]
    assert huge == ([what] if what in inputs else [])


@pytest.mark.parametrize("branch", ["cmp", "sel", "win"])
@pytest.mark.parametrize("mode", ["batched", "stepwise"])
def test_a_backend_that_gives_nan_is_named(plant: Any, branch: str, mode: str) -> None:  # noqa: F811
    plant(branch)
    model, options = new_model(mode=mode, S=24)
    assert found_by(model, options) is None
    BROKEN.add("forward")
    found = found_by(model, options)
    assert found.place == Place(0, branch, branch, FORWARD, "output")
    assert (found.bad, found.count) == ("nan", 2 * 4 * 8)
    assert found.index == (0, POSITION if mode == "batched" else 0, 0, 0)


@pytest.mark.parametrize("branch", ["cmp", "sel", "win"])
@pytest.mark.parametrize("mode", ["batched", "stepwise"])
def test_a_backend_that_hands_nan_back_is_named(plant: Any, branch: str, mode: str) -> None:  # noqa: F811
    plant(branch)
    model, options = new_model(mode=mode, S=24)
    BROKEN.add("backward")
    assert found_by(model, options).place == Place(1, branch, branch, BACKWARD, f"gradient of v_{branch}")


def test_a_bad_block_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("score", "planted", f"{__name__}:beyond", lambda request: None)
    monkeypatch.setattr(routes, "TABLE", (row, *routes.TABLE))
    model, options = new_model()
    found = found_by(model, options)
    assert str(found) == ("layer 0, score, forward: blocks has 384 invalid of 576, the first at [0, 0, 0, 1]")


def beyond(q: Any, k: Any, config: Any, *, kv_len: int, **named: Any) -> Any:
    return torch.tensor([0, 6, 7], dtype=torch.int32).expand(2, q.shape[1], 2, 3)


def set_nan(name: str) -> Change:
    def change(model: Any) -> None:
        model.get_parameter(name).view(-1)[0] = torch.nan

    return change


def spoil_gradient(model: Any) -> None:
    model.get_parameter("layers.0.feed_forward.up.weight").register_hook(lambda grad: grad / 0)


def set_inf_embedding(model: Any) -> None:
    model.embedding.weight[:, 3] = math.inf


def set_nan_values(model: Any) -> None:
    """The value projection of layer 1's selected branch."""
    config = model.layers[1].attention.config
    rows = config.num_kv_heads * config.v_dim
    first = (config.num_heads + 3 * config.num_kv_heads) * config.head_dim + rows
    model.layers[1].attention.proj.weight[first : first + rows] = torch.nan


TRAINED = [
    pytest.param(
        set_nan_values,
        Place(1, "proj", "sel", FORWARD, "layers.1.attention.proj.weight, rows of v_sel"),
        id="weight",
    ),
    pytest.param(
        set_inf_embedding, Place(None, "embedding", "", FORWARD, "embedding.weight"), id="embedding"
    ),
    pytest.param(
        spoil_gradient,
        Place(0, "mlp", "", BACKWARD, "gradient of layers.0.feed_forward.up.weight"),
        id="gradient",
    ),
]


@pytest.mark.parametrize(("change", "place"), TRAINED)
def test_a_training_stops_at_the_step_before_its_weights_change(
    change: Change, place: Place, tmp_path: Path
) -> None:
    outcome = train(tmp_path, change)
    path = tmp_path / replay_file(0)
    assert (outcome.status, outcome.step) == ("nan", 1)
    assert outcome.reason.startswith(f"step 2: {place} has ")
    assert outcome.reason.endswith(f"; to repeat it: nsabench train --replay {path}")
    stored = torch.load(path, weights_only=True)
    assert not stored["model"]["head.weight"].isnan().any()
    again = replay(path)
    assert again.recorded is not None
    assert again.recorded.place == place
    if place.passes == FORWARD:  # a hook on a weight is in no file
        assert again.same
        assert again.found == again.recorded
    else:
        assert again.found is None
        assert not again.same


def test_a_backend_is_named_in_training_and_again_in_replay(plant: Any, tmp_path: Path) -> None:  # noqa: F811
    plant("win")
    outcome = train(tmp_path, lambda model: BROKEN.add("backward"), accumulate=2, grad_checkpoint=True)
    assert outcome.reason.startswith("step 2: layer 1, win, backward: gradient of v_win has 1536 nan of 1536")
    again = replay(tmp_path / replay_file(0))
    assert again.same
    BROKEN.clear()
    assert replay(tmp_path / replay_file(0)).found is None


def test_the_micro_batch_is_told(plant: Any) -> None:  # noqa: F811
    """The planted row is bad at query 5, which only the second micro-batch has."""
    plant("win")
    model, options = new_model()
    tokens, mask = RandomBytes(options).batch(1, 0, 1)
    BROKEN.add("forward")
    short = tokens[:, :POSITION], mask[:, : POSITION - 1]
    found = locate(model, Objective(model, options), [short, (tokens, mask)])
    assert found is not None
    assert (found.micro, found.place.part) == (1, "win")


def test_a_loss_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entropy = nn.functional.cross_entropy

    def planted(*args: Any, **named: Any) -> torch.Tensor:
        return entropy(*args, **named) + torch.inf

    monkeypatch.setattr(nn.functional, "cross_entropy", planted)
    outcome = train(tmp_path)
    assert outcome.step == 0
    assert outcome.reason.startswith("step 1: loss, forward: the loss has 1 inf of 1, the first at []")


def test_what_does_not_happen_again_is_said(tmp_path: Path) -> None:
    def once(model: Any) -> None:
        hook = model.head.weight.register_hook(lambda grad: (hook.remove(), grad * torch.nan)[1])

    outcome = train(tmp_path, once)
    assert outcome.reason.startswith(
        "the gradients of step 2 have norm nan; head, backward: gradient of head.weight has 8192 nan of "
        "8192, the first at [0, 0]; done again, the step is finite; to repeat it: nsabench train --replay "
    )
    again = replay(tmp_path / replay_file(0))
    assert again.same
    assert again.found is None
    assert again.cause == "the gradients of step 2 have norm nan"


def test_fp16_overflow_is_counted_and_no_nan(tmp_path: Path) -> None:
    outcome = train(tmp_path, precision="fp16", scale=2.0**26, steps=12)
    assert outcome == Outcome("ok", "", 12)
    assert not (tmp_path / replay_file(0)).exists()


def test_fp16_that_overflows_at_every_scale_is_nan(plant: Any, tmp_path: Path) -> None:  # noqa: F811
    plant("sel")
    outcome = train(
        tmp_path, lambda model: BROKEN.add("backward"), step=3, precision="fp16", scale=4.0, steps=99
    )
    assert outcome.status == "nan"
    # Each step that overflows halves the scale, from 4 to the least; the next ends it.
    assert outcome.step == 2 + math.log2(4.0 / LEAST_SCALE) + 1
    assert "layer 1, sel, backward: gradient of v_sel" in outcome.reason


def test_fp16_with_a_loss_that_is_not_finite_is_nan_at_once(tmp_path: Path) -> None:
    outcome = train(tmp_path, set_nan("norm.weight"), precision="fp16")
    assert (outcome.status, outcome.step) == ("nan", 1)
    assert outcome.reason.startswith("step 2: norm, forward: norm.weight has 1 nan of 32")


@pytest.mark.filterwarnings("ignore:Error detected in _NaNGradientBackward", "ignore:Anomaly Detection")
def test_detect_anomaly_names_the_same_place(plant: Any, tmp_path: Path) -> None:  # noqa: F811
    plant("cmp")
    outcome = train(tmp_path, lambda model: BROKEN.add("backward"), detect_anomaly=True)
    assert (outcome.status, outcome.step) == ("nan", 1)
    assert outcome.reason.startswith("step 2: layer 1, cmp, backward: gradient of v_cmp has ")
    stored = replay(tmp_path / replay_file(0))
    assert "_NaNGradientBackward' returned nan values" in stored.cause
    assert not torch.is_anomaly_enabled()


def test_the_good_case_leaves_nothing_behind(tmp_path: Path) -> None:
    assert train(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_replay_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "replay.pt"
    with pytest.raises(PlanError, match=r"cannot read .*replay\.pt: No such file"):
        replay(path)
    path.write_bytes(b"not one")
    with pytest.raises(PlanError, match="is damaged or no replay file"):
        replay(path)
    torch.save({"format": "other"}, path)
    with pytest.raises(PlanError, match="is no replay file of nsabench train"):
        replay(path)
    train(tmp_path, set_nan("head.weight"))
    content = torch.load(path, weights_only=True)
    content["version"] = 2
    torch.save(content, path)
    with pytest.raises(PlanError, match="has version 2; this nsabench reads 1"):
        replay(path)
    content["version"] = 1
    del content["model"]["head.weight"]
    torch.save(content, path)
    with pytest.raises(PlanError, match=r"is damaged: .*head\.weight"):
        replay(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(PlanError, match="is damaged or no replay file"):
        replay(path)


def test_the_first_rank_says_what_another_found(tmp_path: Path) -> None:
    """Rank 1 alone has a bad byte; the gradients that both have are bad."""
    options = settings(world=2)
    end = StopTraining("nan", "the loss of step 1 is nan")
    reasons = {}
    for rank in (1, 0):
        model = ByteLM(options.model)
        model.embedding.weight.data[7] = torch.inf
        guard = Guard(tmp_path, options, rank=rank, world=2)
        guard.begin(model, 1)
        guard.begin_step(1)
        tokens, mask = RandomBytes(options).batch(1, rank, 2)
        tokens = tokens.masked_fill(tokens == 7, 8)
        if rank == 1:
            tokens[0, 3] = 7
        else:
            model.embedding.weight.data[7] = 0
        guard.batch(1, 0, tokens, mask)
        with pytest.raises(StopTraining) as stopped:
            guard.failed(1, end)
        reasons[rank] = stopped.value.reason
    said = "embedding, forward: embedding.weight has 32 inf of 8192, the first at [7, 0]; to repeat it: "
    assert reasons[1] == f"step 1: {said}nsabench train --replay {tmp_path / 'replay.rank1.pt'}"
    assert reasons[0] == f"rank 1: {said}nsabench train --replay {tmp_path / 'replay.pt'}"


def test_what_ends_a_step_otherwise_is_left_alone(tmp_path: Path) -> None:
    guard = Guard(tmp_path, settings())
    guard.begin(new_model()[0], 1)
    guard.begin_step(1)
    guard.batch(1, 0, *RandomBytes(settings()).batch(1, 0, 1))
    guard.failed(1, StopTraining("hang", "no sign of life"))
    guard.failed(1, RuntimeError("another"))
    assert list(tmp_path.iterdir()) == []
