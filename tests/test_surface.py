"""What users and readers meet: the public names, a README that knows every option, no word of any machine.

As in test_architecture.py, a checker takes its material as data and is first shown to bite.
"""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]

PUBLIC_NAMES = (
    "NSAConfig",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_attention",
    "nsa_attention",
    "NativeSparseAttention",
    "KVCache",
    "Routing",
    "UnsupportedRoute",
    "stage_hook",
    "selection_hook",
)


def report(faults: Collection[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def public_faults(package: Any) -> list[str]:
    exported = set(package.__all__)
    faults = [f"{name} is missing from __all__" for name in sorted(set(PUBLIC_NAMES) - exported)]
    faults += [f"{name} is exported but not agreed" for name in sorted(exported - set(PUBLIC_NAMES))]
    for name in package.__all__:
        text = getattr(package, name).__doc__ or ""
        if not text.strip() or text.startswith(
            f"{name}("
        ):  # a dataclass makes up its signature as a docstring
            faults.append(f"{name} has no docstring")
    return faults


def test_public_names_bite() -> None:
    def package(*names: str, **docs: str) -> SimpleNamespace:
        return SimpleNamespace(
            __all__=names,
            **{name: SimpleNamespace(__doc__=docs.get(name, "What it does.")) for name in names},
        )

    assert public_faults(package(*PUBLIC_NAMES)) == []
    assert public_faults(package(*PUBLIC_NAMES[1:])) == ["NSAConfig is missing from __all__"]
    assert public_faults(package(*PUBLIC_NAMES, "helper")) == ["helper is exported but not agreed"]
    assert public_faults(package(*PUBLIC_NAMES, KVCache="")) == ["KVCache has no docstring"]
    assert public_faults(package(*PUBLIC_NAMES, NSAConfig="NSAConfig(dim: int)")) == [
        "NSAConfig has no docstring"
    ]


def test_public_names() -> None:
    report(public_faults(importlib.import_module("nsa")))


Commands = Mapping[
    str, Collection[tuple[str, ...]]
]  # "suite run" -> its options, each with all its spellings


def collect_commands(command: Any, path: str = "") -> dict[str, set[tuple[str, ...]]]:
    """Every visible command of a click-like tree, with its visible options but --help and completion."""
    found: dict[str, set[tuple[str, ...]]] = {path: set()}
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            found[path].add(tuple(param.opts))
    found[path] -= {("--help",), ("--install-completion",), ("--show-completion",)}
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            found |= collect_commands(child, f"{path} {name}".strip())
    return found


def readme_faults(commands: Commands, readme: str) -> list[str]:
    def mentions(word: str, before: str = r"(?<![\w-])") -> bool:
        return re.search(rf"{before}{re.escape(word)}(?![\w-])", readme) is not None

    faults = []
    for path, options in commands.items():
        if path and not mentions(path, before="(?:nsabench |`)"):
            faults.append(f"README.md says nothing of `nsabench {path}`")
        for names in options:
            if not any(mentions(name) for name in names):
                faults.append(f"README.md says nothing of {'/'.join(names)} (nsabench {path})")
    return sorted(faults)


def test_undocumented_commands_and_options_bite() -> None:
    app = typer.Typer()
    suite = typer.Typer()
    app.add_typer(suite, name="suite")

    @app.command()
    def decode(
        lengths: Annotated[str, typer.Option("--S")] = "512",
        dry: Annotated[bool, typer.Option("--dry-run/--wet-run")] = False,
        inner: Annotated[bool, typer.Option("--inner", hidden=True)] = False,
    ) -> None: ...

    @suite.command("show")
    def show(name: str, as_json: Annotated[bool, typer.Option("--json", "-j")] = False) -> None: ...

    @suite.command("spare", hidden=True)
    def spare() -> None: ...

    commands = collect_commands(typer.main.get_command(app))
    assert commands == {
        "": set(),
        "decode": {("--S",), ("--dry-run",)},
        "suite": set(),
        "suite show": {("--json", "-j")},
    }

    good = "Run `nsabench decode --S 512 --dry-run`, `suite`, `nsabench suite show --json`."
    assert readme_faults(commands, good) == []
    assert readme_faults(commands, good.replace("--S", "--Size")) == [
        "README.md says nothing of --S (nsabench decode)"
    ]
    assert readme_faults(commands, good.replace("decode", "go")) == [
        "README.md says nothing of `nsabench decode`"
    ]
    assert readme_faults(commands, good.replace(" show", "")) == [
        "README.md says nothing of `nsabench suite show`"
    ]


def test_readme_names_every_command_and_option() -> None:
    app = importlib.import_module("nsabench.cli").app
    commands = collect_commands(typer.main.get_command(app))
    assert set(commands) - {""}, "no command to document"
    report(readme_faults(commands, (ROOT / "README.md").read_text(encoding="utf-8")))


# Written in pieces, for this file is read too.
BANNED = {
    "a machine's own path": r"(?<![\w.])/(?:(?:work|farm|root|home|Users)/|opt/v\b)",
    "talk of how the work was organised": r"(?i)\b(?:"
    + "|".join([r"this[ ]session", r"helper[ ]session", r"issue[ ]#"])
    + ")",
    "a package registry's host": "|".join(
        re.escape(".".join(host))
        for host in [
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("pypi", "python"),
            ("download", "pytorch"),
            ("anaconda", "org"),
        ]
    ),
}


def banned_faults(files: Iterable[tuple[str, bytes]]) -> list[str]:
    faults = []
    for name, content in files:
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            for what, pattern in BANNED.items():
                if found := re.search(pattern, line):
                    faults.append(f"{name}:{number} {what}: {found[0]}")
    return faults


@pytest.mark.parametrize(
    "pieces",
    [
        ("see /", "work/main"),
        ("'/", "root/.cache'"),
        ("/", "opt/v/dev"),
        ("fixed in This ", "session"),
        ("a helper ", "session"),
        ("closes issue ", "#7"),
        ("https://pypi.", "org/simple"),
        ("https://files.python", "hosted.org/x"),
        ("--index-url https://download.", "pytorch.org/whl"),
    ],
)
def test_banned_words_bite(pieces: tuple[str, str]) -> None:
    assert len(banned_faults([("README.md", "".join(pieces).encode())])) == 1


def test_plain_words_pass() -> None:
    text = b"a/work/b ./root/x /tmp/x /opt/venv https://github.com/x/home/y a session's floor, an issue (#7)"
    assert banned_faults([("README.md", text), ("plot.png", b"\0/" + b"root/")]) == []


def test_repository_says_nothing_of_machines_and_workplaces() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in done.stdout.decode().split("\0") if (ROOT / name).is_file()]
    report(banned_faults((name, (ROOT / name).read_bytes()) for name in names))


def test_readme_shows_the_route_table_as_it_is() -> None:
    from nsabench.commands._route_table import matrix_markdown

    readme = (ROOT / "README.md").read_text()
    shown = readme.split("<!-- routes -->")[1].split("<!-- /routes -->")[0].strip()
    assert shown == matrix_markdown(), (
        "run `nsabench routes --markdown` and put its output between the markers"
    )


def test_readme_shows_the_predictions_as_they_are() -> None:
    pytest.importorskip("triton")
    script = runpy.run_path(str(ROOT / "suites" / "predict.py"))
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("<!-- predictions -->")[1].split("<!-- /predictions -->")[0].strip()
    assert shown == script["table"](script["Rates"]()), (
        "run `python suites/predict.py` and put its output between the markers"
    )
