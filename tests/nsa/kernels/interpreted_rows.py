"""A run of pytest in which Triton interprets: the tests of one kernel file and of its rows of the table.

`TRITON_INTERPRET=1 python interpreted_rows.py sliding` runs the tests marked `interpret` in
`test_kernels_sliding.py`, then the parity tests of every row `win=triton...`, less the parameters that only
repeat others at the interpreter's pace. It fails where nothing was found, or something was skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
BRANCHES = {"compressed": "cmp", "selection": "score", "selected": "sel", "sliding": "win"}

Keep = Callable[[dict[str, Any]], bool]


def only(**allowed: tuple[Any, ...]) -> Keep:
    return lambda params: all(params[name] in values for name, values in allowed.items() if name in params)


def is_fp64(params: dict[str, Any]) -> bool:
    return "float64" in str(params.get("dtype"))


def none(params: dict[str, Any]) -> bool:
    return False


# What is left of a test's parameters; of tests not named here, all.
KEPT: dict[str, Keep] = {
    "test_group_sizes": only(group=(1, 3, 6, 16)),
    "test_lengths": only(length=(1, 7, 8, 9, 17, 24, 25, 65, 129)),
    "test_many_chunks": only(heads=(2,)),
    "test_windows": only(window=(1, 64, 65, 200, 900), q_start=(37,)),
    "test_non_contiguous_inputs": only(rows=(70,)),
    "test_queries_that_start_later": only(later_keys=(21,), later=(50,)),
    "test_later_tokens_change_nothing_bit_for_bit": only(kv_heads=(2,), size=(1e3,), rows=(40, 200)),
    "test_long_prompts_in_the_papers_blocks": lambda params: (
        params["rows"] == 1100 and params["row"].branch == "cmp"  # windows have a test of their own
    ),
    "test_all_logits_very_negative": only(rows=(100,)),
    "test_row_maxima_far_apart": only(largest=(700.0,)),
    "test_same_sets": only(group=(1, 3, 16), dtype=(torch.float16, torch.float32)),
    "test_hot_block_gathers_the_gradient_of_every_query": none,
}
# Selected attention is several kernels, each of several steps. Besides these, what of the above is left.
KEPT_OF_SELECTED: dict[str, Keep] = {
    "test_dtypes": only(dtype=(torch.float16,)),
    "test_group_sizes": only(group=(6,)),
    "test_lengths": only(length=(1, 65)),
    "test_many_chunks": none,
    "test_value_dim_differs_from_head_dim": only(head_dim=(192,)),
    "test_non_contiguous_inputs": only(rows=(2,)),
    "test_queries_that_start_anywhere_per_sequence": only(rows=(1, 3)),
    "test_geometries": lambda params: params["shape"].get("selection_block_size") == 9,
    "test_later_tokens_change_nothing_bit_for_bit": only(kv_heads=(2,), size=(1e3,), rows=(40,)),
    "test_no_nan_rows_selected": only(rows=(5,), dtype=(torch.float16, torch.bfloat16)),
    "test_no_nan_when_no_list_holds_anything": only(dtype=(torch.float16,)),
    "test_fewer_keys_than_queries": only(q_start=(20, 28), rows=(40, 3)),
    "test_any_list": lambda params: (
        params["rows"] == 3 or params["lists"] in ("duplicates in any order", "blocks of the future")
    ),
    "test_later_lists_change_nothing_bit_for_bit": only(changed=(65,), lists=("the first block",)),
    "test_all_logits_very_negative": only(rows=(3,)),
    "test_row_maxima_far_apart": only(largest=(700.0,), dtype=(torch.float16,)),
    "test_one_key_outweighs_all_others": none,
}
# What the choice between them is tried on, and the kernel that is a program a token, which takes seconds.
CHOICE = ("test_row_offers_the_contract", "test_group_sizes", "test_queries_that_start_later")
FEW_ROWS = (
    *("test_row_offers_the_contract", "test_any_list", "test_no_nan_rows_selected"),
    *("test_queries_that_start_later", "test_queries_that_start_anywhere_per_sequence"),
    *("test_non_contiguous_inputs", "test_all_logits_very_negative"),
)


def kept(name: str, params: dict[str, Any]) -> bool:
    """Whether the test ``name`` of a row of the table is run with these parameters."""
    row = params["row"]
    table = KEPT | KEPT_OF_SELECTED if row.branch == "sel" else KEPT
    if row.branch == "sel" and row.backend == "triton" and name not in CHOICE:
        return False
    if row.backend.endswith("query_major") and (name not in FEW_ROWS or params.get("rows", 0) > 5):
        return False
    return name not in table or table[name](params)


# Refusals that are no loss: what these tests ask for, no kernel computes.
REFUSED = ("got fp64", "computes no gradient", "selection has its own tests")


class Chosen:
    """Plugin: keeps the tests of one kernel file, and counts those that did not run."""

    def __init__(self, kernel: str) -> None:
        self.file = f"test_kernels_{kernel}.py"
        self.branch = BRANCHES.get(kernel)
        self.skipped: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self.of_the_file(item) or self.of_a_row(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        if not any(map(self.of_the_file, kept)):
            raise pytest.UsageError(f"{self.file} has no test marked interpret")
        if self.branch is not None and not any(map(self.of_a_row, kept)):
            raise pytest.UsageError(f"the route table has no row {self.branch}=triton")

    def of_the_file(self, item: pytest.Item) -> bool:
        return item.path.name == self.file and item.get_closest_marker("interpret") is not None

    def of_a_row(self, item: pytest.Item) -> bool:
        params = (
            item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        )
        row = params.get("row")
        if row is None or row.branch != self.branch or not row.backend.startswith("triton"):
            return False
        if is_fp64(params) or item.get_closest_marker("gpu"):
            return False
        return kept(item.function.__name__, params)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not report.longrepr[-1].endswith(REFUSED):
            self.skipped.append(f"{report.nodeid}: {report.longrepr[-1]}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def main(kernel: str, *options: str) -> int:
    plugin = Chosen(kernel)
    files = [str(HERE / plugin.file)]
    if plugin.branch is not None:
        files += [str(HERE.parent / f"test_rows_{part}.py") for part in ("parity", "traps", "long", "select")]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *options, *files], plugins=[plugin])
    for one in plugin.skipped:
        print("skipped, though it must run:", one)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
