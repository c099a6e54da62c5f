"""Rules by meaning: what may depend on what, bit for bit, and what a query that sees nothing gives."""

from __future__ import annotations

from dataclasses import replace

import torch

from nsa.blocks import visible_compressed_blocks
from nsa.testing import error_budget
from nsabench.verify import wrong_variants
from nsabench.verify.cases import attention, changed, draw, layer, normal, small
from nsabench.verify.subjects import LAYER_DIM, Case, LayerCase, Tensors
from nsabench.verify.trial import Trial, largest, rule

OUTPUTS = ("o", "lse", "blocks")


def moved_rows(before: Tensors, after: Tensors) -> torch.Tensor:
    """Rows of any output that are not the same bits, ``(B, T)``."""
    rows = [
        (before[key] != after[key]).flatten(2).any(-1) for key in OUTPUTS if key in before and key in after
    ]
    return torch.stack(rows).any(0)


def _empties(branch: str, dtype: str) -> list[tuple[Case, torch.Tensor]]:
    """Cases and their rows that see nothing, ``(B,T,HQ)``."""
    found: list[tuple[Case, torch.Tensor]] = []
    config = small()

    def add(case: Case, empty: torch.Tensor) -> None:
        found.append((case, empty.expand(*case.tensors["q"].shape[:3])))

    if branch == "cmp":
        for rows in (1, 7, 8, 80):
            add(draw("cmp", config, rows, dtype), (torch.arange(rows) < 7)[:, None])
        starts = torch.tensor([3, 0, 50])
        case = draw("cmp", config, 6, dtype, batch=3, q_start=starts)
        add(case, (starts[:, None] + torch.arange(6) < 7)[..., None])
    if branch == "sel":
        for rows in (1, 5, 80):
            case = draw("sel", config, rows, dtype)
            lists = case.tensors["block_indices"].clone()
            lists[:, ::3, 1] = -1
            empty = torch.zeros(2, rows, 4, dtype=torch.bool)
            empty[:, ::3, 2:] = True
            add(changed(case, "empty lists of one KV head", block_indices=lists), empty)
        nothing = torch.full_like(lists, -1)
        add(changed(case, "no list holds anything", block_indices=nothing), torch.ones(()).bool())
    if branch == "win":
        for start, rows in ((20, 90), (53, 2), (60, 70)):
            case = draw("win", config, rows, dtype, keys=30, q_start=start, more="keys=30")
            add(case, (start + torch.arange(rows) >= 53)[:, None])
    return found


def _layers_with_empties(dtype: str) -> list[LayerCase]:
    return [
        layer(small(), length, dtype, more=", ".join(options), options=options)
        for options, lengths in (({}, (7, 70)), ({"compress": "mlp", "gate": "softmax"}, (8,)))
        for length in lengths
    ]


@rule
def no_nan_rows(trial: Trial) -> None:
    trial.note(trial.oracle.once(wrong_variants.nan_rows))
    if trial.branch == "layer":
        for plain in trial.oracle.once(_layers_with_empties, trial.dtype):
            case = trial.with_gradients(plain)
            _finite(trial, case, trial.ask(case))
        return
    for plain, empty in trial.oracle.once(_empties, trial.branch, trial.dtype):
        case = trial.with_gradients(plain)
        found = trial.ask(case)
        if found is None:
            continue
        _finite(trial, case, {name: t for name, t in found.items() if name != "lse"})
        trial.holds(case.name, "empty rows whose output is not 0", (found["o"][empty] != 0).sum())
        if "lse" in found:
            lse = found["lse"]
            trial.holds(case.name, "empty rows whose lse is not -inf", (lse[empty] != float("-inf")).sum())
            trial.holds(case.name, "lse of other rows not finite", (~lse[~empty].isfinite()).sum())
        if "d_q" in found:
            trial.holds(case.name, "empty rows with a gradient", (found["d_q"][empty] != 0).sum())


def _finite(trial: Trial, case: Case, found: Tensors | None) -> None:
    for name, tensor in (found or {}).items():
        if tensor.is_floating_point():
            trial.holds(case.name, f"{name}: values not finite", (~tensor.isfinite()).sum())


def _futures(branch: str, dtype: str, full: bool) -> list[tuple[int, Case, Case]]:
    """Cases, and the same with every token from one on changed."""
    found: list[tuple[int, Case, Case]] = []
    if branch == "layer":
        one = layer(small(), 150, dtype)
        for token in (1, 8, 70, 149):
            later = one.tensors["x"].clone()
            later[:, token:] = (1e3 if token == 8 else 1.0) * (later[:, token:] + 1)
            found.append((token, one, changed(one, f"from token {token} on", x=later)))
        return found
    for kv_heads, rows, token, size in (
        (2, 40, 17, 1.0),
        (4, 150, 70, 1e3),
        (2, 150, 149, 1.0),
        *([(2, 150, 70, 1.0), (4, 200, 193, 1e3)] if full else []),
    ):
        config = small(num_kv_heads=kv_heads)
        whole, other = (draw(branch, config, rows, dtype, seed=seed) for seed in (0, 10))
        # A compressed block belongs to the last token it covers.
        block = max(0, token - config.compression_block_size) // config.compression_stride + 1
        tensors = {}
        for name, tensor in whole.tensors.items():
            first = min(block, tensor.shape[1]) if name in ("k_cmp", "v_cmp") else token
            later = other.tensors[name][:, first:]
            later = later * size if later.is_floating_point() else later
            tensors[name] = torch.cat([tensor[:, :first], later], 1)
        found.append((token, whole, changed(whole, f"from token {token} on", **tensors)))
    return found


def _past(branch: str, dtype: str) -> Case:
    """Gradients of the first 50 of 100 rows alone."""
    if branch == "layer":
        case: Case = layer(small(), 100, dtype, gradients=True, more="gradient of 50 rows")
        upstream = normal(2, 100, LAYER_DIM, seed=1)
    else:
        case = draw(branch, small(), 100, dtype, gradients=True, more="gradient of 50 rows")
        upstream = normal(2, 100, case.config.num_heads, case.config.v_dim, seed=1)
    upstream[:, 50:] = 0
    return replace(case, upstream=upstream)


@rule
def causality(trial: Trial) -> None:
    answers: dict[Case, Tensors | None] = {}
    for token, whole, later in trial.oracle.once(_futures, trial.branch, trial.dtype, trial.full):
        if whole not in answers:
            answers[whole] = trial.ask(whole)
        before, after = answers[whole], trial.ask(later)
        if before is None or after is None:
            continue
        moved = moved_rows(before, after)
        trial.holds(later.name, "rows before the changed token that moved", moved[:, :token].sum())
        if trial.branch != "score":  # other scores may choose the same blocks
            trial.holds(later.name, "rows that should move and do not", int(not moved[:, token:].any()))
    if trial.branch == "score":
        return
    case = trial.oracle.once(_past, trial.branch, trial.dtype)
    found = trial.ask(case) if trial.takes(case) else None
    for name in found.keys() & {"d_q", "d_k", "d_v", "d_x"} if found else ():
        late = found[name][:, 50:] != 0  # type: ignore[index]
        trial.holds(case.name, f"{name}: gradients of later tokens", late.sum())


def _keys_changed(branch: str, dtype: str) -> list[tuple[Case, Case, torch.Tensor]]:
    """Cases, the same with one key and value changed, and the rows that must move, ``(B,T,HQ)``."""
    config = small()
    rows = 80
    whole = draw(branch, config, rows, dtype)
    t = torch.arange(rows)
    found = []
    names = ("k_cmp", "v_cmp") if branch == "cmp" else ("k", "v")
    places = (0, 3, whole.tensors[names[0]].shape[1] - 1) if branch == "cmp" else (0, 30, 47, 60, rows - 1)
    for place in places:
        tensors = {}
        for name in names:
            tensors[name] = whole.tensors[name].clone()
            tensors[name][:, place] = tensors[name][:, place].roll(1, -1) + 1
        if branch == "cmp":
            reach = (place < visible_compressed_blocks(t, config))[None, :, None]
        elif branch == "win":
            reach = ((t >= place) & (t < place + config.window_size))[None, :, None]
        else:
            block = place // config.selection_block_size
            listed = (whole.tensors["block_indices"] == block).any(-1) & (t >= place)[:, None]
            reach = listed.repeat_interleave(config.group_size, 2)
        where = changed(whole, f"{'block' if branch == 'cmp' else 'key'} {place} changed", **tensors)
        found.append((whole, where, reach.expand(2, rows, config.num_heads)))
    return found


def _reaches(trial: Trial) -> None:
    """One key at a time: the rows that move are those that see it, no more and no less."""
    before = None
    for whole, where, reach in trial.oracle.once(_keys_changed, trial.branch, trial.dtype):
        before = before or trial.ask(whole)
        after = trial.ask(where)
        if before is None or after is None:
            return
        moved = (before["o"] != after["o"]).any(-1)
        trial.holds(where.name, "rows that see it and should not", (moved & ~reach).sum())
        trial.holds(where.name, "rows that should see it and do not", (reach & ~moved).sum())


@rule
def window_width(trial: Trial) -> None:
    _reaches(trial)


@rule
def block_visibility(trial: Trial) -> None:
    _reaches(trial)


@rule
def own_block(trial: Trial) -> None:
    _reaches(trial)


def _batches(branch: str, dtype: str) -> list[tuple[Case, list[tuple[list[int], Case]]]]:
    """Cases of three sequences, and what some of them give elsewhere."""
    wholes: list[Case]
    if branch == "layer":
        wholes = [attention(small(), rows, dtype, batch=3) for rows in (3, 70)]
    else:
        wholes = [draw(branch, small(), rows, dtype, batch=3, q_start=35) for rows in (3, 70)]
    found = []
    for whole in wholes:
        parts = []
        for some in ([0], [2], [2, 0]):
            tensors = {name: tensor[some] for name, tensor in whole.tensors.items()}
            named = f"{whole.name} sequences {some}"
            parts.append((some, replace(whole, tensors=tensors, name=named)))
        found.append((whole, parts))
    return found


def _layers_in_batches(dtype: str) -> list[LayerCase]:
    whole = layer(small(), 70, dtype, batch=3)
    cases = []
    for some in ([0, 1, 2], [2, 0], [1]):
        tensors = {"x": whole.tensors["x"][some]}
        cases.append(replace(whole, tensors=tensors, name=f"{whole.name} sequences {some}"))
    return cases


@rule
def batch_invariance(trial: Trial) -> None:
    for whole, parts in trial.oracle.once(_batches, trial.branch, trial.dtype):
        together = trial.ask(whole)
        if together is None:
            continue
        for some, case in parts:
            found = trial.ask(case)
            for key in found.keys() & set(OUTPUTS) if found else ():
                trial.same(case.name, key, found[key], together[key][some])  # type: ignore[index]
    if trial.branch == "layer":
        # Projections are torch's own products, whose bits may depend on the number of rows.
        for case in trial.oracle.once(_layers_in_batches, trial.dtype):
            found = trial.ask(case)
            if found is not None:
                given = replace(case, blocks=found["blocks"])
                exact, eager = trial.oracle.exact(given)["o"], trial.oracle.eager(given)["o"]
                trial.close(case, "o", found["o"], exact, error_budget(exact, eager, largest(case)))


def _again(branch: str, dtype: str) -> Case:
    if branch == "layer":
        return layer(small(), 70, dtype)
    return draw(branch, small(), 150, dtype)


@rule
def determinism(trial: Trial) -> None:
    case = trial.oracle.once(_again, trial.branch, trial.dtype)
    case = case if trial.branch == "score" else trial.with_gradients(case)
    first = trial.ask(case)
    for _ in range(3 if trial.full else 1):
        again = trial.ask(case)
        for key in first.keys() & again.keys() if first and again else ():
            trial.same(case.name, key, again[key], first[key])  # type: ignore[index]
