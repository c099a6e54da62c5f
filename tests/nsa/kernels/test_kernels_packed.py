"""Packed sequences through the kernels: each as if it were alone, in one call; and the lse they hand on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch

import nsa.reference
from nsa import NativeSparseAttention, nsa_attention, stage_hook
from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.packing import Packed
from nsa.routes import FUNCTIONS, TABLE, Row
from nsa.testing import against_spec
from tests.nsa.recorder import Recorder

pytest.importorskip("triton")

from nsa.kernels import _by_keys, _union, selection

Small = Callable[..., NSAConfig]

# None, one, fewer than a compressed block, and more than one tile.
LENGTHS = (21, 0, 1, 7, 70, 0)

every_row = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.branch}={row.backend}")
        for row in TABLE
        if row.backend.startswith("triton")
    ],
)


def packed_on(device: str, config: NSAConfig, lengths: tuple[int, ...] = LENGTHS) -> Packed:
    return Packed.of(torch.tensor(list(accumulate(lengths, initial=0)), device=device), sum(lengths), config)


def inputs(branch: str, config: NSAConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of packed sequences, by the names of the branch's arguments; strided as part of a wider tensor."""
    generator = torch.Generator().manual_seed(1)
    blocks = sum(num_compressed_blocks(length, config) for length in LENGTHS)
    rows = blocks if branch in ("cmp", "score") else sum(LENGTHS)

    def draw(rows: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, rows, heads, 2 * width, generator=generator).to(dtype)[..., :width]

    q = draw(sum(LENGTHS), config.num_heads, config.head_dim)
    names = ("k_cmp", "v_cmp") if branch in ("cmp", "score") else ("k", "v")
    key = {names[0]: draw(rows, config.num_kv_heads, config.head_dim)}
    value = {names[1]: draw(rows, config.num_kv_heads, config.v_dim)}
    if branch == "score":
        return {"q": q, **key}
    if branch != "sel":
        return {"q": q, **key, **value}
    # Any block that begins in the sequence or before: some are of the future, some of none, some repeated.
    chosen = [
        torch.randint(-1, max(1, length // 16), (1, length, config.num_kv_heads, 4), generator=generator)
        for length in LENGTHS
    ]
    return {"q": q, **key, **value, "block_indices": torch.cat(chosen, 1).int()}


def one_by_one(branch: str, config: NSAConfig, packed: Packed) -> Callable[..., Any]:
    """The specification, sequence by sequence; outputs one after the other."""
    specification = getattr(nsa.reference, FUNCTIONS[branch])

    def compute(**tensors: torch.Tensor) -> Any:
        found = []
        for tokens, blocks in packed.parts():
            given = {
                name: tensor[:, blocks if name.endswith("_cmp") else tokens]
                for name, tensor in tensors.items()
            }
            found.append(specification(**given, config=config))
        if branch == "score":
            return torch.cat(found, 1)
        return tuple(torch.cat(part, 1) for part in zip(*found, strict=True))

    return compute


@every_row
@pytest.mark.interpret
@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(6, 2, torch.float16), (16, 1, torch.float32)])
def test_each_sequence_is_as_if_alone(
    row: Row, heads: int, kv_heads: int, dtype: torch.dtype, small: Small, kernel_device: str
) -> None:
    config = small(num_heads=heads, num_kv_heads=kv_heads, value_dim=32)
    packed = packed_on(kernel_device, config)
    tensors = {name: t.to(kernel_device) for name, t in inputs(row.branch, config, dtype).items()}
    function, specification = row.load(), one_by_one(row.branch, config, packed)
    if row.branch == "score":
        exact = {name: t.cpu().double() for name, t in tensors.items()}
        assert torch.equal(function(**tensors, config=config, packed=packed).cpu(), specification(**exact))
        return
    for index, name in enumerate(("o", "lse")):
        outcome = against_spec(
            lambda index=index, **given: function(**given, config=config, packed=packed)[index],
            lambda index=index, **given: specification(**given)[index],
            tensors,
        )["out"]
        assert outcome.ok, f"{name} differs by {outcome.max_abs_err:.3e}, budget {outcome.budget:.3e}"


@pytest.mark.interpret
@pytest.mark.parametrize("backend", ["score=triton", "sel=triton:union", "sel=triton:kv_outer"])
def test_in_several_chunks(
    backend: str, small: Small, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, size in (
        (_union, "CHUNK_BYTES", 2000),
        (_by_keys, "CHUNK_BYTES", 20000),
        (selection, "SCRATCH_BYTES", 2000),
    ):
        monkeypatch.setattr(module, name, size)
    row = next(row for row in TABLE if f"{row.branch}={row.backend}" == backend)
    test_each_sequence_is_as_if_alone(row, 6, 2, torch.float16, small, kernel_device)


@pytest.mark.interpret
def test_a_layer_computes_them_in_one_call(small: Small, kernel_device: str) -> None:
    torch.manual_seed(0)
    layer = NativeSparseAttention(small(), dim=32).to(kernel_device)
    x = torch.randn(1, sum(LENGTHS), 32, device=kernel_device)
    bounds = torch.tensor(list(accumulate(LENGTHS, initial=0)))
    calls = Recorder()
    with torch.no_grad(), stage_hook(calls):
        found = layer(x, routing="triton", cu_seqlens=bounds)
    assert [calls.seen.count(name) for name in ("cmp", "score", "sel", "win")] == [1, 1, 1, 1]

    def exact(x: torch.Tensor, **parameters: torch.Tensor) -> torch.Tensor:
        spec = layer.cpu().to(x.dtype)
        return spec(x, routing="reference", cu_seqlens=bounds)

    outcome = against_spec(lambda x: found, exact, {"x": x.cpu()})["out"]
    assert outcome.ok, f"differs by {outcome.max_abs_err:.3e}, budget {outcome.budget:.3e}"


@pytest.mark.interpret
def test_scores_begin_with_the_lse_of_compressed_attention(
    small: Small, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    torch.manual_seed(0)

    def draw(rows: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(2, rows, heads, width, device=kernel_device)

    rows = 40
    blocks = num_compressed_blocks(rows, config)
    keys = [draw(blocks if i < 2 else rows, config.num_kv_heads, config.head_dim) for i in range(6)]
    given = (draw(rows, config.num_heads, config.head_dim), *keys, draw(rows, config.num_heads, 3), config)
    walks: list[int] = []
    walk = selection._lse
    monkeypatch.setattr(selection, "_lse", lambda *args: (walks.append(1), walk(*args)))
    through = "score=triton,sel=triton,win=triton"
    alone = nsa_attention(*given, routing=f"cmp=reference,{through}")
    assert len(walks) == 1
    handed = nsa_attention(*given, routing=f"cmp=triton,{through}")
    assert len(walks) == 1
    torch.testing.assert_close(handed, alone, rtol=1e-5, atol=1e-5)
