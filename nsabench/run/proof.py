"""Route proof: which library computed each branch, told from the names of the operators and kernels that ran.

What was asked for is not believed: `prove` holds the backends of a route against what was seen, and a branch
that ran something else fell back. Operators are torch's names on the host (``aten::`` may be left out);
kernels are the device's, as a profiler gives them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nsa import NSAConfig, stage_hook
from nsa.blocks import num_compressed_blocks, num_selection_blocks
from nsa.routes import BRANCHES, Route
from nsabench.measure.trace import observe, short_name

MATH = "math"
"""Plain products of matrices, with a softmax of one's own."""
NOTHING_SEEN = "no operator of torch"

# By kernels first, each name by the first pattern that fits: FlashAttention 3 lives in FlashAttention 2's
# namespace, and cuDNN's kernels have "flash" in their names.
_KERNELS = {
    "cudnn": r"cudnn\w*(sdpa|fmha|flash|attention)",
    "fa4": r"flash_?attn_?cute|FlashAttention(Forward|Backward)Sm\d",
    "fa3": r"FlashAttn(Fwd|Bwd)|\bflash::(enable_sm|prepare_)",
    "efficient": r"fmha_cutlass|PyTorchMemEffAttention",
    "flash": r"pytorch_flash::",
    "fa2": r"\bflash::flash_(fwd|bwd)",
    "flex": r"triton_\w*flex|triton_tem_(?!\w*mm)",
    "triton": r"^_(attention|lse|scores|top_n|mark|compact|rank|place|union|query|block|merge)_kernel$",
}
_OPERATORS = {
    "cudnn": r"_scaled_dot_product_cudnn_attention|_cudnn_attention_",
    "efficient": r"_scaled_dot_product_efficient_attention|_efficient_attention_",
    "fa3": r"flash_attn_3::",
    "fa4": r"flash_attn\w*[.:]+cute",
    "fa2": r"flash_attn::",
    "flash": r"_scaled_dot_product_flash_attention|(^|::)_flash_attention_|torch_attn::_varlen_attn",
    "flex": r"flex_attention|FlexAttention",
    MATH: r"_scaled_dot_product_attention_math",
}
_PRODUCT = r"(^|::)(bmm|mm|mv|addmm|addmv|baddbmm|matmul|einsum)_?$|gemm|gemv|nvjet|xmma"
_ORDER = ("flash", "efficient", "cudnn", "fa2", "fa3", "fa4", "flex", "triton", MATH)


def observed(names: Iterable[str]) -> str:
    """The library behind an attention that ran operators and kernels of these names.

    ``flash`` (torch's own, its CPU kernel too), ``efficient``, ``cudnn``, ``fa2``, ``fa3``, ``fa4``,
    ``flex``, ``triton`` (nsa's own kernels), ``math``; joined by ``+`` where there are several; empty where
    no name tells. Kernels overrule operators.
    """
    return "+".join(_evidence(names))


def _evidence(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that tell of each library, shortened, each once."""
    kernels: dict[str, list[str]] = {}
    operators: dict[str, list[str]] = {}
    products = []
    for name in dict.fromkeys(names):
        if word := _first(_KERNELS, name):
            kernels.setdefault(word, []).append(_short(name))
        elif word := _first(_OPERATORS, name):
            operators.setdefault(word, []).append(_short(name))
        elif re.search(_PRODUCT, name):
            products.append(_short(name))
    found = kernels or operators
    if products:
        found = {**found, MATH: [*found.get(MATH, []), *products]}
    return {word: list(dict.fromkeys(found[word])) for word in _ORDER if word in found}


def _first(patterns: Mapping[str, str], name: str) -> str:
    return next((word for word, pattern in patterns.items() if re.search(pattern, name)), "")


def _short(name: str) -> str:
    return short_name(name).removeprefix("aten::")[:60]


@dataclass(frozen=True)
class Rule:
    """What a backend shows when it runs: what may be `observed`, by device; names of which one must be seen,
    and names of which none may be. ``small``: what may be observed, too, where a query attends all it sees.
    What computes outside of torch on a CPU shows nothing there, and no name.
    """

    cpu: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()
    shows: str = ""
    hides: str = ""
    small: tuple[str, ...] = ()

    def silent(self, device: str) -> bool:
        """Whether nothing can be seen of it."""
        return device == "cpu" and self.cpu == ("",)


_OWN = r"_ByKeys|ByQueries|_Pieces"  # autograd functions of nsa's backends show by their names
_FLASH = Rule(cuda=("flash", "fa2"))

RULES = {
    "cpp": Rule(cpu=("",)),
    "sdpa": Rule(cpu=("flash",), cuda=("efficient",), shows="_Pieces"),
    "gather": Rule(cpu=(MATH, "flash+math"), cuda=(MATH,), shows=_OWN, small=("flash",)),
    "gather:keys": Rule(cpu=(MATH,), cuda=(MATH,), shows="_ByKeys"),
    "gather:queries": Rule(cpu=(MATH, "flash+math"), shows="ByQueries|_Pieces", small=("flash",)),
    "chunked": Rule(cpu=(MATH,), cuda=(MATH,), shows="exp2"),
    "reference": Rule(cpu=(MATH,), cuda=(MATH,), shows="softmax|einsum", hides=f"{_OWN}|exp2"),
    "fa2": _FLASH,
    "fa2:varlen": _FLASH,
    "fa3": Rule(cuda=("fa3",)),
    "fa4": Rule(cuda=("fa4",)),
    "triton": Rule(cpu=("",), cuda=("triton",)),
    **{
        f"triton:{variant}": Rule(cpu=("",), cuda=("triton",), shows=rf"^_{kernel}_kernel$")
        for variant, kernel in (("union", "union"), ("kv_outer", "block"), ("query_major", "query"))
    },
    "flex": Rule(cpu=("flex",), cuda=("flex",)),
    "flex:eager": Rule(cpu=("flex+math",), cuda=("flex+math",)),
}
"""By backend of the route table."""


def idle_branches(length: int, config: NSAConfig) -> tuple[str, ...]:
    """Branches with nothing to compute for ``length`` tokens: no compressed block exists yet, or no more
    blocks than are selected.
    """
    idle = []
    if num_compressed_blocks(length, config) == 0:
        idle.append("cmp")
    if num_selection_blocks(length, config) <= config.num_selected_blocks:
        idle.append("score")
    return tuple(idle)


@dataclass(frozen=True)
class Proof:
    """What was seen of a route, in a line; empty where nothing could be seen. ``fell_back``: the first branch
    that ran something else than its backend, and what.
    """

    text: str = ""
    fell_back: str = ""


def proven(
    run: Callable[[], torch.Tensor], route: Route, config: NSAConfig, inputs: Mapping[str, Any]
) -> tuple[torch.Tensor, Proof]:
    """Run the attention of a settled route on ``inputs``, and see what ran."""
    backends = {branch: route.backend(branch) for branch in BRANCHES}
    device, idle = inputs["q"].device, idle_branches(inputs["k_sel"].shape[1], config)
    out, names = observe(run, stage_hook, device)
    proof = prove(backends, names or {}, device.type, idle)
    if proof.fell_back:  # unless it was the compiler that was seen: a first call may compile
        names = observe(run, stage_hook, device)[1]
        proof = prove(backends, names or {}, device.type, idle)
    return out, proof


def prove(
    backends: Mapping[str, str],
    names: Mapping[str, Sequence[str]],
    device: str,
    idle: Collection[str] = (),
) -> Proof:
    """Hold the backends that a route settled on, by branch, against what ran.

    ``names``: operators and kernels by branch, as `nsabench.measure.trace.observe` gives them; of a branch
    that is left out nothing is known. A backend without a rule is not judged. ``device`` is its type.
    ``idle``: see `idle_branches`.
    """
    seen: dict[str, list[str]] = {}
    for branch, backend in backends.items():
        if backend == "off" or branch not in names:
            continue
        found = _evidence(names[branch])
        if not _fits(backend, branch, names[branch], "+".join(found), device, idle):
            return Proof(fell_back=f"fell back: requested {backend} for {branch}, ran {_described(found)}")
        text = _described(found, [name for name in dict.fromkeys(names[branch]) if re.fullmatch(_OWN, name)])
        if not found and not (backend in RULES and RULES[backend].silent(device)):
            text = "nothing to compute"
        seen.setdefault(text, []).append(branch)
    return Proof("; ".join(f"{', '.join(branches)}: {text}" for text, branches in seen.items()))


def _fits(
    backend: str, branch: str, names: Sequence[str], word: str, device: str, idle: Collection[str]
) -> bool:
    rule = RULES.get(backend)
    if rule is None:
        return True
    if not word and branch in idle:
        return True
    allowed = rule.cpu if device == "cpu" else rule.cuda
    if "score" in idle:
        allowed += rule.small
    shown = rule.silent(device) or not rule.shows or any(re.search(rule.shows, name) for name in names)
    hidden = not rule.hides or not any(re.search(rule.hides, name) for name in names)
    return word in allowed and shown and hidden


def _described(found: Mapping[str, Sequence[str]], own: Sequence[str] = ()) -> str:
    if not found:
        return NOTHING_SEEN
    told = [*own, *(name for names in found.values() for name in names[:2])]
    return f"{'+'.join(found)} ({', '.join(told[:4])})"
