"""The process that compiles: what modules offer as `STATIC`, for one architecture, into a report of lines."""

from __future__ import annotations

import contextlib
import io
import json
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_KEYS = ("kernel", "signature", "constexprs", "name", "num_warps", "num_stages", "num_ctas", "maxnreg")
_LONGEST_REASON = 300
_OPTIONS = {"num_warps": 4, "num_stages": 3, "num_ctas": 1, "maxnreg": None}


class Refused(Exception):
    """Modules that offer nothing to compile, or something that cannot be. One line."""


@dataclass(frozen=True)
class Spec:
    """One kernel to compile. `types` by argument, `constexpr` for those in `constexprs`; `divisible` are the
    places of the arguments that 16 divides.
    """

    module: str
    name: str
    kernel: Any
    types: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[int, ...]
    options: dict[str, Any]


def main(*, modules: Sequence[str], arch: int, report: str) -> None:
    """Compile for `sm_<arch>`. The report's first line names the kernels, or says why there is none; then a
    line for each, as soon as it is compiled.
    """
    with open(report, "w", buffering=1) as file:
        try:
            specs = [spec for module in modules for spec in offered(module)]
            names = _told_apart(specs)
        except Refused as error:
            file.write(json.dumps({"refused": str(error)}) + "\n")
            return
        file.write(json.dumps({"kernels": [(s.module, n) for s, n in zip(specs, names, strict=True)]}) + "\n")
        for spec, name in zip(specs, names, strict=True):
            file.write(json.dumps({"module": spec.module, "kernel": name, **compiled(spec, arch)}) + "\n")


def offered(module: str) -> Iterator[Spec]:
    """What a module, or every module of a package, offers; Refused where it offers nothing."""
    found = [spec for name in _with_submodules(module) for spec in _specs(name)]
    if not found:
        raise Refused(f"module {module!r} offers no kernels: it has no STATIC")
    yield from found


def _with_submodules(module: str) -> list[str]:
    package = _imported(module)
    inner = pkgutil.walk_packages(getattr(package, "__path__", ()), f"{module}.")
    return [module, *(one.name for one in inner)]


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise Refused(f"module {module!r} cannot be imported: {type(error).__name__}: {why}") from error


def _specs(module: str) -> Iterator[Spec]:
    for number, given in enumerate(getattr(_imported(module), "STATIC", ()), 1):
        where = f"{module}.STATIC[{number}]"
        if not isinstance(given, Mapping) or not {"kernel", "signature"} <= given.keys():
            raise Refused(f"{where} is no mapping with kernel and signature")
        unknown = [key for key in given if key not in _KEYS]
        if unknown:
            raise Refused(f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(_KEYS)}")
        yield _spec(module, where, given)


def _spec(module: str, where: str, given: Mapping[str, Any]) -> Spec:
    import triton

    kernel = given["kernel"]
    while not isinstance(kernel, triton.JITFunction):  # an autotuner, heuristics
        if not hasattr(kernel, "fn"):
            raise Refused(f"{where}: kernel is {type(kernel).__name__}, not a function under triton.jit")
        kernel = kernel.fn
    constexprs = dict(given.get("constexprs", {}))
    known = {**given["signature"], **dict.fromkeys(constexprs, "constexpr")}
    arguments = list(kernel.arg_names)
    if set(known) != set(arguments):
        wrong = sorted(set(known) ^ set(arguments))
        raise Refused(
            f"{where}: {', '.join(wrong)}: the kernel takes {', '.join(arguments)}, each is needed once"
        )
    types = {name: str(known[name]).partition(":")[0] for name in arguments}
    divisible = tuple(place for place, name in enumerate(arguments) if str(known[name]).endswith(":16"))
    options = {name: given[name] for name in _OPTIONS if name in given}
    return Spec(module, given.get("name", kernel.__name__), kernel, types, constexprs, divisible, options)


def _told_apart(specs: Sequence[Spec]) -> list[str]:
    """The kernels' names; those that come twice in a module with their constexprs and options, too."""
    named = [(spec.module, spec.name) for spec in specs]
    return [
        spec.name if named.count(name) == 1 else _in_full(spec)
        for spec, name in zip(specs, named, strict=True)
    ]


def _in_full(spec: Spec) -> str:
    return " ".join([spec.name, *(f"{k}={v}" for k, v in (spec.constexprs | spec.options).items())])


def compiled(spec: Spec, arch: int) -> dict[str, Any]:
    """What came of one kernel: status, reason; where it is ok, `ptx` and the `log` of `ptxas -v` too."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    options = {**_OPTIONS, **spec.options}
    about = {
        "constexprs": {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in spec.constexprs.items()
        },
        "num_warps": options["num_warps"],
        "num_stages": options["num_stages"],
    }
    more = {"attrs": {(place,): [["tt.divisibility", 16]] for place in spec.divisible}}
    log = io.StringIO()
    try:
        knobs.nvidia.dump_ptxas_log = True
        source = ASTSource(spec.kernel, dict(spec.types), constexprs=dict(spec.constexprs), **more)
        with contextlib.redirect_stdout(log):
            kernel = build(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return {**about, **why_not(error, arch)}
    return {
        **about,
        "status": "ok",
        "shared_bytes": int(kernel.metadata.shared),
        "ptx": kernel.asm["ptx"],
        "log": log.getvalue(),
    }


def why_not(error: Exception, arch: int) -> dict[str, str]:
    """Status and reason of a kernel that could not be compiled."""
    text = str(error)
    if "not defined for option 'gpu-name'" in text:
        return {
            "status": "unsupported",
            "reason": f"the ptxas that comes with Triton does not know sm_{arch}",
        }
    told = re.findall(r"^ptxas\S* .*?(?:fatal|error).*$", text, re.MULTILINE) or text.strip().splitlines()
    why = told[-1].strip()[:_LONGEST_REASON] if told else "no message"
    return {"status": "error", "reason": f"{type(error).__name__}: {why}"}
