"""The table branch x backend: what runs, or why it cannot. Code, parity tests, bench and README read this one
table.

Grammar of a routing: ``auto`` | ``BACKEND`` | ``cmp=fa2,sel=gather,win=sdpa``; a backend may name a variant
(``gather:keys``), and a branch may be ``off`` (its work is skipped and it adds nothing). Branches left out
are ``auto``; with a bare ``BACKEND``, so are the branches that backend has no row for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from nsa import refusals
from nsa.refusals import Request

BRANCHES = ("cmp", "score", "sel", "win")
FUNCTIONS = {
    "cmp": "compressed_attention",
    "score": "select_blocks",
    "sel": "selected_attention",
    "win": "sliding_attention",
}


class UnsupportedRoute(RuntimeError):
    """A named backend cannot run this request; the message gives the reason of every row asked."""


@dataclass(frozen=True)
class Row:
    """One way to compute one branch.

    ``refuse`` returns why a request cannot run, or None. ``avoid`` returns why ``auto`` passes over the row
    although it could run; a row named explicitly ignores it. ``where`` says in words what ``refuse`` accepts.
    ``passes`` are the passes the row computes. ``library`` is the function that names what the row runs,
    where that is not torch itself. ``takes`` names the arguments its function has beside the contract's:
    ``packed`` (:class:`nsa.packing.Packed`), and, for scores, ``lse`` of compressed attention.
    """

    branch: str
    backend: str
    target: str
    refuse: Callable[[Request], str | None]
    avoid: Callable[[Request], str | None] = lambda request: None
    where: str = "cpu, cuda"
    passes: tuple[str, ...] = ("fwd", "bwd")
    library: str | None = None
    takes: tuple[str, ...] = ()

    def provider(self) -> str | None:
        """The library that computes the row and its version, e.g. ``flash_attn 2.8.3``; None for torch and
        nsa.
        """
        return None if self.library is None else refusals.load(self.library)()

    def load(self) -> Callable[..., Any]:
        """The function itself; its module is imported now."""
        return refusals.load(self.target)


def _row(branch: str, backend: str, module: str, refuse: Callable[[Request], str | None], **more: Any) -> Row:
    return Row(branch, backend, f"nsa.{module}:{FUNCTIONS[branch]}", refuse, **more)


def _gather_by(what: str, refuse: Callable[[Request], str | None], **more: Any) -> Row:
    target = f"nsa.backends.gather:selected_attention_by_{what}"
    return Row("sel", f"gather:{what}", target, refuse, refusals.chosen_by_gather, **more)


def _flash_row(
    generation: str, branch: str, refuse: Callable[[Request], str | None], variant: str = "", **more: Any
) -> Row:
    flash = f"{refusals.FLASH}:{generation.upper()}"
    target = f"{flash}.{FUNCTIONS[branch]}" + ("_varlen" if variant else "")
    more = {"where": "cuda: fp16, bf16", "library": f"{flash}.provider"} | more
    return Row(branch, f"{generation}{variant}", target, refuse, **more)


def _fa2(branch: str, variant: str = "", **more: Any) -> Row:
    return _flash_row("fa2", branch, refusals.fa2_takes, variant, **more)


def _newer(branch: str) -> tuple[Row, Row]:
    """FlashAttention 3 and 4."""
    hopper, blackwell = "cuda sm_90: fp16, bf16", "cuda sm_90, sm_100: fp16, bf16"
    return (
        _flash_row("fa3", branch, refusals.fa3_takes, avoid=refusals.newer_by_name, where=hopper),
        _flash_row("fa4", branch, refusals.fa4_takes, avoid=refusals.newer_by_name, where=blackwell),
    )


def _flex_rows(branch: str) -> tuple[Row, Row]:
    flex, name, avoid = "nsa.backends.flex", FUNCTIONS[branch], refusals.flex_by_name
    return (
        Row(branch, "flex", f"{flex}:COMPILED.{name}", refusals.flex, avoid, "cuda: fp32, fp16, bf16"),
        Row(branch, "flex:eager", f"{flex}:EAGER.{name}", refusals.flex_eager, avoid),
    )


def _compiled(branch: str) -> Row:
    return _row(
        branch,
        "cpp",
        "backends.cpp",
        refusals.cpp,
        where="cpu: fp32, fp16, bf16",
        passes=("fwd",),
        library=f"{refusals.CPP_LIBRARY}:provider",
    )


_KERNELS = {"cmp": "compressed", "score": "selection", "sel": "selected", "win": "sliding"}


def _triton_row(branch: str, variant: str = "", **more: Any) -> Row:
    """A kernel of this project; ``variant`` such as ``:union`` ends the name of its function, too."""
    target = f"nsa.kernels.{_KERNELS[branch]}:{FUNCTIONS[branch]}{variant.replace(':', '_')}"
    known: dict[str, Any] = {
        "avoid": refusals.unmeasured_by_name,
        "where": "cuda: fp32, fp16, bf16",
        "passes": ("fwd",),
        "library": f"{refusals.TRITON}:provider",
        "takes": ("packed", "lse") if branch == "score" else ("packed",),
    }
    return Row(branch, f"triton{variant}", target, refusals.triton, **(known | more))


_TRITON_SELECTED = (":union", ":kv_outer", ":query_major")


def _specification(branch: str) -> Row:
    passes = ("fwd",) if branch == "score" else ("fwd", "bwd")  # selection carries no gradient
    anywhere, never = refusals.runs_anywhere, refusals.never_auto
    return _row(branch, "reference", "reference", anywhere, avoid=never, passes=passes)


TABLE: tuple[Row, ...] = (
    _triton_row("cmp"),
    _fa2("cmp"),
    _fa2("cmp", ":varlen", avoid=refusals.varlen_by_name),
    *_newer("cmp"),
    _compiled("cmp"),
    _row("cmp", "sdpa", "backends.sdpa", refusals.fused_sdpa),
    *_flex_rows("cmp"),
    _triton_row("score"),
    _compiled("score"),
    _row("score", "chunked", "backends.chunked", refusals.runs_anywhere, passes=("fwd",)),
    _triton_row("sel"),
    *(_triton_row("sel", variant, avoid=refusals.chosen_by_triton) for variant in _TRITON_SELECTED),
    _compiled("sel"),
    _row("sel", "sdpa", "backends.sdpa", refusals.fused_sdpa, avoid=refusals.short_only),
    _row("sel", "gather", "backends.gather", refusals.runs_anywhere),
    _gather_by("keys", refusals.runs_anywhere),
    _gather_by("queries", refusals.on_cpu, where="cpu"),
    _fa2("sel"),  # after gather, which refuses nothing: chosen only by name
    *_newer("sel"),
    *_flex_rows("sel"),
    _triton_row("win"),
    _fa2("win"),
    _fa2("win", ":varlen", avoid=refusals.varlen_by_name),
    *_newer("win"),
    _compiled("win"),
    _row("win", "sdpa", "backends.sdpa", refusals.fused_sdpa),
    *_flex_rows("win"),
    *map(_specification, BRANCHES),
)


def backends(branch: str | None = None) -> list[str]:
    """Names in the table, for one branch or all, in the table's order."""
    return list(dict.fromkeys(row.backend for row in TABLE if branch in (None, row.branch)))


def provider(backend: str) -> str | None:
    """The library behind ``backend`` and its version, e.g. ``flash_attn 2.8.3``; None for torch and nsa."""
    return next((row.provider() for row in TABLE if row.backend == backend), None)


@dataclass(frozen=True)
class Routing:
    """A backend, ``auto`` or ``off`` per branch. ``score`` is ``off`` exactly when ``sel`` is."""

    cmp: str = "auto"
    score: str = "auto"
    sel: str = "auto"
    win: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, known = getattr(self, field.name), backends(field.name)
            if value not in ("auto", "off", *known):
                allowed = ", ".join(["auto", "off", *known])
                raise ValueError(f"unknown backend {value!r} for {field.name}; allowed: {allowed}")
        if "off" in (self.score, self.sel):
            object.__setattr__(self, "score", "off")
            object.__setattr__(self, "sel", "off")
        if self.cmp == self.sel == self.win == "off":
            raise ValueError("every branch is off; at least one of cmp, sel, win must run")

    @classmethod
    def parse(cls, text: str) -> Routing:
        """Read ``auto``, ``env``, a backend's name or ``branch=backend,...``; ValueError names the fault."""
        return _parse(text.strip()) if text.strip() != "env" else cls.from_env(os.environ)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Routing:
        """The routing an earlier NSA code would take from its ``NSA_*`` switches (1, true, yes, on are
        true).
        """

        def on(name: str) -> bool:
            return environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")

        chosen: dict[str, str] = {}
        if on("NSA_USE_FA2"):
            chosen.update(cmp="fa2", win="fa2")
        for branch in ("cmp", "win"):
            switch = f"NSA_USE_FA2_{branch.upper()}"
            if switch in environ:
                chosen[branch] = "fa2" if on(switch) else "sdpa"
        if on("NSA_FA2_FORCE_VARLEN"):
            chosen = {
                branch: "fa2:varlen" if backend == "fa2" else backend for branch, backend in chosen.items()
            }
        if on("NSA_WIN_FORCE_DENSE"):
            chosen["win"] = "sdpa"
        # V2 chose how the packed path packs; without the first switch that code gathered.
        if on("NSA_USE_SEL_VARLEN"):
            chosen["sel"] = "fa2"
        elif "NSA_USE_SEL_VARLEN" in environ or on("NSA_SEL_VARLEN_V2"):
            chosen["sel"] = "gather"
        return cls(**chosen)

    def __str__(self) -> str:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.sel == "off":
            del named["score"]
        return ",".join(f"{branch}={name}" for branch, name in named.items() if name != "auto") or "auto"


@lru_cache(maxsize=256)
def _parse(text: str) -> Routing:
    if "=" not in text:
        if text == "auto":
            return Routing()
        if text not in backends():
            raise ValueError(
                f"unknown route {text!r}; allowed: auto, env, {', '.join(backends())}, branch=backend,..."
            )
        return Routing(**{branch: text for branch in BRANCHES if text in backends(branch)})
    chosen: dict[str, str] = {}
    for part in text.split(","):
        branch, _, name = (piece.strip() for piece in part.partition("="))
        if branch not in BRANCHES:
            raise ValueError(f"unknown branch {branch!r} in route {text!r}; allowed: {', '.join(BRANCHES)}")
        if branch in chosen:
            raise ValueError(f"branch {branch} is given twice in route {text!r}")
        chosen[branch] = name
    return Routing(**chosen)


@dataclass(frozen=True)
class Route:
    """A settled routing: the function of each branch, None where it is off, and the rows they come from."""

    rows: dict[str, Row | None]
    cmp: Callable[..., Any] | None
    score: Callable[..., Any] | None
    sel: Callable[..., Any] | None
    win: Callable[..., Any] | None

    def backend(self, branch: str) -> str:
        """Name of the backend that computes ``branch``, or ``off``."""
        row = self.rows[branch]
        return "off" if row is None else row.backend

    def provider(self, branch: str) -> str | None:
        """The library that computes ``branch`` and its version; None where it is torch's own, nsa's own or
        off.
        """
        row = self.rows[branch]
        return None if row is None else row.provider()

    @property
    def takes_packed(self) -> bool:
        """Whether every branch that runs computes packed sequences in one call."""
        return all(row is None or "packed" in row.takes for row in self.rows.values())

    @property
    def shares_lse(self) -> bool:
        """Whether the scores can begin with the lse of compressed attention. Only one backend's own: another
        may have rounded it more than a score allows.
        """
        score = self.rows["score"]
        return score is not None and "lse" in score.takes and self.backend("cmp") == score.backend


def resolve(routing: str | Routing, request: Request) -> Route:
    """Settle ``routing`` for ``request`` before anything runs.

    Raises:
        UnsupportedRoute: a named backend refuses, or ``auto`` finds no row; the message holds every reason.
    """
    if isinstance(routing, str):
        routing = Routing.parse(routing)
    rows: dict[str, Row | None] = {}
    reasons: list[str] = []
    for branch in BRANCHES:
        name = getattr(routing, branch)
        found = None if name == "off" else _choose(branch, name, request)
        if isinstance(found, list):
            reasons += found
        else:
            rows[branch] = found
    if reasons:
        raise UnsupportedRoute("; ".join(reasons))
    return Route(rows, **{branch: None if row is None else row.load() for branch, row in rows.items()})


def _choose(branch: str, name: str, request: Request) -> Row | list[str]:
    """The row that computes ``branch``, or the reason of each row asked."""
    reasons = []
    for row in TABLE:
        if row.branch != branch or name not in ("auto", row.backend):
            continue
        reason = refusal(row, request) or (row.avoid(request) if name == "auto" else None)
        if reason is None:
            return row
        reasons.append(f"{branch}={row.backend}: {reason}")
    return reasons


def refusal(row: Row, request: Request) -> str | None:
    """Why ``row`` cannot run ``request``, or None."""
    if request.needs_grad and "bwd" not in row.passes and row.branch != "score":
        return "computes no gradient"
    return row.refuse(request)
