"""One arm of a group: a route on the group's workload, from the gate to its row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from nsabench.measure import (
    CpuTimer,
    GraphTimer,
    Shares,
    StageRecorder,
    Timer,
    backward_shares,
    choose_iters,
    make_timer,
    peak_memory,
)
from nsabench.measure.stages import Hook
from nsabench.plan import Cell
from nsabench.run.check import Verdict
from nsabench.run.cold import prove_cold
from nsabench.run.cross_check import cross_check
from nsabench.run.gate import Refused, judge, refuse_other_output
from nsabench.run.kernels import (
    PROFILED_CALLS,
    Weighted,
    attributed,
    graph_shares,
    kernel_rows,
    refuse_fallback,
)
from nsabench.run.limits import known_peaks, part_of_limit
from nsabench.run.policy import Policy
from nsabench.run.timing import time_fields
from nsabench.run.workload import Variant, Workload
from nsabench.stats import median_interval
from nsabench.store.schema import STAGES

BRANCHES = ("cmp", "sel", "win")
ALONE_SAMPLES = 5
SHARE_BATCHES = 5
SHARE_TRIES = 3
# Steps of a sample at most; a flush of the cache before each costs far more than a short step.
COLD_ITERS, WARM_ITERS = 5, 10_000
# An instrumented step this much slower or faster than the timed one says nothing about it.
SHARES_WITHIN = 2.0


class Arm:
    """A route of a group. ``prepare`` gates and warms up, ``sample`` is called once a round, ``finish``
    closes the account; what comes of it stands in ``fields`` and ``samples``.

    ``clock`` gives the seconds of ``t_s``; ``process`` is the number of the process that measures.
    """

    def __init__(
        self,
        cell: Cell,
        workload: Workload,
        policy: Policy,
        clock: Callable[[], float] = time.perf_counter,
        process: int = 0,
    ) -> None:
        self.cell, self.workload, self.policy = cell, workload, policy
        self.clock, self.process = clock, process
        self.fields: dict[str, Any] = {
            **cell.to_dict(),
            "cell_id": cell.cell_id,
            "status": "ok",
            "reason": "",
        }
        self.samples: list[dict[str, Any]] = []
        self.kernels: list[dict[str, Any]] = []
        self._profiled: Weighted = []
        self._timers: list[tuple[Variant, Timer, int]] = []
        self._first: dict[str, torch.Tensor] = {}
        self._places: list[list[Variant]] = []
        self.step_ms = math.inf
        """Of the shortest variant, once, before the rounds."""

    def prepare(self) -> None:
        """Settle the route, check the result against the specification, warm up. Raises :class:`Refused`."""
        self.fields |= self.workload.settle(self.cell.route)
        self._describe_work()
        verdict, expected = judge(self.workload, self.cell.route)
        self._record(verdict)
        self.note(prove_cold(self.cell, self.policy, self.fields))
        for variant in self.workload.variants(self.cell.route):
            timer = self._timer(variant)
            self._first[variant.name] = _kept(timer.output)
            if self.cell.passes == "fwd":
                refuse_other_output(self._first[variant.name], expected[variant.name], _of(variant))
            once = max(timer.sample(1), 1e-4)
            timer.steps = timer.gated_steps = 0  # those of the rounds are to count
            self._timers.append((variant, timer, self._iters(once)))
            self.step_ms = min(self.step_ms, once)
        self.fields |= {
            "timer": self._timers[0][1].name,
            "regime": self.policy.regime,
            "cache": self.policy.cache_for(self.cell),
        }
        if self.fields["timer"] in ("graph", "cpu"):
            self.fields["copies"] = 1

    def _iters(self, once_ms: float) -> int:
        """How often what takes ``once_ms`` is timed a sample."""
        return choose_iters(once_ms, self.policy.sample_ms, limit=self._most_iters)

    @property
    def _most_iters(self) -> int:
        return COLD_ITERS if self.policy.cache_for(self.cell) == "cold" else WARM_ITERS

    def rotate(self, count: int) -> None:
        """Time each step ``count`` at a time, in one graph: cold ones each on tensors of its own. Raises
        Refused where one of them gives another result.
        """
        cold = self.fields["cache"] == "cold"
        copies = [
            workload.variants(self.cell.route) for workload in self.workload.copies(count if cold else 1)[1:]
        ]
        for place, (variant, _, _) in enumerate(list(self._timers)):
            others = [mine[place].step for mine in copies] if cold else [variant.step] * (count - 1)
            timer = self._make_timer("graph")
            assert isinstance(timer, GraphTimer)
            timer.prepare(variant.step, *others)
            for output in timer.outputs:
                self._refuse_other(variant, _kept(output), "in a copy")
            self._timers[place] = variant, timer, count * self._iters(count * self.step_ms)
        self.fields["copies"] = count if cold else 1

    def spread(self, count: int) -> None:
        """Take turns, a round each, on the workload's first ``count`` copies, itself the first of them."""
        self._places = [workload.variants(self.cell.route) for workload in self.workload.copies(count)]
        self.fields["copies"] = count

    def note(self, text: str) -> None:
        """Add to ``timers_note``."""
        notes = [self.fields.get("timers_note"), text]
        self.fields["timers_note"] = "; ".join(filter(None, notes))

    def release(self) -> None:
        """Let go of what only sampling needs: outputs, captured graphs."""
        self._timers.clear()
        self._first.clear()
        self._places.clear()

    def _describe_work(self) -> None:
        work = self.workload.work(self.cell.route)
        cached = self.workload.cache_bytes()
        self.fields |= {
            "flops": work.flops,
            "bytes": work.bytes,
            "reads_tokens": work.reads_tokens,
            "reads_tokens_dense": work.reads_tokens_dense,
            "kv_cache_bytes": sum(cached.values()) if cached else None,
            **{f"kv_cache_{branch}_bytes": cached.get(branch) for branch in BRANCHES},
        }

    def _record(self, verdict: Verdict) -> None:
        error = verdict.error
        finite = math.isfinite(error.max_abs_err)
        self.fields |= {
            "max_abs_err": error.max_abs_err if finite else None,
            "rel_err": error.rel_err if finite else None,
            "err_budget": error.budget,
            "selection_overlap": verdict.overlap,
            "neighbour_overlap": verdict.sharing.neighbour_overlap,
            "union_blocks": verdict.sharing.union_blocks,
        }
        if verdict.proof:
            self.fields["route_proof"] = verdict.proof
        if verdict.reason:
            raise Refused("nan" if verdict.has_nan else "wrong", verdict.reason)

    def _timer(self, variant: Variant) -> Timer:
        timer = self._make_timer(self.policy.timer_for(self.cell))
        timer.prepare(variant.step)
        return timer

    def _make_timer(self, kind: str) -> Timer:
        return make_timer(kind, self.workload.device, self.policy.cache_for(self.cell), self.policy.regime)

    def sample(self, round_number: int, position: int) -> None:
        """One sample of each variant. Raises Refused where a copy gives another result."""
        place = round_number % len(self._places) if self._places else 0
        for number, (variant, timer, iters) in enumerate(self._timers):
            if self._places:
                assert isinstance(timer, CpuTimer)
                timer.use(self._places[place][number].step)
            at = self.clock()
            self.samples.append(
                {
                    "process": self.process,
                    "round": round_number,
                    "position": position,
                    "variant": variant.name,
                    "iters": iters,
                    "ms": timer.sample(iters),
                    "t_s": at,
                }
            )
            if place == round_number > 0:
                self._refuse_other(variant, _kept(timer.output), "in a copy")

    def finish(self) -> None:
        """After the rounds: the result once more, then time, shares, branches alone and memory. Raises
        Refused.
        """
        self._check_again()
        self._attribute()
        self._time()
        if self.cell.device != "cpu":
            self.note(cross_check(self._timers, self._make_timer, self.fields))
        if self.policy.shares:
            self._shares()
        if self.policy.alone and self.cell.passes == "fwd":
            self._alone()
        if self.policy.memory:
            peak = peak_memory(self._timers[0][0].step, self.workload.device)
            self.fields |= {"peak_alloc_bytes": peak.alloc_bytes, "peak_reserved_bytes": peak.reserved_bytes}

    def _check_again(self) -> None:
        """The last timed output against the first one: timing must not have changed the result."""
        for variant, timer, _ in self._timers:
            last = _kept(timer.output)
            if not bool(torch.isfinite(last).all()):
                raise Refused("nan", f"the last timed output{_of(variant)} is not finite")
            self._refuse_other(variant, last, "while timed")

    def _refuse_other(self, variant: Variant, output: torch.Tensor, when: str) -> None:
        """Refused where an output is not the first one, but for rounding."""
        first = self._first[variant.name]
        moved = float((output - first).abs().max()) if output.numel() else 0.0
        allowed = self.fields["err_budget"] + 16 * torch.finfo(output.dtype).eps * float(first.abs().max())
        if not moved <= allowed:
            raise Refused(
                "wrong", f"the output{_of(variant)} moved by {moved:.3g} {when}; allowed {allowed:.3g}"
            )

    def _time(self) -> None:
        weights = {variant.name: variant.weight for variant, _, _ in self._timers}
        work = {"flops": self.fields["flops"], "moved_bytes": self.fields["bytes"]}
        self.fields |= time_fields(self.cell, self.samples, weights, **work)
        self.fields |= part_of_limit(self.fields, known_peaks(self.cell.device))

    def _attribute(self) -> None:
        """The kernels of its steps, and once more the proof of its route: of the steps that were timed."""
        if not (self.policy.shares and self.policy.kernels):
            return
        steps = [variant for variant, _, _ in self._timers]
        self._profiled = attributed(self.workload, steps, self.cell.route, self.fields, self.step_ms)
        refuse_fallback(self.cell, self.fields, self._profiled)
        self.kernels = kernel_rows(self._profiled)

    def _shares(self) -> None:
        """Shares of the stages; a step that was disturbed while instrumented is instrumented again."""
        hook, total = self.workload.hook, self.fields["ms_total"]
        if hook is None:
            self.fields["shares_note"] = f"the core of {self.cell.impl} is one stage"
            return
        for _ in range(SHARE_TRIES):
            shares = self._weighted_shares(hook)
            near = total / SHARES_WITHIN <= shares.total_ms <= total * SHARES_WITHIN
            if shares.pct is None or near or self.cell.passes != "fwd":
                break
        else:
            took = f"the instrumented step took {shares.total_ms:.3g} ms, the timed one {total:.3g} ms"
            shares = Shares(shares.total_ms, None, took)
        if shares.pct is None:
            self.fields["shares_note"] = shares.note
            return
        for stage in STAGES:
            part = shares.pct.get(stage, 0.0)
            self.fields |= {f"share_{stage}_pct": part, f"ms_{stage}": part / 100 * total}

    def _weighted_shares(self, hook: Hook) -> Shares:
        if self._profiled and self.fields["timer"] == "graph":
            parts = [(weight, graph_shares(step)) for weight, step in self._profiled]
        else:
            parts = [(variant.weight, self._shares_of(variant, hook)) for variant, _, _ in self._timers]
        shares = parts[0][1].scaled(parts[0][0] * parts[0][1].total_ms)
        for weight, other in parts[1:]:
            shares = shares.plus(other.scaled(weight * other.total_ms))
        return shares

    def _shares_of(self, variant: Variant, hook: Hook) -> Shares:
        if self.cell.passes == "fwd":
            return self._forward_shares(variant.step, hook)
        calls = len(self.workload.steps[0].spans)
        if calls > PROFILED_CALLS:
            return Shares(1.0, None, f"the backward of {calls} calls is too long to profile")
        runs = 3 if calls == 1 else 1
        step = self.workload.training_step(self.cell.route)
        back = backward_shares(step, hook, self.workload.device, n=runs)
        if self.cell.passes == "bwd":
            return back
        forward = self._forward_shares(self.workload.graph_step(self.cell.route), hook)
        # A profiled backward is slower than a timed one: it gives the shares, the timer the whole.
        rest = self.fields["ms_total"] - forward.total_ms
        if rest <= 0:
            took = f"the forward took {forward.total_ms:.3g} ms of a step of {self.fields['ms_total']:.3g} ms"
            return Shares(forward.total_ms, None, took)
        return forward.plus(back.scaled(rest))

    def _forward_shares(self, step: Callable[[], object], hook: Hook) -> Shares:
        """Mean shares over batches of runs, with the total of the middle batch: a pause spoils only one."""
        recorder = StageRecorder(self.workload.device, cache=self.policy.cache_for(self.cell))
        runs = max(1, self.policy.share_runs // SHARE_BATCHES)
        batches = [recorder.run(step, hook, n=runs) for _ in range(SHARE_BATCHES)]
        return Shares.mean(batches).scaled(median(batch.total_ms for batch in batches))

    def _alone(self) -> None:
        """The step with only one branch's work: skipped, not gated away. Another metric than the shares."""
        for branch, only in self.workload.alone(self.cell.route).items():
            total = 0.0
            for variant, (_, _, iters) in zip(self.workload.variants(only), self._timers, strict=True):
                timer, iters = self._timer(variant), min(iters, self._most_iters)
                total += (
                    variant.weight
                    * median_interval([timer.sample(iters) for _ in range(ALONE_SAMPLES)]).point
                )
            self.fields[f"ms_alone_{branch}"] = total


def _of(variant: Variant) -> str:
    return f" of the {variant.name} step" if variant.name else ""


def _kept(output: object) -> torch.Tensor:
    assert isinstance(output, torch.Tensor)
    return output.detach().clone()
