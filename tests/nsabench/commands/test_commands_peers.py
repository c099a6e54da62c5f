"""`nsabench peers`: what is known of other implementations, and which are here."""

from __future__ import annotations

import sys

import pytest

from nsabench.commands.peers import peers_markdown, survey
from nsabench.peers import registry

NAMES = [peer.name for peer in registry.PEERS]


@pytest.fixture(autouse=True)
def one_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.Peer, "version", lambda peer: "0.6.0" if peer.name == "fla-core" else None)


def test_every_peer_is_listed_with_its_version_or_how_to_get_it(call) -> None:  # type: ignore[no-untyped-def]
    done = call("peers")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    for name in NAMES:
        assert any(line.startswith(name) for line in lines), name
    assert next(line for line in lines if line.startswith("fla-core *")).split()[2] == "0.6.0"
    assert any(line.startswith("lucidrains *") and "pip install" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_json_is_an_object_a_peer(call) -> None:  # type: ignore[no-untyped-def]
    rows = call("peers", "--json").rows
    assert [row["peer"] for row in rows] == NAMES
    assert [row["peer"] for row in rows if row["verified"]] == [
        "fla-core",
        "lucidrains",
        "xunhaolai",
        "sfnsa",
    ]
    assert {row["peer"]: row["timed"] for row in rows if row["timed"]} == {
        "fla-core": ["peer:fla-core", "peer:fla-core:naive"],
        "xunhaolai": ["peer:xunhaolai"],
        "sfnsa": ["peer:sfnsa"],
    }
    assert [row["version"] for row in rows if row["version"]] == ["0.6.0"]
    assert all(row["get"] and row["offers"] and row["differs"] for row in rows)
    assert all(row["source"].startswith("https://github.com/") for row in rows)


def test_markdown_is_a_table(call) -> None:  # type: ignore[no-untyped-def]
    done = call("peers", "--markdown")
    lines = done.out.splitlines()
    assert done.out.strip() == peers_markdown(survey())
    assert len(lines) == len(NAMES) + 2
    assert {line.count("|") for line in lines} == {8}
    assert lines[2].startswith("| [fla-core](https://github.com/fla-org/flash-linear-attention) | 0.6.0 |")


def test_one_output_at_a_time(call) -> None:  # type: ignore[no-untyped-def]
    done = call("peers", "--json", "--markdown")
    assert (done.code, done.out) == (2, "")
    assert done.err == "nsabench: --json and --markdown both want stdout; give one\n"


def test_nothing_of_theirs_is_imported(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("fla", "native_sparse_attention_pytorch", "cudnn", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    assert call("peers").code == 0
