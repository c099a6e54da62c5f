"""The axis grammar of the command line and of suites: lists of sizes and lists of routes."""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

MAX_VALUES = 10_000
"""Longest list one axis may name; more is a slip of the pen."""

MAX_INT = 2**63 - 1
"""Largest value: lengths and seeds are int64 everywhere."""

_SUFFIX = {"": 1, "k": 1024, "m": 1024**2}
_NUMBER = re.compile(r"(-?[0-9]{1,19})([kKmM]?)")
_DURATION = re.compile(r"[0-9]+([.][0-9]+)?|([0-9]+([.][0-9]+)?(ms|[smhd])){1,5}")
_PART = re.compile(r"([0-9.]+)(ms|[smhd]|$)")
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
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


def sizes_text(values: Sequence[int]) -> str:
    """Axis text that `parse_ints` reads as these sizes: `1k:64k:x2` for four and more that double."""
    if len(values) > 3 and all(b == 2 * a for a, b in itertools.pairwise(values)):
        return f"{_short(values[0])}:{_short(values[-1])}:x2"
    return ",".join(map(_short, values))


def _short(value: int) -> str:
    unit = next((unit for unit in ("m", "k") if value and value % _SUFFIX[unit] == 0), "")
    return f"{value // _SUFFIX[unit]}{unit}"


def parse_routes(text: str, *, name: str = "--routes") -> list[str]:
    """The routes that `text` names, separated by semicolons: `auto; sdpa; cmp=fa2,sel=triton`.

    Spaces around a route, its commas and its equals signs are dropped. Raises PlanError for an empty route
    and for a route given twice. Whether a route exists is for the route table to say.
    """
    routes: list[str] = []
    for item in text.split(";"):
        route = re.sub(r"\s*([,=])\s*", r"\1", item.strip())
        if not route:
            raise PlanError(
                f"{name}: an empty route in {text!r}; separate routes by one ';', as in 'auto;sdpa'"
            )
        if route in routes:
            raise PlanError(f"{name}: {route!r} is given twice in {text!r}; name each route once")
        routes.append(route)
    return routes


def parse_duration(text: str, *, name: str = "--budget") -> float:
    """Seconds in `text`: `90`, `90s`, `1.5h`, `1h30m`. PlanError for anything else and for no time at all."""
    match = _DURATION.fullmatch(text.strip())
    parts = [] if match is None else [(part, _SECONDS[unit]) for part, unit in _PART.findall(match[0])]
    seconds = sum(float(part) * unit for part, unit in parts)
    if not 0 < seconds < MAX_INT:
        raise PlanError(f"{name}: {text!r} is not a length of time; allowed: 90s, 9m, 1h30m, above 0")
    return seconds


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown name: the likeliest known one, else all of them."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {found[0]}?" if found else f"known: {', '.join(names)}"


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
