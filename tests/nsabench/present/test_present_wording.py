"""How numbers are written: exact where they claim to be, three digits elsewhere, parts that total 100."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsabench.present import wording


@pytest.mark.parametrize(
    ("n", "text"),
    [
        *(
            (1, "1"),
            (512, "512"),
            (1000, "1000"),
            (1023, "1023"),
            (1024, "1k"),
            (1536, "1.5k"),
            (65536, "64k"),
        ),
        *((2**20, "1m"), (3 * 2**19, "1.5m"), (1024 * 1025, "1025k"), (100_000, "100000")),
    ],
)
def test_tokens(n: int, text: str) -> None:
    assert wording.tokens_text(n) == text


@given(st.integers(1, 2**40))
def test_tokens_lose_nothing(n: int) -> None:
    text = wording.tokens_text(n)
    unit = {"k": 1024, "m": 1024**2}.get(text[-1], 1)
    assert float(text.rstrip("km")) * unit == n


@pytest.mark.parametrize(
    ("n", "text"),
    [
        *(
            (None, "-"),
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
        ),
        *((12.3 * 2**20, "12.3 MiB"), (999.9 * 2**20, "0.976 GiB"), (2**45, "32.0 TiB")),
    ],
)
def test_bytes(n: float | None, text: str) -> None:
    assert wording.bytes_text(n) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (0, "0"), (0.012345, "0.0123"), (0.9996, "1.00"), (9.996, "10.0")),
        *((123.4, "123"), (1234.5, "1234"), (-0.5, "-0.500")),
    ],
)
def test_digits(value: float | None, text: str) -> None:
    assert wording.digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0479, "0.048"), (0.5, "0.500"), (1.456, "1.46"), (12.34, "12.3")]
)
def test_ratio(value: float | None, text: str) -> None:
    assert wording.ratio_text(value) == text


def test_range_needs_both_ends() -> None:
    assert wording.range_text(1.0, 2.0, wording.digits) == "1.00-2.00"
    assert wording.range_text(None, 2.0, wording.digits) == "-"
    assert wording.range_text(1.0, None, wording.digits) == "-"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (7290, "2h01m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert wording.duration_text(seconds) == text


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=9), st.integers(0, 2))
def test_rounded_parts_total_100(values: list[float], decimals: int) -> None:
    rounded = wording.round_to_100(values, decimals)
    assert sum(rounded) == pytest.approx(100, abs=1e-9)
    for part, value in zip(rounded, values, strict=True):
        assert part == pytest.approx(value / sum(values) * 100, abs=1.0001 / 10**decimals)


def test_rounding_gives_to_the_largest_remainder() -> None:
    assert wording.round_to_100([1, 1, 1], 0) == [34, 33, 33]
    assert wording.round_to_100([20.4, 30.3, 49.3], 0) == [21, 30, 49]


def test_fields() -> None:
    row = {"phase": "decode", "l_sel": 64, "n_sel": 16, "dk": None, "selection": "file=/data/me/seen.pt"}
    assert wording.fields_text(row, row) == "decode l'=64 n=16 selection=file=seen.pt"


def test_folded_route_breaks_after_commas_only() -> None:
    route = "cmp=fa2,score=triton,sel=triton,win=sdpa"
    assert wording.folded(route, 20) == ["cmp=fa2,", "score=triton,", "sel=triton,win=sdpa"]
    assert wording.folded(route, 100) == [route]
    assert wording.folded("a_backend_with_a_long_name", 5) == ["a_backend_with_a_long_name"]
    assert "".join(wording.folded(",,a,", 1)) == ",,a,"


def test_counts_the_most_frequent_first() -> None:
    rows = [{"status": s} for s in ("oom", "ok", "ok")]
    assert wording.count_text(rows) == "2 ok, 1 oom"
