"""Installed peers as subjects of the scorecard: each branch that one offers, with our tensors."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from nsa.routes import Request
from nsabench.peers.branches import Ask, PeerBranch
from nsabench.peers.registry import Peer, adapted
from nsabench.plan import PlanError
from nsabench.plan.checks import Choice
from nsabench.verify.subjects import DTYPES, Case, Subject, Tensors, answer, placed, start_on


@dataclass(frozen=True)
class PeerSubject:
    """A branch of a peer, installed in ``version``."""

    peer: Peer
    version: str
    part: PeerBranch
    device: str
    ours: bool = False
    dtypes: tuple[str, ...] = tuple(DTYPES)

    @property
    def name(self) -> str:
        """``fla-core:naive 0.6.0 sel``."""
        return f"{self.backend} {self.version} {self.branch}"

    @property
    def branch(self) -> str:
        return self.part.branch

    @property
    def backend(self) -> str:
        return _backend(self.peer, self.part)

    def refusal(self, case: Case) -> str:
        """The adapter's own reason."""
        request = Request(
            device=torch.device(self.device).type,
            dtype=DTYPES[case.dtype],
            num_queries=case.tensors["q"].shape[1],
            kv_len=_tokens(case),
            needs_grad=case.gradients,
            config=case.config,
        )
        return self.part.refuse(Ask(request, case.q_start, case.tensors.get("block_indices")))

    def differs(self, rule: str) -> str:
        """What the adapter declares of the whole branch."""
        return self.part.differs

    def run(self, case: Case) -> Tensors:
        given = placed(case, self.device)
        where: dict[str, Any] = {"config": case.config, "q_start": start_on(case, self.device)}
        if case.branch == "score":
            return {"blocks": self.part.compute(**given, **where, kv_len=case.kv_len)}
        with nullcontext() if case.gradients else torch.no_grad():
            o, lse = self.part.compute(**given, **where)
        return answer(case, given, o, **({} if lse is None else {"lse": lse}))


def peer_subjects(choice: Choice) -> list[Subject]:
    """A subject for each branch of each installed peer, on the choice's device; none where it wants no peers.

    Nothing of a peer is imported yet.
    """
    if not choice.peers:
        return []
    found: list[Subject] = []
    for peer in adapted():
        version = peer.version()
        if version is not None:
            found += [PeerSubject(peer, version, part, choice.device) for part in peer.branches()]
    return found


def spelled_out(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of subjects, in which that of a peer stands for all its variants.

    PlanError for a peer that is known but not installed.
    """
    found: list[str] = []
    peers = {peer.name: peer for peer in adapted()}
    for name in names:
        peer = peers.get(name.partition(":")[0])
        if peer is not None and peer.version() is None:
            raise PlanError(f"{peer.name} is not installed: {peer.get}")
        found += [_backend(peer, part) for part in peer.branches()] if peer and name == peer.name else [name]
    return tuple(dict.fromkeys(found))


def absent_rows() -> list[dict[str, Any]]:
    """A row of the scorecard for each peer that could be asked but is not installed, and how to get it."""
    return [
        {
            "rule": "installed",
            "title": "the peer is installed",
            "source": "",
            "subject": peer.name,
            "branch": "all",
            "backend": peer.name,
            "dtype": "",
            "passes": "",
            "status": "unsupported",
            "reason": f"not installed: {peer.get}",
            "max_abs_err": None,
            "budget": None,
            "cases": 0,
            "failed": 0,
            "worst": "",
            "reported": None,
            "reported_note": "",
            "seconds": None,
        }
        for peer in adapted()
        if peer.version() is None
    ]


def _backend(peer: Peer, part: PeerBranch) -> str:
    return f"{peer.name}:{part.variant}" if part.variant else peer.name


def _tokens(case: Case) -> int:
    """Tokens that exist."""
    if "k" in case.tensors:
        return case.tensors["k"].shape[1]
    if case.kv_len is not None:
        return case.kv_len
    return int(torch.as_tensor(case.q_start).max()) + case.tensors["q"].shape[1]
