"""The emulator the fa2, fa3 and fa4 tests stand on, against what FlashAttention documents."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests import flash_attn_emulator as emulator


@pytest.mark.parametrize(
    ("rows", "keys", "picture"),
    [
        (2, 5, ["11110", "11111"]),
        (5, 2, ["00", "00", "00", "10", "11"]),
    ],
)
def test_emulator_draws_the_causal_pictures_of_the_library(rows: int, keys: int, picture: list[str]) -> None:
    drawn = emulator.mask(rows, keys, emulator.normalised((-1, -1), True, keys))
    assert ["".join(str(int(x)) for x in row) for row in drawn] == picture
    assert drawn.equal(emulator.mask(rows, keys, emulator.normalised((-1, 0), False, keys)))


def test_emulator_draws_windows() -> None:
    drawn = emulator.mask(3, 5, (1, 0))
    assert drawn.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    # The launcher gives a lone left bound the longest sequence as its right one, which many rows over few
    # keys feel.
    assert emulator.mask(4, 1, emulator.normalised((0, -1), False, 1)).int().tolist() == [[0], [0], [1], [1]]


def test_emulator_equals_sdpa_where_both_are_defined() -> None:
    q, k, v = (torch.randn(2, 7, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    o, lse, _ = emulator.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, return_attn_probs=True)
    wide = [t.transpose(1, 2) for t in (q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=0.3)
    torch.testing.assert_close(o, expected.transpose(1, 2))
    logits = (wide[0] @ wide[1].transpose(-1, -2) * 0.3).masked_fill(
        ~torch.ones(7, 7).tril().bool(), -torch.inf
    )
    torch.testing.assert_close(lse, logits.logsumexp(-1))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0)])
def test_emulator_packs_like_a_loop(window: tuple[int, int]) -> None:
    lengths = [(3, 5), (0, 4), (2, 0), (4, 4)]
    cu_q, cu_k = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True))
    q, k, v = (torch.randn(total, heads, 8) for total, heads in ((9, 4), (15, 2), (15, 2)))
    k.requires_grad_()
    causal = window[1] == 0
    o, lse, _ = emulator.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 4, 5, causal=causal, window_size=window, return_attn_probs=True
    )
    for i, (rows, keys) in enumerate(lengths):
        q0, k0 = int(cu_q[i]), int(cu_k[i])
        if rows and keys:
            one = [
                t[None, start : start + n] for t, start, n in ((q, q0, rows), (k, k0, keys), (v, k0, keys))
            ]
            dense, dense_lse, _ = emulator.flash_attn_func(
                *one, causal=causal, window_size=window, return_attn_probs=True
            )
            torch.testing.assert_close(o[q0 : q0 + rows], dense[0])
            torch.testing.assert_close(lse[:, q0 : q0 + rows], dense_lse[0])
        elif rows:
            assert (o[q0 : q0 + rows] == 0).all()
            assert (lse[:, q0 : q0 + rows] == torch.inf).all()
    o.sum().backward()
    grad = k.grad
    assert grad is not None
    assert (grad[5:9] == 0).all()  # the keys of the sequence without queries
    assert grad[13:].isnan().sum() == 2 * 2 * 8  # past the last sequence nothing is written


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 12},
        {"head_dim": 264},
        {"max_q": 2},
        {"dtype": torch.int64},
        {"kv_heads": 3},
        {"max_q": 1, "rows": [1, 0, 1]},
    ],
)
def test_emulator_refuses_what_the_kernels_cannot_take(change: dict[str, Any]) -> None:
    given = {"head_dim": 8, "max_q": 3, "dtype": torch.int32, "kv_heads": 2, "rows": [3, 1, 2], **change}
    cu_q = torch.tensor([0, *given["rows"]]).cumsum(0).to(given["dtype"])
    cu_k = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    q = torch.randn(int(cu_q[-1]), 4, given["head_dim"])
    k = torch.randn(6, given["kv_heads"], given["head_dim"])
    with pytest.raises(emulator.Refused):
        emulator.flash_attn_varlen_func(q, k, k, cu_q, cu_k, given["max_q"], 2)


def test_emulated_torch_has_the_arguments_of_the_installed_one() -> None:
    from torch.nn.attention import varlen

    real = inspect.signature(varlen.varlen_attn).parameters
    emulated = inspect.signature(emulator.varlen_attn_211).parameters
    assert [real[name].kind for name in emulated] == [p.kind for p in emulated.values()]
    assert varlen.AuxRequest._fields == emulator.AuxRequest._fields


@pytest.mark.parametrize(
    ("rows", "keys", "picture"),
    [(2, 5, ["11110", "11111"]), (5, 2, ["00", "00", "00", "10", "11"])],
)
def test_newer_generations_draw_the_same_causal_pictures(rows: int, keys: int, picture: list[str]) -> None:
    for window in (
        emulator.normalised3((-1, -1), True, rows, keys),
        emulator.normalised3((-1, 0), False, rows, keys),
        emulator.normalised4((None, None), True),
        emulator.normalised4((None, 0), False),
    ):
        drawn = emulator.mask(rows, keys, window)
        assert ["".join(str(int(x)) for x in row) for row in drawn] == picture


@pytest.mark.parametrize(("rows", "keys"), [(1, 7), (3, 7), (7, 7), (1, 1), (4, 9)])
@pytest.mark.parametrize("left", [0, 1, 5, 6, 7, 20])
def test_a_window_is_the_same_in_every_generation(rows: int, keys: int, left: int) -> None:
    drawn = emulator.mask(rows, keys, emulator.normalised((left, 0), True, keys))
    assert drawn.equal(emulator.mask(rows, keys, emulator.normalised3((left, 0), True, rows, keys)))
    assert drawn.equal(emulator.mask(rows, keys, emulator.normalised4((left, 0), False)))


def test_newer_generations_mark_an_empty_row_by_minus_infinity() -> None:
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 1, 2, 8)
    _, lse = emulator.flash3_func(q, k, k, causal=True, return_attn_probs=True)
    _, other = emulator.Cute(9).flash_attn_func(q, k, k, causal=True, return_lse=True)
    assert other is not None
    assert lse.equal(other)
    assert (lse[:, :, :2] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, 2]).all()
    assert emulator.Cute(9).flash_attn_func(q, k, k)[1] is None


@pytest.mark.parametrize(
    ("major", "dims", "window"),
    [
        (9, (192, 128), (None, None)),
        (9, (264, 264), (None, None)),
        (10, (192, 192), (None, None)),
        (10, (256, 256), (None, None)),
        (10, (12, 12), (None, None)),
        (9, (8, 8), (-1, 0)),
    ],
)
def test_emulator_of_flash_attention_4_refuses(
    major: int, dims: tuple[int, int], window: tuple[int | None, int | None]
) -> None:
    q, v = torch.randn(1, 3, 2, dims[0]), torch.randn(1, 3, 2, dims[1])
    with pytest.raises(emulator.Refused):
        emulator.Cute(major).flash_attn_func(q, q, v, window_size=window)
