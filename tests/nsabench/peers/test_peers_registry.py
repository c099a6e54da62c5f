"""What is known of other implementations, without importing any."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError

import pytest

from nsabench.peers import registry
from nsabench.peers.branches import PeerBranch
from nsabench.peers.registry import PEERS, Peer, adapted

BRANCHES = ("cmp", "score", "sel", "win")


def test_names_are_unique_and_say_something() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        assert peer.get.startswith(("pip install ", "git clone https://github.com/"))
        assert peer.offers
        assert peer.differs
        assert bool(peer.module) == bool(peer.distribution or peer.file)
        assert not peer.timed or peer.adapter


def test_a_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer("x", "x-core", "x", "pip install x-core", "a", "b", "https://github.com/x/x")
    found: dict[str, object] = {"x": ModuleSpec("x", None)}
    monkeypatch.setattr(registry, "find_spec", found.get)
    monkeypatch.setattr(registry.metadata, "version", {"x-core": "1.2"}.__getitem__)
    assert peer.version() == "1.2"
    found.clear()
    assert peer.version() is None


def test_a_module_of_another_distribution_is_not_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(registry, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(registry.metadata, "version", absent)
    assert adapted()[0].version() is None


def test_adapters_import_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in adapted():
        monkeypatch.setitem(sys.modules, peer.module, None)  # importing it would fail
        monkeypatch.delitem(sys.modules, peer.adapter, raising=False)
        found = peer.branches()
        assert found
        assert all(isinstance(part, PeerBranch) and part.branch in BRANCHES for part in found)
        assert len({(part.branch, part.variant) for part in found}) == len(found)
    assert Peer("x", "", "", "git clone", "a", "b", "c").branches() == ()
