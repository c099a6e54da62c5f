from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsa import select_blocks
from nsabench.plan import Cell, PlanError
from nsabench.plan.training import Settings
from nsabench.run import Policy
from nsabench.run.selection import sharing
from nsabench.run.selection_file import load_selection, read_header
from nsabench.run.session import measure_group
from nsabench.training.capture import check_target, larger_blocks, save_selection
from nsabench.training.model import ByteLM, attention_config
from tests.nsabench.training.small import RandomBytes, settings

ONCE = Policy(rounds=1, sample_ms=0.01, shares=False, alone=False)


class Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def mark(self, cell: Cell | None) -> None: ...

    def doing(self, text: str) -> None: ...

    def done(self, row: Any, *more: Any) -> None:
        self.rows.append(dict(row))


def chosen_by(model: ByteLM, options: Settings, layer: int, **config: int) -> torch.Tensor:
    """What the scores of a layer choose in the sequence after the last that was trained on."""
    inputs = {}
    model.layers[layer].attention.register_forward_pre_hook(lambda module, x: inputs.update(x=x[0]))
    with torch.no_grad():
        model(RandomBytes(options).batch(options.steps * options.accumulate, 0, 1)[0][:1, :-1])
        attention: Any = model.layers[layer].attention
        given = attention.attention_inputs(inputs["x"])
    geometry = attention.config if not config else larger_blocks(attention.config)
    return select_blocks(given["q"], given["k_cmp"], geometry)


@pytest.mark.parametrize("layer", [None, 0])
def test_a_layer_is_saved_with_what_its_neighbours_share(layer: int | None, tmp_path: Path) -> None:
    options = settings(accumulate=2)
    model, path = ByteLM(options.model), tmp_path / "x.npz"
    header = save_selection(model, options, RandomBytes(options), path, layer=layer)
    assert header == read_header(path)
    number = 1 if layer is None else layer
    chosen = chosen_by(model, options, number)
    cell = cell_of(options)
    assert np.array_equal(load_selection(path, cell), chosen[0].numpy())
    found = sharing(chosen, 0, attention_config(options.model))
    assert header["neighbour_overlap"] == found.neighbour_overlap
    assert header["union_blocks"] == found.union_blocks
    assert 0 < header["neighbour_overlap"] < 1
    assert header["layers"][number]["neighbour_overlap"] == found.neighbour_overlap
    assert header["layers"][0] != header["layers"][1] | {"layer": 0}
    assert header["source"] == f"nsabench train of synthetic: layer {number} of 2 after 3 steps"
    assert (header["S"], header["B"], header["layer"]) == (48, 1, number)
    assert (header["n_initial"], header["n_local"]) == (1, 1)


def cell_of(options: Settings, **given: Any) -> Cell:
    names = ("dim", "heads", "groups", "dk", "dv", "l", "d", "l_sel", "n_sel", "w")
    shape = {name: getattr(options.model, name) for name in names}
    common = {"phase": "prefill", "passes": "fwd", "mode": "batched", "B": 1, "S": options.S, "seed": 0}
    return Cell(**{**common, **shape, "dtype": "fp32", "device": "cpu", "route": "auto", **given})


def test_the_benchmark_takes_the_file(tmp_path: Path) -> None:
    """With the forced blocks of the paper, which are the benchmark's, its figures are those of the header."""
    options, path = settings(n_initial=1, n_local=2, n_sel=4), tmp_path / "x.npz"
    header = save_selection(ByteLM(options.model), options, RandomBytes(options), path)
    sink = Rows()
    measure_group([cell_of(options, selection=f"file={path}")], ONCE, sink)
    (row,) = sink.rows
    assert row["status"] == "ok"
    assert row["neighbour_overlap"] == pytest.approx(header["neighbour_overlap"], abs=1e-3)
    assert row["union_blocks"] == pytest.approx(header["union_blocks"], abs=1e-3)


def test_blocks_of_64_tokens_are_those_their_scores_select(tmp_path: Path) -> None:
    options = settings(S=300, n_sel=2, n_initial=0)
    model, path = ByteLM(options.model), tmp_path / "x.npz"
    header = save_selection(model, options, RandomBytes(options), path)
    config = larger_blocks(attention_config(options.model))
    assert config is not None
    found = sharing(chosen_by(model, options, 1, l_sel=64), 0, config)
    assert found.neighbour_overlap is not None
    assert header["l_sel_64"][1] == {
        "layer": 1,
        "neighbour_overlap": found.neighbour_overlap,
        "union_blocks": found.union_blocks,
    }
    assert len(header["l_sel_64"]) == 2


def test_a_geometry_without_blocks_of_64_tokens_has_no_such_figures(tmp_path: Path) -> None:
    options = settings(l=96, d=48, l_sel=96)
    header = save_selection(ByteLM(options.model), options, RandomBytes(options), tmp_path / "x.npz")
    assert header["l_sel_64"] is None
    assert header["neighbour_overlap"] is None


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    options, path = settings(), tmp_path / "x.npz"
    check_target(path, options)
    with pytest.raises(PlanError, match=r"^--save-selection: there is no layer 2; allowed: 0 to 1$"):
        save_selection(ByteLM(options.model), options, RandomBytes(options), path, layer=2)
    with pytest.raises(PlanError, match=r"^--save-selection: 'sel=off' selects nothing$"):
        check_target(path, settings(route="sel=off"))
    with pytest.raises(PlanError, match=r"^--save-selection: .*none is no folder$"):
        check_target(tmp_path / "none" / "x.npz")
    path.touch()
    with pytest.raises(PlanError, match=r"^--save-selection: .*x\.npz exists; name another file$"):
        check_target(path)
