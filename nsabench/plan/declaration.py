"""What a suite may say: the one declaration behind its checks, the options of sweeps and the JSON Schema."""

from __future__ import annotations

from nsabench.plan.cells import ALL, BASELINES, IMPLS, allowed, pattern
from nsabench.plan.kinds import (
    Choice,
    Duration,
    Flag,
    Kind,
    Names,
    Number,
    Routes,
    Sizes,
    Table,
    Tables,
    Text,
    Whole,
    Words,
)
from nsabench.plan.training import PRECISIONS

TIMERS = ("auto", "cpu", "host", "event", "graph")
CACHES = ("auto", "cold", "warm")
REGIMES = ("latency", "sustained")
PHASES = ("decode", "prefill")


def _words(name: str, about: str, default: tuple[str, ...] | None = None) -> Words:
    return Words(about, pattern(name), allowed(name), default)


SHAPE: dict[str, Kind] = {
    "dim": Sizes("Model width, channels."),
    "heads": Sizes("Query heads."),
    "groups": Sizes("KV heads; they divide the query heads."),
    "dk": Sizes("Key dim of a head, channels."),
    "dv": Sizes("Value dim of a head, channels; as dk where left out."),
    "l": Sizes("Compression block size, tokens.", default=(32,)),
    "d": Sizes("Compression stride, tokens.", default=(16,)),
    "l_sel": Sizes("Selection block size, tokens.", default=(64,)),
    "n_sel": Sizes("Selected blocks per query.", default=(16,)),
    "w": Sizes("Sliding window, tokens.", default=(512,)),
    "dtype": _words("dtype", "Floating-point type."),
    "device": Words(
        "Where to measure; auto is the GPU where there is one, else the CPU.",
        f"auto|{pattern('device')}",
        "auto, cpu, cuda, cuda:N",
        ("auto",),
    ),
    "scope": _words("scope", "What is timed: module, the layer, or core, the attention alone.", ("module",)),
    "selection": _words(
        "selection", "How blocks come to be selected; the scores are computed in any case.", ("natural",)
    ),
    "seed": Sizes("Seed of weights, inputs and the order in a round.", minimum=0, default=(0,)),
}
AXES: dict[str, Kind] = {
    "S": Sizes("Sequence lengths, tokens.", default=(512, 1024, 2048)),
    "B": Sizes("Batch sizes, sequences.", default=(1,)),
    "routes": Routes("Routes of NSA to measure side by side.", ("auto",)),
    "passes": _words("passes", "Passes of a prefill.", ("fwd",)),
    "mode": _words("mode", "How a prefill feeds its prompt.", ("batched",)),
    "impl": Names(
        "What to measure: nsa by its routes, a dense attention, or a peer.", (*IMPLS, ALL), ("nsa",)
    ),
    "baselines": Names(
        "Dense attention to measure beside it in the same rounds; all is each kind, none stands for nothing.",
        (*BASELINES, ALL, "none"),
        ("none",),
    ),
    **SHAPE,
}
"""The axes of a sweep: each may hold several values, and every combination is measured."""

PREFILL_ONLY = {"passes": "fwd", "mode": "batched"}
"""Axes of a prefill, and their one value in decode."""

POLICY: dict[str, Kind] = {
    "rounds": Whole("Rounds, each of which times every arm once; an interval needs 6.", 1, 10_000),
    "sample_ms": Number("Steps are repeated to fill this many ms a sample.", 60_000),
    "timer": Choice("What times a step; auto: by device and phase.", TIMERS),
    "cache": Choice("Last-level cache before a step; auto: cold for decode, else warm.", CACHES),
    "regime": Choice("latency: one step at a time; sustained: back to back.", REGIMES),
    "shares": Flag("Measure each stage inside the step."),
    "alone": Flag("Measure each branch run by itself."),
    "share_runs": Whole("Steps in which stages are measured.", 1, 10_000),
    "timeout_s": Duration("Longest a cell may take, seconds or text such as 10m."),
    "budget": Duration("Time for the whole suite, such as 9m; what does not fit is left for resume."),
}
SPEEDUP = Table(
    "One ratio of times that must be reached: against over route, 1 and more when route is faster.",
    {
        "S": Whole("Sequence length, tokens.", 1),
        "phase": Choice("Phase.", PHASES),
        "passes": Choice("Pass; fwd where left out.", ("fwd", "bwd", "fwd_bwd")),
        "scope": Choice("Scope; module where left out.", ("module", "core")),
        "route": Text("Route of NSA; auto where left out."),
        "against": Text("What it is held against: a baseline, such as dense, or another route."),
        "ratio": Number("Least ratio.", 1e6),
    },
    required=("S", "phase", "against", "ratio"),
)
MAX_MS = Table(
    "One time of a step that must not be passed.",
    {
        "S": Whole("Sequence length, tokens.", 1),
        "phase": Choice("Phase.", PHASES),
        "passes": Choice("Pass; fwd where left out.", ("fwd", "bwd", "fwd_bwd")),
        "scope": Choice("Scope; module where left out.", ("module", "core")),
        "route": Text("Route of NSA, or a baseline such as dense; auto where left out."),
        "ms": Number("Longest time, ms.", 1e9),
    },
    required=("S", "phase", "ms"),
)
TRAINING = Table(
    "What one training must show: status ok and every loss finite, in any case, and what is given here.",
    {
        "precision": Choice("Only a training in this precision; any where left out.", PRECISIONS),
        "steps": Whole("Least steps.", 1),
        "loss": Number("Highest mean loss of its last tenth of steps, nats.", 1e6),
        "loss_falls": Flag("The mean loss of its last tenth of steps is below that of its first."),
        "open_gates": Flag("In no layer had the gates collapsed at its end."),
        "needle": Number("Least accuracy of needle retrieval from beyond the window, a part of 1.", 1),
        "sel_off_near_chance": Flag(
            "The same accuracy with the selected branch off is within 0.05, or 3 standard errors, of chance."
        ),
    },
)
CRITERIA: dict[str, Kind] = {
    "require_ok": Flag("Every planned cell must be ok; one that this machine cannot run fails too."),
    "max_failures": Whole("Most cells that may fail; one that this machine cannot run is no failure.", 0),
    "correct": Flag("Every ok cell must be checked against the reference, within its error budget."),
    "max_rel_interval": Number(
        "Widest 95 % interval of an ok cell's time, as a part of that time: 0.05 is 5 %.", 100
    ),
    "comparisons": Choice(
        "What verdicts of nsabench compare must be: valid, none is INVALID; conclusive, nor INCONCLUSIVE.",
        ("valid", "conclusive"),
    ),
    "verify": Choice("pass: a scorecard of nsabench verify in which nothing of ours fails.", ("pass",)),
    "speedup": Tables("Ratios that must be reached.", SPEEDUP),
    "max_ms": Tables("Times that must not be passed.", MAX_MS),
    "training": Tables("Trainings there must be, each met by one run of nsabench train.", TRAINING),
}
SWEEP = Table(
    "One sweep: every combination of its axes, over the defaults of [shape].",
    {
        "phase": Choice("decode: one token after S. prefill: a prompt of S tokens.", PHASES),
        "headline": Flag("Measured before sweeps without it."),
        **AXES,
    },
    required=("phase",),
)
SUITE = Table(
    "Sweeps to measure in one run.",
    {
        "about": Text("What the suite is for, in a line."),
        "tags": Words("Words to find its runs by.", r"[\w.:/=+-]+", "words of letters, digits and _.:/=+-"),
        "policy": Table("How to measure; what is left out is as on the command line.", POLICY),
        "shape": Table("Defaults of all sweeps; what is left out is as on the command line.", SHAPE),
        "sweep": Tables("The sweeps, in the order in which they are measured.", SWEEP),
        "criteria": Table("What must come out, for a report.", CRITERIA),
    },
    required=("about", "sweep"),
)
