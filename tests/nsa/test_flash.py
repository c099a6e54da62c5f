"""The fa2, fa3 and fa4 backends: their arithmetic on an emulator of FlashAttention, anywhere; the kernels of
FlashAttention 2 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa import reference
from nsa.backends import _flash_packs, _flash_rows
from nsa.backends._flash_library import FULL, FlashAttn, FlashAttn3, FlashAttn4, Library, TorchVarlen
from nsa.backends.flash import FA2
from nsa.config import NSAConfig
from nsa.testing import Check, against_spec
from tests import flash_attn_emulator as emulator

LIBRARIES = {
    "flash_attn": FlashAttn(emulator.PACKAGE, "flash_attn 2.8.3"),
    "torch": TorchVarlen(emulator.TORCH, "torch 2.13.0 varlen"),
    "torch-2.11": TorchVarlen(emulator.TORCH_211, "torch 2.11.0 varlen"),
    "fa3": FlashAttn3(emulator.FLASH3, "flash_attn_3 3.0.0"),
    "fa4": FlashAttn4(emulator.Cute(9), "flash-attn-4 4.0.0b20", 9),
}
SPECIFICATION = {
    "sliding_attention": reference.sliding_attention,
    "sliding_attention_varlen": reference.sliding_attention,
    "compressed_attention": reference.compressed_attention,
    "compressed_attention_varlen": reference.compressed_attention,
    "selected_attention": reference.selected_attention,
}
SLIDING = ["sliding_attention", "sliding_attention_varlen"]
COMPRESSED = ["compressed_attention", "compressed_attention_varlen"]

# The same arithmetic whichever library computes: the fixtures below say which.
flash = FA2


def use(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(flash, "library", lambda: library)


Tensors = dict[str, torch.Tensor]
QStart = int | list[int]


def small(heads: int = 4, kv_heads: int = 2, **more: Any) -> NSAConfig:
    fields: dict[str, Any] = {
        "head_dim": 8,
        "compression_block_size": 8,
        "compression_stride": 4,
        "selection_block_size": 8,
        "num_selected_blocks": 4,
        "window_size": 10,
    }
    return NSAConfig(num_heads=heads, num_kv_heads=kv_heads, **{**fields, **more})


def inputs(
    branch: str,
    config: NSAConfig,
    rows: int,
    q_start: QStart,
    *,
    batch: int = 2,
    keys: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Tensors:
    """Tensors of one call; ``keys`` tokens (blocks for cmp) where it is not what the last query needs."""
    length = rows + (max(q_start) if isinstance(q_start, list) else q_start)
    if branch in COMPRESSED:
        length = max(0, (length - config.compression_block_size) // config.compression_stride + 1)
    length = length if keys is None else keys
    generator = torch.Generator().manual_seed(1)

    def normal(length: int, heads: int, dim: int) -> torch.Tensor:
        values = torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=dtype)

    tensors = {
        "q": normal(rows, config.num_heads, config.head_dim),
        "k": normal(length, config.num_kv_heads, config.head_dim),
        "v": normal(length, config.num_kv_heads, config.v_dim),
    }
    if branch == "selected_attention":
        # Any order, repeats, -1 anywhere, blocks that begin after the query; a tenth of the lists is empty.
        shape = (batch, rows, config.num_kv_heads, config.num_selected_blocks)
        blocks = -(-length // config.selection_block_size)
        chosen = torch.randint(-1, blocks, shape, generator=generator, dtype=torch.int32)
        chosen[torch.rand(shape[:3], generator=generator) < 0.1] = -1
        tensors["block_indices"] = chosen.to(device)
    if isinstance(q_start, list):
        tensors["q_start"] = torch.tensor(q_start, device=device)
    return tensors


def compare(branch: str, config: NSAConfig, tensors: Tensors, q_start: QStart = 0) -> dict[str, Check]:
    """Output, lse and gradients of ``branch`` against the specification."""
    fixed = {} if isinstance(q_start, list) else {"q_start": q_start}

    def part(fn: Callable[..., Any], index: int) -> Callable[..., torch.Tensor]:
        return lambda **given: fn(config=config, **_named(branch, given), **fixed)[index]

    mine, exact = getattr(flash, branch), SPECIFICATION[branch]
    checks = against_spec(part(mine, 0), part(exact, 0), tensors, gradients=True)
    return checks | {"lse": against_spec(part(mine, 1), part(exact, 1), tensors)["out"]}


def _named(branch: str, tensors: Tensors) -> Tensors:
    names = {"k": "k_cmp", "v": "v_cmp"} if branch in COMPRESSED else {}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def assert_agrees(branch: str, config: NSAConfig, tensors: Tensors, q_start: QStart = 0) -> None:
    checks = compare(branch, config, tensors, q_start)
    assert all(check.ok for check in checks.values()), checks


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    use(monkeypatch, LIBRARIES[request.param])
    return str(request.param)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The emulated package alone, for a test to break or to watch."""
    namespace = SimpleNamespace(**vars(emulator.PACKAGE))
    use(monkeypatch, FlashAttn(namespace, "flash_attn 2.8.3"))
    return namespace


# Each branch against the specification.


@pytest.mark.parametrize("q_start", [0, 1, 8, 9, 10, 37])
@pytest.mark.parametrize("rows", [1, 2, 9, 10, 11, 23])
@pytest.mark.parametrize("branch", SLIDING)
def test_sliding(library: str, branch: str, rows: int, q_start: int) -> None:
    config = small()
    assert_agrees(branch, config, inputs(branch, config, rows, q_start), q_start)


@pytest.mark.parametrize("q_start", [[0, 0], [0, 17], [30, 3], [21]])
@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize("branch", SLIDING)
def test_sliding_with_lengths_that_differ(library: str, branch: str, rows: int, q_start: list[int]) -> None:
    config = small()
    assert_agrees(branch, config, inputs(branch, config, rows, q_start), q_start)


@pytest.mark.parametrize(
    ("rows", "q_start", "keys"), [(6, 0, 2), (20, 0, 4), (5, 7, 3), (4, 30, 5), (3, 2, 20)]
)
@pytest.mark.parametrize("branch", SLIDING)
def test_sliding_over_fewer_or_more_keys(
    library: str, branch: str, rows: int, q_start: int, keys: int
) -> None:
    config = small()
    assert_agrees(branch, config, inputs(branch, config, rows, q_start, keys=keys), q_start)


def test_sliding_refuses_a_tensor_of_starts_beyond_the_keys(library: str) -> None:
    tensors = inputs("sliding_attention", small(), 4, [3, 5], keys=8)
    with pytest.raises(RuntimeError, match="more than 8 keys"):
        flash.sliding_attention(**tensors, config=small())


@pytest.mark.parametrize("q_start", [0, 3, 6, 7, 8, 11, 40])
@pytest.mark.parametrize("rows", [1, 3, 7, 8, 9, 12, 13, 31])
@pytest.mark.parametrize("branch", COMPRESSED)
def test_compressed(library: str, branch: str, rows: int, q_start: int) -> None:
    config = small()
    assert_agrees(branch, config, inputs(branch, config, rows, q_start), q_start)


@pytest.mark.parametrize(("block", "stride"), [(4, 4), (8, 1), (8, 2), (8, 8), (6, 3)])
@pytest.mark.parametrize("q_start", [0, 5, 21])
def test_compressed_geometries(library: str, block: int, stride: int, q_start: int) -> None:
    config = small(compression_block_size=block, compression_stride=stride, selection_block_size=24)
    branch = "compressed_attention"
    assert_agrees(branch, config, inputs(branch, config, 29, q_start), q_start)


@pytest.mark.parametrize("keys", [0, 1, 2, 5, 9, 40])
@pytest.mark.parametrize("q_start", [0, 10, 200])
def test_compressed_over_fewer_or_more_blocks(library: str, q_start: int, keys: int) -> None:
    config, branch = small(), "compressed_attention"
    assert_agrees(branch, config, inputs(branch, config, 33, q_start, keys=keys), q_start)


@pytest.mark.parametrize("q_start", [[0, 0], [0, 17], [40, 6], [2, 3], [21]])
@pytest.mark.parametrize("rows", [1, 5, 26])
def test_compressed_with_lengths_that_differ(library: str, rows: int, q_start: list[int]) -> None:
    config, branch = small(), "compressed_attention"
    assert_agrees(branch, config, inputs(branch, config, rows, q_start), q_start)


@pytest.mark.parametrize("q_start", [0, 5, 37, [0, 0], [0, 21]])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 30])
def test_selected(library: str, rows: int, q_start: QStart) -> None:
    config, branch = small(), "selected_attention"
    assert_agrees(branch, config, inputs(branch, config, rows, q_start), q_start)


@pytest.mark.parametrize(
    "lists",
    [
        [[-1, -1, -1, -1]],
        [[-1, 0, -1, 1], [1, -1, 0, 0]],
        [[2, 2, 2, 2], [0, 2, 1, 2]],
        [[3, 3, -1, 0], [-1, -1, -1, 3]],
        [[0, 1, 2, 3]],
    ],
)
def test_selected_lists(library: str, lists: list[list[int]]) -> None:
    config, branch = small(), "selected_attention"
    tensors = inputs(branch, config, 29, 0)
    rows = torch.tensor(lists, dtype=torch.int32).repeat(29, 1)[:29]
    tensors["block_indices"] = rows[None, :, None].expand(2, -1, 2, -1).contiguous()
    assert_agrees(branch, config, tensors)


def test_selected_by_the_specification_s_own_choice(library: str) -> None:
    config, branch = small(), "selected_attention"
    tensors = inputs(branch, config, 61, 0)
    blocks = inputs("compressed_attention", config, 61, 0)
    tensors["block_indices"] = reference.select_blocks(tensors["q"], blocks["k"], config)
    assert_agrees(branch, config, tensors)


@pytest.mark.parametrize(("rows", "keys"), [(5, 0), (9, 3), (3, 50)])
def test_selected_over_fewer_or_more_keys(library: str, rows: int, keys: int) -> None:
    config, branch = small(), "selected_attention"
    tensors = inputs(branch, config, rows, 0, keys=max(keys, 1))
    tensors.update({name: tensors[name][:, :keys] for name in ("k", "v")})
    assert_agrees(branch, config, tensors)


def test_selected_in_chunks_is_the_same(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, branch = small(), "selected_attention"
    monkeypatch.setattr(_flash_packs, "PACKED_BYTES", 5 * 2 * 2 * 24 * 8 * 8)  # five queries at most
    for q_start in (0, [0, 9]):
        assert_agrees(branch, config, inputs(branch, config, 24, q_start), q_start)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (2, 1), (6, 2), (5, 1), (6, 1), (16, 2)])
@pytest.mark.parametrize("branch", SPECIFICATION)
def test_every_group_size(library: str, branch: str, heads: int, kv_heads: int) -> None:
    config = small(heads, kv_heads)
    for rows, q_start in ((27, 0), (1, 30), (9, 50)):
        assert_agrees(branch, config, inputs(branch, config, rows, q_start), q_start)


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (20, 12), (8, 24), (256, 256)])
@pytest.mark.parametrize("branch", SPECIFICATION)
def test_head_dims(library: str, branch: str, dim: int, value_dim: int) -> None:
    config = small(head_dim=dim, value_dim=value_dim)
    for q_start in (0, [0, 6]):
        assert_agrees(branch, config, inputs(branch, config, 17, q_start), q_start)


@pytest.mark.parametrize("branch", SPECIFICATION)
def test_the_first_releases_of_flash_attention_3(monkeypatch: pytest.MonkeyPatch, branch: str) -> None:
    use(monkeypatch, FlashAttn3(emulator.FLASH3_FIRST, "flash_attn_3 3.0.0b1"))
    for rows, q_start in ((27, 0), (1, 30), (9, 50), (1, [9, 40])):
        assert_agrees(branch, small(), inputs(branch, small(), rows, q_start), q_start)


@pytest.mark.parametrize(("dim", "value_dim"), [(192, 128), (128, 128), (20, 12), (8, 24)])
@pytest.mark.parametrize("branch", SPECIFICATION)
def test_head_dims_of_flash_attention_4_on_blackwell(
    monkeypatch: pytest.MonkeyPatch, branch: str, dim: int, value_dim: int
) -> None:
    """Its kernels have no width of 192 for values, so nothing is padded to one."""
    use(monkeypatch, FlashAttn4(emulator.Cute(10), "flash-attn-4 4.0.0b20", 10))
    config = small(head_dim=dim, value_dim=value_dim)
    for rows, q_start in ((17, 0), (11, [0, 6])):
        tensors = inputs(branch, config, rows, q_start)
        assert_agrees(branch, config, tensors, q_start)
    empty = inputs(branch, config, 3, 0, keys=0)
    assert_agrees(branch, config, empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch", SPECIFICATION)
def test_dtypes(library: str, branch: str, dtype: torch.dtype) -> None:
    config = small(6, 2)
    for rows, q_start in ((150, 0), (9, 300)):
        assert_agrees(branch, config, inputs(branch, config, rows, q_start, dtype=dtype), q_start)


@pytest.mark.parametrize("layout", ["heads first", "strided last dim"])
@pytest.mark.parametrize("branch", SPECIFICATION)
def test_non_contiguous_inputs(library: str, branch: str, layout: str) -> None:
    def scattered(t: torch.Tensor) -> torch.Tensor:
        if layout == "heads first":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        return t.repeat_interleave(2, -1)[..., ::2]

    config = small()
    for q_start in (0, [0, 6]):
        tensors = inputs(branch, config, 17, q_start)
        floating = {name: scattered(t) for name, t in tensors.items() if t.is_floating_point()}
        assert not any(t.is_contiguous() for t in floating.values())
        assert_agrees(branch, config, tensors | floating, q_start)


@pytest.mark.parametrize("branch", SPECIFICATION)
def test_rows_without_a_key_give_zero_and_stay_in_the_graph(library: str, branch: str) -> None:
    config = small()
    tensors = inputs(branch, config, 5, 0)
    if branch in SLIDING:
        tensors.update({name: tensors[name][:, :0] for name in ("k", "v")})
    if branch == "selected_attention":
        tensors["block_indices"].fill_(-1)
    tensors["q"][:] = float("nan")
    q = tensors["q"].requires_grad_()
    o, lse = getattr(flash, branch)(**_named(branch, tensors), config=config)
    o.sum().backward()
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    assert q.grad is not None
    assert (q.grad == 0).all()


@pytest.mark.parametrize("branch", SPECIFICATION)
def test_lse_carries_no_gradient(library: str, branch: str) -> None:
    config = small()
    tensors = {
        name: t.requires_grad_() if t.is_floating_point() else t
        for name, t in inputs(branch, config, 30, 0).items()
    }
    o, lse = getattr(flash, branch)(**_named(branch, tensors), config=config)
    assert o.requires_grad
    assert not lse.requires_grad


# The shape of the work handed to the library.


def _watch(package: SimpleNamespace) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def watched(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args, kwargs))
            return fn(*args, **kwargs)

        return call

    for name, fn in list(vars(package).items()):
        setattr(package, name, watched(name, fn))
    return calls


def test_sliding_is_one_call_with_the_window_as_documented(package: SimpleNamespace) -> None:
    calls = _watch(package)
    config = small()
    flash.sliding_attention(**inputs("sliding_attention", config, 40, 25), config=config, q_start=25)
    ((name, (q, k, _), options),) = calls
    assert name == "flash_attn_func"
    assert options["window_size"] == (9, 0)
    assert (q.shape[1], k.shape[1]) == (40, 49)  # the window of the first query and all that follow


def test_decode_steps_are_one_call_without_a_window(package: SimpleNamespace) -> None:
    calls = _watch(package)
    config = small()
    for branch, keys in (("sliding_attention", 10), ("compressed_attention", 24)):
        calls.clear()
        tensors = _named(branch, inputs(branch, config, 1, 99))
        getattr(flash, branch)(**tensors, config=config, q_start=99)
        ((name, (_, k, _), options),) = calls
        assert name == "flash_attn_func"
        assert (options["window_size"], options["causal"], k.shape[1]) == ((-1, -1), False, keys)


@pytest.mark.parametrize(("rows", "q_start", "copies"), [(203, 0, 4), (203, 2, 4), (12, 1000, 1)])
def test_compressed_makes_three_calls_and_copies_no_more_than_it_must(
    package: SimpleNamespace, rows: int, q_start: int, copies: int
) -> None:
    calls = _watch(package)
    config, branch = small(), "compressed_attention"
    tensors = inputs(branch, config, rows, q_start)
    flash.compressed_attention(**_named(branch, tensors), config=config, q_start=q_start)
    assert len(calls) <= 3
    phased = [(q, k) for _, (q, k, _), options in calls if options["causal"]]
    ((q, k),) = phased
    stride = config.compression_stride
    assert q.shape[2] == stride * config.num_heads
    assert k.shape[2] == copies * config.num_kv_heads
    seen = sum(q.shape[1] * q.shape[2] // config.num_heads for _, (q, _, _), _ in calls)
    assert seen == rows - max(0, config.compression_block_size - 1 - q_start)


def test_selected_packs_exactly_the_keys_of_the_specification(package: SimpleNamespace) -> None:
    calls = _watch(package)
    config, branch = small(), "selected_attention"
    tensors = inputs(branch, config, 30, 0)
    flash.selected_attention(**tensors, config=config)
    ((name, (q, k, _, cu_q, cu_k, max_q, _), options),) = calls
    assert name == "flash_attn_varlen_func"
    assert not options["causal"]
    assert (q.shape[1], k.shape[1], max_q) == (1, 1, 2)
    assert cu_q.diff().eq(2).all()
    expected = [
        sum(min(t + 1, 30) - 8 * b if 8 * b + 8 > t + 1 else 8 for b in set(row.tolist()) if 0 <= 8 * b <= t)
        for sequence in tensors["block_indices"]
        for t, heads in enumerate(sequence)
        for row in heads
    ]
    assert cu_k.diff().tolist() == expected


def test_selected_keeps_to_the_sequences_one_launch_takes(
    package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_flash_packs, "MAX_SEQUENCES", 7)
    calls = _watch(package)
    config = small()
    flash.selected_attention(**inputs("selected_attention", config, 10, 0), config=config)
    assert [len(args[3]) - 1 for _, args, _ in calls] == [6, 6, 6, 6, 6, 6, 4]


@pytest.mark.parametrize(
    ("branch", "rows", "q_start"),
    [(branch, *call) for branch in SPECIFICATION for call in [(50, 0), (50, 7), (1, 40), (1, [9, 40])]]
    + [(branch, 20, [0, 30]) for branch in SPECIFICATION if branch not in COMPRESSED],
)
def test_torch_s_own_operator_takes_the_calls_and_no_value_is_read_on_the_host(
    monkeypatch: pytest.MonkeyPatch, branch: str, rows: int, q_start: QStart
) -> None:
    # Meta tensors have shapes and no values: reading one is an error.
    from torch.nn.attention import varlen

    use(monkeypatch, TorchVarlen(varlen, "torch varlen"))
    config = small(6, 2, value_dim=24)
    tensors = inputs(branch, config, rows, q_start, dtype=torch.bfloat16, device="meta")
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    fixed = {} if isinstance(q_start, list) else {"q_start": q_start}
    o, lse = getattr(flash, branch)(**_named(branch, given), config=config, **fixed)
    assert (o.shape, o.dtype) == ((2, rows, 6, 24), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, rows, 6), torch.float32)
    o.sum().backward()
    for name, tensor in given.items():
        if tensor.is_floating_point():
            assert tensor.grad is not None, name
            assert tensor.grad.shape == tensor.shape


# Planted faults: each must show.


def _one_key_more(package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def widened(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, window_size: tuple[int, int], **options: Any) -> Any:
            left, right = window_size
            return fn(*args, window_size=(left + 1 if left >= 0 else left, right), **options)

        return call

    for name, fn in list(vars(package).items()):
        setattr(package, name, widened(fn))


def _causal_when_packed(package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fn = package.flash_attn_varlen_func
    package.flash_attn_varlen_func = lambda *args, causal, **options: fn(*args, causal=True, **options)


def _never_causal(package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flash_rows, "CAUSAL", FULL)


def _top_left(package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    bottom_right = emulator.mask
    monkeypatch.setattr(
        emulator, "mask", lambda rows, keys, window: bottom_right(max(rows, keys), keys, window)[:rows]
    )


def _phase_off_by_one(package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _flash_rows._staircase
    monkeypatch.setattr(
        _flash_rows,
        "_staircase",
        lambda rows, blocks, q_start, config: right(rows, blocks, q_start + 1, config),
    )


def _own_token_hidden(package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _flash_packs._sources
    monkeypatch.setattr(
        _flash_packs, "_sources", lambda chosen, position, *rest: right(chosen, position - 1, *rest)
    )


@pytest.mark.parametrize(
    ("branch", "fault", "rows", "q_start"),
    [
        ("sliding_attention", _one_key_more, 30, 0),
        ("sliding_attention", _one_key_more, 5, 40),
        ("sliding_attention", _top_left, 5, 40),
        ("sliding_attention_varlen", _one_key_more, 30, 0),
        ("sliding_attention_varlen", _one_key_more, 30, [0, 9]),
        ("sliding_attention_varlen", _top_left, 30, [0, 9]),
        ("compressed_attention", _never_causal, 30, 0),
        ("compressed_attention", _top_left, 30, 40),
        ("compressed_attention", _phase_off_by_one, 30, 0),
        ("selected_attention", _causal_when_packed, 30, 0),
        ("selected_attention", _own_token_hidden, 30, 0),
    ],
)
def test_a_planted_fault_shows(
    package: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    branch: str,
    fault: Callable[[SimpleNamespace, pytest.MonkeyPatch], None],
    rows: int,
    q_start: QStart,
) -> None:
    config = small()
    tensors = inputs(branch, config, rows, q_start)
    assert_agrees(branch, config, tensors, q_start)
    fault(package, monkeypatch)
    checks = compare(branch, config, tensors, q_start)
    assert not checks["out"].ok
    assert not checks["d_q"].ok


# The kernels themselves.


@pytest.fixture
def kernels() -> None:
    if flash.provider() is None:
        pytest.skip("neither flash_attn nor a torch with FlashAttention is installed")


GPU_CALLS: list[tuple[int, QStart]] = [(1, 700), (333, 0), (70, 433), (1, [90, 700]), (37, [0, 411])]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (192, 128)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 1)])
@pytest.mark.parametrize("branch", SPECIFICATION)
def test_kernels(
    kernels: None, branch: str, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    config = NSAConfig(
        heads, kv_heads, dim, value_dim, num_selected_blocks=4, window_size=100, num_local_blocks=1
    )
    for rows, q_start in GPU_CALLS:
        tensors = inputs(branch, config, rows, q_start, dtype=dtype, device="cuda")
        assert_agrees(branch, config, tensors, q_start)


@pytest.mark.gpu
@pytest.mark.parametrize("branch", SPECIFICATION)
def test_kernels_in_chunks_and_over_strange_lists(
    kernels: None, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_flash_packs, "PACKED_BYTES", 2**18)
    config = small(6, 2)
    for rows, q_start in ((61, 0), (3, 500)):
        tensors = inputs(branch, config, rows, q_start, dtype=torch.bfloat16, device="cuda")
        assert_agrees(branch, config, tensors, q_start)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    ("branch", "rows", "q_start"),
    [(branch, *call) for branch in SPECIFICATION for call in [(200, 0), (1, 500), (1, [90, 700])]]
    + [(branch, 40, [0, 30]) for branch in SPECIFICATION if branch not in COMPRESSED],
)
def test_kernels_run_without_a_host_synchronisation(
    kernels: None, branch: str, rows: int, q_start: QStart
) -> None:
    config = small(8, 2, head_dim=64)
    tensors = inputs(branch, config, rows, q_start, dtype=torch.bfloat16, device="cuda")
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    fixed = {} if isinstance(q_start, list) else {"q_start": q_start}

    def step() -> None:
        o, _ = getattr(flash, branch)(**_named(branch, given), config=config, **fixed)
        o.sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
