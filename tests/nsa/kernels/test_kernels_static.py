"""What compilers say of the kernels, for GPUs that need not be here: nothing spills, products are wgmma."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import nsa.kernels
from nsabench.measure.static import StaticRow, compile_static

MODULES = [
    name
    for name in (f"nsa.kernels.{found.name}" for found in pkgutil.iter_modules(nsa.kernels.__path__))
    if hasattr(import_module(name), "STATIC")
]
# Rows of a tile from which on a product is one instruction of Hopper's tensor cores.
ROWS_OF_WGMMA = 64


def launched(offered: list[dict[str, Any]], arch: str) -> list[int]:
    """Places of what runs on ``arch``. A name may end with the architectures it is for, as in
    ``union_sm_80_sm_120``; one without is for all that none of its kind names.
    """
    found: dict[str, dict[str, int]] = {}
    for place, one in enumerate(offered):
        name = one.get("name") or f"{one['kernel'].__name__}{place}"
        base = re.sub(r"(_sm_\d+)+$", "", name)
        found.setdefault(base, {})[name.removeprefix(base)] = place
    return [
        next(
            (place for archs, place in kinds.items() if f"{archs}_".find(f"_{arch}_") >= 0), kinds.get("", -1)
        )
        for kinds in found.values()
    ]


def test_launches_of_an_architecture() -> None:
    offered = [{"name": name} for name in ("a", "b_d64_64", "b_d64_64_sm_80_sm_120", "b_d64_64_sm_100")]
    assert launched(offered, "sm_90") == [0, 1]
    assert launched(offered, "sm_120") == [0, 2]
    assert launched(offered, "sm_100") == [0, 3]


def faults(rows: list[StaticRow]) -> Iterator[str]:
    for row in rows:
        about = f"{row.kernel} on {row.arch}"
        if row.status != "ok":
            yield f"{about}: {row.status}: {row.reason}"
        elif row.spill_store_bytes != 0 or row.spill_load_bytes != 0:  # None where ptxas was not heard
            yield f"{about} spills {row.spill_store_bytes} bytes"


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``compiled(module, arch)``: what the module launches on ``arch``, compiled for it."""

    def rows(module: str, arch: str, *, packed_dim: int | None = None) -> list[StaticRow]:
        offered = list(import_module(module).STATIC)
        places = launched(offered, arch)
        change = "one"
        if packed_dim is not None:
            places = [place for place in places if offered[place]["constexprs"].get("D") == packed_dim]
            change = (
                '{**one, "signature": one["signature"] | {"q_bounds": "*i32:16", "k_bounds": "*i32:16"},'
                ' "constexprs": {"starts": None} | {name: value for name, value in one["constexprs"].items()'
                ' if not name.endswith("_bounds")}}'
            )
        (tmp_path / "chosen.py").write_text(
            f"from {module} import STATIC as found\n"
            f"STATIC = [{change} for one in (found[place] for place in {places})]\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        return compile_static(["chosen"], [arch])

    return rows


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", MODULES)
def test_nothing_spills_on_hopper_and_products_are_wgmma(module: str, compiled: Any) -> None:
    rows = compiled(module, "sm_90")
    assert not list(faults(rows))
    large = [
        row
        for row in rows
        if row.matrix != "none" and (row.constexprs or {}).get("BLOCK_M", ROWS_OF_WGMMA) >= ROWS_OF_WGMMA
    ]
    assert len(large) >= 3, "head_dim 64, 128 and 192/128"
    assert {row.matrix for row in large} == {"wgmma"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
@pytest.mark.parametrize("module", [module for module in MODULES if module != "nsa.kernels.compressed"])
def test_nothing_spills_elsewhere(module: str, arch: str, compiled: Any) -> None:
    """Compressed attention is the kernel of sliding attention."""
    assert not list(faults(compiled(module, arch)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", [module for module in MODULES if module != "nsa.kernels.compressed"])
def test_nothing_spills_where_sequences_are_packed(module: str, compiled: Any) -> None:
    rows = compiled(module, "sm_90", packed_dim=128)
    assert rows
    assert not list(faults(rows))
