"""Rules by number: values and gradients against the specification in fp64, at every shape that trips."""

from __future__ import annotations

from dataclasses import replace

import torch

import nsa.reference
from nsa import NSAConfig
from nsa.routes import FUNCTIONS
from nsa.testing import error_budget
from nsabench.verify import brute
from nsabench.verify.cases import borders, changed, draw, layer, small
from nsabench.verify.ours import run_function
from nsabench.verify.selection import meets_selection
from nsabench.verify.subjects import DTYPES, Case, Tensors
from nsabench.verify.trial import Trial, largest, rule

NO_ORACLE = (
    "logits of hundreds are rounded in fp64 as in the specification: nothing is exact enough to judge by"
)

GROUPS = (1, 3, 4, 5, 6, 12)
STARTS = ((1, 1), (6, 3), (23, 2), (40, 70), (203, 5))
"""(position of the first query, queries)."""

GEOMETRIES = (
    (6, 3, 9, 4, 7, 1, 2),
    (16, 16, 16, 4, 1, 1, 2),
    (32, 4, 32, 4, 300, 1, 2),
    (8, 4, 16, 1, 24, 0, 0),
    (8, 4, 16, 30, 24, 2, 3),
    (32, 16, 64, 16, 512, 1, 2),
)
"""l, d, l', n, w, and how many blocks are initial and local."""

_FIELDS = (
    "compression_block_size",
    "compression_stride",
    "selection_block_size",
    "num_selected_blocks",
    "window_size",
    "num_initial_blocks",
    "num_local_blocks",
)


def meets(trial: Trial, case: Case) -> None:
    """Put down how a case's answer differs from the specification's, lists or values."""
    if case.branch == "score":
        meets_selection(trial, case)
    else:
        trial.meets_spec(case)


def _typical(branch: str, dtype: str, full: bool) -> list[Case]:
    if branch == "layer":
        layers: list[Case] = [layer(small(value_dim=8), 90, dtype)]
        if full:
            layers += [
                layer(small(), 70, dtype, more=", ".join(options), options=options)
                for options in (
                    {"compress": "mlp", "gate": "softmax"},
                    {"compress": "conv", "rope": None},
                    {"shared_kv": True},
                    {"compress_rotated": True},
                )
            ]
        return layers
    config = small(value_dim=32)
    some = [draw(branch, config, 90, dtype)]
    if full or dtype == "fp32":
        some.append(draw(branch, small(num_heads=2), 70, dtype, batch=1, seed=5))
    if full:
        some.append(draw(branch, NSAConfig(4, 2, 16), 1100, dtype, batch=1, more="l=32 d=16 l'=64 n=16"))
    return some


@rule
def values(trial: Trial) -> None:
    for case in trial.oracle.once(_typical, trial.branch, trial.dtype, trial.full):
        trial.meets_spec(case)


@rule
def gradients(trial: Trial) -> None:
    for case in trial.oracle.once(_typical, trial.branch, trial.dtype, trial.full):
        asked = trial.oracle.once(_gradients_of, case)
        trial.meets_spec(asked)


def _gradients_of(case: Case) -> Case:
    return replace(case, gradients=True)


def _values_of(case: Case) -> Case:
    return replace(case, gradients=False)


def _tiny(branch: str, dtype: str) -> list[Case]:
    config = NSAConfig(
        4, 2, 16, 32, compression_block_size=4, compression_stride=2, selection_block_size=6,
        num_selected_blocks=3, window_size=5, num_local_blocks=1,
    )  # fmt: skip
    return [draw(branch, config, 26, dtype), draw(branch, config, 5, dtype, q_start=torch.tensor([21, 2]))]


@rule
def brute_force(trial: Trial) -> None:
    for case in trial.oracle.once(_tiny, trial.branch, trial.dtype):
        exact: Tensors = trial.oracle.once(brute.answers, case)
        if case.branch == "score":
            meets_selection(trial, case, exact)
            continue
        found = trial.ask(case)
        for key in found.keys() & exact.keys() if found else ():
            eager = trial.oracle.eager(case)[key]
            budget = error_budget(exact[key], eager, largest(case))
            trial.close(case, key, found[key], exact[key], budget)  # type: ignore[index]


def _lengths(branch: str, dtype: str, full: bool) -> list[Case]:
    config = small(value_dim=8) if branch == "layer" else small()
    if branch == "layer":
        return [layer(config, length, dtype) for length in borders(config)]
    more = [127, 128, 129, 1037] if full else []
    return [draw(branch, config, length, dtype) for length in (*borders(config), *more)]


@rule
def lengths(trial: Trial) -> None:
    for case in trial.oracle.once(_lengths, trial.branch, trial.dtype, trial.full):
        meets(trial, trial.with_gradients(case) if trial.full and case.branch != "score" else case)


def _groups(branch: str, dtype: str) -> list[Case]:
    return [draw(branch, small(num_heads=2 * group), 66, dtype) for group in GROUPS]


@rule
def group_sizes(trial: Trial) -> None:
    for case in trial.oracle.once(_groups, trial.branch, trial.dtype):
        backward = trial.full or case.config.group_size in (3, 12)
        meets(trial, trial.with_gradients(case) if backward and case.branch != "score" else case)


def _dims(branch: str, dtype: str) -> list[Case]:
    dims = ((192, 128), (16, 32), (32, 16))
    return [draw(branch, small(head_dim=dk, value_dim=dv), 70, dtype) for dk, dv in dims]


@rule
def value_dim(trial: Trial) -> None:
    for case in trial.oracle.once(_dims, trial.branch, trial.dtype):
        meets(trial, trial.with_gradients(case))


def _geometries(branch: str, dtype: str) -> list[Case]:
    return [
        draw(
            branch,
            small(**dict(zip(_FIELDS, shape, strict=True))),
            150,
            dtype,
            batch=1,
            more="l={} d={} l'={} n={} w={} initial={} local={}".format(*shape),
        )
        for shape in GEOMETRIES
    ]


@rule
def geometries(trial: Trial) -> None:
    for case in trial.oracle.once(_geometries, trial.branch, trial.dtype):
        meets(trial, case if case.branch == "score" else trial.with_gradients(case))


@rule
def bad_geometry(trial: Trial) -> None:
    for wrong in (
        {"compression_stride": 3},
        {"compression_stride": 8, "selection_block_size": 20},
        {"compression_block_size": 32},
        {"num_selected_blocks": 2},
        {"num_heads": 3},
    ):
        name = ", ".join(f"{field}={value}" for field, value in wrong.items())
        try:
            small(**wrong)
        except ValueError as error:
            trial.holds(name, "lines of the message beyond the first", str(error).count("\n"))
        else:
            trial.holds(name, "a geometry that cannot be was taken", 1)


def _strided(branch: str, dtype: str) -> list[Case]:
    whole = draw(branch, small(), 70, dtype, q_start=30)
    layouts = ("heads first", "sliced", "channels first", "expanded")
    return [replace(whole, layout=layout, name=f"{whole.name} {layout}") for layout in layouts]


@rule
def strides(trial: Trial) -> None:
    for case in trial.oracle.once(_strided, trial.branch, trial.dtype):
        if case.branch == "score" and case.layout == "expanded":
            continue
        meets(trial, case if case.branch == "score" else trial.with_gradients(case))


def _starts(branch: str, dtype: str, full: bool) -> list[Case]:
    starts = STARTS if full else STARTS[1:4]
    some = [draw(branch, small(), rows, dtype, q_start=start) for start, rows in starts]
    some.append(draw(branch, small(), 3, dtype, keys=64, q_start=40, more="keys=64"))
    for rows in (1, 3, 66) if full else (1, 66):
        some.append(draw(branch, small(), rows, dtype, batch=4, q_start=torch.tensor([0, 41, 6, 130])))
    return some


@rule
def any_start(trial: Trial) -> None:
    for case in trial.oracle.once(_starts, trial.branch, trial.dtype, trial.full):
        backward = trial.full or case.tensors["q"].shape[1] > 3
        meets(trial, trial.with_gradients(case) if backward and case.branch != "score" else case)


def _steps(branch: str, dtype: str) -> tuple[Case, list[tuple[int, Case]]]:
    config = small()
    whole = draw(branch, config, 80, dtype)
    steps = []
    for t in sorted({*(length - 1 for length in borders(config)), 79}):
        blocks = max(0, (t + 1 - config.compression_block_size) // config.compression_stride + 1)
        cut = {"k": t + 1, "v": t + 1, "k_cmp": blocks, "v_cmp": blocks}
        tensors = {n: x[:, : cut[n]] if n in cut else x[:, t : t + 1] for n, x in whole.tensors.items()}
        kv_len = t + 1 if branch == "score" else None
        name = f"{whole.name} token {t} alone"
        steps.append((t, replace(whole, tensors=tensors, q_start=t, kv_len=kv_len, name=name)))
    return whole, steps


@rule
def decode(trial: Trial) -> None:
    whole, steps = trial.oracle.once(_steps, trial.branch, trial.dtype)
    for t, case in steps:
        if case.branch == "score":
            meets_selection(trial, case)
            continue
        found = trial.ask(case)
        for key in found.keys() & {"o", "lse"} if found else ():
            exact = trial.oracle.exact(whole)[key][:, t : t + 1]
            eager = trial.oracle.eager(whole)[key][:, t : t + 1]
            budget = error_budget(exact, eager, largest(whole))
            trial.close(case, key, found[key], exact, budget)  # type: ignore[index]


def reference_of(case: Case, dtype: str) -> Tensors:
    """The specification's answer to a case of a branch, computed in ``dtype``."""
    return run_function(getattr(nsa.reference, FUNCTIONS[case.branch]), case, "cpu", DTYPES[dtype])


def _far_maxima(branch: str, dtype: str) -> list[Case]:
    if branch == "score":
        case = draw("score", small(num_heads=8), 300, dtype)
        size = torch.tensor([300.0, 1.0, 0.01, -300.0] * 2)[:, None]
        return [changed(case, "heads of one group 300 apart", q=case.tensors["q"] * size)]
    some = []
    for most in (100.0, 700.0):
        # A backward from lse errs by the rounding of logits, at 700 by more than eager code: values only.
        case = draw(branch, small(), 100, dtype, gradients=most < 700)
        size = torch.linspace(0, 1, 100)[:, None, None] * torch.tensor([1.0, 0.01, 1.0, -1.0])[:, None]
        tensors = {"q": size * most / 16 + 0.1 * case.tensors["q"]}
        for name in case.tensors.keys() & {"k", "k_cmp"}:
            tensors[name] = 4 + 0.3 * case.tensors[name]
        some.append(changed(case, f"largest logit {most:.0f}", **tensors))
    return some


@rule
def row_maxima(trial: Trial) -> None:
    if trial.dtype == "fp64":
        trial.refused.append(NO_ORACLE)
        return
    for case in trial.oracle.once(_far_maxima, trial.branch, trial.dtype):
        if case.gradients and not trial.takes(case):
            case = trial.oracle.once(_values_of, case)
        meets(trial, case)


def _negative(branch: str, dtype: str, full: bool) -> list[Case]:
    some = []
    for logit in (-30.0, -200.0, -4000.0) if full else (-200.0,):
        # With q = a and k = -a in 16 places a logit is -16 a^2 / 4; some noise keeps the softmax alive.
        place = (-logit / 4) ** 0.5
        case = draw(branch, small(), 100, dtype, q_start=40)
        tensors = {"q": case.tensors["q"] * 0.1 / place + place}
        for name in case.tensors.keys() & {"k", "k_cmp"}:
            tensors[name] = case.tensors[name] * 0.1 / place - place
        some.append(changed(case, f"logits {logit:.0f}", **tensors))
    return some


@rule
def very_negative(trial: Trial) -> None:
    if trial.dtype == "fp64":
        trial.refused.append(NO_ORACLE)
        return
    for case in trial.oracle.once(_negative, trial.branch, trial.dtype, trial.full):
        meets(trial, case if case.branch == "score" else trial.with_gradients(case))
