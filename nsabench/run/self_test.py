"""What the bench is tested with: work whose truth is known because it was planted.

A planted step is a fixed piece of work, a small attention, repeated: 100 times, or 105 times for a step that
is truly 5 % slower. Sleeping or spinning for a part of a step's time would have to measure that time first,
and would not follow the clock; repeated work is slower by just so much at any clock, in any cache, beside any
neighbour. What a step costs besides (some microseconds of milliseconds) lessens the truth by far less than it
can be measured. Both sides are built apart and hold tensors of their own, as two implementations do.

All else is what every comparison goes through: fresh workers, the gate, the canary, interleaved rounds.
Workers are neither forked from a common parent nor begun beforehand: the first would share where things lie
in memory, which is what fresh processes are there to vary, the second would disturb the one that measures.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from nsa import reference, routes
from nsabench.plan import Cell
from nsabench.run.check import Inputs, Segment, Verdict, compare
from nsabench.run.comparison import Effort
from nsabench.run.impl import IMPLS, Fields, Impl
from nsabench.run.impl_nsa import part_of
from nsabench.run.policy import Policy
from nsabench.run.session import measure_group
from nsabench.run.steps import Span
from nsabench.run.work import Work, count_dense_work
from nsabench.run.worker import Sink

REPEATS = 100
"""Pieces of work in a step that is not slowed down: each more is 1 %."""

HANG_S = 1000.0
"""How long a planted hang hangs, unless it is ended."""

POLICY = Policy(cache="warm", sample_ms=15.0, shares=False, alone=False, memory=False, settle=True)
HASTY = replace(POLICY, timeout_s=16.0)
"""With a limit that a planted hang need not be waited for long: half of it."""

_IMPL = "planted"
_FORGOTTEN = 64
"""Keys at the end that a planted wrong result leaves out: a tile."""


@dataclass(frozen=True, kw_only=True)
class Plant:
    """One kind of planted truth. ``side`` is what is held against the base; ``expected`` the verdict or
    status that it must come to, ``says`` a word that the reason must hold. ``part``: of the runs asked for.

    ``least``: share that must come out as expected, None where none is demanded. ``limit_s``: seconds within
    which, or it counts for nothing. ``width`` and ``delta`` as for a comparison.
    """

    name: str
    side: str
    expected: tuple[str, ...]
    says: str = ""
    part: float = 0.05
    least: float | None = 1.0
    limit_s: float = 60.0
    width: float = 0.02
    delta: float = 0.01
    processes: int = 3
    policy: Policy = POLICY
    measure: str = "nsabench.run.self_test:measure"
    neighbour: bool = False

    @property
    def effort(self) -> Effort:
        """A further process is begun only where it ends before the limit; a tenth is left for the rest."""
        return Effort(processes=self.processes, width=self.width, budget_s=0.9 * self.limit_s)

    @property
    def is_fault(self) -> bool:
        """Whether there is no ratio to be found."""
        return not {"SAME", "SLOWER"} & set(self.expected)

    def runs(self, asked: int) -> int:
        """How many of this kind there are where ``asked`` comparisons of equals are: one at least."""
        return max(1, round(self.part * asked))

    def cells(self, device: str, number: int) -> list[Cell]:
        """The base, the side and the base again. ``number`` changes inputs and the order of rounds."""
        base = replace(BASE, device=device, dtype="fp32" if device == "cpu" else "bf16", seed=number)
        if self.side.startswith("win="):
            other = {"win": "reference", "cmp": "reference", "sel": "reference"}
            route = ",".join(f"{branch}={backend}" for branch, backend in other.items())
            base = replace(base, phase="prefill", impl="nsa", S=256, route=route)
            side = replace(base, route=route.replace("win=reference", self.side))
        else:
            side = replace(base, impl=f"{_IMPL}:{self.side}")
        return [base, side, replace(base, twin=1)]


BASE = Cell(
    phase="decode",
    passes="fwd",
    mode="batched",
    impl=f"{_IMPL}:{REPEATS}",
    scope="core",
    S=1024,
    B=1,
    dim=64,
    heads=1,
    groups=1,
    dk=64,
    dv=64,
    l=32,
    d=16,
    l_sel=64,
    n_sel=4,
    w=64,
    dtype="fp32",
    device="cpu",
    seed=0,
    route="auto",
)


def plants(device: str) -> tuple[Plant, ...]:
    """All that is planted on a device. Noise of a CPU hides 1 %: it is tried there now and then, not
    demanded.
    """
    slower, on_cpu = ("SLOWER",), device == "cpu"
    return (
        Plant(
            name="equal work", side="100b", expected=("SAME", "INCONCLUSIVE"), part=1, least=0.95, limit_s=20
        ),
        Plant(name="5 % slower", side="105", expected=slower, part=0.5, least=0.95, limit_s=20),
        Plant(name="2 % slower", side="102", expected=slower, part=0.5, least=0.9, width=0.01),
        Plant(
            name="1 % slower",
            side="101",
            expected=slower,
            part=0.1 if on_cpu else 0.5,
            least=None if on_cpu else 0.9,
            width=0.005,
            delta=0.005,
        ),
        Plant(name="wrong result", side="wrong", expected=("wrong",)),
        Plant(
            name="fallback",
            side="win=sdpa",
            expected=("invalid",),
            says="fell back",
            measure="nsabench.run.self_test:measure_fallback",
        ),
        Plant(
            name="neighbour",
            side="100b",
            expected=("INVALID",),
            says="other processes",
            width=10.0,
            processes=1,
            neighbour=True,
        ),
        Plant(name="hang", side="hang", expected=("hang",), policy=HASTY),
        Plant(name="crash", side="crash", expected=("error",), says="SIGSEGV"),
    )


def measure(
    cells: Sequence[Cell], policy: Policy, sink: Sink, *, process: int, clock: Callable[[], float]
) -> None:
    """`measure_group`, in a process that knows the planted implementations."""
    IMPLS.update({cell.impl: f"{__name__}:Planted" for cell in cells if cell.impl.startswith(_IMPL)})
    measure_group(cells, policy, sink, process=process, clock=clock)


def measure_fallback(
    cells: Sequence[Cell], policy: Policy, sink: Sink, *, process: int, clock: Callable[[], float]
) -> None:
    """`measure_group`, in a process whose route table says ``sdpa`` of the window and runs ``reference``."""
    honest = routes.TABLE
    target = next(row.target for row in honest if (row.branch, row.backend) == ("win", "reference"))
    lying = [(row.branch, row.backend) == ("win", "sdpa") for row in honest]
    routes.TABLE = tuple(
        replace(row, target=target) if lies else row for row, lies in zip(honest, lying, strict=True)
    )
    try:
        measure_group(cells, policy, sink, process=process, clock=clock)
    finally:
        routes.TABLE = honest


class Planted(Impl):
    """A repeated decode step of dense attention, one head: ``planted:100`` a hundred times (``100b`` too, by
    another name), ``planted:wrong``, ``planted:hang`` and ``planted:crash`` as they say.
    """

    leaves = ("q", "k", "v")

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell)
        self.kind = cell.impl.partition(":")[2]
        number = self.kind.rstrip("b")
        self.repeats = int(number) if number.isdigit() else REPEATS

    def layer(self) -> nn.Module:
        return _Layer(self.cell.dim, self.cell.dk).to(self.device, self.dtype)

    def cache(self, *, keep_graph: bool = False) -> None:
        return None

    def forward(self, layer: nn.Module, x: torch.Tensor, cache: None, route: str) -> torch.Tensor:
        raise NotImplementedError("planted work is a core")

    def attend(self, inputs: Inputs, route: str) -> torch.Tensor:
        if self.kind == "hang":
            time.sleep(HANG_S)
        if self.kind == "crash":
            ctypes.string_at(0)
        kept = inputs["k"].shape[1] - (_FORGOTTEN if self.kind == "wrong" else 0)
        q, k, v = (inputs[name][:, :kept].transpose(1, 2) for name in ("q", "k", "v"))
        for _ in range(self.repeats):
            out = scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2)

    def seen(self, whole: Inputs, span: Span, held: Inputs | None = None) -> Inputs:
        (start, end), first = span, whole["k"].shape[1] - whole["q"].shape[1]
        bounds = {"q": (start - first, end - first), "k": (0, end), "v": (0, end)}
        return {name: part_of(whole[name], a, b) for name, (a, b) in bounds.items()}

    def settle(self, route: str, spans: list[Span]) -> Fields:
        return {"provider": f"{self.repeats} times torch {torch.__version__} scaled_dot_product_attention"}

    def work(self, route: str, parameters: int) -> Work:
        once = count_dense_work(self.cell, parameters)
        return replace(once, flops=once.flops * self.repeats)

    def check(self, inputs: Inputs, span: Span, route: str, *, gradients: bool, elements: int) -> Verdict:
        length = inputs["k"].shape[1]
        everything = replace(self.config, window_size=length)

        def specify(given: Inputs, rows: Segment) -> torch.Tensor:
            a, b = rows
            q, start = given["q"][:, a:b], span[0] + a
            return reference.sliding_attention(q, given["k"], given["v"], everything, q_start=start)[0]

        return compare(inputs, [(0, inputs["q"].shape[1])], lambda given: self.attend(given, route), specify)

    def cache_bytes(self, cache: None) -> dict[str, int]:
        return {}


class _Layer(nn.Module):
    """``x (B,T,dim)`` to one head's ``q, k, v (B,T,1,D)``."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * head_dim, bias=False)

    def attention_inputs(self, x: torch.Tensor, cache: object = None) -> Inputs:
        return dict(zip("qkv", self.qkv(x).unsqueeze(2).chunk(3, -1), strict=True))
