"""Cores of other implementations: with their adapters they compute what the specification does."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa import NSAConfig, nsa_attention, reference
from nsa.blocks import num_compressed_blocks
from nsa.routes import Request
from nsa.testing import against_spec
from nsabench.peers import fla, installed, sfnsa, xunhaolai
from nsabench.peers.branches import Ask
from nsabench.peers.core import PeerCore, attend
from nsabench.peers.registry import PEERS, timed
from nsabench.plan import PEERS as IMPLS
from tests.nsabench.peers import clones_emulator
from tests.nsabench.peers.clones_emulator import no_stage
from tests.nsabench.peers.fake_peers import fake_fla

USUAL = NSAConfig(4, 2, 16, 16, 16, 8, 32, 4, 20)
ONE_SIZE = NSAConfig(4, 2, 16, 16, 32, 32, 32, 4, 20)
FLA = importlib.util.find_spec("fla") is not None
CLONES = {"xunhaolai": xunhaolai.XunhaoLai, "sfnsa": sfnsa.Sfnsa}


@pytest.fixture
def clones(clone_folder: Callable[..., Path]) -> Path:
    return clone_folder(flash=True)


def tensors(length: int, config: NSAConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)

    def draw(rows: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(2, rows, heads, width, generator=generator).to(dtype)

    found: dict[str, Any] = {"q": draw(length, config.num_heads, config.head_dim)}
    for name in ("cmp", "sel", "win"):
        rows = num_compressed_blocks(length, config) if name == "cmp" else length
        found[f"k_{name}"] = draw(rows, config.num_kv_heads, config.head_dim)
        found[f"v_{name}"] = draw(rows, config.num_kv_heads, config.v_dim)
    return {**found, "gates": torch.rand(2, length, config.num_heads, 3, generator=generator).to(dtype)}


@pytest.mark.parametrize("off", ["", "cmp sel", "cmp win", "sel win", "win"])
@pytest.mark.parametrize("length", [32, 33, 161])
@pytest.mark.parametrize("config", [USUAL, ONE_SIZE], ids=["usual", "one size"])
@pytest.mark.parametrize("peer", CLONES)
def test_a_core_is_the_specifications(
    clones: Path, peer: str, config: NSAConfig, length: int, off: str
) -> None:
    branches = [branch for branch in ("cmp", "sel", "win") if branch not in off]
    given = tensors(length, config)
    route = ",".join(f"{b}={'reference' if b in branches else 'off'}" for b in ("cmp", "sel", "win"))

    def mine(**inputs: torch.Tensor) -> torch.Tensor:
        return attend(CLONES[peer](), branches, inputs, config, stage=no_stage)[0]

    def spec(**inputs: torch.Tensor) -> torch.Tensor:
        return nsa_attention(**inputs, config=config, routing=route)

    outcome = against_spec(mine, spec, given)
    assert all(check.ok for check in outcome.values()), outcome


@pytest.mark.parametrize("peer", CLONES)
def test_lists_go_there_and_back(clones: Path, peer: str) -> None:
    core: PeerCore = CLONES[peer]()
    given = tensors(161, USUAL)
    blocks = reference.select_blocks(given["q"], given["k_cmp"], USUAL, kv_len=161)
    assert torch.equal(core.blocks_of(core.lists_of(blocks, USUAL), 2, USUAL), blocks)
    chosen = core.choose(given["q"], given["k_cmp"], USUAL)
    assert torch.equal(core.blocks_of(chosen, 2, USUAL), blocks)


def test_output_and_blocks_of_one_call_are_asked_for_once(clones: Path) -> None:
    given = tensors(70, USUAL)
    for branches, expected in ((("cmp", "sel"), [4]), (("cmp",), [0]), (("sel",), [4])):
        clones_emulator.seen.clear()
        attend(xunhaolai.XunhaoLai(), branches, given, USUAL, stage=no_stage)
        assert [n for name, n in clones_emulator.seen if name == "compressed_attention"] == expected


def test_scores_begin_with_the_lse_and_are_kept_in_fp32(clones: Path) -> None:
    given = tensors(70, USUAL)
    clones_emulator.seen.clear()
    attend(sfnsa.Sfnsa(), ("cmp", "sel"), given, USUAL, stage=no_stage)
    names = [name for name, _ in clones_emulator.seen]
    assert names.count("compress_attn") == 1
    assert ("slc_topk_indices", True) in clones_emulator.seen


def test_settings_follow_the_sizes(clones: Path) -> None:
    """Lengths that are equal are not looked at again by the clone, whatever the sizes became."""
    core = sfnsa.Sfnsa()
    for config in (USUAL, ONE_SIZE, USUAL, replace(USUAL, window_size=7)):
        given = tensors(96, config)
        out = attend(core, ("cmp", "sel", "win"), given, config, stage=no_stage)[0]
        spec = nsa_attention(**given, config=config, routing="reference")
        torch.testing.assert_close(out, spec)
    clones_emulator.seen.clear()
    for _ in range(3):
        attend(core, ("cmp",), given, config, stage=no_stage)
    assert not [name for name, _ in clones_emulator.seen if name == "set_hyperparameters"]


@pytest.mark.parametrize("variant", ["", "naive"])
@pytest.mark.parametrize("kind", ["fake", *(["real"] if FLA else [])])
def test_flas_core_is_the_specifications(variant: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "real" and not variant:
        pytest.skip("its kernels need a GPU")
    seen: list[dict[str, Any]] = []
    if kind == "fake":
        monkeypatch.setattr(fla, "_ops", fake_fla(seen))
    core = fla.CORES[variant]
    for length in (40, 96, 161):
        given = tensors(length, ONE_SIZE)

        def mine(**inputs: torch.Tensor) -> torch.Tensor:
            return attend(core, ("cmp", "sel"), inputs, ONE_SIZE, stage=no_stage)[0]

        def spec(**inputs: torch.Tensor) -> torch.Tensor:
            return nsa_attention(
                **inputs, config=ONE_SIZE, routing="cmp=reference,score=reference,sel=reference,win=off"
            )

        outcome = against_spec(mine, spec, given)
        assert all(check.ok for check in outcome.values()), outcome
        blocks = reference.select_blocks(given["q"], given["k_cmp"], ONE_SIZE, kv_len=length)
        lists = core.choose(given["q"], given["k_cmp"], ONE_SIZE)
        assert torch.equal(core.blocks_of(lists, 2, ONE_SIZE), blocks)
    assert kind == "real" or bool(variant) or any(entry.get("lse") for entry in seen)


def ask(config: NSAConfig, **changes: Any) -> Request:
    fields = {
        "device": "cuda",
        "dtype": torch.bfloat16,
        "num_queries": 256,
        "kv_len": 256,
        "needs_grad": False,
    }
    return Request(**{**fields, **changes}, config=config)


@pytest.mark.parametrize(
    ("core", "config", "changes", "branches", "said"),
    [
        (xunhaolai, {}, {"device": "cpu"}, "cmp", "Triton kernels: need a CUDA GPU, got cpu"),
        (xunhaolai, {}, {"dtype": torch.float32}, "cmp", "takes fp16 and bf16, got fp32"),
        (xunhaolai, {"value_dim": 32}, {}, "cmp", "takes one head dim up to 128"),
        (xunhaolai, {"head_dim": 192, "value_dim": 192}, {}, "sel", "takes one head dim up to 128"),
        (xunhaolai, {"selection_block_size": 16}, {}, "sel", "takes l' of 32, 64, 128, 256 only"),
        (xunhaolai, {}, {"kv_len": 9}, "score", "needs a whole compressed block, 16 tokens"),
        (
            xunhaolai,
            {"compression_block_size": 1, "compression_stride": 1},
            {},
            "cmp",
            "takes fewer compressed blocks than tokens only",
        ),
        (sfnsa, {}, {"device": "cpu"}, "cmp", "Triton kernels: need a CUDA GPU, got cpu"),
        (sfnsa, {"compression_block_size": 12, "compression_stride": 12, "selection_block_size": 24}, {},
         "cmp", "takes d a power of two only"),
        (sfnsa, {"selection_block_size": 48}, {}, "sel", "takes l' a power of two only"),
        (sfnsa, {"head_dim": 72}, {}, "sel",
         "takes key dims of one power of two or the sum of two, each at least 16"),
        (sfnsa, {"value_dim": 96}, {}, "sel", "takes value dims that are a power of two of at least 16"),
        (sfnsa, {}, {"kv_len": 2**18 + 1}, "sel", "takes up to 262144 tokens"),
        (sfnsa, {}, {"kv_len": 9}, "cmp", "needs a whole compressed block, 16 tokens"),
        (fla, {}, {}, "cmp", "G a power of two of at least 16 only"),
        (fla, {"num_heads": 32}, {}, "cmp", "l = d only"),
        (fla, {"num_heads": 32}, {}, "score", "l = d only"),
        (fla, {"num_heads": 32}, {"device": "cpu"}, "sel", "Triton kernels: need a CUDA GPU, got cpu"),
    ],
)  # fmt: skip
def test_what_is_refused(
    clones: Path, core: Any, config: dict[str, Any], changes: dict[str, Any], branches: str, said: str
) -> None:
    assert core.CORES[""].refuse(ask(replace(USUAL, **config), **changes), (branches,)) == said


@pytest.mark.parametrize(("core", "heads"), [(xunhaolai, 4), (sfnsa, 4), (fla, 32)])
def test_what_is_taken(clones: Path, core: Any, heads: int) -> None:
    config = replace(ONE_SIZE, num_heads=heads, head_dim=128, value_dim=128)
    assert core.CORES[""].refuse(ask(config), ("cmp", "score", "sel", "win")) == ""
    assert sfnsa.CORES[""].refuse(ask(replace(config, head_dim=192)), ("cmp", "score", "sel")) == ""


@pytest.mark.parametrize("core", [xunhaolai, sfnsa, fla])
def test_a_window_is_flash_attns(clone_folder: Callable[..., Path], core: Any) -> None:
    clone_folder(flash=False)
    config = replace(ONE_SIZE, num_heads=32)
    assert core.CORES[""].refuse(ask(config), ("win",)).endswith("not installed; ask with win=off")
    assert core.CORES[""].refuse(ask(config), ("cmp", "score", "sel")) == ""


def test_what_they_need_is_named(clones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xunhaolai, "find_spec", lambda name: None)
    monkeypatch.setattr(sfnsa, "find_spec", lambda name: None)
    assert xunhaolai.CORES[""].refuse(ask(USUAL), ("cmp",)) == "needs einops: pip install einops"
    assert sfnsa.CORES[""].refuse(ask(USUAL), ("cmp",)).startswith("needs pkg_resources")


def test_branch_by_branch_they_take_whole_sequences_and_no_gradient(clones: Path) -> None:
    for module in (xunhaolai, sfnsa):
        assert [part.branch for part in module.BRANCHES] == ["cmp", "score", "sel", "win"]
        for part in module.BRANCHES:
            assert part.refuse(Ask(ask(ONE_SIZE))) == ""
            assert "forwards only" in part.refuse(Ask(ask(ONE_SIZE, needs_grad=True)))
            assert "whole sequences" in part.refuse(Ask(ask(ONE_SIZE, num_queries=9), 247))
    given = tensors(70, USUAL)
    (select,) = (part for part in sfnsa.BRANCHES if part.branch == "sel")
    blocks = reference.select_blocks(given["q"], given["k_cmp"], USUAL, kv_len=70)
    request = ask(USUAL, num_queries=70, kv_len=70)
    assert select.refuse(Ask(request, 0, blocks)) == ""
    fewer = blocks.clone()
    fewer[:, 40:, :, 1:] = -1
    assert select.refuse(Ask(request, 0, fewer)) == "takes lists with every slot filled that can be"
    o, lse = select.compute(given["q"], given["k_sel"], given["v_sel"], blocks, USUAL)
    torch.testing.assert_close(
        o, reference.selected_attention(given["q"], given["k_sel"], given["v_sel"], blocks, USUAL)[0]
    )
    assert lse is None


def test_the_names_that_a_plan_knows_are_the_cores_there_are() -> None:
    assert tuple(timed()) == IMPLS
    for impl, peer in timed().items():
        assert isinstance(peer.core(impl), PeerCore)
    assert all(bool(peer.adapter) for peer in PEERS if peer.timed)


def test_a_clone_is_told_from_another_module_of_its_name(clones: Path) -> None:
    peers = {peer.name: peer for peer in PEERS}
    assert str(peers["xunhaolai"].version()).startswith("sources ")
    (clones / "flash_nsa/ops/select_attn.py").unlink()
    assert peers["sfnsa"].version() is None


def test_a_clones_version_is_its_commit(clones: Path) -> None:
    def git(*words: str) -> str:
        named = ["-c", "user.name=x", "-c", "user.email=x"]
        done = subprocess.run(
            ["git", "-C", clones, *named, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    (peer,) = (peer for peer in PEERS if peer.name == "sfnsa")
    installed.state_of.cache_clear()
    assert peer.version() == f"commit {git('rev-parse', '--short=10', 'HEAD')}"
    (clones / "flash_nsa/ops/select_attn.py").write_text("# changed\n")
    installed.state_of.cache_clear()
    assert str(peer.version()).endswith("-dirty")
