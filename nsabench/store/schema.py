"""The schema of a stored run: every column of every CSV file, in file order, with kind, unit and meaning.

A missing value is an empty cell. In memory it is `""` for a `str` column and `None` for a number (NaN in a
DataFrame); it is never 0.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any, Literal

SCHEMA_VERSION = 3

STATUSES = ("ok", "unsupported", "wrong", "oom", "timeout", "hang", "nan", "error", "invalid")
"""What became of a cell. Only `ok` rows carry performance columns; every other status carries a reason."""

STAGES = ("proj", "compress", "cmp", "score", "sel", "win", "gate", "other")
"""The parts of one step, in order; their times add up to `ms_total`."""

_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class SchemaError(ValueError):
    """A row that does not fit the schema."""


@dataclass(frozen=True, eq=False)  # each exists once: rows by the thousand look up its table
class Column:
    """One column. `unit` is "1" for a plain number and "text" for words."""

    name: str
    kind: Literal["str", "int", "float"]
    unit: str
    doc: str


def _text(name: str, doc: str) -> Column:
    return Column(name, "str", "text", doc)


def _int(name: str, unit: str, doc: str) -> Column:
    return Column(name, "int", unit, doc)


def _float(name: str, unit: str, doc: str) -> Column:
    return Column(name, "float", unit, doc)


_RUN_ID = _text("run_id", "the run: UTC time, name and commit")
_CELL_ID = _text("cell_id", "the cell: hash of every field of its plan, equal across runs")

_WHAT = (
    _RUN_ID,
    _CELL_ID,
    _text("phase", "decode, prefill or train"),
    _text("passes", "fwd, bwd or fwd_bwd"),
    _text("mode", "batched, stepwise or chunked=N: how the tokens are fed"),
    _text("impl", "the implementation measured: nsa, or what it is compared with, as dense or peer:sfnsa"),
    _text("scope", "what is timed: module (the whole layer) or core (the attention on given inputs)"),
    _int("S", "tokens", "sequence length: keys seen by the measured step"),
    _int("B", "sequences", "batch size"),
    _int("dim", "channels", "model width"),
    _int("heads", "heads", "query heads"),
    _int("groups", "heads", "KV heads; query heads of one group share them"),
    _int("dk", "channels", "key and query dim of one head"),
    _int("dv", "channels", "value dim of one head"),
    _int("l", "tokens", "compression block size"),
    _int("d", "tokens", "compression stride"),
    _int("l_sel", "tokens", "selection block size"),
    _int("n_sel", "blocks", "selected blocks per query"),
    _int("w", "tokens", "sliding window size"),
    _text("dtype", "fp64, fp32, fp16 or bf16"),
    _text("device", "cpu, cuda or cuda:N"),
    _text("selection", "how blocks come to be selected: natural, random, overlap=X or file"),
    _int("seed", "1", "seed of weights and inputs"),
    _int("twin", "1", "0; above, the same cell timed again in the same rounds, as a comparison's control"),
)

_ROUTE = (
    _text("route", "the route as requested"),
    _text("cmp_backend", "backend that ran the compressed branch"),
    _text("score_backend", "backend that scored and selected blocks"),
    _text("sel_backend", "backend that ran the selected branch"),
    _text("win_backend", "backend that ran the sliding branch"),
    _text("route_proof", "what proves the route: kernels or operators seen to run"),
    _text("provider", "library and version behind the fa2 branches; empty without one"),
)

_OUTCOME = (
    _text("status", "one of " + ", ".join(STATUSES)),
    _text("reason", "why status is not ok, in one line; empty only when it is"),
)

_TIME = (
    _float("ms_total", "ms", "time of one step: median over rounds"),
    _float("ms_lo", "ms", "lower end of the 95 % interval of ms_total; empty below 6 rounds"),
    _float("ms_hi", "ms", "upper end of the 95 % interval of ms_total; empty below 6 rounds"),
    _float("ms_min", "ms", "fastest sample"),
    _float("ms_p95", "ms", "95th percentile of the samples"),
    _float("ms_emit", "ms", "decode: step that completes a compressed block"),
    _float("ms_plain", "ms", "decode: step that completes no compressed block"),
    _int("n_samples", "samples", "raw samples behind ms_total"),
    _int("n_rounds", "rounds", "rounds behind ms_total"),
    _text("timer", "cpu, host, event or graph"),
    _text("cross_timer", "the timer that cross-checks, in a pass of its own; empty without one"),
    _float("ms_cross", "ms", "time of one step by cross_timer"),
    _text("timers_note", "how the two timers disagree; empty when they do not"),
    _int("copies", "copies", "copies of its tensors that a step rotates through; 1 is none"),
    _text("regime", "latency (one step at a time) or sustained (back to back)"),
    _text("cache", "cold or warm: state of the last-level cache before a step"),
    *(_float(f"ms_{s}", "ms", f"time of stage {s} inside the step") for s in STAGES),
    *(_float(f"share_{s}_pct", "%", f"part of ms_total spent in stage {s}") for s in STAGES),
    _text("shares_note", "why there are no shares; empty when there are"),
    _float("ms_alone_cmp", "ms", "compressed branch run by itself; no part of ms_total"),
    _float("ms_alone_sel", "ms", "selected branch run by itself; no part of ms_total"),
    _float("ms_alone_win", "ms", "sliding branch run by itself; no part of ms_total"),
)

_WORK = (
    _int("flops", "FLOP", "floating-point operations the step needs, counted from its shapes"),
    _int("bytes", "bytes", "memory traffic the step needs, counted from its shapes"),
    _int("reads_tokens", "tokens", "KV tokens one query reads"),
    _int("reads_tokens_dense", "tokens", "KV tokens one query of dense attention reads"),
    _float("neighbour_overlap", "1", "part of a query's free blocks that the query before it selects too"),
    _float("union_blocks", "blocks", "blocks that four neighbouring queries select together, mean"),
    _float("tflops", "TFLOP/s", "flops over ms_total"),
    _float("gbps", "GB/s", "bytes over ms_total, 1 GB = 1e9 bytes"),
    _float("pct_of_limit", "%", "limit time over ms_total, from this machine's measured peaks"),
    _float("tokens_per_s", "tokens/s", "tokens processed per second, over the batch"),
)

_MEMORY = (
    _int("peak_alloc_bytes", "bytes", "peak of live tensors during one step"),
    _int("peak_reserved_bytes", "bytes", "peak held by the caching allocator; empty on a CPU"),
    _int("kv_cache_bytes", "bytes", "KV cache over all branches"),
    _int("kv_cache_cmp_bytes", "bytes", "KV cache of the compressed branch"),
    _int("kv_cache_sel_bytes", "bytes", "KV cache of the selected branch"),
    _int("kv_cache_win_bytes", "bytes", "KV cache of the sliding branch"),
    _int("nvml_used_bytes", "bytes", "memory used on the whole GPU, by NVML"),
)

_NVML = (
    _float("power_w", "W", "mean power over the rounds, in which all arms of the shape take turns"),
    _float("energy_j", "J", "energy spent in the rounds of a cell alone; empty below 50 counter updates"),
    _float("temp_c", "C", "highest GPU temperature while the cell was measured"),
    _float("sm_clock_mhz", "MHz", "median SM clock"),
    _float("mem_clock_mhz", "MHz", "median memory clock"),
    _float("util_pct", "%", "mean GPU utilisation"),
    _text("throttle_reasons", "clock event reasons seen, joined by +"),
)

_VALIDITY = (
    _float("max_abs_err", "1", "largest absolute error against the reference"),
    _float("rel_err", "1", "relative error against the reference"),
    _float("err_budget", "1", "error allowed for this dtype and shape"),
    _float("selection_overlap", "1", "part of the selected blocks equal to the reference's, 0 to 1"),
    _float("host_bound", "1", "host time over device time: how launch-bound eager use is"),
    _float("power_capped_pct", "%", "part of the readings under a power cap"),
    _float("clock_spread_pct", "%", "spread of the SM clock over its median"),
    _float("queue_gated_pct", "%", "steps whose device time holds host time, because the host was late"),
    _float("cold_probe", "1", "rate of re-reading a marker after the flush over that of memory"),
    _int("dropped_rounds", "rounds", "rounds that do not count, because the hardware slowed down"),
    _float("neighbour_load_pct", "%", "the most that others used of the device, before or in the rounds"),
    _float("canary_spread_pct", "%", "spread of fixed work timed before the rounds; up to 1 is steady"),
    _float("aa_lo", "1", "lower end of the same arm measured twice, as a ratio; 1 is no difference"),
    _float("aa_hi", "1", "upper end of the same arm measured twice, as a ratio; 1 is no difference"),
)

CELL_COLUMNS = _WHAT + _ROUTE + _OUTCOME + _TIME + _WORK + _MEMORY + _NVML + _VALIDITY
"""cells.csv: one row per cell."""

SAMPLE_COLUMNS = (
    _RUN_ID,
    _CELL_ID,
    _int("process", "1", "number of the fresh process that measured, from 0"),
    _int("round", "1", "number of the round, from 0"),
    _int("position", "1", "place of the arm within its round, from 0"),
    _text("variant", "emit, plain or empty: the kind of decode step"),
    _int("iters", "steps", "steps in this sample"),
    _float("ms", "ms", "time of one step, mean over iters"),
    _text("dropped", "why the round does not count; empty when it does"),
    _float("t_s", "s", "start of the sample since the start of the run"),
)
"""samples.csv: one row per raw sample, in time order."""

TELEMETRY_COLUMNS = (
    _RUN_ID,
    _CELL_ID,
    _float("t_s", "s", "time of the reading since the start of the run"),
    _text("gpu_uuid", "the GPU read"),
    _float("power_w", "W", "power"),
    _float("energy_j", "J", "energy counter"),
    _float("temp_c", "C", "GPU temperature"),
    _float("sm_clock_mhz", "MHz", "SM clock"),
    _float("mem_clock_mhz", "MHz", "memory clock"),
    _float("util_pct", "%", "GPU utilisation"),
    _int("nvml_used_bytes", "bytes", "memory used on the whole GPU"),
    _text("throttle_reasons", "clock event reasons active, joined by +"),
)
"""telemetry.csv: one row per NVML reading, in time order."""

KERNEL_COLUMNS = (
    _RUN_ID,
    _CELL_ID,
    _text("kernel", "name of the kernel or operator"),
    _text("branch", "stage it belongs to"),
    _float("calls", "calls", "calls per step"),
    _float("ms", "ms", "time per step, over all calls"),
)
"""kernels.csv: one row per kernel of a cell."""

TABLES: dict[str, tuple[Column, ...]] = {
    "cells.csv": CELL_COLUMNS,
    "samples.csv": SAMPLE_COLUMNS,
    "telemetry.csv": TELEMETRY_COLUMNS,
    "kernels.csv": KERNEL_COLUMNS,
}

_SINCE = {
    **dict.fromkeys(("scope", "twin", "canary_spread_pct"), 2),
    **dict.fromkeys(("cross_timer", "ms_cross", "timers_note", "copies"), 3),
    **dict.fromkeys(("neighbour_overlap", "union_blocks"), 3),
    **dict.fromkeys(("queue_gated_pct", "cold_probe", "dropped_rounds", "neighbour_load_pct", "dropped"), 3),
}
_BEFORE: dict[str, str | int] = {"scope": "module", "twin": 0}


def columns_of(file: str, version: int) -> tuple[Column, ...]:
    """The columns that `file` has in a run of that schema version."""
    return tuple(c for c in TABLES[file] if _SINCE.get(c.name, 1) <= version)


def upgraded(row: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A row of cells.csv of that schema version with what later columns were then understood to be."""
    return {**row, **{name: value for name, value in _BEFORE.items() if version < _SINCE[name]}}


_NOT_PERFORMANCE = {"n_samples", "n_rounds", "timer", "regime", "cache", "shares_note"} | {
    *("cross_timer", "timers_note", "copies"),
}
_DERIVED = {"tflops", "gbps", "pct_of_limit", "tokens_per_s"}
_MEASURED_MEMORY = {"peak_alloc_bytes", "peak_reserved_bytes", "nvml_used_bytes"}
PERFORMANCE_COLUMNS = frozenset(
    {c.name for c in _TIME + _NVML} - _NOT_PERFORMANCE | _DERIVED | _MEASURED_MEMORY,
)
"""Columns of cells.csv that are empty unless status is ok: what was measured, not what was planned.

The evidence behind a refused row stays in samples.csv, telemetry.csv and the validity columns.
"""


def is_missing(value: Any) -> bool:
    """True for None, NaN, pandas' NA and the empty string."""
    if value is None or isinstance(value, str):
        return not value
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA will not say
        return True


def clean_row(row: Mapping[str, Any], columns: Iterable[Column]) -> dict[str, Any]:
    """The row with every column, in order, as plain Python values; missing ones `""` (str) or None (numbers).

    Accepts NumPy scalars. Line breaks and other control characters in text become one space; an int
    fits int64. SchemaError for an unknown column or a value of the wrong kind.
    """
    known, clean = _layout(tuple(columns))
    clean = clean.copy()
    try:
        # Only what the row holds: half of a stored row is missing.
        for name, value in row.items():
            clean[name] = clean_value(known[name], value)
    except KeyError:
        raise SchemaError(_unknown(set(row) - set(known), list(known))) from None
    return clean


def clean_columns(rows: Sequence[Mapping[str, Any]], columns: Iterable[Column]) -> dict[str, list[Any]]:
    """The values of `clean_row` of every row, by column; much sooner where there are thousands of rows.

    SchemaError as `clean_row`.
    """
    known, missing = _layout(tuple(columns))
    held = {name for names in set(map(tuple, rows)) for name in names}
    if not held <= known.keys():
        raise SchemaError(_unknown(held - known.keys(), list(known)))
    return {
        name: clean_values(column, [row.get(name) for row in rows])
        if name in held
        else [missing[name]] * len(rows)
        for name, column in known.items()
    }


def rows_of(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows that equally long columns make, as plain dicts."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def clean_values(column: Column, values: list[Any]) -> list[Any]:
    """`clean_value` of all values of a column."""
    if _is_clean(column, values):
        return values
    return [clean_value(column, value) for value in values]


def _is_clean(column: Column, values: Sequence[Any]) -> bool:
    """Whether all values are of the column's kind, none missing, and fit: so are those of nearly all."""
    kinds = set(map(type, values))
    if column.kind == "str":
        return kinds == {str} and "".join(values).isprintable()
    if column.kind == "int":
        return kinds == {int} and -(2**63) <= min(values) <= max(values) < 2**63
    return kinds == {float} and not math.isnan(sum(values))


@cache
def _layout(columns: tuple[Column, ...]) -> tuple[dict[str, Column], dict[str, Any]]:
    """The columns by name, and a row in which all of them are missing."""
    return {c.name: c for c in columns}, {c.name: "" if c.kind == "str" else None for c in columns}


def check_row(row: Mapping[str, Any]) -> None:
    """SchemaError unless `row` may stand in cells.csv; columns left out count as empty."""
    clean = clean_row(row, CELL_COLUMNS)
    status = clean["status"]
    if status not in STATUSES:
        raise SchemaError(f"status is {status!r}; allowed: {', '.join(STATUSES)}")
    if status == "ok":
        if clean["reason"]:
            raise SchemaError(f"status is ok, so reason must be empty; it is {clean['reason']!r}")
        return
    if not clean["reason"].strip():
        raise SchemaError(f"status is {status}, so reason must say why; it is empty")
    present = [n for n in clean if n in PERFORMANCE_COLUMNS and not is_missing(clean[n])]
    if present:
        raise SchemaError(f"status is {status}, so {', '.join(present)} must be empty")


def without_performance(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row less its performance columns, for a cell that turned out not to be ok."""
    return {name: value for name, value in row.items() if name not in PERFORMANCE_COLUMNS}


def clean_value(column: Column, value: Any) -> str | int | float | None:
    """One value of `clean_row`."""
    # The values of nearly every row first: a store of thousands of cells passes here a million times.
    if value is None:
        return "" if column.kind == "str" else None
    if type(value) is float and column.kind == "float":
        return value if value == value else None
    if type(value) is str and column.kind == "str" and value.isprintable():
        return value
    if type(value) is int and column.kind == "int" and -(2**63) <= value < 2**63:
        return value
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if not hasattr(value, "ndim"):
        if is_missing(value):
            return "" if column.kind == "str" else None
        if column.kind == "str":
            if isinstance(value, str):
                return _BREAKS.sub(" ", value.encode(errors="backslashreplace").decode())
        elif (number := _number(column.kind, value)) is not None:
            return number
    raise SchemaError(f"{column.name} takes {column.kind}, not {value!r}")


def _number(kind: str, value: Any) -> int | float | None:
    """`value` as that kind of number, or None where it is not one; True is none, lest it become 1."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if kind == "float":
        return number
    whole: Any = value
    return int(whole) if number.is_integer() and -(2**63) <= whole < 2**63 else None


def _unknown(names: Iterable[str], known: list[str]) -> str:
    close = {near for name in names for near in difflib.get_close_matches(name, known, n=1)}
    hint = f"; did you mean {', '.join(sorted(close))}?" if close else ""
    return f"unknown column {', '.join(sorted(map(repr, names)))}{hint}"
