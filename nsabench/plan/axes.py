"""The axis grammar of the command line and of suites: lists of sizes and lists of routes."""

import re
from collections.abc import Iterator

MAX_VALUES = 10_000
"""Longest list one axis may name; more is a slip of the pen."""

MAX_INT = 2**63 - 1
"""Largest value: lengths and seeds are int64 everywhere."""

_SUFFIX = {"": 1, "k": 1024, "m": 1024**2}
_NUMBER = re.compile(r"(-?[0-9]{1,19})([kKmM]?)")
_RANGE = re.compile(r"([^:]*):([^:]*):\s*([xX+])([^:]*)")


class PlanError(ValueError):
    """A plan that cannot be run: one line with the value given and what is allowed."""


def parse_ints(text: str, *, name: str = "--S", minimum: int = 1) -> list[int]:
    """The sizes that `text` names, in the order written, duplicates dropped.

    Items are separated by commas: a size (`512`, `4k`, `1m`; k = 1024, m = 1024**2), a geometric range
    (`1k:64k:x2`) or an arithmetic one (`1k:4k:+1k`). A range holds its start and each step up to its end, the
    end included when a step lands on it. `name` is the option to name in errors.

    Raises PlanError for anything else, for a value below `minimum` or beyond int64, and for more than 10000
    values.
    """
    values: dict[int, None] = {}
    for item in text.split(","):
        for value in _expand(item.strip(), name, minimum):
            values[value] = None
            if len(values) > MAX_VALUES:
                raise PlanError(f"{name}: {text!r} names more than {MAX_VALUES} values; use a larger step")
    return list(values)


def parse_routes(text: str) -> list[str]:
    """The routes that `text` names, separated by semicolons: `auto; sdpa; cmp=fa2,sel=triton`.

    Spaces around a route, its commas and its equals signs are dropped. Raises PlanError for an empty route
    and for a route given twice. Whether a route exists is for the route table to say.
    """
    routes: list[str] = []
    for item in text.split(";"):
        route = re.sub(r"\s*([,=])\s*", r"\1", item.strip())
        if not route:
            raise PlanError(
                f"--routes: an empty route in {text!r}; separate routes by one ';', as in 'auto;sdpa'"
            )
        if route in routes:
            raise PlanError(f"--routes: {route!r} is given twice in {text!r}; name each route once")
        routes.append(route)
    return routes


def _expand(item: str, name: str, minimum: int) -> Iterator[int]:
    match = _RANGE.fullmatch(item)
    if match is None:
        yield _size(item, item, name, minimum)
        return
    first, last, kind, by = match.groups()
    start, stop = (_size(end.strip(), item, name, minimum) for end in (first, last))
    step = _size(by.strip(), item, name, 2 if kind in "xX" else 1)
    if start > stop:
        raise PlanError(f"{name}: range {item!r} runs backwards; write the smaller end first")
    if kind in "xX" and start < 1:
        raise PlanError(f"{name}: range {item!r} multiplies from {start}; start at 1 or more")
    while start <= stop:
        yield start
        start = start * step if kind in "xX" else start + step


def _size(text: str, item: str, name: str, minimum: int) -> int:
    given = f"{name}: {text!r}" + (f" in {item!r}" if text != item else "")
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise PlanError(f"{given} is not a size; allowed, separated by commas: 512, 4k, 1k:64k:x2, 1k:4k:+1k")
    value = int(match[1]) * _SUFFIX[match[2].lower()]
    if value < minimum:
        raise PlanError(f"{given} is too small; it must be at least {minimum}")
    if value > MAX_INT:
        raise PlanError(f"{given} is too large; it must be below 2**63")
    return value
