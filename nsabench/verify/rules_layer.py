"""Rules about the whole layer: gates, separate keys, positions, packing, and what carries no gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from nsa import reference
from nsa.testing import error_budget
from nsabench.verify.cases import attention, changed, draw, layer, normal, small
from nsabench.verify.ours import build_layer, run_layer
from nsabench.verify.selection import exchanged, specified
from nsabench.verify.subjects import DTYPES, LAYER_DIM, Case, LayerCase, Tensors
from nsabench.verify.trial import Trial, largest, rule

GATES = ("cmp", "sel", "win")


def composed(given: dict[str, Any], config: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Eq. 5 from the specification's branches: the sum of gate x branch, ``blocks`` attended."""
    q, gates = given["q"], given["gates"]
    parts = (
        reference.compressed_attention(q, given["k_cmp"], given["v_cmp"], config)[0],
        reference.selected_attention(q, given["k_sel"], given["v_sel"], blocks, config)[0],
        reference.sliding_attention(q, given["k_win"], given["v_win"], config)[0],
    )
    return sum((gates[..., i, None] * part for i, part in enumerate(parts)), torch.zeros(()).to(q))


def _gated(dtype: str) -> list[LayerCase]:
    whole = attention(small(value_dim=32), 90, dtype)
    some = [whole]
    for i, branch in enumerate(GATES):
        alone = torch.zeros_like(whole.tensors["gates"])
        alone[..., i] = 1
        some.append(_with(whole, f"only {branch}", gates=alone))
    some.append(_with(whole, "1 2 4", gates=torch.tensor([1.0, 2.0, 4.0]).expand(2, 90, 4, 3)))
    return some


def _with(case: LayerCase, more: str, **tensors: torch.Tensor) -> LayerCase:
    made = changed(case, more, **tensors)
    assert isinstance(made, LayerCase)
    return made


def _composed_in(case: LayerCase, dtype: torch.dtype, blocks: torch.Tensor) -> torch.Tensor:
    given = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
    return composed(given, case.config, blocks)


@rule
def gates(trial: Trial) -> None:
    for case in trial.oracle.once(_gated, trial.dtype):
        found = trial.ask(case)
        if found is None:
            continue
        blocks = found["blocks"]
        exact = _composed_in(case, torch.float64, blocks)
        eager = _composed_in(case, DTYPES[trial.dtype], blocks)
        trial.close(case, "o", found["o"], exact, error_budget(exact, eager, largest(case)))
        truth = trial.oracle.once(specified, trial.oracle.once(_scores_of, case))
        trial.judge(case.name, "score of a block taken for a better one (log)", *exchanged(blocks, truth))


def _scores_of(case: LayerCase) -> Case:
    """The question about scores that is part of an attention's."""
    tensors = {name: case.tensors[name] for name in ("q", "k_cmp")}
    return Case(case.name, "score", case.config, case.dtype, tensors, kv_len=case.tensors["q"].shape[1])


def _separate(dtype: str) -> list[tuple[str, LayerCase, LayerCase, bool]]:
    """A branch alone, the same with keys and values of one branch changed, and whether it reads them."""
    whole, found = attention(small(), 70, dtype), []
    for i, branch in enumerate(GATES):
        alone = torch.zeros_like(whole.tensors["gates"])
        alone[..., i] = 1
        before = _with(whole, f"only {branch}", gates=alone)
        # Scores, and so the selected blocks, come from the compressed keys.
        own = [f"k_{branch}", f"v_{branch}"]
        read = [*own, "k_cmp"] if branch == "sel" else own
        others = [f"{kind}_{other}" for other in GATES for kind in "kv" if f"{kind}_{other}" not in read]
        for names, reads in ((others, False), *(([name], True) for name in own)):
            later = {name: whole.tensors[name].roll(1, -1) * -3 for name in names}
            found.append((branch, before, _with(before, f"{' '.join(names)} changed", **later), reads))
    return found


@rule
def separate_kv(trial: Trial) -> None:
    answers: dict[Case, Tensors | None] = {}
    for branch, before, after, reads in trial.oracle.once(_separate, trial.dtype):
        if before not in answers:
            answers[before] = trial.ask(before)
        first, second = answers[before], trial.ask(after)
        if first is None or second is None:
            return
        moved = int((first["o"] != second["o"]).sum())
        if reads:
            trial.holds(after.name, f"{branch} does not read its own", int(moved == 0))
        else:
            trial.holds(after.name, f"values of {branch} that read another branch's", moved)


def _turned(x: torch.Tensor, positions: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """``x (B,T,H,D)`` rotated by ``positions (T,)``, half-split pairs, angle by angle."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * base ** -(torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None].to(x), angle.sin()[:, None].to(x)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def _rotated_output(case: LayerCase, dtype: torch.dtype, blocks: torch.Tensor) -> torch.Tensor:
    """The layer's output from the average of unrotated keys, rotated here."""
    config, x = case.config, case.tensors["x"].to(dtype)
    with torch.no_grad():
        plain = build_layer(replace(case, options={**case.options, "rope": None}), "cpu", dtype)
        built = build_layer(case, "cpu", dtype)
        raw, given = plain.attention_inputs(x), built.attention_inputs(x)
        token = torch.arange(x.shape[1])
        first = torch.arange(raw["k_cmp"].shape[1]) * config.compression_stride
        for name, positions in (("q", token), ("k_sel", token), ("k_win", token), ("k_cmp", first)):
            given[name] = _turned(raw[name], positions)
        return built.out(composed(given, config, blocks).flatten(2))


def _positioned(dtype: str) -> list[LayerCase]:
    # All three branches, and the compressed one alone.
    return [layer(small(), 90, dtype, more=f"gates {only or 'all'}", only=only) for only in ("", "cmp")]


@rule
def positions(trial: Trial) -> None:
    for case in trial.oracle.once(_positioned, trial.dtype):
        found = trial.ask(case)
        if found is None:
            continue
        exact, eager = (
            _rotated_output(case, dtype, found["blocks"]) for dtype in (torch.float64, DTYPES[trial.dtype])
        )
        trial.close(case, "o", found["o"], exact, error_budget(exact, eager, largest(case)))


PACKS = (17, 0, 1, 66, 6)
"""Tokens of packed sequences: one of none, one of one."""


def _packed(dtype: str) -> LayerCase:
    case = layer(small(), sum(PACKS), dtype, batch=1, chunks=PACKS, mode="packed", more=f"packed {PACKS}")
    return replace(case, upstream=normal(1, sum(PACKS), LAYER_DIM, seed=1))


def _loop(case: LayerCase, dtype: torch.dtype, blocks: torch.Tensor) -> Tensors:
    """Each sequence on its own, put together; parameters' gradients added up."""
    ends = torch.tensor([0, *case.chunks]).cumsum(0).tolist()
    total: Tensors = {}
    assert case.upstream is not None
    for a, b in pairwise(ends):
        if a == b:
            continue
        tensors = {"x": case.tensors["x"][:, a:b]}
        upstream = case.upstream[:, a:b]
        one = replace(
            case, tensors=tensors, mode="batched", chunks=(), blocks=blocks[:, a:b], upstream=upstream
        )
        for key, tensor in run_layer(one, "cpu", "reference", dtype).items():
            if key in ("o", "d_x"):
                total[key] = torch.cat([total[key], tensor], 1) if key in total else tensor
            elif key != "blocks":
                total[key] = total[key] + tensor if key in total else tensor
    return total


@rule
def packed(trial: Trial) -> None:
    case = trial.with_gradients(trial.oracle.once(_packed, trial.dtype))
    assert isinstance(case, LayerCase)
    found = trial.ask(case)
    if found is None:
        return
    exact, eager = (_loop(case, dtype, found["blocks"]) for dtype in (torch.float64, DTYPES[trial.dtype]))
    for key, truth in exact.items():
        if key in found:
            budget = error_budget(truth, eager[key], largest(case))
            trial.close(case, key, found[key], truth, budget)


def _choosing(dtype: str) -> LayerCase:
    return attention(small(), 90, dtype, gradients=True)


@rule
def no_selection_gradient(trial: Trial) -> None:
    if trial.branch == "score":
        case = replace(draw("score", small(), 100, trial.dtype), gradients=True)
        if trial.ask(case) is not None:
            lists = trial.subject.run(case)["blocks"]
            trial.holds(case.name, "lists with a gradient", int(lists.requires_grad))
            trial.holds(case.name, "lists that are no integers", int(lists.is_floating_point()))
        return
    # With the chosen blocks given, no score takes part: the gradients must be the same.
    chosen = trial.oracle.once(_choosing, trial.dtype)
    found = trial.ask(chosen)
    if found is None:
        return
    given = replace(chosen, blocks=found["blocks"])
    exact, eager = trial.oracle.exact(given), trial.oracle.eager(given)
    for name in ("d_q", "d_k_cmp", "d_k_sel"):
        budget = error_budget(exact[name], eager[name], largest(chosen))
        trial.close(chosen, name, found[name], exact[name], budget)
