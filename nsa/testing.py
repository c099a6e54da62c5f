"""The one tolerance policy: what a result may differ from the fp64 specification, for tests and for the
bench.

An implementation may err about twice what plain eager code errs in the same dtype on the same inputs. The
budget is
measured, never chosen: run the specification in fp64, run it again in the inputs' own dtype, and double the
difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

HEADROOM = 2.0
# Eager code can be exact by luck (one key, equal values): the floor is a few roundings of the largest value
# in the precision of sums (fp32 at least), and one of the stored dtype: more would hide a key too many in
# bf16.
FLOOR_ROUNDINGS = 16.0


@dataclass(frozen=True)
class Check:
    """Outcome of one comparison. ``max_abs_err`` and ``budget`` are absolute, ``rel_err`` is ``|a - b| /
    |b|`` (2-norm).
    """

    max_abs_err: float
    rel_err: float
    budget: float

    @property
    def ok(self) -> bool:
        """True when the error is a number and within the budget."""
        return math.isfinite(self.max_abs_err) and self.max_abs_err <= self.budget


def error_budget(exact: torch.Tensor, eager: torch.Tensor, magnitude: float = 0.0) -> float:
    """Largest absolute error allowed to an implementation in ``eager``'s dtype.

    Args:
        exact: the specification's result in fp64 from the rounded inputs.
        eager: the specification's result in the inputs' own dtype; same shape. Where it overflows, it buys
            no budget.
        magnitude: largest magnitude that went in. Where terms of that size cancel to a small result, rounding
        does not.
    """
    size = max(magnitude, _largest(exact))
    sums = torch.promote_types(eager.dtype, torch.float32)
    floor = FLOOR_ROUNDINGS * torch.finfo(sums).eps + torch.finfo(eager.dtype).eps
    return HEADROOM * _largest(_difference(eager, exact)) + floor * size


def check(actual: torch.Tensor, exact: torch.Tensor, budget: float) -> Check:
    """Compare ``actual`` with the fp64 result ``exact``. A NaN, or an infinity in another place, is an
    infinite error.
    """
    if actual.shape != exact.shape:
        raise ValueError(
            f"shapes differ: got {tuple(actual.shape)}, the specification gives {tuple(exact.shape)}"
        )
    difference = _difference(actual, exact)
    norm = torch.where(torch.isfinite(exact), exact, 0.0).norm().item()
    relative = difference.norm().item() / norm if norm else difference.norm().item()
    return Check(difference.max().item() if difference.numel() else 0.0, relative, budget)


def assert_matches(actual: torch.Tensor, exact: torch.Tensor, budget: float, name: str = "result") -> None:
    """Raise AssertionError with the error, the budget and the place of the largest difference."""
    outcome = check(actual, exact, budget)
    if not outcome.ok:
        flat = int(_difference(actual, exact).nan_to_num(float("inf")).argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape))
        raise AssertionError(f"{name} differs by {outcome.max_abs_err:.3e} at {where}, budget {budget:.3e}")


def against_spec(
    implementation: Callable[..., torch.Tensor],
    specification: Callable[..., torch.Tensor],
    tensors: dict[str, torch.Tensor],
    *,
    gradients: bool = False,
    seed: int = 0,
) -> dict[str, Check]:
    """Check values, and gradients for every floating tensor, of one implementation against the specification.

    Both callables take ``tensors`` by name and return one output tensor. The specification runs on the CPU,
    in fp64 and in the inputs' dtype. Keys of the result: ``out`` and, with ``gradients``, ``d_<name>``.
    """
    mine = _run(implementation, tensors, None, None, gradients, seed)
    exact = _run(specification, tensors, torch.device("cpu"), torch.float64, gradients, seed)
    eager = _run(specification, tensors, torch.device("cpu"), None, gradients, seed)
    magnitude = max(_largest(t) for t in tensors.values() if t.is_floating_point())
    return {
        key: check(mine[key], exact[key], error_budget(exact[key], eager[key], magnitude)) for key in exact
    }


def _run(
    fn: Callable[..., torch.Tensor],
    tensors: dict[str, torch.Tensor],
    device: torch.device | None,
    dtype: torch.dtype | None,
    gradients: bool,
    seed: int,
) -> dict[str, torch.Tensor]:
    def place(tensor: torch.Tensor) -> torch.Tensor:
        floating = tensor.is_floating_point()
        moved = tensor.detach().to(device=device, dtype=dtype if floating else None)
        return moved.requires_grad_(gradients) if floating else moved

    given = {name: place(tensor) for name, tensor in tensors.items()}
    out = fn(**given)
    results = {"out": out.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float32)
        # Rounded to the inputs' dtype once, so that every run receives the same upstream gradient.
        rounded = upstream.to(next(t.dtype for t in tensors.values() if t.is_floating_point()))
        out.backward(rounded.to(out))
        for name, tensor in given.items():
            if tensor.is_floating_point():
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                results[f"d_{name}"] = grad
    return {name: value.detach() for name, value in results.items()}


def _difference(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    actual = actual.detach().to(device=exact.device, dtype=torch.float64)
    exact = exact.detach().to(torch.float64)
    same = actual == exact  # also equal infinities, whose difference would be NaN
    return torch.where(same, 0.0, (actual - exact).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)]
    return finite.abs().max().item() if finite.numel() else 0.0
