"""The shape of one NSA layer, checked once where it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class NSAConfig:
    """Heads and block geometry of Native Sparse Attention (arXiv 2502.11089, section 3.3).

    Args:
        num_heads: query heads ``HQ``.
        num_kv_heads: KV heads (groups) ``H``; divides ``num_heads``.
        head_dim: key dim ``D``.
        value_dim: value dim ``DV``; ``head_dim`` when None.
        compression_block_size: ``l``, tokens in a compressed block.
        compression_stride: ``d``, tokens between block starts; divides ``l`` and ``l'``.
        selection_block_size: ``l'``, tokens in a selection block; at least ``l``.
        num_selected_blocks: ``n``, blocks a query selects, forced ones included.
        window_size: ``w``, keys of the sliding window, the query's own included.
        num_initial_blocks: first blocks, always selected.
        num_local_blocks: last blocks up to the query's own, always selected.

    Raises:
        ValueError: one line naming the field, the value given and what is allowed.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int | None = None
    compression_block_size: int = 32
    compression_stride: int = 16
    selection_block_size: int = 64
    num_selected_blocks: int = 16
    window_size: int = 512
    num_initial_blocks: int = 1
    num_local_blocks: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "value_dim":
                continue
            least = 0 if field.name in ("num_initial_blocks", "num_local_blocks") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field.name} must be an integer of at least {least}, got {value!r}")
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        stride, block, selection = (
            self.compression_stride,
            self.compression_block_size,
            self.selection_block_size,
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if block % stride:
            raise ValueError(f"compression_stride must divide compression_block_size={block}, got {stride}")
        if selection % stride:
            raise ValueError(f"compression_stride must divide selection_block_size={selection}, got {stride}")
        if block > selection:
            raise ValueError(
                f"compression_block_size must be at most selection_block_size={selection}, got {block}"
            )
        forced = self.num_initial_blocks + self.num_local_blocks
        if forced > self.num_selected_blocks:
            raise ValueError(
                f"num_selected_blocks must hold the {forced} forced blocks "
                f"(initial + local), got {self.num_selected_blocks}"
            )

    @property
    def group_size(self) -> int:
        """``G``: query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def v_dim(self) -> int:
        """``DV`` as a plain integer."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def scale(self) -> float:
        """Softmax scale, ``1 / sqrt(head_dim)``."""
        return float(self.head_dim) ** -0.5
