"""The house rules as tests: who may import whom, how long a file may grow, what code may not do.

A checker takes its material as data and returns one line per fault: each rule is first shown to bite on
made-up sources, then put to the real tree.
"""

from __future__ import annotations

import ast
import graphlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

Sources = Mapping[str, str]  # module name -> source text; a package is named "pkg.__init__"


# A module imports from the floors below its own, and sideways only what SIDEWAYS names.
NSA_FLOORS = (
    ("nsa.stages", "nsa.config", "nsa.blocks", "nsa.packing", "nsa.untraced"),
    ("nsa.reference", "nsa.testing", "nsa.compress", "nsa.refusals", "nsa.backends.*", "nsa.kernels.*"),
    ("nsa.routes",),
    ("nsa.attention", "nsa.cache"),
    ("nsa.module",),
    ("nsa.__init__",),
)
SIDEWAYS = (
    ("nsa.blocks", "nsa.config"),
    ("nsa.packing", "nsa.blocks"),
    ("nsa.packing", "nsa.config"),
    ("nsa.testing", "nsa.reference"),
    ("nsa.backends.*", "nsa.backends._[!_]*"),
    ("nsa.kernels.*", "nsa.kernels._[!_]*"),
    ("nsa.kernels.*", "nsa.kernels.work"),
)

# What each part of nsabench may import besides itself and the version in nsabench/__init__.py.
NSABENCH_FLOORS: dict[str, set[str]] = {
    "__init__": set(),
    "plan": set(),
    "stats": set(),
    "store": set(),
    "present": {"plan", "stats", "store"},
    "measure": set(),
    "peers": {"nsa"},
    "run": {"plan", "stats", "store", "measure", "peers", "nsa"},
    "verify": {"plan", "stats", "store", "measure", "peers", "run", "nsa"},
    "training": {"plan", "stats", "store", "measure", "run", "nsa"},
    "history": {"plan", "stats", "store", "run"},
    "commands": {
        *("plan", "stats", "store", "present", "measure", "peers", "run", "verify", "training", "history"),
        "nsa",
    },
    "cli": {"commands"},
    "__main__": {"cli"},
}
# nsabench knows nsa by its public names, the spec, the tolerances, the routes, the block geometry and what
# kernels declare to do.
NSA_DOORS = {
    *("nsa.__init__", "nsa.reference", "nsa.testing", "nsa.routes", "nsa.blocks", "nsa.kernels.work"),
}
TORCH_FREE = ("plan", "stats", "store", "present")
LAZY_TORCH = {"nsabench.store.environment"}  # records torch's version, inside a function

LONGEST_FILE = 600


def read_package(package: str) -> dict[str, str]:
    files = sorted((ROOT / package).rglob("*.py"))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return dict(zip(names, (file.read_text(encoding="utf-8") for file in files), strict=True))


NSA = read_package("nsa")
NSABENCH = read_package("nsabench")
BOTH = NSA | NSABENCH


def report(faults: Collection[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


@dataclass(frozen=True)
class Import:
    module: str
    target: str
    line: int
    lazy: bool  # inside a function, hence not run when the module is imported

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def _imported(node: ast.AST, module: str) -> Iterator[str]:
    """Dotted names an import statement, or import_module("literal"), may bring in."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=base, names=names, level=level):
            if level:
                base = ".".join([*module.split(".")[:-level], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in names)
        case ast.Call(
            func=ast.Name(id=func) | ast.Attribute(attr=func), args=[ast.Constant(value=str(name)), *_]
        ):
            if func in {"import_module", "__import__"}:
                yield name


def _resolve(name: str, sources: Sources) -> str:
    """The module that `name` is, or is a name of; foreign names stay as they are."""
    for candidate in (name, name.rpartition(".")[0]):
        for known in (candidate, f"{candidate}.__init__"):
            if known in sources:
                return known
        if any(module.startswith(f"{candidate}.") for module in sources):
            return candidate
    return name


def find_imports(sources: Sources) -> list[Import]:
    found = []

    def visit(node: ast.AST, module: str, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            for target in dict.fromkeys(_resolve(name, sources) for name in _imported(child, module)):
                found.append(Import(module, target, child.lineno, lazy))  # type: ignore[attr-defined]
            visit(
                child, module, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            )

    for module, source in sources.items():
        visit(ast.parse(source), module, False)
    return found


def _part_of(name: str, *packages: str) -> bool:
    return name.split(".")[0] in packages


def nsa_floor_faults(sources: Sources) -> list[str]:
    def floor(module: str) -> int | None:
        fits = (any(fnmatchcase(module, pattern) for pattern in patterns) for patterns in NSA_FLOORS)
        return next((number for number, fit in enumerate(fits) if fit), None)

    def sideways(module: str, target: str) -> bool:
        return any(fnmatchcase(module, m) and fnmatchcase(target, t) for m, t in SIDEWAYS)

    faults = [f"{module} stands on no floor of NSA_FLOORS" for module in sources if floor(module) is None]
    for item in find_imports(sources):
        if not _part_of(item.module, "nsa"):
            continue
        if _part_of(item.target, "nsabench"):
            faults.append(f"{item}: nsa knows nothing of measuring")
        elif _part_of(item.target, "triton") and not item.module.startswith("nsa.kernels."):
            faults.append(f"{item}: only nsa.kernels imports triton")
        elif _part_of(item.target, "nsa") and item.target != item.module:
            here, there = floor(item.module), floor(item.target)
            if there is None:
                faults.append(f"{item}: no such module")
            elif here is not None and there >= here and not sideways(item.module, item.target):
                faults.append(f"{item}: floor {here} imports from floor {there}")
    return faults


def nsabench_floor_faults(sources: Sources) -> list[str]:
    faults = []
    for module in sources:
        if _part_of(module, "nsabench") and module.split(".")[1] not in NSABENCH_FLOORS:
            faults.append(f"{module} stands on no floor of NSABENCH_FLOORS")
    for item in find_imports(sources):
        if not _part_of(item.module, "nsabench"):
            continue
        unit = item.module.split(".")[1]
        allowed = NSABENCH_FLOORS.get(unit, set()) | {unit, "__init__"}
        if _part_of(item.target, "nsa", "nsabench"):
            top, *rest = item.target.split(".")
            target = top if top == "nsa" else (rest or ["__init__"])[0]
            if target not in allowed:
                faults.append(
                    f"{item}: {unit} may import of the house {sorted(allowed - {unit, '__init__'})}"
                )
            elif target == "nsa" and item.target not in NSA_DOORS:
                faults.append(f"{item}: nsa's doors are {sorted(NSA_DOORS)}")
        elif _part_of(item.target, "torch", "triton") and unit in TORCH_FREE:
            lazily = item.lazy and item.module in LAZY_TORCH
            faults += [] if lazily else [f"{item}: {unit} is free of torch"]
    return faults


def cycle_faults(sources: Sources) -> list[str]:
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for item in find_imports(sources):
        if not item.lazy and item.target in sources and item.target != item.module:
            graph[item.module].add(item.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["import cycle: " + " <- ".join(error.args[1])]
    return []


NSA_TREE = {
    "nsa.__init__": "from nsa.module import NativeSparseAttention",
    "nsa.stages": "",
    "nsa.config": "",
    "nsa.blocks": "from nsa.config import NSAConfig",
    "nsa.reference": "from nsa import blocks",
    "nsa.testing": "from nsa.reference import sliding_attention",
    "nsa.backends._mask": "import torch",
    "nsa.backends.sdpa": "from . import _mask\nfrom nsa.blocks import visible",
    "nsa.refusals": "from nsa.config import NSAConfig",
    "nsa.kernels._tiles": "import triton",
    "nsa.kernels.sliding": "from nsa.kernels._tiles import load",
    "nsa.routes": "from nsa import refusals",
    "nsa.attention": "from nsa.routes import resolve",
    "nsa.module": "from nsa.attention import nsa_attention",
}


def test_floors_of_nsa_allow_the_house() -> None:
    assert nsa_floor_faults(NSA_TREE) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nsa.config", "from nsa.blocks import visible"),
        ("nsa.config", "import nsabench.plan"),
        ("nsa.reference", "def f():\n    from nsa.testing import error_budget"),
        ("nsa.backends.sdpa", "from .gather import rows"),
        ("nsa.backends.sdpa", "from nsa.kernels import _tiles"),
        ("nsa.backends.sdpa", "import triton.language as tl"),
        ("nsa.backends.sdpa", "import nsa.backends"),
        ("nsa.refusals", "from nsa.routes import Row"),
        ("nsa.refusals", "import nsa.backends.sdpa"),
        ("nsa.kernels.sliding", "import nsa.reference"),
        ("nsa.kernels.sliding", "from nsa.kernels.selected import launch"),
        ("nsa.blocks", "import importlib\nimportlib.import_module('nsa.module')"),
        ("nsa.cache", "from ..nsa.attention import nsa_attention"),
        ("nsa.module", "from nsa import NSAConfig"),
        ("nsa.misc", ""),
    ],
)
def test_floors_of_nsa_bite(module: str, source: str) -> None:
    neighbours = {
        "nsa.backends.gather": "",
        "nsa.kernels.selected": "",
        "nsa.backends.__init__": "",
        "nsa.cache": "",
    }
    assert len(nsa_floor_faults(NSA_TREE | neighbours | {module: source})) == 1


NSABENCH_TREE = {
    "nsa.__init__": "",
    "nsa.cache": "",
    "nsa.testing": "",
    "nsabench.__init__": "",
    "nsabench.plan.axes": "import re",
    "nsabench.stats": "import numpy",
    "nsabench.store.environment": "from nsabench import __version__\ndef f():\n    import torch",
    "nsabench.present.plots": "from nsabench.store import runs\nfrom nsabench.stats import median_interval",
    "nsabench.measure.timers": "import torch\nfrom .memory import peak",
    "nsabench.measure.memory": "",
    "nsabench.run.worker": "from nsa import KVCache, testing\nfrom nsabench import measure, plan, store",
    "nsabench.commands.decode": "from nsabench import present, run",
    "nsabench.cli": "from nsabench.commands import decode",
}


def test_floors_of_nsabench_allow_the_house() -> None:
    assert nsabench_floor_faults(NSABENCH_TREE) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nsabench.plan.axes", "import torch"),
        ("nsabench.plan.axes", "def f():\n    import nsa"),
        ("nsabench.stats", "from nsabench.store import runs"),
        ("nsabench.store.environment", "import torch"),
        ("nsabench.store.runs", "def f():\n    import torch"),
        ("nsabench.present.plots", "from torch.nn import Module"),
        ("nsabench.present.plots", "from ..run import worker"),
        ("nsabench.measure.timers", "import nsa"),
        ("nsabench.measure.timers", "from nsabench import store"),
        ("nsabench.run.worker", "import nsabench.present"),
        ("nsabench.run.worker", "from nsa.cache import KVCache"),
        ("nsabench.run.worker", "from nsabench.commands import decode"),
        ("nsabench.commands.decode", "import nsabench.cli"),
        ("nsabench.cli", "from nsabench import run"),
        ("nsabench.__init__", "from nsabench.plan import axes"),
        ("nsabench.misc", ""),
    ],
)
def test_floors_of_nsabench_bite(module: str, source: str) -> None:
    assert len(nsabench_floor_faults(NSABENCH_TREE | {module: source})) == 1


def test_cycles_bite() -> None:
    assert cycle_faults({"nsa.a": "import nsa.b", "nsa.b": "def f():\n    import nsa.a"}) == []
    assert cycle_faults({"nsa.a": "import nsa.b", "nsa.b": "from nsa import a"}) != []


def test_floors_of_nsa() -> None:
    assert NSA, "no nsa to check"
    report(nsa_floor_faults(NSA))


def test_floors_of_nsabench() -> None:
    assert NSABENCH, "no nsabench to check"
    report(nsabench_floor_faults(BOTH))


def test_no_import_cycles() -> None:
    report(cycle_faults(BOTH))


@pytest.mark.parametrize("part", TORCH_FREE)
def test_imports_without_torch(part: str) -> None:
    modules = [m.removesuffix(".__init__") for m in NSABENCH if m.split(".")[1] == part]
    assert modules, f"no nsabench.{part} to import"
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"importing nsabench.{part} imports torch"


def length_faults(sources: Sources) -> list[str]:
    lengths = {module: source.count("\n") for module, source in sources.items()}
    return [f"{module}: {n} lines, over {LONGEST_FILE}" for module, n in lengths.items() if n > LONGEST_FILE]


def comment_faults(sources: Sources) -> list[str]:
    """Rows of dashes and the like; work put off with no word on where it is kept."""
    faults = []
    for module, source in sources.items():
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and re.search(r"([^\w\s.])\1{3}", token.string):
                faults.append(f"{module}:{token.start[0]} banner comment")
        for number, line in enumerate(source.splitlines(), 1):
            if re.search(r"\b(TODO|FIXME)\b(?!\([^)]+\))", line):
                faults.append(f"{module}:{number} put off without an anchor: write TODO(where it is kept)")
    return faults


def environment_faults(sources: Sources) -> list[str]:
    """Reads of the environment in nsa: routes.py may, the rest only ask for TRITON_INTERPRET."""
    faults = []
    for module, source in sources.items():
        if module == "nsa.routes":
            continue
        tree = ast.parse(source)
        allowed = set()
        for node in ast.walk(tree):
            match node:
                case (
                    ast.Subscript(value=read, slice=ast.Constant(value="TRITON_INTERPRET"))
                    | ast.Compare(left=ast.Constant(value="TRITON_INTERPRET"), comparators=[read])
                    | ast.Call(
                        func=ast.Attribute(value=read, attr="get"),
                        args=[ast.Constant(value="TRITON_INTERPRET"), *_],
                    )
                    | ast.Call(func=read, args=[ast.Constant(value="TRITON_INTERPRET"), *_])
                ):
                    allowed.add(read)
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(attr="environ" | "environb" | "getenv" | "getenvb") if node not in allowed:
                    faults.append(f"{module}:{node.lineno} reads the environment")
                case ast.ImportFrom(module="os", names=names):
                    if any(
                        alias.name in {"environ", "environb", "getenv", "getenvb", "*"} for alias in names
                    ):
                        faults.append(f"{module}:{node.lineno} takes the environment out of os")
    return faults


def swallow_faults(sources: Sources) -> list[str]:
    """Bare excepts, everything caught and dropped, and imports inside nsa that are tried and replaced."""
    faults = []
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Try | ast.TryStar):
                continue
            for handler in node.handlers:
                where = f"{module}:{handler.lineno}"
                caught = (
                    {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
                    if handler.type
                    else set()
                )
                if handler.type is None:
                    faults.append(f"{where} bare except")
                elif caught & {"Exception", "BaseException"} and _does_nothing(handler.body):
                    faults.append(f"{where} catches everything and drops it")
                elif _tries_import(node.body, module) and not any(
                    isinstance(n, ast.Raise) for n in ast.walk(handler)
                ):
                    faults.append(f"{where} falls back from an import of nsa in silence")
    return faults


def _does_nothing(body: Iterable[ast.stmt]) -> bool:
    return all(
        isinstance(stmt, ast.Pass | ast.Continue)
        or (isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Constant))
        for stmt in body
    )


def _tries_import(body: Iterable[ast.stmt], module: str) -> bool:
    """Whether the statements import from nsa; inside nsa an import_module of a computed name counts too."""
    nodes = [node for stmt in body for node in ast.walk(stmt)]
    computed = _part_of(module, "nsa") and any(
        isinstance(node, ast.Name | ast.Attribute)
        and "import_module" in (vars(node).get("id"), vars(node).get("attr"))
        for node in nodes
    )
    return computed or any(_part_of(name, "nsa") for node in nodes for name in _imported(node, module))


def test_long_files_bite() -> None:
    assert length_faults({"nsa.a": "\n" * LONGEST_FILE}) == []
    assert len(length_faults({"nsa.a": "\n" * (LONGEST_FILE + 1)})) == 1


@pytest.mark.parametrize("line", ["# " + "-" * 20, "#" * 5, "# ==== Helpers ====", "x = 1  # " + "─" * 6])
def test_banner_comments_bite(line: str) -> None:
    assert len(comment_faults({"nsa.a": line})) == 1


@pytest.mark.parametrize("line", ["# TO" + "DO later", "'''FIX" + "ME'''"])
def test_work_put_off_bites(line: str) -> None:
    assert len(comment_faults({"nsa.a": line})) == 1


@pytest.mark.parametrize(
    "line", ["# why, once", "rule = '-----'", "# see above ...", "# TO" + "DO(docs/plan.md) later"]
)
def test_plain_comments_pass(line: str) -> None:
    assert comment_faults({"nsa.a": line}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nx = os.environ.get('NSA_FAST')",
        "import os as o\nx = o.getenv('NSA_FAST')",
        "import os\nx = os.environ['NSA_FAST']",
        "import os\nx = os.environ[name]",
        "import os\nx = 'NSA_FAST' in os.environ",
        "from os import getenv",
    ],
)
def test_environment_reads_bite(source: str) -> None:
    assert len(environment_faults({"nsa.attention": source})) == 1
    assert environment_faults({"nsa.routes": source}) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = os.environ.get('TRITON_INTERPRET', '0')",
        "x = os.getenv('TRITON_INTERPRET')",
        "x = os.environ['TRITON_INTERPRET']",
        "x = 'TRITON_INTERPRET' in os.environ",
    ],
)
def test_interpreter_detection_passes(source: str) -> None:
    assert environment_faults({"nsa.kernels.sliding": source}) == []


@pytest.mark.parametrize(
    "handler",
    [
        "except: raise",
        "except Exception: pass",
        "except (ValueError, BaseException): ...",
        "except OSError: y = 1",
    ],
)
def test_swallowed_errors_bite(handler: str) -> None:
    assert len(swallow_faults({"nsa.a": f"try:\n    from nsa.kernels import sliding\n{handler}"})) == 1


def test_computed_import_with_a_fallback_bites() -> None:
    source = "try:\n    backend = import_module(row.target)\nexcept ImportError:\n    backend = None"
    assert len(swallow_faults({"nsa.routes": source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    x = 1\nexcept OSError:\n    pass",
        "try:\n    x = 1\nexcept Exception as error:\n    y = str(error)",
        "try:\n    import nsa.kernels.sliding\nexcept ImportError as error:\n    raise ValueError from error",
    ],
)
def test_handled_errors_pass(source: str) -> None:
    assert swallow_faults({"nsa.a": source}) == []


def test_no_file_is_too_long() -> None:
    report(length_faults(BOTH))


def test_no_banners_and_nothing_put_off() -> None:
    report(comment_faults(BOTH))


def test_nsa_reads_no_environment() -> None:
    report(environment_faults(NSA))


def test_no_error_is_swallowed() -> None:
    report(swallow_faults(BOTH))
