"""The fa2, fa3 and fa4 rows of the route table: which library runs, why a request is refused, what auto
prefers.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsa import routes
from nsa.backends import _flash_installed
from nsa.backends.flash import FA2, FA3, FA4, Flash
from nsa.config import NSAConfig
from nsa.routes import TABLE, Request, UnsupportedRoute, resolve


def request_for(
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64, value_dim: int | None = None
) -> Request:
    config = NSAConfig(4, 2, dim, value_dim)
    return Request(device=device, dtype=dtype, num_queries=8192, kv_len=8192, needs_grad=True, config=config)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a Hopper GPU and a torch with FlashAttention, for a test to take things from.

    ``package``, ``fa3``, ``fa4``: installed versions; None where there is none.
    """
    given = SimpleNamespace(package=None, fa3=None, fa4=None, torch=True, cuda=True, capability=(9, 0))

    def versions(name: str) -> list[SimpleNamespace]:
        found = {"flash-attn": given.package, "flash-attn-3": given.fa3, "flash-attn-4": given.fa4}[name]
        return [] if found is None else [SimpleNamespace(version=found)]

    def spec(name: str) -> str | None:
        found = {"flash_attn_2_cuda": given.package, "flash_attn_interface": given.fa3}[name]
        return None if found is None else name

    monkeypatch.setattr(_flash_installed, "find_spec", spec)
    monkeypatch.setattr(_flash_installed.metadata, "distributions", versions)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: given.torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: given.cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: given.capability)
    monkeypatch.setattr(torch.version, "hip", None)
    # Asked anew at every call: the real one keeps its first answer.
    monkeypatch.setattr(_flash_installed, "provider", _flash_installed.provider.__wrapped__)
    return given


ROUTE = "cmp=fa2,sel=fa2,win=fa2:varlen"


@pytest.mark.parametrize(
    ("package", "name"),
    [
        (None, f"torch {torch.__version__.split('+')[0]} varlen"),
        ("2.8.3", "flash_attn 2.8.3"),
        ("2.7.4.post1", "flash_attn 2.7.4.post1"),
        ("2.5.9", f"torch {torch.__version__.split('+')[0]} varlen"),
        ("4.0.0b20", f"torch {torch.__version__.split('+')[0]} varlen"),
    ],
)
def test_the_library_that_runs_has_a_name(machine: SimpleNamespace, package: str | None, name: str) -> None:
    machine.package = package
    route = resolve(ROUTE, request_for())
    assert [route.provider(branch) for branch in ("cmp", "score", "sel", "win")] == [name, None, name, name]
    assert routes.provider("fa2") == routes.provider("fa2:varlen") == name
    assert routes.provider("sdpa") is None


@pytest.mark.parametrize(
    ("change", "asked", "reason"),
    [
        ({}, {"device": "cpu"}, "needs a CUDA GPU, got cpu"),
        ({}, {"dtype": torch.float32}, "takes fp16 and bf16, got fp32"),
        ({}, {"dtype": torch.float64}, "takes fp16 and bf16, got fp64"),
        ({}, {"dim": 264}, "head_dim at most 256, got 264"),
        ({}, {"dim": 64, "value_dim": 512}, "head_dim at most 256, got 512"),
        ({"torch": False}, {}, "pip install 'nsabench[flash-attn]'"),
        ({"cuda": False}, {}, "needs a CUDA GPU, torch sees none"),
        ({"capability": (7, 5)}, {}, "needs compute capability 8.0, got 7.5"),
    ],
)
@pytest.mark.parametrize("branch", ["cmp=fa2", "cmp=fa2:varlen", "sel=fa2", "win=fa2", "win=fa2:varlen"])
def test_a_refusal_says_why(
    machine: SimpleNamespace, branch: str, change: dict[str, object], asked: dict[str, object], reason: str
) -> None:
    vars(machine).update(change)
    others = [f"{name}=reference" for name in routes.BRANCHES if not branch.startswith(name)]
    with pytest.raises(UnsupportedRoute) as refused:
        resolve(",".join([branch, *others]), request_for(**asked))  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"{branch}: ")
    assert reason in str(refused.value)


def test_rocm_is_refused(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UnsupportedRoute, match="needs an NVIDIA GPU, got ROCm"):
        resolve("fa2", request_for())


def test_nothing_is_imported_to_decide(machine: SimpleNamespace) -> None:
    machine.package = "2.8.3"  # the module does not exist here
    assert FA2.provider() == "flash_attn 2.8.3"


@pytest.mark.parametrize(
    ("flash", "line"),
    [
        (
            FA2,
            "neither flash_attn nor a torch with FlashAttention is installed: "
            "pip install 'nsabench[flash-attn]'",
        ),
        (
            FA3,
            "flash_attn_interface is not installed: git clone https://github.com/Dao-AILab/flash-attention "
            "&& cd flash-attention/hopper && python setup.py install",
        ),
        (FA4, "flash-attn-4 is not installed: pip install flash-attn-4"),
    ],
)
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    machine: SimpleNamespace, flash: Flash, line: str
) -> None:
    machine.torch = False
    with pytest.raises(RuntimeError) as raised:
        _flash_installed.load.__wrapped__(flash.generation)
    assert str(raised.value) == line
    with pytest.raises(UnsupportedRoute) as refused:
        resolve(flash.generation, request_for())
    for branch in ("cmp", "sel", "win"):
        assert f"{branch}={flash.generation}: {line}" in str(refused.value)


def test_loading_takes_the_library_that_is_named(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_flash_installed, "import_module", lambda name: name)
    for generation, name, module in (
        ("fa2", "flash_attn 2.8.3", "flash_attn"),
        ("fa2", "torch 2.13.0 varlen", "torch.nn.attention.varlen"),
        ("fa3", "flash_attn_3 3.0.0", "flash_attn_interface"),
        ("fa4", "flash-attn-4 4.0.0b36", "flash_attn.cute"),
    ):
        monkeypatch.setattr(_flash_installed, "provider", lambda generation, name=name: name)
        library = _flash_installed.load.__wrapped__(generation)
        assert (library.name, library.module) == (name, module)


@pytest.mark.parametrize(
    ("generation", "version", "name"),
    [
        ("fa3", "3.0.0", "flash_attn_3 3.0.0"),
        ("fa4", "4.0.0b20", "flash-attn-4 4.0.0b20"),
        ("fa4", "4.0.0b36.dev1+g0123456", "flash-attn-4 4.0.0b36.dev1+g0123456"),
        ("fa4", "4.0.0", "flash-attn-4 4.0.0"),
        ("fa4", "4.1.0b1", "flash-attn-4 4.1.0b1"),
        ("fa4", "4.0.0b19", None),
    ],
)
def test_newer_libraries_have_a_name(
    machine: SimpleNamespace, generation: str, version: str, name: str | None
) -> None:
    setattr(machine, generation, version)
    assert routes.provider(generation) == name
    if name is not None:
        route = resolve(generation, request_for())
        assert [route.provider(branch) for branch in ("cmp", "sel", "win")] == [name] * 3


@pytest.mark.parametrize(
    ("generation", "change", "asked", "reason"),
    [
        ("fa3", {}, {"device": "cpu"}, "needs a CUDA GPU, got cpu"),
        ("fa3", {}, {"dtype": torch.float32}, "takes fp16 and bf16, got fp32"),
        ("fa3", {}, {"dim": 264}, "head_dim at most 256, got 264"),
        ("fa3", {"cuda": False}, {}, "needs a CUDA GPU, torch sees none"),
        ("fa3", {"capability": (8, 9)}, {}, "FlashAttention 3 runs on Hopper (sm_90), got sm_89"),
        ("fa3", {"capability": (10, 0)}, {}, "FlashAttention 3 runs on Hopper (sm_90), got sm_100"),
        ("fa4", {"capability": (8, 0)}, {}, "on Hopper (sm_90) or Blackwell (sm_100), got sm_80"),
        ("fa4", {"capability": (12, 0)}, {}, "on Hopper (sm_90) or Blackwell (sm_100), got sm_120"),
        ("fa4", {}, {"dim": 256}, "head_dim at most 192 on sm_90 with a backward, got 256"),
        ("fa4", {"capability": (10, 0)}, {"dim": 192}, "192 with 128 for values, on sm_100, got 192 and 192"),
    ],
)
def test_a_newer_library_refuses_what_it_does_not_document(
    machine: SimpleNamespace,
    generation: str,
    change: dict[str, object],
    asked: dict[str, object],
    reason: str,
) -> None:
    machine.fa3, machine.fa4 = "3.0.0", "4.0.0b36"
    vars(machine).update(change)
    with pytest.raises(UnsupportedRoute) as refused:
        resolve(f"cmp={generation},sel=off,win=off", request_for(**asked))  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"cmp={generation}: ")
    assert reason in str(refused.value)


def test_newer_libraries_run_by_name_alone(machine: SimpleNamespace) -> None:
    machine.fa3, machine.fa4 = "3.0.0", "4.0.0b36"
    for generation in ("fa3", "fa4"):
        route = resolve(generation, request_for())
        assert [route.backend(branch) for branch in ("cmp", "sel", "win")] == [generation] * 3
    machine.capability = (10, 0)
    assert resolve("fa4", request_for(dim=192, value_dim=128)).backend("win") == "fa4"
    machine.capability = (9, 0)
    forward = replace(request_for(dim=256), needs_grad=False)
    assert resolve("fa4", forward).backend("sel") == "fa4"
    assert [resolve("auto", request_for()).backend(branch) for branch in ("cmp", "win")] == ["fa2", "fa2"]


def test_auto_prefers_fa2_to_sdpa_and_gather_to_fa2(machine: SimpleNamespace) -> None:
    def place(branch: str, backend: str) -> int:
        return [(row.branch, row.backend) for row in TABLE].index((branch, backend))

    assert place("cmp", "fa2") < place("cmp", "sdpa")
    assert place("win", "fa2") < place("win", "sdpa")
    assert place("sel", "gather") < place("sel", "fa2")
    rows = {row.backend: row for row in TABLE if row.branch == "win"}
    assert rows["fa2"].avoid(request_for()) is None
    assert rows["fa2:varlen"].avoid(request_for()) is not None


def test_the_name_alone_takes_every_branch_it_has(machine: SimpleNamespace) -> None:
    route = resolve("fa2", request_for())
    assert [route.backend(branch) for branch in ("cmp", "sel", "win")] == ["fa2"] * 3
