"""A byte-level decoder on NSA: embedding, then layers of attention and SwiGLU, each on normalised input."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nsa import KVCache, NativeSparseAttention, NSAConfig, Routing
from nsabench.plan import PlanError
from nsabench.plan.training import VOCABULARY, ModelSettings

MODES = ("batched", "stepwise")

Caches = list[KVCache]
"""One cache a layer."""


class ByteLM(nn.Module):
    """Logits of the next byte at every position.

    Args:
        settings: width, depth and geometry.
        grad_checkpoint: keep only each layer's input for the backward pass and compute the rest again.

    Raises:
        PlanError: a geometry that NSA does not allow, in NSA's words.
    """

    def __init__(self, settings: ModelSettings, *, grad_checkpoint: bool = False) -> None:
        super().__init__()
        self.settings, self.grad_checkpoint = settings, grad_checkpoint
        self.config = attention_config(settings)
        self.embedding = nn.Embedding(VOCABULARY, settings.dim)
        self.layers = nn.ModuleList(Layer(settings, self.config) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.dim)
        self.head = nn.Linear(settings.dim, VOCABULARY, bias=False)
        self._initialise()
        if settings.tied:
            self.head.weight = self.embedding.weight

    def _initialise(self) -> None:
        """Normal weights of the standard deviation that keeps a signal's size; what adds to the stream is
        smaller by the square root of the number of additions.
        """
        settings = self.settings
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".compress_" not in name:
                adds = name.endswith((".attention.out", ".feed_forward.down"))
                std = 1 / math.sqrt(module.in_features * (2 * settings.layers if adds else 1))
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        std = 1 / math.sqrt(settings.dim) if settings.tied else settings.embedding_std
        nn.init.normal_(self.embedding.weight, std=std)

    def forward(
        self,
        tokens: torch.Tensor,
        routing: str | Routing = "auto",
        cache: Caches | None = None,
        mode: str = "batched",
    ) -> torch.Tensor:
        """``tokens (B,T) int64 -> logits (B,T,256)``, in the dtype of the head's product.

        Args:
            routing: which backend computes each branch, in every layer.
            cache: of :meth:`new_cache`; the tokens continue what it holds, and it grows by T.
            mode: ``batched`` computes every position at once. ``stepwise`` feeds token after token through
                caches that keep gradients: the same values and gradients.

        Raises:
            ValueError: an unknown mode, or a mode that does not go with a cache or with checkpointing.
        """
        if mode == "batched":
            return self._logits(tokens, routing, cache)
        if mode != "stepwise":
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if cache is not None or self.grad_checkpoint:
            what = "a cache" if cache is not None else "grad_checkpoint"
            raise ValueError(
                f"mode stepwise makes its own caches and keeps every step; it goes without {what}"
            )
        if tokens.shape[1] == 0:
            return self._logits(tokens, routing, None)
        steps = self.new_cache(tokens.shape[0], tokens.shape[1], keep_graph=torch.is_grad_enabled())
        return torch.cat([self._logits(token, routing, steps) for token in tokens.split(1, 1)], 1)

    def _logits(self, tokens: torch.Tensor, routing: str | Routing, cache: Caches | None) -> torch.Tensor:
        x = self.embedding(tokens)
        again = self.grad_checkpoint and cache is None and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers):
            if again:
                x = checkpoint(layer, x, routing, use_reentrant=False)
            else:
                x = layer(x, routing, None if cache is None else cache[number])
        logits: torch.Tensor = self.head(self.norm(x))
        return logits

    def new_cache(self, batch_size: int, max_seq_len: int, *, keep_graph: bool = False) -> Caches:
        """An empty cache for every layer, where the weights are and in the dtype that keys will have."""
        weight = self.embedding.weight
        device = weight.device
        cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if cast else weight.dtype
        return [
            KVCache(
                self.config,
                batch_size,
                max_seq_len,
                dtype=dtype,
                device=device,
                shared_kv=self.settings.shared_kv,
                keep_graph=keep_graph,
            )
            for _ in self.layers
        ]

    def num_parameters(self) -> int:
        """Numbers that are trained; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


class Layer(nn.Module):
    """Attention, then feed-forward, each added to the stream ``x (B,T,dim)``."""

    def __init__(self, settings: ModelSettings, config: NSAConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.dim)
        self.attention = NativeSparseAttention(
            config,
            settings.dim,
            rope=settings.rope or None,
            gate=settings.gate,
            compress=settings.compress,
            shared_kv=settings.shared_kv,
        )
        self.feed_forward_norm = nn.RMSNorm(settings.dim)
        self.feed_forward = SwiGLU(settings.dim, settings.feed_forward)

    def forward(
        self, x: torch.Tensor, routing: str | Routing = "auto", cache: KVCache | None = None
    ) -> torch.Tensor:
        """``x (B,T,dim) -> (B,T,dim)``."""
        x = x + self.attention(self.attention_norm(x), cache, routing)
        added: torch.Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return added


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., dim) -> (..., dim)``."""
        gate, value = self.up(x).chunk(2, -1)
        y: torch.Tensor = self.down(F.silu(gate) * value)
        return y


def attention_config(settings: ModelSettings) -> NSAConfig:
    """The configuration of every attention layer. PlanError where NSA refuses it."""
    try:
        return NSAConfig(
            settings.heads,
            settings.groups,
            settings.dk,
            settings.dv,
            compression_block_size=settings.l,
            compression_stride=settings.d,
            selection_block_size=settings.l_sel,
            num_selected_blocks=settings.n_sel,
            window_size=settings.w,
            num_initial_blocks=settings.n_initial,
            num_local_blocks=settings.n_local,
        )
    except ValueError as error:
        raise PlanError(str(error)) from error


def token_loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, nats, over the positions that count; a zero with a gradient where none does.

    ``logits (B,T,256), targets (B,T) int64, mask (B,T) bool -> () fp32``.
    """
    loss = F.cross_entropy(logits[mask].float(), targets[mask], reduction="sum")
    return loss / max(1, int(mask.sum()))
