"""Suites as files: found, read, written, described."""

from __future__ import annotations

import json
import sysconfig
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsabench.plan.axes import PlanError, nearest
from nsabench.plan.declaration import CRITERIA, SUITE
from nsabench.plan.kinds import Tables
from nsabench.plan.suite import Suite

FOLDER = "suites"


def folders() -> list[Path]:
    """Where suites are looked for: here, then those that came with nsabench (a checkout, or an installed
    copy). Of two with one name, the first counts.
    """
    checkout = Path(__file__).resolve().parents[2] / FOLDER
    installed = Path(sysconfig.get_path("data")) / "share" / "nsabench" / FOLDER
    return list(dict.fromkeys(f for f in (Path(FOLDER).resolve(), checkout, installed) if f.is_dir()))


def suite_files() -> dict[str, Path]:
    """The suites there are, by name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for file in sorted(folder.glob("*.toml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def find_suite(name: str) -> Path:
    """The file of the suite called ``name``, or at the path ``name``: what holds a ``/`` or ends in
    ``.toml``.
    """
    if "/" in name or name.endswith(".toml"):
        return Path(name)
    files = suite_files()
    if name not in files:
        raise PlanError(f"{name!r} is no suite; {nearest(name, files) if files else 'there are none here'}")
    return files[name]


def load_suite(path: Path) -> Suite:
    """The suite in a file; PlanError in one line with the file, the key, the value and what is allowed."""
    try:
        return parse_suite(path.read_text(encoding="utf-8"), name=path.stem)
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PlanError(f"{path}: not UTF-8 text") from None
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def save_suite(suite: Suite, path: Path) -> None:
    """Write the suite to a new file; PlanError where there is one already or it cannot be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_toml(suite))
    except FileExistsError:
        raise PlanError(f"{path} exists; name another file") from None
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}") from None


def parse_suite(text: str, *, name: str) -> Suite:
    """The suite that TOML text declares; PlanError says what is wrong with it, and where."""
    try:
        declared = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"not TOML: {error}") from None
    return Suite.read(name, declared)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a suite's file, for editors and other tools."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "nsabench suite"} | (
        SUITE.schema()
    )


def to_toml(suite: Suite) -> str:
    """The suite as a file that `parse_suite` reads back."""
    declared = suite.to_dict()
    lines = [f"{key} = {_toml(declared[key])}" for key in ("about", "tags") if key in declared]
    for key in ("policy", "shape"):
        if key in declared:
            lines += ["", f"[{key}]", *_pairs(declared[key])]
    for own in declared["sweep"]:
        lines += ["", "[[sweep]]", *_pairs(own)]
    criteria = declared.get("criteria", {})
    tables = {key: items for key, items in criteria.items() if isinstance(CRITERIA[key], Tables)}
    if len(tables) < len(criteria):
        lines += ["", "[criteria]", *_pairs({k: v for k, v in criteria.items() if k not in tables})]
    for key, items in tables.items():
        for item in items:
            lines += ["", f"[[criteria.{key}]]", *_pairs(item)]
    return "\n".join(lines) + "\n"


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items()]


def _toml(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    # A TOML string is a JSON string, but for one character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
