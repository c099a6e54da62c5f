"""What can be verified: the rules of the attention, each with its source, and a choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nsabench.plan.axes import PlanError, nearest

LEVELS = ("quick", "full")
DTYPES = ("fp32", "fp16", "bf16", "fp64")
BRANCHES = ("cmp", "score", "sel", "win")
LAYER = "layer"

TRIPS = {
    "maximum": "rows whose maximum logit differs from token 0's by more than 88",
    "fp16 scores": "fp16 storage of scores, in which small ones vanish",
    "decode window": "a window off by one between prefill and decode",
    "leading -1": "leading -1 indices poisoning an online softmax",
    "group sizes": "G not a power of two, and G = 1",
    "int32 offsets": "offsets beyond 2^31 elements",
    "hot block": "the initial block attended by every query",
    "duplicates": "duplicate indices",
    "very negative": "all logits very negative",
    "lengths": "lengths around every border",
    "value dim": "head_dim other than value_dim",
    "strides": "non-contiguous inputs",
}
"""What broke other code."""


@dataclass(frozen=True)
class Rule:
    """One row of the scorecard.

    Args:
        title: the rule in words.
        source: where it stands: numbered rules of the semantics, equations of the paper.
        branches: whom it is put to: branches, and ``layer``.
        every_dtype: whether ``quick`` asks it in every dtype; ``full`` always does.
        level: the least level that asks it.
        subjects: the only subjects it is put to, where no route takes part; empty for all.
        covers: numbers of the rules and names of ``TRIPS`` that it checks.
        reported: the figure of a field report, where one has it.
        report: what the report says, and its cause.
    """

    title: str
    source: str
    branches: tuple[str, ...]
    every_dtype: bool = False
    level: str = "quick"
    subjects: tuple[str, ...] = ()
    covers: tuple[str, ...] = ()
    reported: float | None = None
    report: str = ""


_ATTEND = ("cmp", "sel", "win")
_ALL = (*BRANCHES, LAYER)

RULES: dict[str, Rule] = {
    "values": Rule(
        "output and lse equal the specification's in fp64", "rules 1 to 9, eq. 5 to 12", (*_ATTEND, LAYER),
        every_dtype=True, covers=("1", "3", "7", "8", "9"),
    ),
    "gradients": Rule(
        "the gradient of every input equals the specification's in fp64", "rules 1 to 9, eq. 5 to 12",
        (*_ATTEND, LAYER), every_dtype=True, covers=("1", "3", "7", "8", "9"),
    ),
    "brute_force": Rule(
        "a Python loop over queries, written from the rules alone, gives the same",
        "rules 1 to 8, eq. 7 to 12", BRANCHES, covers=("1", "2", "3", "4", "5", "6", "7", "8"),
    ),
    "lengths": Rule(
        "every length around a border: 1, and one less, equal, one more than l, l', w, n l'",
        "rules 1, 2, 6 to 8", _ALL, covers=("lengths", "1", "8"),
    ),
    "group_sizes": Rule("G of 1, 3, 4, 5, 6 and 12", "rule 5", BRANCHES, covers=("group sizes", "5")),
    "value_dim": Rule("head_dim 192 with value_dim 128, and others that differ", "rule 3", _ATTEND,
                      covers=("value dim", "3")),
    "geometries": Rule("other block sizes, strides and windows", "rule 1, eq. 9", (*BRANCHES,), level="full",
                       covers=("1", "4")),
    "bad_geometry": Rule("a stride that divides no block, or l above l', is refused in one line", "rule 1",
                         (LAYER,), subjects=("layer:auto",), covers=("1",)),
    "strides": Rule("non-contiguous inputs: transposed, sliced, expanded", "rule 7", BRANCHES,
                    covers=("strides",)),
    "any_start": Rule("queries that begin anywhere, a place for each sequence too", "rules 1, 7, 8", BRANCHES,
                      covers=("1", "7", "8")),
    "decode": Rule("one query alone gives its row of prefill", "rule 12", BRANCHES,
                   covers=("decode window", "12", "8")),
    "causality": Rule(
        "changing token t changes nothing before t, bit for bit; nothing before t sends it a gradient",
        "rules 1, 7, 8, 12", _ALL, covers=("12", "1", "7", "8"),
    ),
    "window_width": Rule("a key reaches exactly the w queries from its own on", "rule 8", ("win",),
                         covers=("8",)),
    "block_visibility": Rule("block i reaches exactly the queries from its last token, i d + l - 1, on",
                             "rule 1, eq. 7", ("cmp",), covers=("1",)),
    "own_block": Rule(
        "a key reaches exactly the queries from its own on that selected its block", "rule 7, eq. 11",
        ("sel",), covers=("7",),
    ),
    "score_weights": Rule("a compressed block counts for each selection block it overlaps, by the pairs",
                          "rule 4, eq. 9", ("score",), covers=("4",)),
    "group_sum": Rule("block scores are summed over the heads of a group", "rule 5, eq. 10", ("score",),
                      covers=("5",)),
    "selection": Rule(
        "the specification's blocks, ascending, -1 at the tail, forced ones inside the count",
        "rule 6, eq. 11, 12", ("score",), every_dtype=True, covers=("6",),
    ),
    "ties": Rule("equal scores go to the lower index", "rule 6", ("score",), every_dtype=True, covers=("6",)),
    "small_scores": Rule("scores of 1e-11 and less are ranked all the same", "rule 6", ("score",),
                         every_dtype=True, covers=("6", "fp16 scores")),
    "score_precision": Rule("products for scores are not rounded to 16 bits", "rules 3, 6", ("score",),
                            every_dtype=True, covers=("3", "6")),
    "leading_empty": Rule("-1 before the first index, and between indices", "rule 7", ("sel",),
                          covers=("7", "leading -1")),
    "any_order": Rule("indices in any order, of any integer type", "rule 7", ("sel",), covers=("7",)),
    "duplicates": Rule("a block named twice counts once", "rule 7", ("sel",), covers=("7", "duplicates")),
    "row_maxima": Rule("largest logits of rows hundreds apart", "rule 3", BRANCHES, every_dtype=True,
                       covers=("3", "maximum")),
    "very_negative": Rule("all logits of a row at -30, -200, -4000", "rule 3", BRANCHES, every_dtype=True,
                          covers=("3", "very negative")),
    "hot_block": Rule("the gradient of the initial block, attended by every query and head", "rule 7",
                      ("sel",), every_dtype=True, covers=("7", "hot block")),
    "int32_offsets": Rule("two sequences 2^31 elements apart in one buffer", "rule 7", _ATTEND, level="full",
                          covers=("int32 offsets",)),
    "batch_invariance": Rule("a sequence gives the same rows in any batch", "rule 12", _ALL, covers=("12",)),
    "determinism": Rule("two runs give the same bits, forward and backward", "rule 12", _ALL, covers=("12",)),
    "no_selection_gradient": Rule(
        "selection carries no gradient; queries and compressed keys get theirs through the output alone",
        "rule 11", ("score", LAYER), covers=("11",),
    ),
    "gates": Rule("output = sum of gate x branch, in the order cmp, sel, win", "rule 9, eq. 5", (LAYER,),
                  covers=("9",)),
    "separate_kv": Rule("a branch reads its own K and V, and no other's", "rule 10", (LAYER,),
                        covers=("10",)),
    "positions": Rule("a compressed key is rotated at its block's first position, the average unrotated",
                      "rule 10", (LAYER,), covers=("10",)),
    "packed": Rule("packed sequences (cu_seqlens) = a loop over them, values and gradients", "rule 12",
                   (LAYER,), covers=("12",)),
    "no_nan_rows": Rule(
        "a query that sees nothing: output 0, lse -inf, gradient 0; no NaN anywhere", "rule 2",
        (*_ATTEND, LAYER), every_dtype=True, covers=("2",),
        report="batched prefill: rows without an allowed key became NaN, laid to boolean masks",
    ),
    "smallS_equivalence": Rule(
        "window over everything, only its gate open: full attention, batched and token by token",
        "rule 12", (LAYER,), every_dtype=True, covers=("12", "8"), reported=0.152,
        report="small-S equivalence: MAE 0.152 of batched prefill, called numerical precision",
    ),
    "sliding_fa2": Rule(
        "the window = window_size (w - 1, 0), causal bottom-right, over full K and V", "rule 8", ("win",),
        every_dtype=True, covers=("8",), reported=0.766,
        report="sliding window through FA2: MAE 0.766, called a fundamental limitation",
    ),
    "compressed_fa2": Rule(
        "compressed attention = a length for each row, not causal on a rectangle", "rule 1", ("cmp",),
        every_dtype=True, covers=("1",),
        report="compressed through FA2 with causal=True: passed",
    ),
    "selection_packed": Rule(
        "packed rows, clamped to the query, not causal = selected attention", "rule 7", ("sel",),
        every_dtype=True, covers=("7",), reported=0.629,
        report="packed selection: MAE 0.629 on a CPU and 0.325 on CUDA, called production ready",
    ),
    "phi_mlp_matches_avg": Rule(
        "conv and mlp, initialised to the average, equal mean: prefill and decode", "rule 12, eq. 7",
        (LAYER,), covers=("12", "10"),
        report="batched prefill NaN: test_phi_mlp_matches_avg_prefill failed with it",
    ),
    "batched_equals_stepwise": Rule(
        "batched prefill = chunked prefill = token by token, values and gradients", "rule 12", (LAYER,),
        covers=("12", "decode window"),
        report="step-5 hang: sequential prefill hung in training, batched went on with NaN in fp16",
    ),
}  # fmt: skip
"""Every rule, in the order of the scorecard; the checks named for field reports come last."""

NAMED = tuple(name for name, rule in RULES.items() if rule.report)
"""The checks that answer a field report."""


@dataclass(frozen=True)
class Choice:
    """What to verify, and how thoroughly.

    Args:
        level: ``quick`` or ``full``.
        device: a torch device, e.g. ``cpu``, ``cuda``.
        dtypes: of ``DTYPES``, those to ask in; all of the level's when empty (fp64 is asked by ``full``).
        subjects: names, branches or backends of subjects; all when empty.
        rules: names of ``RULES``; all of the level's when empty. A rule named here runs at either level.
        peers: whether installed peers are asked too.

    Raises:
        PlanError: one line with the name given and what is known.
    """

    level: str = "quick"
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    peers: bool = True

    def __post_init__(self) -> None:
        _check("level", (self.level,), LEVELS)
        _check("dtype", self.dtypes, DTYPES)
        _check("rule", self.rules, RULES)

    @property
    def asked_dtypes(self) -> tuple[str, ...]:
        """The dtypes to ask in, in the order of ``DTYPES``."""
        if self.dtypes:
            return tuple(name for name in DTYPES if name in self.dtypes)
        return DTYPES if self.level == "full" else DTYPES[:3]

    @property
    def asked_rules(self) -> dict[str, Rule]:
        """The rules to ask, by name, in the order of ``RULES``."""
        if self.rules:
            return {name: rule for name, rule in RULES.items() if name in self.rules}
        return {name: r for name, r in RULES.items() if self.level == "full" or r.level == "quick"}

    def pick(self, known: Sequence[tuple[str, str, str]]) -> list[int]:
        """Places of the subjects to ask among ``known``, each given as (name, branch, backend).

        PlanError for a name that is none of these.
        """
        words = dict.fromkeys(word for subject in known for word in subject)
        _check("subject", self.subjects, words)
        return [i for i, s in enumerate(known) if not self.subjects or set(s) & set(self.subjects)]


def _check(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            raise PlanError(f"unknown {what} {name!r}; {nearest(name, names)}")
