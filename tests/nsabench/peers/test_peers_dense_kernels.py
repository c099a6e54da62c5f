"""Each dense implementation: right by the specification where it runs, refused with its reason where not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from nsa import NSAConfig, sliding_attention
from nsa.testing import against_spec
from nsabench.measure.profiling import operators, profile
from nsabench.peers import dense_flash, dense_flex, dense_sdpa
from nsabench.peers.dense_kernels import KERNELS, DenseKernel, Problem, family_of, kernel_for
from nsabench.plan import BASELINES
from tests import flash_attn_emulator as emulator

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPANS = [(1, 1), (1, 37), (37, 37), (5, 37), (36, 37), (130, 300)]
HEADS = [(4, 2, 8, 8), (3, 1, 8, 4), (5, 5, 4, 8), (6, 1, 6, 6)]
GPU = Problem(torch.device("cuda"), torch.bfloat16, 2, 8, 2, 128, 128, 1024, 1024, False)
CPU = replace(GPU, device=torch.device("cpu"), dtype=torch.float32)


def qkv(span: tuple[int, int], heads: Sequence[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    (tokens, length), (query_heads, kv_heads, dk, dv) = span, heads
    return {
        "q": torch.randn(2, tokens, query_heads, dk).to(dtype),
        "k": torch.randn(2, length, kv_heads, dk).to(dtype),
        "v": torch.randn(2, length, kv_heads, dv).to(dtype),
    }


def refuse_wrong(
    attend: Callable[..., torch.Tensor], given: dict[str, torch.Tensor], heads: Sequence[int], gradients: bool
) -> None:
    tokens, length = given["q"].shape[1], given["k"].shape[1]
    config = NSAConfig(*heads, window_size=length)

    def specification(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sliding_attention(q, k, v, config, q_start=length - tokens)[0]

    found = against_spec(attend, specification, given, gradients=gradients)
    assert {name: check for name, check in found.items() if not check.ok} == {}


def test_every_name_of_the_plan_has_its_implementation() -> None:
    assert tuple(KERNELS) == BASELINES
    assert [kernel_for(name).name for name in KERNELS] == list(KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["dense:flash", "dense:math"])
def test_torchs_kernels_are_right_and_alone(
    name: str, heads: tuple[int, ...], span: tuple[int, int], dtype: str
) -> None:
    kernel, given = kernel_for(name), qkv(span, heads, DTYPES[dtype])
    refuse_wrong(kernel, given, heads, gradients=True)
    with profile() as profiler:
        kernel(**given)
    seen = {family_of(name) for name in operators(profiler)} - {""}
    assert seen == {name.partition(":")[2]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("heads", HEADS)
def test_flex_attention_is_right(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, ...], span: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(dense_flex, "why_not_compiled", lambda *_: "a test does not wait for a compiler")
    refuse_wrong(dense_flex.FLEX, qkv(span, heads, DTYPES[dtype]), heads, gradients=False)


def test_flex_attention_is_compiled_once_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compiler(function: Any, **options: Any) -> Any:
        asked.append((function, options))
        return dense_flex._eager

    monkeypatch.setattr(dense_flex, "why_not_compiled", lambda *_: "")
    kernel = dense_flex.Flex(compiler)
    for span in SPANS:
        refuse_wrong(kernel, qkv(span, HEADS[0], torch.float32), HEADS[0], gradients=False)
    assert asked == [(flex_attention, {"fullgraph": True})]


@pytest.mark.parametrize(
    ("device", "dtype", "hidden", "said"),
    [
        ("cpu", torch.float64, "", "torch compiles it for fp32 and less on a CPU"),
        ("cpu", torch.float32, "compiler", "no C++ compiler is installed"),
        ("cuda", torch.bfloat16, "triton", "triton is not installed"),
    ],
)
def test_flex_attention_says_why_it_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, hidden: str, said: str
) -> None:
    monkeypatch.setattr(dense_flex, "_compiler_found", lambda: hidden != "compiler")
    monkeypatch.setattr(dense_flex, "find_spec", lambda name: None if name == hidden else object())
    text = dense_flex.FLEX.provider(replace(CPU, device=torch.device(device), dtype=dtype))
    assert text.endswith(f" flex_attention, not compiled, with every score in memory: {said}")
    usual = replace(CPU if hidden != "compiler" else GPU)
    monkeypatch.setattr(dense_flex, "find_spec", lambda name: object())
    assert dense_flex.FLEX.provider(usual).endswith(" flex_attention, compiled")


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 1), (5, 37), (128, 128), (130, 300), (257, 640), (300, 300), (256, 512)]
)
def test_the_block_mask_of_flex_attention_skips_nothing_visible(tokens: int, length: int) -> None:
    mask = dense_flex.causal_mask(tokens, length, "cpu")
    query, key = torch.arange(tokens)[:, None] + length - tokens, torch.arange(length)
    visible = key <= query
    rows, columns = -(-tokens // 128), -(-length // 128)
    full = torch.zeros(rows, columns, dtype=torch.bool)
    some = torch.zeros(rows, columns, dtype=torch.bool)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for row in range(rows):
        full[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
        some[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] = True
        for column in range(columns):
            cut = visible[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
            whole = bool(cut.all()) and cut.shape[1] == 128
            assert bool(full[row, column]) == whole
            assert bool(some[row, column]) == (bool(cut.any()) and not whole)
    assert mask.shape == (1, 1, tokens, length)


class Package:
    """A FlashAttention package whose kernels are the emulator's; keeps the options it was called with."""

    def __init__(self, *, pair: bool = False) -> None:
        self.pair, self.options = pair, {}

    def flash_attn_func(self, q: Any, k: Any, v: Any, *, num_splits: int = 1, **options: Any) -> Any:
        self.options = {**options, "num_splits": num_splits}
        o = emulator.flash_attn_func(q, k, v, **options)
        return (o, None) if self.pair else o


LIBRARIES: dict[str, tuple[DenseKernel, Any]] = {
    "fa2": (dense_flash.FA2, Package()),
    "fa2 in torch": (dense_flash.FA2, emulator.TORCH),
    "fa2 in torch 2.11": (dense_flash.FA2, emulator.TORCH_211),
    "fa3": (dense_flash.FA3, Package()),
    "fa3, older": (dense_flash.FA3, Package(pair=True)),
    "fa4": (dense_flash.FA4, Package(pair=True)),
}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], DenseKernel]:
    def install(which: str) -> DenseKernel:
        kernel, module = LIBRARIES[which]
        monkeypatch.setattr(dense_flash, "import_module", lambda name: module)
        monkeypatch.setattr(dense_flash, "_package_of_fa2", lambda: "" if "torch" in which else which)
        monkeypatch.setattr(dense_flash, "_wants_to_be_told", lambda: which == "fa2 in torch")
        return kernel

    return install


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("which", LIBRARIES)
def test_the_libraries_get_valid_calls(
    emulated: Callable[[str], DenseKernel],
    which: str,
    heads: tuple[int, ...],
    span: tuple[int, int],
    dtype: str,
) -> None:
    refuse_wrong(emulated(which), qkv(span, heads, DTYPES[dtype]), heads, gradients=True)


def test_fa3_may_split_keys_unless_there_is_a_backward(emulated: Callable[[str], DenseKernel]) -> None:
    kernel, package = emulated("fa3"), LIBRARIES["fa3"][1]
    given = qkv((1, 37), (4, 2, 8, 8), torch.float32)
    kernel(**given)
    assert package.options["num_splits"] == 0
    kernel(**{name: t.requires_grad_() for name, t in given.items()})
    assert package.options["num_splits"] == 1


@pytest.mark.parametrize(
    ("name", "problem", "said"),
    [
        (
            "dense:flash",
            replace(GPU, dtype=torch.float32),
            "torch's flash kernel takes fp16 and bf16, not fp32",
        ),
        ("dense:cudnn", CPU, "torch's cudnn kernel runs on cuda, not on cpu"),
        (
            "dense:cudnn",
            replace(GPU, dtype=torch.float64),
            "torch's cudnn kernel takes fp16 and bf16, not fp64",
        ),
        ("dense:efficient", CPU, "torch's efficient kernel runs on cuda, not on cpu"),
        ("dense:flex", replace(CPU, gradients=True), "torch's FlexAttention has no backward on cpu"),
        ("dense:fa2", CPU, "fa2 runs on cuda, not on cpu"),
        ("dense:fa2", GPU, "fa2 is not installed: pip install 'nsabench[flash-attn]'"),
        (
            "dense:fa3",
            GPU,
            "fa3 is not installed: git clone https://github.com/Dao-AILab/flash-attention && "
            "cd flash-attention/hopper && python setup.py install",
        ),
        ("dense:fa4", GPU, "fa4 is not installed: pip install 'nsabench[fa4]'"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, name: str, problem: Problem, said: str
) -> None:
    for find in ("_package_of_fa2", "_torch_varlen"):
        monkeypatch.setattr(dense_flash, find, lambda: "")
    monkeypatch.setattr(dense_flash, "_package", lambda *names: "")
    monkeypatch.setattr(dense_flash, "_distribution", lambda name: "")
    assert kernel_for(name).refusal(problem) == said


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dense:fa2", {"dtype": torch.float32}, "fa2 takes fp16 and bf16, not fp32"),
        ("dense:fa2", {"key_dim": 264}, "fa2 takes head dims up to 256, not 264"),
        ("dense:fa3", {"key_dim": 192, "value_dim": 384}, "fa3 takes head dims up to 256, not 384"),
        ("dense:fa4", {"key_dim": 260}, "fa4 takes head dims up to 256, not 264"),
    ],
)
def test_what_a_library_does_not_take(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], said: str
) -> None:
    kernel = kernel_for(name)
    monkeypatch.setattr(type(kernel), "version", lambda self: "here 1.0")
    assert kernel.refusal(GPU) == ""
    assert kernel.refusal(replace(GPU, **changes)) == said


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("4.0.0b20", "flash_attn_4 4.0.0b20"),
        ("4.0.0.b21", "flash_attn_4 4.0.0.b21"),
        ("4.0.0b9", ""),
        ("4.1.0b2", "flash_attn_4 4.1.0b2"),
        ("4.0.0", "flash_attn_4 4.0.0"),
    ],
)
def test_an_early_beta_counts_as_none(monkeypatch: pytest.MonkeyPatch, version: str, found: str) -> None:
    monkeypatch.setattr(dense_flash.metadata, "version", lambda name: version)
    assert dense_flash.FA4.version() == found


@pytest.mark.parametrize(("generation", "width"), [(0, 192), (9, 192), (10, 0)])
def test_a_blackwell_has_one_kernel_of_two_dims(
    monkeypatch: pytest.MonkeyPatch, generation: int, width: int
) -> None:
    monkeypatch.setattr(dense_flash, "_generation", lambda: generation)
    assert dense_flash.FA4.width(192, 128, True) == width
    assert dense_flash.FA4.width(128, 128, True) == 0


@pytest.mark.parametrize(
    ("package", "version", "found"),
    [
        (True, "2.8.3", "flash_attn 2.8.3"),
        (True, "2.6.3", "torch's"),
        (True, "4.0.0b20", "torch's"),
        (False, "2.8.3", "torch's"),
    ],
)
def test_fa2_is_the_package_or_torchs_own(
    monkeypatch: pytest.MonkeyPatch, package: bool, version: str, found: str
) -> None:
    monkeypatch.setattr(dense_flash, "find_spec", lambda name: object() if package else None)
    monkeypatch.setattr(dense_flash.metadata, "version", lambda name: version)
    monkeypatch.setattr(dense_flash, "_torch_varlen", lambda: "torch's")
    monkeypatch.setattr(dense_flash, "_package_of_fa2", dense_flash._package_of_fa2.__wrapped__)
    assert dense_flash.FA2.version() == found


@pytest.mark.parametrize(
    ("name", "capability", "said"),
    [
        ("dense:fa3", (8, 0), "fa3 is made for compute capability 9.x, not 8.0"),
        ("dense:fa4", (8, 9), "fa4 is made for compute capability 9.x and 10.x, not 8.9"),
    ],
)
def test_a_library_is_made_for_some_gpus(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel_for(name).probe(GPU) == said


def test_a_device_may_refuse_in_the_librarys_own_words(
    monkeypatch: pytest.MonkeyPatch, emulated: Callable[[str], DenseKernel]
) -> None:
    def refuses(*given: Any, **options: Any) -> None:
        raise AssertionError("head_dim 72 is not compiled in\nmore")

    kernel = emulated("fa2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_cpu = replace(CPU, heads=4, key_dim=8, value_dim=8)
    assert kernel.probe(on_cpu) == ""
    monkeypatch.setattr(dense_flash, "import_module", lambda name: SimpleNamespace(flash_attn_func=refuses))
    assert kernel.probe(on_cpu) == "dense:fa2 does not run here: head_dim 72 is not compiled in"


def test_no_memory_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, emulated: Callable[[str], DenseKernel]
) -> None:
    def runs_out(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    kernel = emulated("fa2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dense_flash, "import_module", lambda name: SimpleNamespace(flash_attn_func=runs_out))
    with pytest.raises(torch.OutOfMemoryError):
        kernel.probe(CPU)


def test_torchs_own_reason_is_given() -> None:
    narrow = dense_sdpa.Forced(
        "dense:flash",
        SDPBackend.FLASH_ATTENTION,
        None,
        gpu_only=False,
        halves_only=True,
        grouped=True,
        one_width=False,
    )
    said = narrow.probe(replace(CPU, value_dim=64))
    assert said.startswith(
        "torch's flash kernel does not run here: Flash attention requires q,k,v to have the same last dim"
    )
    assert "Triggered" not in said
    assert "not used because" not in said
    assert narrow.probe(CPU) == ""
    assert dense_sdpa.EFFICIENT.probe(CPU).startswith("torch's efficient kernel does not run here: No viable")


@pytest.mark.parametrize("queries", [1, 40, 64])
@pytest.mark.parametrize("answer", [True, False])
def test_torchs_check_is_asked_about_the_true_shape(
    monkeypatch: pytest.MonkeyPatch, answer: bool, queries: int
) -> None:
    asked: list[Any] = []

    def can_use(parameters: Any, debug: bool) -> bool:
        asked.append(parameters)
        return answer

    problem = replace(CPU, device=torch.device("cpu"), value_dim=64, queries=queries, length=64)
    kernel = replace(dense_sdpa.FLASH, can_use=can_use)
    monkeypatch.setattr(dense_sdpa, "_on_gpu", lambda problem: True)
    said = kernel.probe(problem)
    assert said == ("" if answer else "torch's flash kernel does not take this shape, torch says")
    (found,) = asked
    rows, heads = (4, 2) if queries == 1 else (queries, 8)
    assert found.query.shape == (2, heads, rows, 128)
    assert found.key.shape == found.value.shape == (2, 2, 64, 128)
    assert (found.is_causal, found.enable_gqa) == (queries == 64, queries > 1)
    assert found.query.untyped_storage().nbytes() == 128 * 4


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("dense", {"value_dim": 64}, "scaled_dot_product_attention; values padded from 64 to 128 channels"),
        ("dense", {"dtype": torch.float32}, "scaled_dot_product_attention; KV heads repeated 4 times"),
        ("dense:flash", {"key_dim": 64}, "flash only; keys padded from 64 to 128 channels"),
        ("dense:cudnn", {"key_dim": 64}, "cudnn only"),
        ("dense:efficient", {}, "efficient only; KV heads repeated 4 times"),
        ("dense:efficient", {"queries": 1}, "efficient only"),
        ("dense:efficient", {"kv_heads": 8}, "efficient only"),
        ("dense:math", {"key_dim": 64}, "math only"),
        ("dense:fa3", {"key_dim": 192}, "here 1.0"),
        (
            "dense:fa3",
            {"key_dim": 192, "gradients": True},
            "here 1.0; values padded from 128 to 192 channels",
        ),
        (
            "dense:fa4",
            {"key_dim": 60, "value_dim": 60},
            "here 1.0; keys padded from 60 to 64 channels; values padded from 60 to 64 channels",
        ),
    ],
)
def test_what_is_done_to_the_tensors_is_stated(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(dense_flash.Flash3, "version", lambda self: "here 1.0")
    monkeypatch.setattr(dense_flash.Flash4, "version", lambda self: "here 1.0")
    assert kernel_for(name).provider(replace(GPU, **changes)).endswith(said)


@pytest.mark.parametrize(
    ("name", "ran", "instead"),
    [
        ("dense", ["_scaled_dot_product_attention_math"], ""),
        ("dense:flash", ["_scaled_dot_product_flash_attention_for_cpu"], ""),
        ("dense:flash", ["_scaled_dot_product_attention_math"], "_scaled_dot_product_attention_math"),
        ("dense:flash", ["_flash_attention_forward", "_cudnn_attention_forward"], "_cudnn_attention_forward"),
        ("dense:cudnn", ["_scaled_dot_product_flash_attention"], "_scaled_dot_product_flash_attention"),
        ("dense:cudnn", ["_scaled_dot_product_cudnn_attention"], ""),
        ("dense:math", [], "no operator that is known for it"),
        ("dense:flex", [], ""),
        ("dense:flex", ["_scaled_dot_product_attention_math"], "_scaled_dot_product_attention_math"),
        ("dense:fa2", ["torch_attn::_varlen_attn", "_flash_attention_forward"], ""),
        ("dense:fa3", ["flash_attn_3::_flash_attn_forward"], ""),
        ("dense:fa3", ["_flash_attention_forward"], "_flash_attention_forward"),
        ("dense:fa4", [], ""),
        ("dense:fa4", ["_scaled_dot_product_flash_attention"], "_scaled_dot_product_flash_attention"),
    ],
)  # fmt: skip
def test_what_ran_instead_is_seen(name: str, ran: list[str], instead: str) -> None:
    assert kernel_for(name).fell_back(ran) == instead


def test_only_the_forced_kernel_is_enabled_and_only_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    forced: list[Any] = []

    def spy(backend: Any) -> Any:
        forced.append(backend)
        return sdpa_kernel(backend)

    monkeypatch.setattr(dense_sdpa, "sdpa_kernel", spy)
    dense_sdpa.MATH(**qkv((3, 5), HEADS[0], torch.float32))
    assert forced == [SDPBackend.MATH]
    assert (torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


@pytest.mark.parametrize("name", KERNELS)
def test_a_copied_layer_calls_the_same_kernel(name: str) -> None:
    kernel = kernel_for(name)
    assert copy.deepcopy({"attend": kernel})["attend"] is kernel
