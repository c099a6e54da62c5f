"""Where an implementation lies that is a clone and no package, and its state, without importing it."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def located(module: str, file: str) -> Path | None:
    """The folder of a top-level module that Python would import, if it holds ``file``: another package may
    have the same name. None where there is none.
    """
    spec = find_spec(module)
    folders = () if spec is None else spec.submodule_search_locations or ()
    return next((Path(folder) for folder in folders if (Path(folder) / file).is_file()), None)


@cache
def state_of(folder: Path) -> str:
    """Which sources a module's folder holds: ``commit 9bea856c91`` of a clone (``-dirty`` where it was
    changed), else ``sources 1a2b3c4d5e``, a digest of its Python files.
    """
    if (folder.parent / ".git").exists():
        command = ["git", "-C", str(folder.parent), "describe", "--always", "--dirty", "--exclude=*"]
        try:
            said = subprocess.run([*command, "--abbrev=10"], capture_output=True, text=True, check=True)
            return f"commit {said.stdout.strip()}"
        except (OSError, subprocess.CalledProcessError):
            pass  # no git here, or a folder that it does not trust
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return f"sources {digest.hexdigest()[:10]}"
