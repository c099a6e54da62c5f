"""Rules about selection and selected attention: which blocks, and what their lists may look like."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from nsa import NSAConfig
from nsabench.verify.cases import changed, draw, small
from nsabench.verify.selection import meets_selection, well_formed
from nsabench.verify.subjects import DTYPES, Case
from nsabench.verify.trial import Trial, rule

Lists = Callable[[torch.Tensor], torch.Tensor]


def _selections(dtype: str) -> list[Case]:
    some = [draw("score", small(num_heads=2 * group), 300, dtype) for group in (1, 2, 3, 16)]
    for initial, local in ((0, 0), (0, 1), (2, 2), (4, 0)):
        config = small(num_initial_blocks=initial, num_local_blocks=local)
        some.append(draw("score", config, 150, dtype, more=f"initial={initial} local={local}"))
    return some


@rule
def selection(trial: Trial) -> None:
    for case in trial.oracle.once(_selections, trial.dtype):
        meets_selection(trial, case)


def _level(dtype: str) -> Case:
    case = draw("score", small(num_local_blocks=1), 300, dtype)
    return changed(case, "queries of zero", q=torch.zeros_like(case.tensors["q"]))


def _twins(dtype: str) -> Case:
    """Blocks 2, 5, 8 and 11 have the same key, and the most alike."""
    config = small(
        compression_block_size=16, compression_stride=16, num_initial_blocks=0, num_local_blocks=1,
        num_selected_blocks=3,
    )  # fmt: skip
    case = draw("score", config, 1, dtype, batch=1, q_start=199)
    heads = case.tensors["q"][:, :, ::2]
    keys = case.tensors["k_cmp"].clone()
    keys[:, 2::3] = 2 * heads
    return changed(case, "equal blocks", q=heads.repeat_interleave(2, 2), k_cmp=keys)


@rule
def ties(trial: Trial) -> None:
    case = trial.oracle.once(_level, trial.dtype)
    found = trial.ask(case)
    if found is not None and well_formed(trial, case, found["blocks"]):
        # Block 0 is forced, block 1 the first with a full score; the own one is the only local one.
        for t in (100, 255, 295):
            own = t // case.config.selection_block_size
            wrong = (found["blocks"][:, t] != torch.tensor([0, 1, 2, own])).any(-1).sum()
            trial.holds(case.name, "lists without the lower of equal blocks", wrong)
    twins = trial.oracle.once(_twins, trial.dtype)
    found = trial.ask(twins)
    if found is not None:
        wrong = (found["blocks"] != torch.tensor([2, 5, 12])).any(-1).sum()
        trial.holds(twins.name, "lists without the lower of equal blocks", wrong)


def planted(logits: torch.Tensor, config: NSAConfig, t: int, dtype: str, more: str) -> Case:
    """One query at ``t`` whose head ``g`` has the logits ``logits (G, C)``, the same for every KV head."""
    group, heads = logits.shape[0], config.num_kv_heads
    keys = torch.zeros(1, logits.shape[1], heads, config.head_dim)
    keys[..., :group] = logits.T[None, :, None] * config.head_dim**0.5 / 4
    q = torch.zeros(1, 1, heads, group, config.head_dim)
    for g in range(group):
        q[..., g, g] = 4
    case = draw("score", config, 1, dtype, batch=1, q_start=t, more=more)
    return changed(case, q=q.flatten(2, 3), k_cmp=keys)


def _chooses(trial: Trial, case: Case, expected: list[int], what: str) -> None:
    found = trial.ask(case)
    if found is not None:
        chosen = found["blocks"]
        wrong = (chosen != torch.tensor(expected)).any(-1).sum() if chosen.shape[-1] == len(expected) else 1
        trial.holds(case.name, what, wrong)


def _small(dtype: str) -> Case:
    config = small(
        num_heads=1, num_kv_heads=1, compression_block_size=16, compression_stride=16, num_initial_blocks=0,
        num_local_blocks=1,
    )  # fmt: skip
    logits = torch.tensor([[-60.0, -26.0, -70.0, -27.0, 0.0, -28.0, -65.0, -25.0, -62.0, -90.0]])
    return planted(logits, config, 163, dtype, "scores of 1 and 1e-11 to 1e-39")


@rule
def small_scores(trial: Trial) -> None:
    case = trial.oracle.once(_small, trial.dtype)
    _chooses(trial, case, [1, 4, 7, 10], "lists that rank small scores wrongly")


def _rounded(dtype: str) -> Case:
    case = draw("score", small(num_kv_heads=4), 300, dtype)
    q, keys = case.tensors["q"], case.tensors["k_cmp"]
    return changed(case, "logits about 100", q=q * 10, k_cmp=8 + keys)


@rule
def score_precision(trial: Trial) -> None:
    meets_selection(trial, trial.oracle.once(_rounded, trial.dtype))


def _weighted(dtype: str) -> list[tuple[Case, list[int]]]:
    """For 8/4/16 block j gathers compressed 4j - 1 .. 4j + 3 by 1 2 2 2 1; one slot is free."""
    config = small(num_kv_heads=4, num_initial_blocks=0, num_local_blocks=1, num_selected_blocks=2)
    found = []
    for more, weights, expected in (
        ("inner 0.3 x 2 over outer 0.5", {4 * 5 + 1: 0.3, 4 * 8 - 1: 0.5}, 5),
        ("outer 0.7 over inner 0.3 x 2", {4 * 5 + 1: 0.3, 4 * 8 - 1: 0.7, 4 * 7: 0.01}, 7),
        ("two outer ends of one block", {4 * 5 - 1: 0.4, 4 * 5 + 3: 0.4}, 5),
        ("first of the inner", {4 * 3: 0.3, 4 * 6 + 3: 0.5}, 3),
        ("last of the inner", {4 * 3 + 2: 0.3, 4 * 6 + 3: 0.5}, 3),
        ("the first block has no left end", {0: 0.3, 4 * 6 + 3: 0.5}, 0),
    ):
        p = torch.full((config.group_size, 49), 1e-4)
        for block, part in weights.items():
            p[:, block] = part
        found.append((planted(p.log(), config, 203, dtype, more), [expected, 12]))
    return found


@rule
def score_weights(trial: Trial) -> None:
    for case, expected in trial.oracle.once(_weighted, trial.dtype):
        _chooses(trial, case, expected, "lists by other weights")


def _summed(dtype: str) -> list[tuple[Case, list[int]]]:
    config = small(
        num_heads=8, compression_block_size=16, compression_stride=16, num_initial_blocks=0,
        num_local_blocks=1, num_selected_blocks=2,
    )  # fmt: skip
    found = []
    for more, loud in (("the first head alone is sure", 0), ("the last head alone is sure", 3)):
        p = torch.full((4, 10), 1e-3)
        p[:, 6] = 0.45  # 1.35 of three heads, over the 0.9 of one
        for g in range(4):
            p[g, g] = 0.5
        p[loud] = 1e-3
        p[loud, 5] = 0.9
        p[loud, 6] = 1e-3
        found.append((planted(p.log(), config, 163, dtype, more), [6, 10]))
    return found


@rule
def group_sum(trial: Trial) -> None:
    for case, expected in trial.oracle.once(_summed, trial.dtype):
        _chooses(trial, case, expected, "lists that are not of the group's sum")


def shuffled(lists: torch.Tensor) -> torch.Tensor:
    """Each list in some other order."""
    order = torch.rand(lists.shape, generator=torch.Generator().manual_seed(5)).argsort(-1)
    return lists.gather(-1, order)


LEADING: dict[str, Lists] = {
    "-1 -1 first": lambda lists: torch.nn.functional.pad(lists, (2, 0), value=-1),
    "only the last slot": lambda lists: torch.cat([torch.full_like(lists[..., 1:], -1), lists[..., :1]], -1),
    "-1 before each": lambda lists: torch.stack([torch.full_like(lists, -1), lists], -1).flatten(-2),
}
ORDERS: dict[str, Lists] = {
    "descending": lambda lists: lists.flip(-1),
    "any order": shuffled,
    "int64": lambda lists: lists.long(),
    "one slot": lambda lists: lists[..., :1],
    "every block": lambda lists: torch.arange(9).int().expand(*lists.shape[:-1], -1).contiguous(),
}
REPEATS: dict[str, Lists] = {
    "duplicates": lambda lists: torch.cat([lists, lists[..., :2], lists[..., :1]], -1),
    "one block many times": lambda lists: lists[..., :1].expand(*lists.shape[:-1], 5).contiguous(),
    "duplicates in any order": lambda lists: shuffled(torch.cat([lists, lists], -1)),
}
VARIANTS = {"leading_empty": LEADING, "any_order": ORDERS, "duplicates": REPEATS}


def _listed(name: str, dtype: str) -> list[Case]:
    """Each last query's own block is incomplete; but for ``leading_empty`` no list has an empty slot."""
    some = []
    end = 73 if name == "leading_empty" else 137
    for rows in (3, 73):
        case = draw("sel", small(), rows, dtype, q_start=end - rows)
        for more, lists in VARIANTS[name].items():
            some.append(changed(case, more, block_indices=lists(case.tensors["block_indices"])))
    return some


def _lists(trial: Trial) -> None:
    for case in trial.oracle.once(_listed, trial.rule, trial.dtype):
        trial.meets_spec(trial.with_gradients(case))


@rule
def leading_empty(trial: Trial) -> None:
    _lists(trial)


@rule
def any_order(trial: Trial) -> None:
    _lists(trial)


@rule
def duplicates(trial: Trial) -> None:
    _lists(trial)


def _hot(dtype: str) -> Case:
    config = small(num_kv_heads=1, selection_block_size=64)
    case = draw("sel", config, 600, dtype, batch=1, more="the first block alone", gradients=True)
    lists = case.tensors["block_indices"].clone()
    lists[..., 1:] = -1
    return changed(case, block_indices=lists)


@rule
def hot_block(trial: Trial) -> None:
    trial.meets_spec(trial.oracle.once(_hot, trial.dtype))


def _far(branch: str, dtype: str) -> Case:
    case = draw(branch, small(), 100, dtype, more="2^31 elements apart", layout="2^31 apart")
    return case


@rule
def int32_offsets(trial: Trial) -> None:
    case = trial.with_gradients(trial.oracle.once(_far, trial.branch, trial.dtype))
    bytes_needed = 2 * (2**31 + 2**20) * DTYPES[trial.dtype].itemsize
    free = _free_bytes(trial.subject.device)
    if not trial.subject.refusal(case) and free < 1.2 * bytes_needed:
        needed = f"two buffers of 2^31 elements in {trial.dtype} need {bytes_needed / 1e9:.1f} GB"
        trial.refused.append(f"{needed}; {free / 1e9:.1f} GB are free on {trial.subject.device}")
        return
    trial.meets_spec(case)


def _free_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
