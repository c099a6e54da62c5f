"""`nsabench suite`, and the sweeps of decode and prefill as suites."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsabench.commands import _execute
from nsabench.plan import Cell, Suite, load_suite
from nsabench.run import Policy
from nsabench.store import Run

Call = Callable[..., Any]

MINE = """
about = "a small one"
tags = ["mine"]

[policy]
rounds = 7
budget = "9m"

[shape]
device = "cpu"
dim = 32
heads = 2
groups = 1
dk = 8
l = 8
d = 4
l_sel = 8
n_sel = 4
w = 16

[[sweep]]
phase = "prefill"
S = [32, 64]
passes = ["fwd", "bwd"]
routes = ["auto", "cmp=sdpa,sel=gather"]

[[sweep]]
phase = "decode"
headline = true
S = 48
baselines = "dense"

[[criteria.speedup]]
S = 48
phase = "decode"
against = "dense"
ratio = 0.001
"""


@pytest.fixture
def mine(folder: Path) -> Path:
    (folder / "suites").mkdir()
    file = folder / "suites" / "mine.toml"
    file.write_text(MINE)
    return file


Started = list[tuple[list[Cell], Policy, dict[str, Any]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would have been measured."""
    found: Started = []

    def start(cells: list[Cell], model: Any, policy: Policy, **more: Any) -> int:
        found.append((cells, policy, more))
        return 0

    monkeypatch.setattr(_execute, "start_sweep", start)
    return found


def one_line(done: Any) -> str:
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("nsabench: ")
    assert done.err.count("\n") == 1
    return str(done.err.removeprefix("nsabench: ").strip())


def test_the_list_holds_mine_and_what_ships(call: Call, mine: Path) -> None:
    shown = call("suite", "list")
    assert shown.code == 0
    assert all(name in shown.out for name in ("mine", "a small one", "quick", "h200-quick", "paper"))
    listed = {line["name"]: line for line in call("suite", "list", "--json").rows}
    assert listed["mine"]["path"] == str(mine)
    assert listed["mine"]["tags"] == ["mine"]
    assert Suite.read("mine", {k: v for k, v in listed["mine"].items() if k not in ("name", "path")}) == (
        load_suite(mine)
    )


def test_show_says_what_each_sweep_is_and_which_command_does_it(call: Call, mine: Path) -> None:
    lines = call("suite", "show", "mine").out.splitlines()
    assert lines[:4] == [
        "mine: a small one",
        f"file: {mine}",
        "tags: mine",
        "policy: rounds 7, budget 540.0",
    ]
    shape = "--device cpu --dim 32 --heads 2 --groups 1 --dk 8 --l 8 --d 4 --l-sel 8 --n-sel 4 --w 16"
    commands = {line[:1]: set(shlex.split(line[3:])) for line in lines if line[1:12] == ": nsabench "}
    assert commands == {
        "2": {"nsabench", "decode", *shape.split(), *["--S", "48", "--baseline", "dense", "--rounds", "7"]},
        "1": {
            *("nsabench", "prefill", *shape.split(), "--S", "32,64", "--passes", "fwd,bwd"),
            *("--routes", "auto;cmp=sdpa,sel=gather", "--rounds", "7"),
        },
    }
    assert lines[-1] == ("wanted: auto at least 0.001 x the speed of dense, decode fwd of the module at S=48")
    shown = json.loads(call("suite", "show", str(mine), "--json").out)
    assert (shown["name"], shown["policy"]["budget"]) == ("mine", 540)


@pytest.mark.parametrize(
    "name", ["quick", "paper", "routing", "decode", "crossover", "groups", "kernels", "h200"]
)
def test_the_commands_that_show_prints_plan_the_same_cells(call: Call, name: str) -> None:
    def cells(*arguments: str) -> set[str]:
        return {line["cell_id"] for line in call(*arguments, "--dry-run", "--json").rows}

    lines = call("suite", "show", name).out.splitlines()
    commands = [shlex.split(line.partition(": nsabench ")[2]) for line in lines if ": nsabench " in line]
    assert set().union(*(cells(*command) for command in commands)) == cells("suite", "run", name)


def test_the_schema_is_json(call: Call, folder: Path) -> None:
    assert json.loads(call("suite", "schema").out)["title"] == "nsabench suite"


def test_a_run_gets_the_suites_cells_policy_budget_and_name(call: Call, mine: Path, started: Started) -> None:
    assert call("suite", "run", "mine", "--tag", "today", "--no-plots", "--in-process").code == 0
    ((cells, policy, more),) = started
    assert [(c.phase, c.passes, c.S, c.impl, c.route) for c in cells] == [
        ("decode", "fwd", 48, "nsa", "auto"),
        ("decode", "fwd", 48, "dense", "auto"),
        *(
            ("prefill", passes, S, "nsa", route)
            for S in (32, 64)
            for passes in ("fwd", "bwd")
            for route in ("auto", "cmp=sdpa,sel=gather")
        ),
    ]
    assert (policy.rounds, policy.cache, policy.timeout_s) == (7, "auto", 600.0)
    assert [policy.cache_for(cell) for cell in (cells[0], cells[-1])] == ["cold", "warm"]
    assert (more["budget_s"], more["in_process"], more["plots"]) == (540.0, True, None)
    assert tuple(more["tags"]) == ("mine", "today")
    stored = dict(more["suite"])
    assert stored.pop("name") == "mine"
    assert Suite.read("mine", json.loads(json.dumps(stored))).tags == ("mine", "today")


def test_options_replace_what_the_suite_says(call: Call, mine: Path, started: Started) -> None:
    axes = "--S 24 --passes fwd --routes sdpa --baseline none --dk 4 --scope core --seed 3"
    measuring = "--rounds 9 --cache warm --no-alone --budget 1h --timeout 90s --sample-ms 5 --share-runs 4"
    assert call("suite", "run", "mine", *axes.split(), *measuring.split()).code == 0
    ((cells, policy, more),) = started
    assert [(c.phase, c.S, c.route, c.impl, c.dk, c.dv, c.scope, c.seed) for c in cells] == [
        (phase, 24, "sdpa", "nsa", 4, 4, "core", 3) for phase in ("decode", "prefill")
    ]
    assert policy == Policy(rounds=9, cache="warm", alone=False, timeout_s=90.0, sample_ms=5.0, share_runs=4)
    assert more["budget_s"] == 3600.0
    assert more["suite"]["sweep"][0]["S"] == 24
    assert more["suite"]["policy"]["rounds"] == 9


def test_a_suite_measured(call: Call, mine: Path, the_run: Callable[[], Run]) -> None:
    mine.write_text(MINE.replace('budget = "9m"', "shares = false\nalone = false"))
    done = call("suite", "run", "mine", "--no-plots", "--in-process", "--S", "24", "--passes", "fwd")
    # The criterion's length is not measured now, and that is not held against the run.
    assert done.code == 0
    run = the_run()
    assert "-mine-" in run.run_id
    assert run.info["tags"] == ["mine"]
    assert run.info["suite"]["name"] == "mine"
    assert [(row["phase"], row["impl"], row["S"], row["status"], row["cache"]) for row in run.rows] == [
        ("decode", "nsa", 24, "ok", "cold"),
        ("decode", "dense", 24, "ok", "cold"),
        ("prefill", "nsa", 24, "ok", "warm"),
        ("prefill", "nsa", 24, "ok", "warm"),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run quik", "'quik' is no suite; did you mean quick?"),
        ("show quik", "'quik' is no suite; did you mean quick?"),
        ("run none.toml", "cannot read none.toml: No such file or directory"),
        ("run mine --S 0", "--S: '0' is too small; it must be at least 1"),
        ("run mine --routes fast", "--routes: unknown route 'fast'; allowed: auto, env, "),
        ("run mine --routes fa2", "--routes: 'fa2' cannot run here: cmp=fa2: needs a CUDA GPU, got cpu"),
        ("run mine --timer event", "--timer: 'event' does not time cpu; allowed there: auto, cpu"),
        ("run mine --heads 3 --groups 2", "--groups must divide --heads=3, got 2"),
        ("run mine --groups 3", "--groups must divide shape.heads=2, got 3"),
        ("run mine --dk 7", "--dk: 7 is odd"),
        ("run decode --passes bwd", "--passes: no sweep of the suite is a prefill"),
    ],
)
def test_what_cannot_be_is_one_line(call: Call, mine: Path, arguments: str, said: str) -> None:
    assert said in one_line(call("suite", *arguments.split()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("dk = 8", "dk = 7"), "shape.dk: 7 is odd"),
        (("groups = 1", "groups = 3"), "shape.groups must divide shape.heads=2, got 3"),
        (("S = 48\nbase", "S = 48\nd = 3\nbase"), "sweep[2].d must divide shape.l=8, got 3"),
        (('"auto", "cmp', '"quick", "cmp'), "sweep[1].routes: unknown route 'quick'; allowed: auto, env, "),
        (("S = [32, 64]", "S = [32, 64]\nselection = 'chance'"), "sweep[1].selection: 'chance'; allowed: n"),
        (
            ("S = [32, 64]", "S = [32, 64]\nselection = ['random', 'file=x.npz']"),
            "sweep[1].selection: cannot read x.npz: No such file or directory",
        ),
        (
            ("S = 48\nphase", "S = 99\nphase"),
            "criteria.speedup[1]: no sweep measures auto beside dense, decod",
        ),
        (("rounds = 7", "rounds = '7'"), "suites/mine.toml: policy.rounds: '7' is not a whole number"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(
    call: Call, mine: Path, change: tuple[str, str], said: str
) -> None:
    assert change[0] in MINE
    mine.write_text(MINE.replace(*change))
    assert said in one_line(call("suite", "run", "mine"))


def test_a_device_that_is_not_there_is_refused_and_can_be_planned_for(
    call: Call, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    mine.write_text(MINE.replace('"cpu"', '"cuda"'))
    assert one_line(call("suite", "run", "mine")) == (
        "shape.device: 'cuda', but torch sees no CUDA device here"
    )
    assert call("suite", "run", "mine", "--dry-run").code == 0


def test_a_saved_sweep_is_the_sweep(call: Call, folder: Path, tiny: list[str], started: Started) -> None:
    more = "--S 16,24 --mode chunked=8,stepwise --passes fwd,bwd --routes auto;sdpa --baseline dense"
    measuring = ["--budget", "5m", "--timeout", "90s", "--tag", "x", "--share-runs", "3"]
    given = [*tiny, *more.split(), *measuring]
    assert call("prefill", *given, "--save-suite", "saved.toml").code == 0
    assert call("suite", "run", "./saved.toml", "--no-plots").code == 0
    (direct, policy, first), (saved, policy_saved, second) = started
    assert saved == direct
    assert policy_saved == policy
    assert (second["budget_s"], second["tags"]) == (first["budget_s"], first["tags"]) == (300.0, ("x",))
    assert first["suite"] is None
    assert second["suite"]["name"] == "saved"


def test_a_route_of_the_environment_is_saved_in_words(
    call: Call, folder: Path, tiny: list[str], started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_USE_FA2_WIN", "0")
    monkeypatch.setenv("NSA_PREFILL_BATCHED", "0")
    assert call("prefill", *tiny, "--route", "env", "--mode", "env", "--save-suite", "s.toml").code == 0
    assert load_suite(Path("s.toml")).sweeps[0]["routes"] == ("win=sdpa",)
    assert load_suite(Path("s.toml")).sweeps[0]["mode"] == ("stepwise",)


def test_nothing_is_saved_of_a_sweep_that_cannot_be(call: Call, folder: Path, tiny: list[str]) -> None:
    one_line(call("decode", *tiny, "--routes", "fa2", "--save-suite", "s.toml"))
    assert list(folder.iterdir()) == []


def test_find_max_S_gets_the_plan(
    call: Call, folder: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[Cell], dict[str, Any]]] = []

    def find(cells: list[Cell], **more: Any) -> int:
        asked.append((cells, more))
        return 3

    monkeypatch.setattr("nsabench.commands._capacity.find_max_S", find)
    given = ["--find-max-S", "--memory-limit", "2GiB", "--timeout", "30s", "--baseline", "dense"]
    assert call("decode", *tiny, *given).code == 3
    ((cells, more),) = asked
    assert [(c.S, c.impl) for c in cells] == [(64, "nsa"), (64, "dense")]
    assert more == {
        "memory_limit": "2GiB",
        "timeout_s": 30.0,
        "out": Path("results"),
        "json_lines": False,
    }
