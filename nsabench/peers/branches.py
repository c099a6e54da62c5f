"""One branch through another implementation, asked with the same tensors as a row of the route table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nsa import NSAConfig
from nsa.routes import Request

DTYPE_WORDS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True)
class Ask:
    """The facts a peer may refuse on.

    ``request`` are those of the route table, ``q_start`` the position of the first query, ``blocks`` the
    selected blocks ``(B,T,H,N)`` of a selected branch.
    """

    request: Request
    q_start: int | torch.Tensor = 0
    blocks: torch.Tensor | None = None

    @property
    def config(self) -> NSAConfig:
        """Heads and block geometry."""
        return self.request.config


@dataclass(frozen=True)
class PeerBranch:
    """One branch of a peer.

    ``variant`` tells several ways of the peer apart, as ``naive``. ``compute`` has the signature that the
    branch has in :mod:`nsa.reference`; in place of an ``lse`` that the peer does not offer stands None.
    ``refuse`` says why it cannot, or returns an empty text. ``differs`` says how it computes something else
    by declaration, in every configuration; empty where it should agree.
    """

    branch: str
    variant: str
    compute: Callable[..., Any]
    refuse: Callable[[Ask], str]
    differs: str = ""


def whole_sequences(ask: Ask) -> str:
    """Why a peer that takes as many queries as keys, from the first token on, cannot; empty where it can."""
    request = ask.request
    begins = int(torch.as_tensor(ask.q_start).max())
    if begins or request.num_queries != request.kv_len:
        return "takes whole sequences only: as many queries as keys, from the first token on"
    return ""


def no_fp64(ask: Ask) -> str:
    """Why a peer that computes in fp32 is not asked in fp64; empty for other dtypes."""
    return "computes in fp32, got fp64" if ask.request.dtype == torch.float64 else ""
