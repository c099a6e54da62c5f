"""Several ranks: what they compute together, and how they part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa.testing import assert_matches, error_budget
from nsabench.plan import PlanError
from nsabench.training.distributed import World, WrongRank
from tests.nsabench.training.small import settings
from tests.nsabench.training.test_training_loop import Gradients, Rows, Trainer, train, truth_of

SHAPE: dict[str, Any] = {"S": 24, "layers": 1, "steps": 2, "schedule": "constant"}

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

TOGETHER = """
import os, sys
from pathlib import Path
import torch
from nsabench.training.distributed import World
from tests.nsabench.training.test_training_distributed import SHAPE, part_of_two

part_of_two(Path(sys.argv[1]), World.of(os.environ))
"""


def part_of_two(folder: Path, world: World) -> None:
    """What each rank of the test below does: ordinary steps, a wish to stop, then a failure."""
    world.join("cpu")
    for name, given in {
        "plain": {"batch": 2},
        "accumulate": {"batch": 1, "accumulate": 2},
        "off": {"batch": 2, "route": "cmp=off,sel=off", "compress": "mlp"},
    }.items():
        wanted, seen = settings(**SHAPE, **given, world=2), Gradients()
        trainer = Trainer(wanted, Rows(wanted), observers=lambda made, seen=seen: seen, world=world)
        outcome = trainer.train()
        found = {"outcome": outcome.status, "grads": seen.first, "losses": seen.losses}
        torch.save(found, folder / f"{name}-{world.rank}.pt")
    told = world.gather({"rank": world.rank})
    wanted = settings(**SHAPE, batch=2, world=2)

    def stop() -> bool:
        return world.rank == 1  # one rank is asked to stop: both do

    stopped = Trainer(wanted, Rows(wanted), world=world).train(stop)
    trainer = Trainer(wanted, Rows(wanted), world=world)
    if world.rank == 1:

        def fails(*inputs: Any) -> None:
            raise ValueError("a bad\nrow")

        trainer.objective.forward = fails  # type: ignore[method-assign]
    outcome = trainer.train()
    words = {"told": told, "stopped": stopped.status, "status": outcome.status, "reason": outcome.reason}
    (folder / f"words-{world.rank}.json").write_text(json.dumps(words))
    world.leave()


@pytest.mark.slow
def test_two_ranks_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    done = subprocess.run(
        [*TORCHRUN, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["", *sys.path])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    for name, given in {"plain": {}, "accumulate": {}, "off": {"route": "cmp=off,sel=off"}}.items():
        shape = {**SHAPE, **given, **({"compress": "mlp"} if name == "off" else {})}
        _, alone, _ = train(**shape, batch=4)
        truth = truth_of(**shape)
        largest = max(float(grad.abs().max()) for grad in truth.values())
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert found["outcome"] == "ok"
            for which, exact in truth.items():
                budget = error_budget(exact, alone.first[which], largest)
                assert_matches(found["grads"][which], exact, budget, f"{name} {which}")
            losses = torch.tensor([alone.losses[0], found["losses"][0]], dtype=torch.float64)
            assert_matches(losses[1], losses[0], error_budget(losses[0], losses[0].float()), name)
        both = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert both[0]["losses"] == both[1]["losses"]
    words = [json.loads((tmp_path / f"words-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["told"] for one in words] == [[{"rank": 0}, {"rank": 1}], []]
    assert [one["stopped"] for one in words] == ["interrupted", "interrupted"]
    assert [one["status"] for one in words] == ["error", "error"]
    assert words[1]["reason"] == "step 1: ValueError: a bad row"
    assert words[0]["reason"] == "rank 1: step 1: ValueError: a bad row"


def test_a_process_by_itself_is_a_world() -> None:
    world = World.of({})
    assert (world.rank, world.size, world.first, world.device_of("cuda:3")) == (0, 1, True, "cuda:3")
    world.join("cpu")
    assert world.gather("mine") == ["mine"]
    assert world.from_first(lambda: 7) == 7
    assert world.sum(torch.tensor([2])).tolist() == [2]
    assert world.failure_of_others() is None
    world.leave()


def test_the_variables_of_a_launcher_are_read() -> None:
    world = World.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (world.rank, world.size, world.local_rank, world.first) == (5, 8, 1, False)
    with pytest.raises(PlanError, match="RANK 'x', WORLD_SIZE '2', LOCAL_RANK None: torchrun sets numbers"):
        World.of({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(PlanError, match="RANK is 2 of WORLD_SIZE 2; allowed: 0 to 1"):
        World.of({"RANK": "2", "WORLD_SIZE": "2"})


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(5, 8, 1).device_of("cuda") == "cuda:1"
    assert World(5, 8, 1).device_of("cpu") == "cpu"
    with pytest.raises(PlanError, match="--device: cuda:0 is one GPU for 8 ranks; allowed: cuda, cpu"):
        World(5, 8, 1).device_of("cuda:0")
    with pytest.raises(WrongRank, match="--device: rank 6 finds no GPU for itself, torch sees 2"):
        World(6, 8, 2).device_of("cuda")
