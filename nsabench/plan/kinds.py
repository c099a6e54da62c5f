"""Kinds of values a declared file may hold. Each reads a value and describes itself as JSON Schema, so that
what is checked and what is published is one declaration.

`read(value, where)` returns the value in its one settled form; PlanError names `where`, the value and what is
allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nsabench.plan.axes import (
    MAX_INT,
    MAX_VALUES,
    PlanError,
    nearest,
    parse_duration,
    parse_ints,
    parse_routes,
)

_SIZE = r"[0-9]{1,19}[kKmM]?"
_ITEM = rf"\s*{_SIZE}\s*(:\s*{_SIZE}\s*:\s*[xX+]\s*{_SIZE}\s*)?"


class Kind(Protocol):
    """One kind of value. ``about`` says what it means, in a line."""

    @property
    def about(self) -> str: ...

    def read(self, value: object, where: str) -> Any: ...

    def schema(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Text:
    """A line of text."""

    about: str

    def read(self, value: object, where: str) -> str:
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            raise PlanError(f"{where}: {value!r} is not a line of text")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^[^\n]*\S[^\n]*$", "description": self.about}


@dataclass(frozen=True)
class Flag:
    """true or false."""

    about: str

    def read(self, value: object, where: str) -> bool:
        if not isinstance(value, bool):
            raise PlanError(f"{where}: {value!r}; allowed: true, false")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean", "description": self.about}


@dataclass(frozen=True)
class Whole:
    """One whole number, both ends included."""

    about: str
    minimum: int
    maximum: int = MAX_INT

    def read(self, value: object, where: str) -> int:
        if type(value) is not int:
            raise PlanError(f"{where}: {value!r} is not a whole number")
        if not self.minimum <= value <= self.maximum:
            raise PlanError(f"{where}: {value} is not allowed; allowed: {self.minimum} to {self.maximum}")
        return value

    def schema(self) -> dict[str, Any]:
        limits = {"minimum": self.minimum, "maximum": self.maximum}
        return {"type": "integer", **limits, "description": self.about}


@dataclass(frozen=True)
class Number:
    """A number above 0, ``most`` included."""

    about: str
    most: float

    def read(self, value: object, where: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise PlanError(f"{where}: {value!r} is not a number")
        if not 0 < value <= self.most:
            raise PlanError(f"{where}: {value} is not allowed; allowed: above 0, up to {self.most:g}")
        return float(value)

    def schema(self) -> dict[str, Any]:
        limits = {"exclusiveMinimum": 0, "maximum": self.most}
        return {"type": "number", **limits, "description": self.about}


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    about: str
    words: tuple[str, ...]

    def read(self, value: object, where: str) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise PlanError(f"{where}: {value!r} is unknown; allowed: {', '.join(self.words)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.words), "description": self.about}


@dataclass(frozen=True)
class Duration:
    """A length of time: seconds, or text such as 9m; read as seconds."""

    about: str

    def read(self, value: object, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise PlanError(f"{where}: {value!r} is not a length of time; allowed: 90s, 9m, 1h30m, above 0")
        return parse_duration(value if isinstance(value, str) else repr(value), name=where)

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "pattern": r"^\s*([0-9]+([.][0-9]+)?(ms|[smhd])?){1,5}\s*$"}
        return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, text], "description": self.about}


@dataclass(frozen=True)
class Sizes:
    """Sizes: one, axis text (`1k:64k:x2`) or a list of both; read as a tuple of numbers."""

    about: str
    minimum: int = 1
    default: tuple[int, ...] | None = None

    def read(self, value: object, where: str) -> tuple[int, ...]:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise PlanError(f"{where}: an empty list; give at least one size")
        found: dict[int, None] = {}
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int | str):
                raise PlanError(
                    f"{where}: {item!r} is not a size; allowed: 512, '4k', '1k:64k:x2', or a list"
                )
            found.update(dict.fromkeys(parse_ints(str(item), name=where, minimum=self.minimum)))
        if len(found) > MAX_VALUES:
            raise PlanError(f"{where}: names more than {MAX_VALUES} values")
        return tuple(found)

    def schema(self) -> dict[str, Any]:
        one: list[dict[str, Any]] = [
            {"type": "integer", "minimum": self.minimum, "maximum": MAX_INT},
            {"type": "string", "pattern": f"^{_ITEM}(,{_ITEM})*$"},
        ]
        return _one_or_list(one, self.about, self.default)


@dataclass(frozen=True)
class Words:
    """Words of a few, or of a pattern: one, several in one text with commas between, or a list."""

    about: str
    pattern: str
    """As a whole, of one word."""
    allowed: str
    """In words."""
    default: tuple[str, ...] | None = None

    def read(self, value: object, where: str) -> tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise PlanError(f"{where}: {value!r} is neither text nor a list; allowed: {self.allowed}")
        if not items:
            raise PlanError(f"{where}: an empty list; allowed: {self.allowed}")
        words = [item.strip() if isinstance(item, str) else item for item in items]
        for word in words:
            if not isinstance(word, str) or re.fullmatch(self.pattern, word) is None:
                unknown = " is unknown" if re.fullmatch(r"[\w|]+", self.pattern) else ""
                raise PlanError(f"{where}: {word!r}{unknown}; allowed: {self.allowed}")
        return tuple(dict.fromkeys(words))

    def schema(self) -> dict[str, Any]:
        one = rf"\s*({self.pattern})\s*"
        texts = [{"type": "string", "pattern": f"^{one}(,{one})*$"}]
        return _one_or_list(texts, self.about, self.default)


@dataclass(frozen=True)
class Names:
    """Names of a list: one, several in one text with commas between, or a list; of an unknown one the
    nearest is named.
    """

    about: str
    names: tuple[str, ...]
    default: tuple[str, ...] | None = None

    def read(self, value: object, where: str) -> tuple[str, ...]:
        for word in (found := self._words().read(value, where)):
            if word not in self.names:
                raise PlanError(f"{where}: {word!r} is unknown; {nearest(word, self.names)}")
        return found

    def schema(self) -> dict[str, Any]:
        return self._words("|".join(self.names)).schema()

    def _words(self, pattern: str = r"\S+") -> Words:
        return Words(self.about, pattern, ", ".join(self.names), self.default)


@dataclass(frozen=True)
class Routes:
    """Routes: text with semicolons between, or a list. Whether one exists is for the route table to say."""

    about: str
    default: tuple[str, ...] | None = None

    def read(self, value: object, where: str) -> tuple[str, ...]:
        items: list[object] = value if isinstance(value, list) else [value]
        texts = [item for item in items if isinstance(item, str)]
        if not items or len(texts) < len(items):
            raise PlanError(f"{where}: {value!r} names no routes; allowed: 'auto;sdpa' or a list of routes")
        return tuple(parse_routes(";".join(texts), name=where))

    def schema(self) -> dict[str, Any]:
        return _one_or_list([{"type": "string", "pattern": r"\S"}], self.about, self.default)


@dataclass(frozen=True)
class Table:
    """Named values, ``required`` ones among them; a name not in ``keys`` is refused."""

    about: str
    keys: Mapping[str, Kind]
    required: tuple[str, ...] = ()

    def read(self, value: object, where: str) -> dict[str, Any]:
        return self.read_as(value, where, lambda key: f"{where}.{key}" if where else key)

    def read_as(self, value: object, where: str, name: Callable[[str], str]) -> dict[str, Any]:
        """As ``read``; ``name`` says what a key is called in complaints."""
        if not isinstance(value, Mapping):
            raise PlanError(f"{where}: {value!r} is not a table of: {', '.join(self.keys)}")
        for key in value:
            if key not in self.keys:
                raise PlanError(f"{name(key)}: unknown key; {nearest(key, self.keys)}")
        found = {key: kind.read(value[key], name(key)) for key, kind in self.keys.items() if key in value}
        for key in self.required:
            if key not in found:
                raise PlanError(f"{name(key)} is missing; it is {_lower(self.keys[key].about)}")
        return found

    def schema(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": "object",
            "description": self.about,
            "properties": {key: kind.schema() for key, kind in self.keys.items()},
            "additionalProperties": False,
        }
        return found | ({"required": list(self.required)} if self.required else {})


@dataclass(frozen=True)
class Tables:
    """A list of tables of one kind, counted from 1 in complaints."""

    about: str
    table: Table

    def read(self, value: object, where: str) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not value:
            raise PlanError(f"{where}: not a list of tables; write [[{where}]] above each")
        return [self.table.read(item, f"{where}[{number}]") for number, item in enumerate(value, 1)]

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "minItems": 1, "description": self.about, "items": self.table.schema()}


def _one_or_list(one: list[dict[str, Any]], about: str, default: tuple[Any, ...] | None) -> dict[str, Any]:
    item = one[0] if len(one) == 1 else {"anyOf": one}
    found: dict[str, Any] = {
        "anyOf": [*one, {"type": "array", "minItems": 1, "items": item}],
        "description": about,
    }
    return found | ({} if default is None else {"default": list(default)})


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
