"""Native Sparse Attention (arXiv 2502.11089), exact and trainable. The names below are the public surface."""

from nsa.attention import nsa_attention
from nsa.cache import KVCache
from nsa.config import NSAConfig
from nsa.module import NativeSparseAttention
from nsa.reference import compressed_attention, select_blocks, selected_attention, sliding_attention
from nsa.routes import Routing, UnsupportedRoute
from nsa.stages import selection_hook, stage_hook

__all__ = [
    "KVCache",
    "NSAConfig",
    "NativeSparseAttention",
    "Routing",
    "UnsupportedRoute",
    "compressed_attention",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "selection_hook",
    "sliding_attention",
    "stage_hook",
]
