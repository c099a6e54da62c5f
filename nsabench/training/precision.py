"""In which precision a training computes: torch.amp's autocast, and the GradScaler of fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from nsabench.plan import PlanError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """`name` (fp32, bf16, fp16) on a device. Weights, gradients and the optimizer are fp32 in each."""

    name: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """What autocast computes products in."""
        return DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[object]:
        """Around a forward pass and its loss; never around a backward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """The scaler of fp16, whose gradients underflow without one; disabled for the others."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")

    def check(self) -> None:
        """PlanError where this machine cannot train in it: found by doing a little of everything that a
        training does in it, and said in torch's words.
        """
        if self.name == "fp32":
            return
        if self.name == "bf16" and self.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            raise PlanError("--precision: bf16 needs a GPU of compute capability 8.0, which this one is not")
        try:
            _small_step(self)
        except (RuntimeError, NotImplementedError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            where = "this CPU" if self.device.type == "cpu" else "this GPU"
            raise PlanError(f"--precision: {self.name} cannot run on {where}: {said}") from None

    def note(self) -> str:
        """What is worth knowing before a training in it begins; empty for nothing."""
        if self.device.type != "cpu" or self.name == "fp32" or _native(self.name):
            return ""
        wanted = {"fp16": "AVX512_FP16", "bf16": "AVX512 (or NEON) with bf16"}[self.name]
        return (
            f"{self.name} runs on this CPU, but slowly: it has no {wanted}, so torch converts every product; "
            "fp32 is faster here"
        )


def _native(name: str) -> bool:
    """Whether this CPU multiplies in that type; taken as yes where torch cannot tell."""
    asks = {"fp16": "_is_mkldnn_fp16_supported", "bf16": "_is_mkldnn_bf16_supported"}
    ask = getattr(getattr(torch.ops, "mkldnn", None), asks[name], None)
    try:
        return True if ask is None else bool(ask())
    except RuntimeError:
        return True


def _small_step(precision: Precision) -> None:
    """A step of attention and a linear layer, with its scaler and optimizer."""
    # Its own weights from no generator: a training's random numbers are not touched.
    weight = torch.eye(8, device=precision.device).requires_grad_()
    optimizer = torch.optim.AdamW([weight])
    scaler = precision.scaler()
    with precision.autocast():
        x = F.linear(torch.ones(1, 2, 4, 8, device=precision.device), weight)
        loss = F.scaled_dot_product_attention(x, x, x, is_causal=True).float().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
