"""A report as data: sections of paragraphs, lists, tables, figures and commands, before it is a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Words:
    """A paragraph; of several texts a list."""

    texts: tuple[str, ...]
    listed: bool = False
    kind: str = "words"


@dataclass(frozen=True)
class Grid:
    """A table: headers, lines of as many texts, notes below. `right` are the places of columns of numbers.

    `marks` says of a text of the table how it is to be shown: good, bad or doubt.
    """

    title: str
    headers: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    kind: str = "grid"


@dataclass(frozen=True)
class Picture:
    """A figure: the beginning of its file's name, what it shows, and its bytes as PNG."""

    name: str
    about: str
    png: bytes = field(repr=False)
    kind: str = "picture"


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: tuple[str, ...]
    kind: str = "commands"


Block = Words | Grid | Picture | Commands


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """What links to it."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Page:
    """A whole report. `word` is GO, CONDITIONAL or NO-GO and `why` the verdict in a sentence."""

    title: str
    word: str
    why: str
    sections: tuple[Section, ...]


def paragraph(*texts: str) -> Words:
    return Words(tuple(filter(None, texts)))


def listed(texts: Sequence[str]) -> Words:
    return Words(tuple(texts), listed=True)
