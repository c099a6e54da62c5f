"""Bad usage: exit code 2, one line on stderr, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

SIZES = [
    "--dim",
    "--heads",
    "--groups",
    "--dk",
    "--dv",
    "--l",
    "--d",
    "--l-sel",
    "--n-sel",
    "--w",
    "--rounds",
]


def refused(call: Call, folder: Path, *arguments: str) -> str:
    done = call(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("nsabench: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    assert list(folder.iterdir()) == []
    return str(done.err.removeprefix("nsabench: ").rstrip("\n"))


@pytest.mark.parametrize("option", [*SIZES, "--S", "--B"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "'0' is too small; it must be at least 1"),
        ("-3", "'-3' is too small; it must be at least 1"),
        ("99999999999999999999", "not a size; allowed"),
        ("9223372036854775808", "'9223372036854775808' is too large; it must be below 2**63"),
        ("abc", "'abc' is not a "),
        ("1.5", "'1.5' is not a "),
        ("", "'' is not a "),
    ],
)
def test_a_size_that_is_none(
    call: Call, folder: Path, tiny: list[str], option: str, value: str, said: str
) -> None:
    message = refused(call, folder, "decode", *tiny, option, value)
    assert message.startswith(f"{option}: ")
    assert said in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--rounds 1,2", "--rounds: '1,2' is not a whole number"),
        ("--groups 1,3", "--groups must divide --heads=2, got 3"),
        ("--dk 8,7", "--dk: 7 is odd; rotary positions need an even key dim"),
        ("--seed -1", "--seed: '-1' is too small; it must be at least 0"),
        ("--seed x", "--seed: 'x' is not a size; allowed"),
        ("--rounds 10001", "--rounds: 10001 is not allowed; allowed: 1 to 10000, 6 or more for an interval"),
        ("--S 4k:1k:x2", "--S: range '4k:1k:x2' runs backwards; write the smaller end first"),
        ("--heads 3 --groups 2", "--groups must divide --heads=3, got 2"),
        ("--d 7", "--d must divide --l=8, got 7"),
        ("--d 3 --l 9", "--d must divide --l-sel=8, got 3"),
        ("--l 16", "--l must be at most --l-sel=8, got 16"),
        ("--n-sel 2", "--n-sel must hold the 3 forced blocks (initial + local), got 2"),
        ("--dk 7", "--dk: 7 is odd; rotary positions need an even key dim"),
        ("--dtype fp8", "--dtype: 'fp8' is unknown; allowed: fp64, fp32, fp16, bf16"),
        ("--device tpu", "--device: 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        ("--device cuda:x", "--device: 'cuda:x'; allowed: auto, cpu, cuda, cuda:N"),
        ("--timer event", "--timer: 'event' does not time cpu; allowed there: auto, cpu"),
        ("--timer sundial", "--timer: 'sundial' is unknown; allowed: auto, cpu, host, event, graph"),
        ("--cache hot", "--cache: 'hot' is unknown; allowed: auto, cold, warm"),
        ("--regime calm", "--regime: 'calm' is unknown; allowed: latency, sustained"),
        ("--regime sustained --cache cold", "--cache: 'cold' does not go with --regime sustained"),
        ("--timer host", "--timer: 'host' does not time cpu; allowed there: auto, cpu"),
        ("--routes nonsense", "--routes: unknown route 'nonsense'; allowed: auto, env, "),
        (
            "--routes up=sdpa",
            "--routes: unknown branch 'up' in route 'up=sdpa'; allowed: cmp, score, sel, win",
        ),
        ("--routes win=flash", "--routes: unknown backend 'flash' for win; allowed: auto, off, "),
        ("--routes cmp=off,sel=off,win=off", "--routes: every branch is off; at least one of cmp, sel, win"),
        ("--routes auto;", "--routes: an empty route in 'auto;'; separate routes by one ';'"),
        ("--routes auto;auto", "--routes: 'auto' is given twice in 'auto;auto'; name each route once"),
        ("--routes fa2", "--routes: 'fa2' cannot run here: cmp=fa2: needs a CUDA GPU, got cpu"),
        ("--routes fa2;win=fa2", "'win=fa2' cannot run here: win=fa2: needs a CUDA GPU, got cpu"),
        ("--scope layer", "--scope: 'layer' is unknown; allowed: module, core"),
        ("--scope module,", "--scope: '' is unknown; allowed: module, core"),
        ("--baseline sparse", "--baseline: 'sparse' is unknown; known: dense, dense:flash,"),
        ("--baseline none,dense", "--baseline: 'none,dense'; none goes alone"),
        (
            "--selection overlap=0.96",
            "--selection: 'overlap=0.96'; allowed: natural, random, overlap=X with X",
        ),
        ("--selection natural,file=", "--selection: 'file='; allowed: natural, random, overlap=X with X"),
        ("--selection random,file=x.npz", "--selection: cannot read x.npz: No such file or directory"),
        ("--selection fixed", "--selection: 'fixed'; allowed: natural, random, overlap=X"),
        ("--budget soon", "--budget: 'soon' is not a length of time; allowed: 90s, 9m, 1h30m, above 0"),
        ("--timeout 0", "--timeout: '0' is not a length of time; allowed: 90s, 9m, 1h30m, above 0"),
        ("--timeout 8d", "--timeout: 691200.0 is not allowed; allowed: above 0, up to 604800"),
        ("--sample-ms 0", "--sample-ms: 0.0 is not allowed; allowed: above 0, up to 60000"),
        ("--share-runs 0", "--share-runs: '0' is too small; it must be at least 1"),
        ("--share-runs 20000", "--share-runs: 20000 is not allowed; allowed: 1 to 10000"),
        ("--tag a,b", "--tag: 'a,b'; allowed: words of letters, digits and _.:/=+-"),
        ("--save-suite /dev/null/x.toml", "cannot write /dev/null/x.toml: Not a directory"),
        ("--save-suite /dev/null", "/dev/null exists; name another file"),
        ("--memory-limit 2GiB", "--memory-limit: only with --find-max-S"),
        ("--find-max-S --dry-run", "--dry-run: shows what would be timed; --find-max-S times nothing"),
        ("--S 1:9999:+1 --B 1:9999:+1", "--S: with the other axes, names 99980001 cells, over 100000"),
        ("--out /dev/null/results", "cannot create a run in /dev/null/results: Not a directory"),
        ("--out /proc/results", "cannot create a run in /proc/results: "),
    ],
)
@pytest.mark.parametrize("command", ["decode", "prefill"])
def test_options_that_cannot_be(
    call: Call, folder: Path, tiny: list[str], command: str, arguments: str, said: str
) -> None:
    assert said in refused(call, folder, command, *tiny, *arguments.split(" "))


def test_a_gpu_that_is_not_there(
    call: Call, folder: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(call, folder, "decode", *tiny, "--device", "cuda")
    assert said == "--device: 'cuda', but torch sees no CUDA device here"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--passes x", "--passes: 'x' is unknown; allowed: fwd, bwd, fwd_bwd"),
        ("--passes fwd,", "--passes: '' is unknown; allowed: fwd, bwd, fwd_bwd"),
        (
            "--mode chunked=0",
            "--mode: 'chunked=0'; allowed: batched, stepwise or chunked=N with N at least 1",
        ),
        ("--mode chunked", "--mode: 'chunked'; allowed: batched, stepwise or chunked=N with N at least 1"),
        ("--mode all", "--mode: 'all'; allowed: batched, stepwise or chunked=N with N at least 1"),
        ("--passes bwd --routes win=fa2", "'win=fa2' cannot run here: win=fa2: needs a CUDA GPU, got cpu"),
    ],
)
def test_options_of_prefill_that_cannot_be(
    call: Call, folder: Path, tiny: list[str], arguments: str, said: str
) -> None:
    assert said in refused(call, folder, "prefill", *tiny, *arguments.split())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("resume", "nowhere is not a run: it has no run.json"),
        ("plot", "nowhere is neither a run nor a folder of runs"),
    ],
)
def test_a_run_that_is_none(call: Call, folder: Path, command: str, said: str) -> None:
    assert refused(call, folder, command, "nowhere") == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--S 0", "--S: '0' is too small; it must be at least 1"),
        ("--S 1k,2k", "--S: '1k,2k' is not a whole number"),
        ("--dtype int8", "--dtype: 'int8' is unknown; allowed: fp64, fp32, fp16, bf16"),
        ("--device abacus", "--device: 'abacus'; allowed: auto, cpu, cuda, cuda:N"),
    ],
)
def test_questions_about_routes_that_cannot_be(call: Call, folder: Path, arguments: str, said: str) -> None:
    assert refused(call, folder, "routes", *arguments.split()) == said


@pytest.mark.parametrize(
    "arguments", [["decode", "--nonsense"], ["nonsense"], ["resume"], ["plot"], ["decode", "--S"]]
)
def test_what_the_parser_refuses(call: Call, folder: Path, arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert list(folder.iterdir()) == []


def test_a_refusal_from_a_process_of_its_own(call_apart: Call, folder: Path, tiny: list[str]) -> None:
    assert refused(call_apart, folder, "decode", *tiny, "--dim", "0") == (
        "--dim: '0' is too small; it must be at least 1"
    )
