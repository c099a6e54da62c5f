"""The axis grammar: what a list of sizes or routes names, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsabench.plan import PlanError, nearest, parse_duration, parse_ints, parse_routes
from nsabench.plan.axes import MAX_VALUES, sizes_text


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512", [512]),
        ("512,1024,2048", [512, 1024, 2048]),
        (" 512 , 1k ", [512, 1024]),
        ("1K,1m,2M", [1024, 1024**2, 2 * 1024**2]),
        ("1k:64k:x2", [1024, 2048, 4096, 8192, 16384, 32768, 65536]),
        ("1k:100k:X4", [1024, 4096, 16384, 65536]),
        ("1k:4k:+1k", [1024, 2048, 3072, 4096]),
        ("1 : 10 : +4", [1, 5, 9]),
        ("8:8:x2", [8]),
        ("4,2,4,1:4:x2", [4, 2, 1]),
        ("9223372036854775807", [2**63 - 1]),
    ],
)
def test_sizes_and_ranges(text: str, values: list[int]) -> None:
    assert parse_ints(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a size"),
        ("512,,1024", "'' is not a size"),
        ("512,", "'' is not a size"),
        ("many", "'many' is not a size"),
        ("1.5k", "'1.5k' is not a size"),
        ("1_000", "'1_000' is not a size"),
        ("٣", "is not a size"),
        ("1g", "'1g' is not a size"),
        ("1k:4k", "'1k:4k' is not a size"),
        ("1k:4k:2", "'1k:4k:2' is not a size"),
        ("1k:4k:x1.5", "'1.5' in '1k:4k:x1.5' is not a size"),
        ("1k::x2", "'' in '1k::x2' is not a size"),
        ("0", "'0' is too small; it must be at least 1"),
        ("-4", "'-4' is too small"),
        ("1k:4k:x1", "'1' in '1k:4k:x1' is too small; it must be at least 2"),
        ("+4", "'\\+4' is not a size"),
        ("1k:4k:+0", "'0' in '1k:4k:\\+0' is too small; it must be at least 1"),
        ("4k:1k:x2", "'4k:1k:x2' runs backwards"),
        ("9223372036854775808", "too large"),
        ("9999999999999999999m", "too large"),
        ("9" * 5000, "is not a size"),
        ("1:1m:+1", f"more than {MAX_VALUES} values"),
    ],
)
def test_refused_sizes_name_the_option_and_the_value(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        parse_ints(text, name="--l")
    assert str(caught.value).startswith("--l: ")
    assert "\n" not in str(caught.value)


def test_minimum_is_the_callers() -> None:
    assert parse_ints("0,3", minimum=0) == [0, 3]
    assert parse_ints("0:4:+2", minimum=0) == [0, 2, 4]
    with pytest.raises(PlanError, match="--w: '15' is too small; it must be at least 16"):
        parse_ints("15", name="--w", minimum=16)
    with pytest.raises(PlanError, match="multiplies from 0"):
        parse_ints("0:4:x2", minimum=0)


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=20))
def test_a_plain_list_comes_back_without_duplicates(values: list[int]) -> None:
    assert parse_ints(",".join(map(str, values))) == list(dict.fromkeys(values))


@given(start=st.integers(1, 1000), factor=st.integers(2, 9), extra=st.integers(0, 10**6))
def test_a_geometric_range_holds_every_power_up_to_its_end(start: int, factor: int, extra: int) -> None:
    values = parse_ints(f"{start}:{start + extra}:x{factor}")
    assert values == [start * factor**i for i in range(len(values))]
    assert values[-1] <= start + extra < values[-1] * factor


@given(start=st.integers(1, 1000), step=st.integers(1, 99), extra=st.integers(0, 9000))
def test_an_arithmetic_range_is_pythons_with_its_end(start: int, step: int, extra: int) -> None:
    assert parse_ints(f"{start}:{start + extra}:+{step}") == list(range(start, start + extra + 1, step))


@given(st.text(alphabet="0123456789kmx:+-,. \n", max_size=20))
def test_any_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    values, refusal = [1], ""
    try:
        values = parse_ints(text)
    except PlanError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert values
    assert all(v >= 1 for v in values)
    assert len(set(values)) == len(values)


def test_routes_are_split_at_semicolons_and_tidied() -> None:
    assert parse_routes("auto") == ["auto"]
    assert parse_routes(" sdpa ; cmp=fa2, sel = triton ,win=sdpa") == ["sdpa", "cmp=fa2,sel=triton,win=sdpa"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty route in ''"),
        ("auto;", "an empty route in 'auto;'"),
        ("auto; ;sdpa", "an empty route"),
        ("auto;sdpa;auto", "'auto' is given twice"),
        ("cmp=fa2,sel=gather;cmp=fa2, sel=gather", "'cmp=fa2,sel=gather' is given twice"),
    ],
)
def test_refused_routes(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_routes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 90.0), ("90s", 90.0), ("1.5h", 5400.0), ("1h30m", 5400.0), (" 9m ", 540.0)),
        *(("500ms", 0.5), ("1d", 86400.0), ("0.25", 0.25), ("1h0m1s", 3601.0)),
    ],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-1", "m", "9 m", "1e3", "1.2.3s", "soon", "nan", "inf", "9" * 30, "1h30", ".5s"]
)
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(PlanError, match=r"^--timeout: '.*' is not a length of time; allowed: 90s, 9m, 1h30m"):
        parse_duration(text, name="--timeout")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ([512, 1024, 1536], "512,1k,1536"),
        ([1024, 2048, 4096], "1k,2k,4k"),
        ([1024 << n for n in range(8)], "1k:128k:x2"),
        ([512, 1024, 2048, 4096], "512:4k:x2"),
        ([2**20, 3 * 2**20], "1m,3m"),
        ([4, 2, 1], "4,2,1"),
    ],
)
def test_sizes_in_short(sizes: list[int], text: str) -> None:
    assert sizes_text(sizes) == text


@given(st.lists(st.integers(1, 2**62), min_size=1, max_size=8, unique=True))
def test_sizes_in_short_read_back(sizes: list[int]) -> None:
    assert parse_ints(sizes_text(sizes)) == sizes


def test_the_nearest_known_name() -> None:
    assert nearest("rutes", ["routes", "rounds"]) == "did you mean routes?"
    assert nearest("zzz", ["routes", "rounds"]) == "known: routes, rounds"
