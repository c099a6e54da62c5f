"""The schema: which columns there are, in which order, and which rows are refused."""

import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nsabench.store import SchemaError
from nsabench.store.schema import (
    CELL_COLUMNS,
    PERFORMANCE_COLUMNS,
    STAGES,
    STATUSES,
    TABLES,
    Column,
    check_row,
    clean_columns,
    clean_row,
    is_missing,
    rows_of,
    without_performance,
)

STAGE_NAMES = ["proj", "compress", "cmp", "score", "sel", "win", "gate", "other"]
DOCUMENTED = {
    "cells.csv": """
        run_id cell_id phase passes mode impl scope S B dim heads groups dk dv l d l_sel n_sel w
        dtype device selection seed twin
        route cmp_backend score_backend sel_backend win_backend route_proof provider
        status reason
        ms_total ms_lo ms_hi ms_min ms_p95 ms_emit ms_plain n_samples n_rounds timer
        cross_timer ms_cross timers_note copies regime cache
        ms_proj ms_compress ms_cmp ms_score ms_sel ms_win ms_gate ms_other
        share_proj_pct share_compress_pct share_cmp_pct share_score_pct share_sel_pct share_win_pct
        share_gate_pct share_other_pct shares_note ms_alone_cmp ms_alone_sel ms_alone_win
        flops bytes reads_tokens reads_tokens_dense
        neighbour_overlap union_blocks tflops gbps pct_of_limit tokens_per_s
        peak_alloc_bytes peak_reserved_bytes kv_cache_bytes kv_cache_cmp_bytes kv_cache_sel_bytes
        kv_cache_win_bytes nvml_used_bytes
        power_w energy_j temp_c sm_clock_mhz mem_clock_mhz util_pct throttle_reasons
        max_abs_err rel_err err_budget selection_overlap host_bound power_capped_pct clock_spread_pct
        queue_gated_pct cold_probe dropped_rounds neighbour_load_pct canary_spread_pct aa_lo aa_hi
    """,
    "samples.csv": "run_id cell_id process round position variant iters ms dropped t_s",
    "telemetry.csv": """
        run_id cell_id t_s gpu_uuid power_w energy_j temp_c sm_clock_mhz mem_clock_mhz util_pct
        nvml_used_bytes throttle_reasons
    """,
    "kernels.csv": "run_id cell_id kernel branch calls ms",
}
UNIT_IN_NAME = {
    r"ms(_.*)?": "ms",
    r".*_pct|pct_.*": "%",
    r"(.*_)?bytes": "bytes",
    r".*_mhz": "MHz",
    r".*_tokens(_.*)?": "tokens",
    "tokens_per_s": "tokens/s",
    "t_s": "s",
    "power_w": "W",
    "energy_j": "J",
    "temp_c": "C",
    "flops": "FLOP",
    "tflops": "TFLOP/s",
    "gbps": "GB/s",
}


def test_the_columns_are_the_documented_ones_in_the_documented_order() -> None:
    assert list(STAGES) == STAGE_NAMES
    assert {file: [c.name for c in columns] for file, columns in TABLES.items()} == {
        file: names.split() for file, names in DOCUMENTED.items()
    }


@pytest.mark.parametrize("file", TABLES)
def test_every_column_has_a_unit_and_a_meaning(file: str) -> None:
    columns = TABLES[file]
    assert len({c.name for c in columns}) == len(columns)
    for column in columns:
        assert column.doc, column
        assert column.unit, column
        assert "\n" not in column.doc
        assert column.kind in ("str", "int", "float")
        assert (column.unit == "text") == (column.kind == "str"), column


@pytest.mark.parametrize("file", TABLES)
def test_a_unit_in_a_name_is_the_unit_of_the_column(file: str) -> None:
    for column in TABLES[file]:
        for pattern, unit in UNIT_IN_NAME.items():
            if re.fullmatch(pattern, column.name):
                assert column.unit == unit, column


def test_performance_is_what_was_measured_and_nothing_else() -> None:
    stages = {f"ms_{s}" for s in STAGE_NAMES} | {f"share_{s}_pct" for s in STAGE_NAMES}
    times = {"ms_total", "ms_lo", "ms_hi", "ms_min", "ms_p95", "ms_emit", "ms_plain", "ms_cross"}
    alone = {"ms_alone_cmp", "ms_alone_sel", "ms_alone_win"}
    rates = {"tflops", "gbps", "pct_of_limit", "tokens_per_s"}
    memory = {"peak_alloc_bytes", "peak_reserved_bytes", "nvml_used_bytes"}
    nvml = {"power_w", "energy_j", "temp_c", "sm_clock_mhz", "mem_clock_mhz", "util_pct", "throttle_reasons"}
    assert stages | times | alone | rates | memory | nvml == PERFORMANCE_COLUMNS


def test_good_rows_pass() -> None:
    check_row({"status": "ok", "ms_total": 1.5, "peak_alloc_bytes": 10})
    check_row({"status": "ok", "reason": ""})
    for status in STATUSES[1:]:
        check_row({"status": status, "reason": "because", "ms_total": None, "power_w": math.nan})
    check_row(
        {"status": "wrong", "reason": "off by 0.5", "max_abs_err": 0.5, "kv_cache_bytes": 4, "timer": "cpu"}
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "status is ''; allowed: ok, unsupported"),
        ({"status": "fine"}, "status is 'fine'; allowed: ok"),
        ({"status": "ok", "ms_totl": 1.0}, "unknown column 'ms_totl'; did you mean ms_total?"),
        ({"status": "ok", "xyzzy": 1.0}, "unknown column 'xyzzy'"),
        ({"status": "ok", "reason": "slow"}, "reason must be empty; it is 'slow'"),
        ({"status": "oom"}, "status is oom, so reason must say why"),
        ({"status": "oom", "reason": " \n"}, "reason must say why"),
        ({"status": "ok", "ms_total": "fast"}, "ms_total takes float, not 'fast'"),
        ({"status": "ok", "ms_total": True}, "ms_total takes float, not True"),
        ({"status": "ok", "ms_total": 10**400}, "ms_total takes float"),
        ({"status": "ok", "ms_total": 1j}, "ms_total takes float"),
        ({"status": "ok", "S": 1.5}, "S takes int, not 1.5"),
        ({"status": "ok", "S": math.inf}, "S takes int, not inf"),
        ({"status": "ok", "S": 2**63}, "S takes int"),
        ({"status": "ok", "route": 3}, "route takes str, not 3"),
        ({"status": "ok", "ms_total": np.ones(2)}, "ms_total takes float"),
        ({"status": "ok", "route": ["auto"]}, "route takes str"),
    ],
)
def test_bad_rows_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(message)) as caught:
        check_row(row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", STATUSES[1:])
@pytest.mark.parametrize("name", sorted(PERFORMANCE_COLUMNS))
def test_a_failed_cell_has_no_performance(status: str, name: str) -> None:
    value = {"str": "power cap", "int": 0, "float": 0.0}[next(c.kind for c in CELL_COLUMNS if c.name == name)]
    row = {"status": status, "reason": "because", name: value}
    with pytest.raises(SchemaError, match=f"status is {status}, so {name} must be empty"):
        check_row(row)
    check_row(without_performance(row))


def test_without_performance_keeps_the_rest() -> None:
    row = {"status": "wrong", "reason": "r", "ms_total": 1.0, "tflops": 2.0, "rel_err": 0.3, "S": 4}
    assert without_performance(row) == {"status": "wrong", "reason": "r", "rel_err": 0.3, "S": 4}


def test_clean_rows_are_whole_ordered_and_plain() -> None:
    columns = (Column("a", "int", "1", "a"), Column("b", "float", "1", "b"), Column("c", "str", "text", "c"))
    row = {"c": np.str_("x"), "b": np.float32(0.1), "a": np.int64(2**62 + 1)}
    clean = clean_row(row, columns)
    assert list(clean) == ["a", "b", "c"]
    assert [type(v) for v in clean.values()] == [int, float, str]
    assert clean == {"a": 2**62 + 1, "b": float(np.float32(0.1)), "c": "x"}
    assert clean_row({"a": 3.0, "b": 7, "c": "x"}, columns) == {"a": 3, "b": 7.0, "c": "x"}
    assert clean_row({"a": np.array(3), "b": np.array(0.5)}, columns) == {"a": 3, "b": 0.5, "c": ""}


@pytest.mark.parametrize(
    "missing", [None, math.nan, np.float32("nan"), np.array(math.nan), "", pd.NA, pd.NaT]
)
def test_missing_values_are_none_or_empty_never_zero(missing: object) -> None:
    columns = (Column("a", "int", "1", "a"), Column("b", "float", "1", "b"), Column("c", "str", "text", "c"))
    clean = clean_row({"a": missing, "b": missing, "c": missing}, columns)
    assert clean == {"a": None, "b": None, "c": ""}


VALUES = {
    "int": [3, None, 3.0, math.nan, 2**63 - 1, -(2**63), 0],
    "float": [0.5, None, 7, math.nan, math.inf, -math.inf, 0.0],
    "str": ["x", None, "", "two\nlines", "\xa0", "\ud800"],
}


def test_columns_are_cleaned_as_rows_are() -> None:
    columns = tuple(Column(kind, kind, "1", kind) for kind in VALUES)  # type: ignore[arg-type]
    for kind, values in VALUES.items():
        for held in (values, [value for value in values if type(value) is type(values[0])], values[:1] * 3):
            rows = [{kind: value} for value in held] + [{}]
            assert rows_of(clean_columns(rows, columns)) == [clean_row(row, columns) for row in rows]
            assert rows_of(clean_columns(rows[:-1], columns)) == [
                clean_row(row, columns) for row in rows[:-1]
            ]
    assert clean_columns([], columns) == {"int": [], "float": [], "str": []}


@pytest.mark.parametrize(
    "row", [{"int": 2**63}, {"int": -(2**63) - 1}, {"int": True}, {"float": "1"}, {"str": 1}, {"flaot": 1.0}]
)
def test_columns_refuse_what_rows_refuse(row: dict[str, Any]) -> None:
    columns = tuple(Column(kind, kind, "1", kind) for kind in VALUES)  # type: ignore[arg-type]
    with pytest.raises(SchemaError) as alone:
        clean_row(row, columns)
    with pytest.raises(SchemaError, match=re.escape(str(alone.value))):
        clean_columns([{"int": 1, "float": 1.0, "str": "x"}, row], columns)


def test_zero_and_false_are_not_missing() -> None:
    assert not is_missing(0)
    assert not is_missing(0.0)
    assert not is_missing("0")
    assert not is_missing(" ")


def test_text_is_one_line() -> None:
    columns = (Column("c", "str", "text", "c"),)
    text = 'CUDA error:\r\n  "out, of memory"\x00\x1b[0m\u2028end \ud800'
    clean = clean_row({"c": text}, columns)["c"]
    assert clean == 'CUDA error:   "out, of memory" [0m end \\ud800'


def test_the_store_needs_neither_torch_nor_the_attention_nor_pandas() -> None:
    code = "import sys, nsabench.store; print(sorted({'torch', 'nsa', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
