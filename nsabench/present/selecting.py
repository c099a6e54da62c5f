"""Which cells and which runs: the grammar of --where, --tag and --since."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd

from nsabench.plan import PlanError, nearest, parse_duration, parse_ints
from nsabench.present.frame import PresentError
from nsabench.store.schema import CELL_COLUMNS, STATUSES, Column

_COLUMNS = {c.name: c for c in CELL_COLUMNS}
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|<|>|=)\s*(.*?)\s*")
_ROUTE_PARTS = ("cmp", "score", "sel", "win", "fused")
_AGE = re.compile(r"([0-9.]+[smhdw])+")


@dataclass(frozen=True)
class Condition:
    """One column compared with values, of which one must fit; no value at all means a missing one."""

    column: Column
    sign: str
    values: tuple[Any, ...]

    def mask(self, cells: pd.DataFrame) -> "pd.Series[bool]":
        found = cells[self.column.name]
        if self.sign in ("=", "!="):
            fits = found.isin(self.values) if self.values else found.isna() | (found.astype(str) == "")
            return fits if self.sign == "=" else ~fits
        compare: dict[str, Callable[[Any, Any], Any]] = {
            "<": np.less,
            "<=": np.less_equal,
            ">": np.greater,
            ">=": np.greater_equal,
        }
        return pd.Series(compare[self.sign](found, self.values[0]), index=cells.index)


@dataclass(frozen=True)
class Where:
    """All conditions at once; without any, every cell fits."""

    conditions: tuple[Condition, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.conditions)

    def __call__(self, cells: pd.DataFrame) -> "pd.Series[bool]":
        fits = pd.Series(True, index=cells.index)
        for condition in self.conditions:
            fits &= condition.mask(cells)
        return fits


def parse_where(texts: Sequence[str]) -> Where:
    """The conditions in `S=1024,route=auto`: any column of cells.csv, with = != < <= > >=.

    A comma before another column is an "and", one before a further value an "or": `S=1k,2k,status!=ok`.
    Sizes are written as on every axis (`S=1k:64k:x2`), a route in full (`route=cmp=fa2,sel=triton`).
    PresentError for an unknown column or a value it cannot have.
    """
    found: list[tuple[str, str, list[str]]] = []
    for text in texts:
        for place, part in enumerate(text.split(",")):
            match = _CONDITION.fullmatch(part)
            if match and (match[1] in _COLUMNS or match[1] not in _ROUTE_PARTS):
                found.append((match[1], match[2], [match[3]]))
            elif place == 0:
                raise PresentError(
                    f"--where: {part!r} is no condition; allowed: COLUMN=VALUE, with = != < <= > or >="
                )
            elif match and "=" in found[-1][2][-1]:
                found[-1][2][-1] += f",{part.strip()}"
            else:
                found[-1][2].append(part.strip())
    return Where(tuple(_condition(*condition) for condition in found))


def _condition(name: str, sign: str, texts: list[str]) -> Condition:
    if name not in _COLUMNS:
        raise PresentError(f"--where: unknown column {name!r}; {_near(name)}")
    column = _COLUMNS[name]
    if texts == [""]:
        values: list[Any] = []
    elif column.kind == "str":
        values = list(texts)
        if name == "status" and (wrong := [text for text in texts if text not in STATUSES]):
            raise PresentError(f"--where: status {wrong[0]!r} is unknown; allowed: {', '.join(STATUSES)}")
    else:
        values = _numbers(column, texts)
    if sign not in ("=", "!=") and (len(values) != 1 or column.kind == "str"):
        raise PresentError(
            f"--where: {name}{sign}{','.join(texts)}: {sign} takes a number column and one value"
        )
    return Condition(column, sign, tuple(values))


def _near(name: str) -> str:
    end = nearest(name, _COLUMNS)
    return end if end.startswith("did") else "nsabench results RUN --format csv shows all columns"


def _numbers(column: Column, texts: Sequence[str]) -> list[Any]:
    try:
        if column.kind == "int":
            return parse_ints(",".join(texts), name=f"--where {column.name}", minimum=0)
        return [float(text) for text in texts]
    except PlanError as error:
        raise PresentError(str(error)) from None
    except ValueError:
        raise PresentError(f"--where: {column.name} takes numbers, not {','.join(texts)!r}") from None


def parse_since(text: str, now: datetime | None = None) -> datetime:
    """A day (`2026-11-20`), a moment (`2026-11-20T12:00`), both in UTC, or an age (`36h`, `7d`).

    PresentError for anything else.
    """
    text = text.strip()
    if _AGE.fullmatch(text):
        weeks = re.fullmatch(r"([0-9.]+)w", text)
        try:
            age = parse_duration(f"{weeks[1]}d") * 7 if weeks else parse_duration(text)
            return (now or datetime.now(UTC)) - timedelta(seconds=age)
        except (ValueError, OverflowError):
            pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise PresentError(
            f"--since: {text!r} is no day or moment (2026-11-20, 2026-11-20T12:00) and no age (36h, 7d)"
        ) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def in_time(info: Mapping[str, Any], since: datetime | None) -> bool:
    """Whether the run was made since then; one that does not say when was not."""
    if since is None:
        return True
    try:
        made = datetime.fromisoformat(str(info.get("created")))
    except ValueError:
        return False
    return (made.replace(tzinfo=UTC) if made.tzinfo is None else made) >= since


def has_tags(info: Mapping[str, Any], tags: Sequence[str]) -> bool:
    """Whether the run has every one of the tags."""
    return set(tags) <= set(info.get("tags") or ())
