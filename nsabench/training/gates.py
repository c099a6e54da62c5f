"""The health of a layer's gates: each branch's part, how decided a gate is, whether it collapsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

GATED = ("cmp", "sel", "win")
"""The branches, in the order of the gates."""

COLLAPSED_SHARE = 0.95
"""Collapsed: one branch has more than this share, in the mean over tokens and heads."""

COLLAPSED_ENTROPY = 0.1
"""Collapsed: the entropy is below this, nats, in the mean. Three equal gates have ln 3 = 1.0986."""


@dataclass(frozen=True)
class GateHealth:
    """Means over tokens and heads of the gates of the branches that run, normalised to the sum one.

    ``entropy`` is in nats, ``shares`` those of cmp, sel and win, None where a branch is off. A layer
    collapsed where one branch's share is above COLLAPSED_SHARE or the entropy below COLLAPSED_ENTROPY; one
    that has a single branch has nothing to choose, and did not.
    """

    entropy: float
    shares: tuple[float | None, float | None, float | None]

    @property
    def largest_share(self) -> float:
        """The largest of the shares."""
        return max(share for share in self.shares if share is not None)

    @property
    def collapsed(self) -> bool:
        several = sum(share is not None for share in self.shares) > 1
        return several and (self.largest_share > COLLAPSED_SHARE or self.entropy < COLLAPSED_ENTROPY)

    def row(self) -> dict[str, Any]:
        """The figures by the names of their columns."""
        named = {f"share_{branch}": share for branch, share in zip(GATED, self.shares, strict=True)}
        figures = {"entropy": self.entropy, "largest_share": self.largest_share}
        return {**figures, "collapsed": int(self.collapsed), **named}


@torch.no_grad()
def gate_sums(gates: torch.Tensor, on: Sequence[bool]) -> torch.Tensor:
    """Figures of ``gates (..., 3)`` that add up over calls: ``(5,)`` fp64 on their device, not waited for.

    They are the sums over tokens and heads of the entropy and the three shares, and the number of tokens
    times heads. ``on`` says which branches run. Gates that are all zero have no share and no entropy.
    """
    share = gates.detach().float() * torch.tensor(on, device=gates.device)
    share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    entropy = torch.special.entr(share).sum(-1)
    figures = torch.cat([entropy.unsqueeze(-1), share], -1).flatten(0, -2)
    sums = figures.sum(0, dtype=torch.float64)
    return torch.cat([sums, sums.new_tensor([figures.shape[0]])])


def gate_health(sums: torch.Tensor, on: Sequence[bool]) -> GateHealth:
    """The health of a layer from its calls' `gate_sums`, added up."""
    *totals, count = sums.tolist()
    entropy, *shares = (total / count for total in totals)
    cmp, sel, win = (share if runs else None for share, runs in zip(shares, on, strict=True))
    return GateHealth(entropy, (cmp, sel, win))
