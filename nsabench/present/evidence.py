"""What was found of a criterion, with the rows that show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsabench.present.frame import Row
from nsabench.present.wording import arm_text, field_text, tokens_text

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"


@dataclass(frozen=True)
class Found:
    """`outcome` is met, not met or not measured; `measured` says it in words, or what is missing.

    `evidence` names runs and rows; `limits` is what a criterion that is met still leaves in doubt.
    """

    outcome: str
    measured: str
    evidence: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


def missing(what: str, evidence: Sequence[str] = ()) -> Found:
    """Nothing measured it."""
    return Found(NOT_MEASURED, what, tuple(evidence))


def held(good: bool, measured: str, evidence: Sequence[str] = (), limits: Sequence[str] = ()) -> Found:
    """It was measured."""
    return Found(MET if good else NOT_MET, measured, tuple(evidence), tuple(limits))


def cell_name(row: Row) -> str:
    """A cell in a few words: "prefill bwd core S=4k B=2 sdpa"."""
    usual = {"passes": "fwd", "scope": "module", "B": 1, "mode": "batched", "selection": "natural"}
    told = [field_text(row, name) for name, value in usual.items() if row[name] != value]
    return " ".join([row["phase"], f"S={tokens_text(row['S'])}", *told, arm_text(row)])


def cell_evidence(row: Row) -> str:
    """Where a cell stands: its run, what it is, its id."""
    return f"{row['run_id']}: {cell_name(row)} (cell {row['cell_id']})"


def several(count: int, what: str) -> str:
    """1 -> "1 cell", 3 -> "3 cells"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def first_of(texts: Sequence[str], most: int = 5) -> list[str]:
    """The first few, and how many more there are."""
    more = len(texts) - most
    return [*texts[:most], *([f"and {more} more"] if more > 0 else [])]


def counted(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[Mapping[str, Any]]]:
    """The rows by one of their texts, the most frequent first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row[name]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
