"""A machine that was never calibrated: peaks kept for the real one must not decide a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of a user who has run nothing yet, for this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
