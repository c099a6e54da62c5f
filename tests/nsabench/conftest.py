"""What every test begins with and leaves: a machine that was never calibrated, and no process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from nsabench.peers import core, installed, sfnsa, xunhaolai
from tests.nsabench.peers import clones_emulator


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


@pytest.fixture
def clone_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Makes the stand-ins of two clones importable, with flash-attn's or without any flash-attn, for the
    length of a test; the folder they lie in.
    """
    names = {name.partition("/")[0] for name in clones_emulator.FILES | clones_emulator.FLASH}

    def forget() -> None:
        for module in [name for name in sys.modules if name.partition(".")[0] in names]:
            monkeypatch.delitem(sys.modules, module)
        for cached in (xunhaolai._op, sfnsa._package, installed.state_of):
            cached.cache_clear()
        sfnsa._SET.clear()
        clones_emulator.NSAHelper.x_cu_seqlens = None
        clones_emulator.seen.clear()

    def make(*, flash: bool) -> Path:
        folder = tmp_path / "clones"
        clones_emulator.install(folder, flash=flash)
        monkeypatch.syspath_prepend(folder)
        if not flash:
            monkeypatch.setattr(core, "located", lambda module, file: None)
        forget()
        return folder

    yield make
    forget()
