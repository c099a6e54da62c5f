"""What every test begins with and leaves: a machine that was never calibrated, and no process."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of a user who has run nothing yet, for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _no_tracker_left() -> Iterator[None]:
    """End what multiprocessing keeps running until this process ends: tests of workers count its children."""
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
