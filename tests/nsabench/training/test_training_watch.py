from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nsa import NSAConfig, Routing, routes
from nsa.routes import BRANCHES, Request, Row
from nsabench.plan.training import Settings
from nsabench.run.selection import sharing
from nsabench.store import read_table
from nsabench.store.training import (
    GATES_FILE,
    OVERLAP_FILE,
    ROUTES_FILE,
    TRAINING_TABLES,
    load_training,
)
from nsabench.training.gates import COLLAPSED_ENTROPY, COLLAPSED_SHARE, gate_health, gate_sums
from nsabench.training.guard import Guard
from nsabench.training.loop import Trainer
from nsabench.training.model import ByteLM
from nsabench.training.observe import Observer, Observers
from nsabench.training.routes_seen import RoutesSeen
from nsabench.training.watch import Seen, Watch, gates_of
from tests.nsabench.training.small import RandomBytes, new_run, settings

ON = (True, True, True)


def health(gates: torch.Tensor, on: tuple[bool, ...] = ON) -> Any:
    return gate_health(gate_sums(gates, on), on)


def test_gate_figures_by_hand() -> None:
    """Two tokens of a head: gates 1 1 2, shares 1/4 1/4 1/2; gates 0 1 0, shares 0 1 0."""
    found = health(torch.tensor([[[1.0, 1.0, 2.0]], [[0.0, 0.5, 0.0]]]))
    assert found.shares == pytest.approx((0.125, 0.625, 0.25))
    assert found.entropy == pytest.approx((1.5 * math.log(2)) / 2)
    assert found.largest_share == pytest.approx(0.625)
    assert found.row() == {
        "entropy": found.entropy,
        "largest_share": found.largest_share,
        "collapsed": 0,
        "share_cmp": found.shares[0],
        "share_sel": found.shares[1],
        "share_win": found.shares[2],
    }


def test_equal_gates_have_the_entropy_of_three() -> None:
    found = health(torch.full((2, 5, 4, 3), 0.01, dtype=torch.bfloat16))
    assert found.entropy == pytest.approx(math.log(3), abs=1e-6)
    assert not found.collapsed


@pytest.mark.parametrize(
    ("gates", "collapsed"),
    [
        pytest.param([[0.96, 0.02, 0.02]], 1, id="one branch has nearly all"),
        pytest.param([[0.94, 0.03, 0.03]], 0, id="one branch has much"),
        pytest.param([[1.0, 0.01, 0.0], [0.0, 1.0, 0.01]], 1, id="each token has one branch, whichever"),
        pytest.param([[1.0, 0.1, 0.0], [0.0, 1.0, 0.1]], 0, id="each token has one branch, nearly"),
        pytest.param([[0.0, 0.0, 0.0]], 1, id="all closed"),
    ],
)
def test_the_rule_of_collapse(gates: list[list[float]], collapsed: int) -> None:
    assert (COLLAPSED_SHARE, COLLAPSED_ENTROPY) == (0.95, 0.1)
    assert health(torch.tensor(gates)).row()["collapsed"] == collapsed


def test_a_branch_that_is_off_has_no_share() -> None:
    on = (True, False, True)
    found = health(torch.tensor([[3.0, 96.0, 1.0]]), on)
    assert found.shares == (0.75, None, 0.25)
    assert found.row()["share_sel"] is None
    alone = health(torch.tensor([[3.0, 96.0, 1.0]]), (False, False, True))
    assert (alone.largest_share, alone.entropy, alone.collapsed) == (1.0, 0.0, False)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_the_gates_are_those_of_the_layer(gate: str) -> None:
    attention: Any = ByteLM(settings(gate=gate).model).layers[0].attention
    nn.init.normal_(attention.gate_out.weight)
    logits = []
    attention.gate_out.register_forward_hook(lambda module, x, y: logits.append(y))
    gates = attention.attention_inputs(torch.randn(2, 20, 32))["gates"]
    assert torch.equal(gates_of(attention, logits[0]), gates)


def watched(folder: Path, every: int = 2, **given: Any) -> tuple[Any, Trainer]:
    """What a training with a watch stored, and its trainer."""
    options = settings(**given)
    with new_run(folder) as run:

        def observers(trainer: Trainer) -> Observer:
            probe = trainer.probe if options.compile else None
            return Observers([Watch(run, options.route, every=every, probe=probe)])

        trainer = Trainer(options, RandomBytes(options), run, observers)
        assert trainer.train().status == "ok"
    return load_training(run.path), trainer


def test_what_is_looked_at_and_when(tmp_path: Path) -> None:
    found, _ = watched(tmp_path, steps=5)
    assert [(row["step"], row["layer"]) for row in found.gates] == [
        (step, layer) for step in (1, 2, 4) for layer in (0, 1)
    ]
    assert [(row["step"], row["layer"]) for row in found.overlap] == [
        (step, layer) for step in (1, 2, 4) for layer in (0, 1)
    ]
    assert all(math.log(2) < row["entropy"] <= math.log(3) for row in found.gates)
    assert all(0 < row["neighbour_overlap"] < 1 for row in found.overlap)
    assert all(3 <= row["union_blocks"] <= 6 for row in found.overlap)


def test_the_first_step_is_seen_as_it_is(tmp_path: Path) -> None:
    """Figures of the untrained model, made without a hook."""
    found, trainer = watched(tmp_path, steps=1)
    options = trainer.settings
    torch.manual_seed(options.seed)
    model = ByteLM(options.model)
    tokens = RandomBytes(options).batch(0, 0, 1)[0][:, :-1]
    inputs = []
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    model(tokens)
    for layer, gates, overlap in zip(model.layers, found.gates, found.overlap, strict=True):
        attention: Any = layer.attention
        given = attention.attention_inputs(inputs.pop(0))
        expected = health(given["gates"])
        for name, value in expected.row().items():
            assert gates[name] == pytest.approx(value, abs=1e-6)
        blocks = routes.resolve("auto", request(options)).score(given["q"], given["k_cmp"], attention.config)
        shared = sharing(blocks, 0, attention.config)
        assert overlap["neighbour_overlap"] == pytest.approx(shared.neighbour_overlap)
        assert overlap["union_blocks"] == pytest.approx(shared.union_blocks)


def request(options: Settings, **given: Any) -> Request:
    from nsabench.training.model import attention_config

    config = attention_config(options.model)
    asked = {"device": "cpu", "dtype": torch.float32, "num_queries": 48, "kv_len": 48, "needs_grad": True}
    return Request(**{**asked, "config": config, **given})


@pytest.mark.parametrize(
    "given",
    [{"mode": "stepwise"}, {"grad_checkpoint": True}, {"accumulate": 2}],
    ids=lambda given: str(given),
)
def test_the_figures_do_not_depend_on_how_the_step_is_done(given: dict[str, Any], tmp_path: Path) -> None:
    plain, _ = watched(tmp_path, steps=1)
    found, _ = watched(tmp_path, steps=1, **given)
    for one, other in zip(plain.gates + plain.overlap, found.gates + found.overlap, strict=True):
        assert {k: v for k, v in other.items() if k != "run_id"} == pytest.approx(
            {k: v for k, v in one.items() if k != "run_id"}, abs=1e-6
        )


def test_watching_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    _, one = watched(tmp_path)
    options = one.settings
    other = Trainer(options, RandomBytes(options))
    other.train()
    for mine, plain in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.model.modules())


class Asked:
    """Records the requests that the table is asked with; refuses itself."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> str:
        self.requests.append(request)
        return f"planted, got {request.kv_len}"


@pytest.mark.parametrize("mode", ["batched", "stepwise"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_call_counts_with_the_request_that_the_layer_resolved(
    mode: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted row sees what the attention asks, and what the count asks again."""
    options = settings(mode=mode, precision=precision, S=20)
    asked = Asked()
    row = Row("win", "planted", "nsa.reference:sliding_attention", asked)
    monkeypatch.setattr(routes, "TABLE", (row, *routes.TABLE))
    trainer = Trainer(options, RandomBytes(options))
    tokens, mask = RandomBytes(options).batch(0, 0, 1)
    seen, counted = RoutesSeen(), []
    count = seen.count
    monkeypatch.setattr(seen, "count", lambda *given: (counted.append(given), count(*given)))
    with seen.on(trainer.model), trainer.precision.autocast():
        trainer.objective(tokens, mask)
    mine = [request for _, _, request in counted]
    assert {layer for layer, _, _ in counted} == {0, 1}
    assert all(routing == Routing() for _, routing, _ in counted)
    assert set(asked.requests) == set(mine)
    theirs = {one: asked.requests.count(one) for one in asked.requests}
    # Beside the attention's own calls, a request is asked when it is first counted: to settle, and for why.
    assert all(theirs[one] == mine.count(one) + 2 for one in set(mine))
    refused = [row for row in seen.rows() if row["backend"] == "planted"]
    calls = 1 if mode == "batched" else 20
    assert [(row["layer"], row["refused"]) for row in refused] == [(0, calls), (1, calls)]
    assert all(row["reason"].startswith("planted, got ") for row in refused)


def test_the_routes_of_a_training(tmp_path: Path) -> None:
    found, _ = watched(tmp_path, steps=3, accumulate=2)
    for layer in (0, 1):
        for branch in BRANCHES:
            rows = [row for row in found.routes if (row["layer"], row["branch"]) == (layer, branch)]
            taken = [row for row in rows if row["calls"]]
            passed = [row for row in rows if row["refused"]]
            assert [row["calls"] for row in taken] == [6]
            assert [row["reason"] for row in taken] == [""]
            assert len(taken) + len(passed) == len(rows)
            assert all(row["refused"] == 6 and row["calls"] == 0 and row["reason"] for row in passed)
    backends = {row["backend"] for row in found.routes if row["calls"] and row["branch"] == "win"}
    assert backends == {"sdpa"}
    reasons = {row["backend"]: row["reason"] for row in found.routes if row["branch"] == "win"}
    assert reasons["fa2"] == "needs a CUDA GPU, got cpu"


def test_named_backends_and_those_that_are_off(tmp_path: Path) -> None:
    found, _ = watched(tmp_path, steps=1, route="cmp=reference,sel=off,win=sdpa")
    rows = [(row["branch"], row["backend"], row["calls"]) for row in found.routes if row["layer"] == 0]
    assert rows == [("cmp", "reference", 1), ("score", "off", 1), ("sel", "off", 1), ("win", "sdpa", 1)]
    assert found.overlap == []
    assert {row["share_sel"] for row in found.gates} == {None}
    assert all(row["share_cmp"] + row["share_win"] == pytest.approx(1) for row in found.gates)


def test_an_evaluation_counts_no_routes(tmp_path: Path) -> None:
    options = settings(steps=1)
    with new_run(tmp_path) as run:
        watch = Watch(run, "auto")

        def judge(model: ByteLM, step: int) -> None:
            with torch.no_grad():
                model(RandomBytes(options).batch(0, 0, 1)[0])

        Trainer(options, RandomBytes(options), run, lambda trainer: watch, evaluate=judge).train()
        found = read_table(run.path, ROUTES_FILE, TRAINING_TABLES[ROUTES_FILE])
    assert {row["calls"] for row in found} == {0, 1}


def test_a_step_that_is_done_again_to_find_a_nan_is_not_counted(tmp_path: Path) -> None:
    options = settings(steps=1)
    with new_run(tmp_path) as run:

        def observers(trainer: Trainer) -> Observer:
            nn.init.constant_(trainer.model.head.weight, torch.nan)
            return Observers([Guard(run.path, options), Watch(run, "auto")])

        assert Trainer(options, RandomBytes(options), run, observers).train().status == "nan"
    assert {row["calls"] for row in load_training(run.path).routes} == {0, 1}


def test_counts_go_on_where_they_were() -> None:
    options = settings()
    seen, again = RoutesSeen(), RoutesSeen()
    seen.count(1, Routing(), request(options))
    again.restore(seen.state())
    again.count(1, Routing(), request(options, kv_len=47, num_queries=47))
    assert [row["calls"] + row["refused"] for row in again.rows()] == [2] * len(seen.rows())


def test_a_model_that_cannot_be_looked_into_is_probed(tmp_path: Path) -> None:
    """As one that is compiled: its own steps count nothing, the probe before each that is looked at does."""
    options = settings(steps=3)
    plain, _ = watched(tmp_path, steps=3)
    with new_run(tmp_path) as run:

        def observers(trainer: Trainer) -> Observer:
            return Watch(run, options.route, every=2, probe=trainer.probe)

        Trainer(options, RandomBytes(options), run, observers).train()
    found = load_training(run.path)
    assert {row["calls"] for row in found.routes} == {0, 2}
    taken = [{(r["branch"], r["backend"]) for r in rows.routes if r["calls"]} for rows in (plain, found)]
    assert taken[0] == taken[1]
    for one, other in zip(plain.gates, found.gates, strict=True):
        assert other["entropy"] == pytest.approx(one["entropy"], abs=1e-6)


def test_calls_that_do_not_continue_each_other_are_not_neighbours() -> None:
    model = ByteLM(settings().model)
    seen = Seen(model)
    tokens = RandomBytes(settings()).batch(0, 0, 1)[0]
    with seen.looking(), torch.no_grad():
        model(tokens)
        model(tokens)
    once = Seen(model)
    with once.looking(), torch.no_grad():
        model(tokens)
    assert seen.overlap() == once.overlap()
    config: NSAConfig = model.layers[0].attention.config
    blocks = seen.blocks[0][0][0]
    assert sharing(torch.cat([blocks, blocks], 1), 0, config) != sharing(blocks, 0, config)


def test_a_run_has_its_tables_while_it_goes_on(tmp_path: Path) -> None:
    """A process that is killed leaves what was counted up to the last step looked at."""
    options = settings()
    with new_run(tmp_path) as run:
        watch = Watch(run, "auto", every=2)

        class Look(Observer):
            def after_step(self, step: int, *more: Any) -> None:
                tables = {file: read_table(run.path, file, TRAINING_TABLES[file]) for file in TRAINING_TABLES}
                seen.append(
                    (
                        len(tables[GATES_FILE]),
                        len(tables[OVERLAP_FILE]),
                        max(row["calls"] for row in tables[ROUTES_FILE]),
                    )
                )

        seen: list[tuple[int, int, int]] = []
        Trainer(options, RandomBytes(options), run, lambda trainer: Observers([watch, Look()])).train()
    assert seen == [(2, 2, 1), (4, 4, 2), (4, 4, 2)]
