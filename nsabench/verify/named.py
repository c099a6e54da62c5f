"""The checks that answer the field reports, each with the error that the report's mistake makes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from nsa import NSAConfig
from nsa.testing import error_budget
from nsabench.verify import brute, wrong_variants
from nsabench.verify.cases import draw, layer, small
from nsabench.verify.ours import build_layer
from nsabench.verify.subjects import DTYPES, Case, LayerCase, Subject, Tensors
from nsabench.verify.trial import Trial, largest, rule

ByHand = Callable[[Case, torch.dtype], torch.Tensor]

ALLOWED = {"fp32": 1e-5, "fp64": 1e-10}
"""What equalities of the whole layer may differ by; 16 bits have their error budget."""


def _full_windows(dtype: str, full: bool) -> list[LayerCase]:
    found = []
    for length in (1, 2, 7, 8, 9, 16, 17, 33, 64) if full else (1, 9, 33):
        case = layer(small(value_dim=8, window_size=length + 3), length, dtype, only="win")
        found.append(case)
        if length < 33:
            steps = (1,) * length
            found.append(replace(case, mode="chunked", chunks=steps, name=f"{case.name} token by token"))
    return found


def _full_attention(case: LayerCase, dtype: torch.dtype) -> torch.Tensor:
    """Causal attention over all keys of the window, by hand, through the layer's own projections."""
    with torch.no_grad():
        built = build_layer(case, "cpu", dtype)
        given = built.attention_inputs(case.tensors["x"].to(dtype))
        group = case.config.group_size
        q, k, v = (given[name] for name in ("q", "k_win", "v_win"))
        logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)) * case.config.scale
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        p = logits.masked_fill(future, float("-inf")).softmax(-1)
        o = torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(group, 2))
        return built.out(o.flatten(2))


@rule
def smallS_equivalence(trial: Trial) -> None:
    trial.note(trial.oracle.once(wrong_variants.small_s))
    errors = []
    for case in trial.oracle.once(_full_windows, trial.dtype, trial.full):
        found = trial.ask(case)
        if found is None:
            continue
        exact, eager = (
            trial.oracle.once(_full_attention, case, dtype) for dtype in (torch.float64, DTYPES[trial.dtype])
        )
        budget = error_budget(exact, eager, largest(case))
        trial.close(case, "o", found["o"], exact, ALLOWED.get(trial.dtype, budget))
        errors.append(wrong_variants.mae(found["o"], exact))
    if errors:
        trial.note(f"ours: MAE {max(errors):.2g}")


def _windows(dtype: str) -> list[Case]:
    """T last queries of S keys: FA2 aligns the causal corner of such a rectangle bottom-right."""
    shapes = ((80, 80), (7, 80), (1, 80), (30, 33), (24, 24))
    return [draw("win", small(), rows, dtype, q_start=keys - rows) for rows, keys in shapes]


def _fa2_window(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """``window_size=(w - 1, 0)`` over the whole K and V, as FA2 documents it, written as a mask."""
    q, k, v = (case.tensors[name].to(dtype) for name in "qkv")
    rows, keys = q.shape[1], k.shape[1]
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    left, right = case.config.window_size - 1, 0
    allowed = (j >= i + keys - rows - left) & (j <= i + keys - rows + right)
    return _softmax(q, k, v, allowed.expand(q.shape[0], 1, rows, keys), case.config)


def _softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, config: NSAConfig
) -> torch.Tensor:
    """Masked attention by hand, ``allowed (B, 1 or HQ, T, S)``; rows without a key are 0."""
    group = config.group_size
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)) * config.scale
    p = logits.float() if logits.dtype != torch.float64 else logits
    p = p.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num().to(v.dtype)
    return torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(group, 2))


def _identity(trial: Trial, cases: Sequence[Case], by_hand: ByHand) -> None:
    """Each case's output against another way to write it down, in fp64 and in the case's dtype."""
    for case in cases:
        found = trial.ask(case)
        if found is None:
            continue
        exact, eager = (
            trial.oracle.once(by_hand, case, dtype) for dtype in (torch.float64, DTYPES[trial.dtype])
        )
        trial.close(case, "o", found["o"], exact, error_budget(exact, eager, largest(case)))


@rule
def sliding_fa2(trial: Trial) -> None:
    trial.note(trial.oracle.once(wrong_variants.pre_extracted_windows))
    _identity(trial, trial.oracle.once(_windows, trial.dtype), _fa2_window)


def _rectangles(dtype: str) -> list[Case]:
    starts = ((80, 0), (7, 73), (1, 79), (1, 3))
    return [draw("cmp", small(), rows, dtype, q_start=start) for rows, start in starts]


def _row_lengths(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Each query its own number of keys, counted from the first block."""
    q, k, v = (case.tensors[name].to(dtype) for name in ("q", "k_cmp", "v_cmp"))
    starts, rows, blocks = brute.start_list(case), q.shape[1], k.shape[1]
    lengths = [[len(brute.visible(start + t, blocks, case.config)) for t in range(rows)] for start in starts]
    allowed = torch.arange(blocks) < torch.tensor(lengths)[..., None]
    return _softmax(q, k, v, allowed[:, None], case.config)


@rule
def compressed_fa2(trial: Trial) -> None:
    trial.note(trial.oracle.once(wrong_variants.rectangle))
    _identity(trial, trial.oracle.once(_rectangles, trial.dtype), _row_lengths)


def _packs(dtype: str) -> list[Case]:
    config = small(num_heads=8)
    return [draw("sel", config, rows, dtype, q_start=start) for rows, start in ((80, 0), (3, 77))]


def _packed_rows(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """Each (token, KV head): the selected tokens up to the query, cut out, and no mask over them."""
    q, k, v = (case.tensors[name].to(dtype) for name in "qkv")
    config, starts = case.config, brute.start_list(case)
    lists = case.tensors["block_indices"].tolist()
    group, o = config.group_size, q.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(config.num_kv_heads):
                keys = brute.block_tokens(lists[b][t][h], starts[b] + t, k.shape[1], config)
                own = slice(h * group, (h + 1) * group)
                logits = (q[b, t, own] @ k[b, keys, h].T) * config.scale
                p = logits.to(torch.promote_types(dtype, torch.float32)).softmax(-1).to(dtype)
                o[b, t, own] = p @ v[b, keys, h]
    return o


@rule
def selection_packed(trial: Trial) -> None:
    trial.note(trial.oracle.once(wrong_variants.causal_packs))
    _identity(trial, trial.oracle.once(_packs, trial.dtype), _packed_rows)


def _equal(trial: Trial, case: LayerCase, as_case: LayerCase) -> Tensors | None:
    """Put down how ``case`` differs from what ``as_case`` gives by the specification in fp64, the same blocks
    attended.
    """
    found = trial.ask(case)
    if found is None:
        return None
    blocks = found["blocks"]
    exact = trial.oracle.exact(replace(as_case, gradients=case.gradients, blocks=blocks))
    eager = trial.oracle.eager(replace(case, blocks=blocks))
    for key in found.keys() & exact.keys() - {"blocks"}:
        budget = error_budget(exact[key], eager[key], largest(case))
        trial.close(case, key, found[key], exact[key], min(budget, _most(trial, key)))
    return found


def _most(trial: Trial, key: str) -> float:
    """What an equality of values may differ by, whatever the budget."""
    return ALLOWED.get(trial.dtype, float("inf")) if key == "o" else float("inf")


def _averages(dtype: str, full: bool) -> list[tuple[LayerCase, LayerCase]]:
    found = []
    length = 60
    for phi in ("conv", "mlp"):
        for options in ({}, *([{"shared_kv": True}, {"compress_rotated": True}] if full else [])):
            mean = layer(small(), length, dtype, trained=False, options=options, more="mean")
            learned = replace(mean, options={**options, "compress": phi}, name=f"{mean.name} {phi} prefill")
            chunks = (56,) + (1,) * (length - 56)
            steps = replace(learned, mode="chunked", chunks=chunks, name=f"{mean.name} {phi} decode")
            found += [(learned, mean), (steps, mean)]
    return found


@rule
def phi_mlp_matches_avg(trial: Trial) -> None:
    for case, mean in trial.oracle.once(_averages, trial.dtype, trial.full):
        _equal(trial, case, mean)


STEPS = 53
CHUNKS: dict[str, tuple[int, ...]] = {
    "tokens and chunks": (1, 6, 1, 38, 1, 1, 1, 4),
    "token by token": (1,) * STEPS,
    "uneven chunks": (2, 6, 15, 2, 28),
    "a prompt, then tokens": (43,) + (1,) * 10,
    "one chunk": (STEPS,),
}
OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"compress": "mlp", "gate": "softmax"},
    {"shared_kv": True},
    {"compress_rotated": True, "compress": "conv"},
)


def _chunked(dtype: str, full: bool) -> list[tuple[LayerCase, LayerCase]]:
    found = []
    for options in OPTIONS if full else OPTIONS[:1]:
        more = ", ".join(str(value) for value in options.values())
        # 4 blocks, and n = 3 of which one is chosen by score.
        config = small(value_dim=8, num_selected_blocks=3, num_local_blocks=1)
        whole = layer(config, STEPS, dtype, options=options, more=more)
        # Token by token is many calls: once, and the borders by every other way.
        for name, chunks in list(CHUNKS.items())[: None if full and dtype == "fp32" and not options else 1]:
            named = f"{whole.name} {name}"
            found.append((replace(whole, mode="chunked", chunks=chunks, name=named), whole))
    return found


@rule
def batched_equals_stepwise(trial: Trial) -> None:
    for case, whole in trial.oracle.once(_chunked, trial.dtype, trial.full):
        asked = trial.with_gradients(case)
        assert isinstance(asked, LayerCase)
        found = _equal(trial, asked, whole)
        if found is None or trial.dtype not in ALLOWED:
            continue
        # Rounding of 16 bits may choose another block; wider ones choose the same.
        batched = trial.oracle.once(_batched_blocks, trial.subject, whole)
        others = (found["blocks"] != batched).any(-1).sum()
        trial.holds(case.name, "lists other than batched prefill's", others)


def _batched_blocks(subject: Subject, whole: LayerCase) -> torch.Tensor:
    return subject.run(whole)["blocks"].cpu()
