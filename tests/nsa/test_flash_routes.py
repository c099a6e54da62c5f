"""The fa2 rows of the route table: which library runs, why a request is refused, what auto prefers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa import routes
from nsa.backends import _flash_library
from nsa.config import NSAConfig
from nsa.routes import TABLE, Request, UnsupportedRoute, resolve


def request_for(
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64, value_dim: int | None = None
) -> Request:
    config = NSAConfig(4, 2, dim, value_dim)
    return Request(device=device, dtype=dtype, num_queries=8192, kv_len=8192, needs_grad=True, config=config)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a Hopper GPU and a torch with FlashAttention, for a test to take things from."""
    given = SimpleNamespace(package=None, torch=True, cuda=True, capability=(9, 0))
    monkeypatch.setattr(_flash_library, "find_spec", lambda name: None if given.package is None else name)
    monkeypatch.setattr(
        _flash_library.metadata, "distributions", lambda name: [SimpleNamespace(version=given.package)]
    )
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: given.torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: given.cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: given.capability)
    monkeypatch.setattr(torch.version, "hip", None)
    # Asked anew at every call: the real one keeps its first answer.
    asked = _flash_library.provider.__wrapped__
    real = routes._load
    monkeypatch.setattr(
        routes, "_load", lambda target: asked if target.endswith(":provider") else real(target)
    )
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
    assert _flash_library.provider.__wrapped__() == "flash_attn 2.8.3"


def test_loading_without_a_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flash_library, "provider", lambda: None)
    with pytest.raises(RuntimeError, match="pip install 'nsabench\\[flash-attn\\]'"):
        _flash_library.load.__wrapped__()


def test_loading_takes_the_library_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flash_library, "import_module", lambda name: name)
    for name, module in (
        ("flash_attn 2.8.3", "flash_attn"),
        ("torch 2.13.0 varlen", "torch.nn.attention.varlen"),
    ):
        monkeypatch.setattr(_flash_library, "provider", lambda name=name: name)
        library = _flash_library.load.__wrapped__()
        assert (library.name, library.module) == (name, module)


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
