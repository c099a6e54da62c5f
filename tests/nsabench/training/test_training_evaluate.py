"""Judging: an oracle answers everything, a guesser is at chance, and every branch is switched off in turn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nsa import Routing
from nsabench.plan.training import ModelSettings, Settings
from nsabench.store.training import EVAL_COLUMNS
from nsabench.training.data import open_data
from nsabench.training.evaluate import SEQUENCES, evaluate, routes_of
from nsabench.training.model import ByteLM
from nsabench.training.synthetic import FIRST_ANSWER, FIRST_NEEDLE, FIRST_QUESTION, VALUES, task_of

MODEL = ModelSettings(
    dim=16, layers=1, heads=2, groups=1, dk=8, dv=8, l=8, d=4, l_sel=8, n_sel=3, w=16
)  # fmt: skip


def wanted(route: str = "auto", data: str = "synthetic", S: int = 200) -> Settings:
    return Settings(data=data, model=MODEL, S=S, batch=16, route=route)


def _logits(answers: torch.Tensor) -> torch.Tensor:
    return F.one_hot(answers, 256).float()


def oracle(tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Answers what the last needle of the key says that is asked for."""
    answers = torch.zeros_like(tokens)
    for b, row in enumerate(tokens.tolist()):
        known: dict[int, int] = {}
        for t, byte in enumerate(row):
            if byte >= FIRST_NEEDLE:
                key, value = divmod(byte - FIRST_NEEDLE, VALUES)
                known[key] = FIRST_ANSWER + value
            answers[b, t] = known.get(byte - FIRST_QUESTION, 0)
    return _logits(answers)


def blind_past(reach: int):  # type: ignore[no-untyped-def]
    """An oracle that sees the last `reach` bytes only, with `sel` on; none without."""

    def predict(tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        if routing.sel == "off":
            return _logits(torch.zeros_like(tokens))
        windows = [
            oracle(tokens[:, max(0, t - reach) : t + 1], routing)[:, -1:] for t in range(tokens.shape[1])
        ]
        return torch.cat(windows, 1)

    return predict


def guesser(tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Knows which bytes are answers, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    return _logits(FIRST_ANSWER + torch.randint(VALUES, tokens.shape, generator=generator))


def test_an_oracle_answers_everything() -> None:
    settings = wanted()
    rows = evaluate(oracle, settings, open_data(settings))
    assert [row["accuracy"] for row in rows] == [1.0] * len(rows)
    assert {row["route"] for row in rows} == {"auto", "sel=off", "cmp=off", "win=off"}


def test_a_guesser_is_at_chance() -> None:
    settings = wanted()
    for row in evaluate(guesser, settings, open_data(settings)):
        assert row["chance"] == 1 / 8
        spread = (row["chance"] / row["count"]) ** 0.5
        assert abs(row["accuracy"] - row["chance"]) < 5 * spread, row


def test_rows_tell_near_from_far_and_route_from_route() -> None:
    settings = wanted()
    rows = evaluate(blind_past(MODEL.w - 1), settings, open_data(settings))
    found = {(row["what"], row["route"]): row["accuracy"] for row in rows}
    assert found["needle within the window", "auto"] == 1
    assert found["needle within the window", "sel=off"] == 0
    assert found["needle past the window", "auto"] == 0
    assert found["copy past the window", "cmp=off"] == 0


def test_every_question_is_judged_and_distances_are_the_nearest() -> None:
    settings = wanted()
    task = task_of(settings.S, MODEL.w, MODEL.layers)
    rows = [row for row in evaluate(oracle, settings, open_data(settings)) if row["route"] == "auto"]
    by_what = {row["what"]: row for row in rows}
    assert by_what["needle within the window"]["count"] == SEQUENCES * task.near * task.clusters
    assert by_what["needle past the window"]["count"] == SEQUENCES * task.asked
    assert by_what["copy past the window"]["count"] == SEQUENCES * task.copy
    buckets = [row for row in rows if row["what"].endswith("back")]
    assert sum(row["count"] for row in buckets) == SEQUENCES * task.asked
    assert len(buckets) > 2
    assert by_what["needle within the window"]["distance"] < MODEL.w
    assert by_what["needle past the window"]["distance"] >= task.reach
    for row in buckets:
        low, high = (int(word) for word in row["what"].split() if word.isdigit())
        assert low <= row["distance"] <= high
    names = {column.name for column in EVAL_COLUMNS} - {"run_id", "step"}
    assert all(row.keys() == names for row in rows)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("auto", ["auto", "sel=off", "cmp=off", "win=off"]),
        ("sel=sdpa", ["sel=sdpa", "sel=off", "cmp=off,sel=sdpa", "sel=sdpa,win=off"]),
        ("sel=off", ["sel=off", "cmp=off,sel=off", "sel=off,win=off"]),
        ("cmp=off,sel=off", ["cmp=off,sel=off"]),
    ],
)
def test_each_branch_that_was_trained_is_switched_off(route: str, expected: list[str]) -> None:
    assert [str(routing) for routing in routes_of(route)] == expected


def test_a_model_is_judged_as_it_is() -> None:
    """Twice the same, with no gradient kept, and one of no training knows nothing."""
    settings = wanted(S=160)
    torch.manual_seed(0)
    model, data = ByteLM(MODEL), open_data(settings)
    rows = evaluate(model, settings, data)
    assert rows == evaluate(model, settings, data)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(row["accuracy"] < 0.4 for row in rows if row["count"] > 100)


def test_the_next_byte_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes([*range(50)] * 40))
    settings = wanted(data=str(path), S=30)

    def successor(tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        return _logits((tokens + 1) % 50)

    rows = evaluate(successor, settings, open_data(settings))
    assert {row["accuracy"] for row in rows} == {1.0}
    assert {row["what"] for row in rows} == {"next byte, held-out"}
    assert [row["distance"] for row in rows] == [None] * 4
    assert rows[0]["count"] == 30 * (200 // 31)


def test_chance_on_a_file_is_always_the_commonest_byte(tmp_path: Path) -> None:
    path, source = tmp_path / "text", random.Random(0)
    path.write_bytes(bytes(source.choices(b"ab", weights=[3, 1], k=4000)))
    settings = wanted(data=str(path), S=30)
    data = open_data(settings)
    row = evaluate(lambda tokens, routing: _logits(torch.full_like(tokens, ord("a"))), settings, data)[0]
    assert row["accuracy"] == row["chance"]
    assert 0.65 < row["chance"] < 0.85
