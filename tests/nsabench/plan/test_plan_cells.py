"""Cells: identity, checks, and the order of a sweep."""

import dataclasses
import itertools
import json
import subprocess
import sys
from typing import Any

import pytest

from nsabench.plan import Cell, PlanError, groups, sweep

FIXED: dict[str, Any] = {
    "phase": "decode",
    "mode": "batched",
    "dim": 256,
    "heads": 4,
    "groups": 2,
    "dk": 64,
    "dv": 64,
    "l": 32,
    "d": 16,
    "l_sel": 64,
    "n_sel": 16,
    "w": 512,
    "dtype": "fp32",
    "device": "cpu",
    "seed": 0,
}


def cell(**changes: Any) -> Cell:
    return Cell(**{**FIXED, "passes": "fwd", "S": 512, "B": 1, "route": "auto", **changes})


CHANGES: dict[str, Any] = {
    "phase": "prefill",
    "passes": "bwd",
    "mode": "chunked=64",
    "impl": "dense",
    "scope": "core",
    "S": 513,
    "B": 2,
    "dim": 257,
    "heads": 8,
    "groups": 1,
    "dk": 65,
    "dv": 63,
    "l": 64,
    "d": 8,
    "l_sel": 128,
    "n_sel": 4,
    "w": 511,
    "dtype": "bf16",
    "device": "cuda:1",
    "selection": "overlap=0.5",
    "seed": 1,
    "twin": 1,
    "route": "cmp=fa2,sel=triton",
}


def test_the_id_is_the_same_in_every_run_and_version() -> None:
    """Stored runs are resumed and compared by these ids: changing them orphans every stored run."""
    assert cell().cell_id == "cada589bbad0"
    assert cell().group_key == "5e98ee934260"


def test_every_field_enters_the_id_and_only_the_arms_own_stay_out_of_the_group() -> None:
    assert list(CHANGES) == [f.name for f in dataclasses.fields(Cell)]
    changed = [cell(**{name: value}) for name, value in CHANGES.items()]
    ids = {c.cell_id for c in [cell(), *changed]}
    assert len(ids) == len(CHANGES) + 1
    for name, other in zip(CHANGES, changed, strict=True):
        assert (other.group_key == cell().group_key) == (name in ("impl", "route", "twin")), name


def test_a_cell_survives_json_and_is_hashable() -> None:
    fields = cell().to_dict()
    assert list(fields) == list(CHANGES)
    back = Cell.from_dict(json.loads(json.dumps(fields)))
    assert back == cell()
    assert back.cell_id == cell().cell_id
    assert {back: 1}[cell()] == 1


def test_from_dict_refuses_unknown_and_missing_fields() -> None:
    fields = cell().to_dict()
    with pytest.raises(PlanError, match="unknown 'heat'; known: phase, passes"):
        Cell.from_dict({**fields, "heat": 1})
    del fields["w"], fields["impl"]
    with pytest.raises(PlanError, match=r"impl, w missing"):
        Cell.from_dict(fields)


def test_a_plan_stored_before_there_was_a_scope_measured_the_module() -> None:
    fields = cell().to_dict()
    del fields["scope"]
    assert Cell.from_dict(fields) == cell(scope="module")


def test_a_baseline_has_no_routes() -> None:
    assert cell(impl="dense").route == "auto"
    assert cell(impl="dense:flash").impl == "dense:flash"
    with pytest.raises(PlanError, match=r"^cell: route is 'sdpa'; dense has no routes, only auto$"):
        cell(impl="dense", route="sdpa")


def test_baselines_follow_the_routes_of_each_shape_in_its_group() -> None:
    cells = sweep(
        S=[512, 256], B=[1], routes=["sdpa", "auto"], passes=["fwd"], baselines=["dense", "dense"], **FIXED
    )
    arms = [(c.impl, c.route) for c in cells]
    assert arms == [("nsa", "sdpa"), ("nsa", "auto"), ("dense", "auto")] * 2
    assert groups(cells) == [cells[:3], cells[3:]]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("phase", "encode", "phase is 'encode'; allowed: decode, prefill, train"),
        ("passes", "both", "passes is 'both'; allowed: fwd, bwd, fwd_bwd"),
        ("mode", "chunked=0", "mode is 'chunked=0'; allowed: batched, stepwise or chunked=N"),
        ("mode", "chunked", "mode is 'chunked'"),
        ("dtype", "float32", "dtype is 'float32'; allowed: fp64, fp32, fp16, bf16"),
        ("device", "gpu", "device is 'gpu'; allowed: cpu, cuda or cuda:N"),
        ("selection", "overlap=0.96", "selection is 'overlap=0.96'; allowed: natural, random"),
        ("selection", "overlap=", "selection is 'overlap='"),
        ("selection", "file=", "selection is 'file='"),
        ("route", "", "route is ''"),
        ("route", "cmp=fa2, sel=triton", "without spaces"),
        ("impl", None, "impl is None"),
        ("scope", "layer", "scope is 'layer'; allowed: module, core"),
        ("S", 0, "S is 0; it must be at least 1"),
        ("S", 2**63, "below 2"),
        ("seed", -1, "seed is -1; it must be at least 0"),
        ("B", True, "B is True; it must be a whole number"),
        ("w", 512.0, "w is 512.0; it must be a whole number"),
        ("l", "32", "l is '32'; it must be a whole number"),
    ],
)
def test_a_cell_checks_itself(name: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        cell(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "stepwise"),
        ("mode", "chunked=1"),
        ("selection", "random"),
        ("selection", "overlap=0"),
        ("selection", "overlap=0.95"),
        ("selection", "file=captured/layer 3.pt"),
        ("device", "cuda"),
        ("seed", 2**63 - 1),
    ],
)
def test_allowed_values(name: str, value: Any) -> None:
    assert getattr(cell(**{name: value}), name) == value


def test_a_sweep_is_ordered_by_batch_passes_length_and_route() -> None:
    cells = sweep(S=[512, 256], B=[1, 4], routes=["sdpa", "auto"], passes=["fwd", "bwd"], **FIXED)
    order = [(c.B, c.passes, c.S, c.route) for c in cells]
    assert order == list(itertools.product([1, 4], ["fwd", "bwd"], [512, 256], ["sdpa", "auto"]))
    assert (cells[0].impl, cells[0].selection) == ("nsa", "natural")
    assert len({c.cell_id for c in cells}) == len(cells)


def test_a_sweep_drops_duplicates_and_takes_every_fixed_field() -> None:
    fixed = {**FIXED, "impl": "dense", "selection": "random"}
    cells = sweep(S=[8, 8], B=[1, 1], routes=["auto", "auto"], passes=["fwd", "fwd"], **fixed)
    assert [(c.impl, c.selection, c.S) for c in cells] == [("dense", "random", 8)]


@pytest.mark.parametrize("axis", ["S", "B", "routes", "passes"])
def test_an_empty_axis_is_refused(axis: str) -> None:
    axes: dict[str, Any] = {"S": [1], "B": [1], "routes": ["auto"], "passes": ["fwd"], axis: []}
    with pytest.raises(PlanError, match=f"sweep: {axis} is empty"):
        sweep(**axes, **FIXED)


def test_a_sweep_refuses_unknown_and_missing_fields() -> None:
    with pytest.raises(PlanError, match="unknown 'heat'"):
        sweep(S=[1], B=[1], routes=["auto"], passes=["fwd"], heat=1, **FIXED)
    with pytest.raises(PlanError, match="phase, mode, dim"):
        sweep(S=[1], B=[1], routes=["auto"], passes=["fwd"])


def test_groups_hold_the_routes_of_one_shape_in_order() -> None:
    cells = sweep(S=[512, 256], B=[1], routes=["auto", "sdpa"], passes=["fwd"], **FIXED)
    assert groups(cells) == [cells[:2], cells[2:]]
    apart = [cells[0], cells[2], cells[1], cells[3]]
    assert groups(apart) == [cells[:2], cells[2:]]
    assert groups([]) == []


def test_planning_needs_neither_torch_nor_the_attention() -> None:
    code = "import sys, nsabench.plan; print(sorted({'torch', 'nsa', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
