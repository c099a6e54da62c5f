"""A stage hook that notes what it sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Recorder:
    """A hook that notes each stage and fails when one opens inside another."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.inside: str | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        assert self.inside is None, f"{name} inside {self.inside}"
        self.seen.append(name)
        self.inside = name
        try:
            yield
        finally:
            self.inside = None
