"""Other implementations of NSA and its relatives: where they come from, what they offer, how they differ.

Nothing is imported to find out what is installed; an adapter is imported when its branches are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nsabench.peers.installed import located, state_of

if TYPE_CHECKING:
    from nsabench.peers.branches import PeerBranch
    from nsabench.peers.core import PeerCore

EXTRA = "pip install 'nsabench[peers]'"
CLONE = "git clone https://github.com"


@dataclass(frozen=True)
class Peer:
    """One of them.

    ``distribution`` is its name for pip, empty where it is no package; ``module`` the top-level module that
    it installs, and ``file`` what tells a clone's folder from another of that name. ``get`` is how to get it,
    ``adapter`` the module of this package that asks it, empty where there is none; ``timed`` are the variants
    whose core can be timed, the first of them the peer's best.
    """

    name: str
    distribution: str
    module: str
    get: str
    offers: str
    differs: str
    source: str
    adapter: str = ""
    file: str = ""
    timed: tuple[str, ...] = ()

    def version(self) -> str | None:
        """The installed version, of a clone its commit; None where it is not installed. Imports nothing of
        it.
        """
        if self.file:
            folder = located(self.module, self.file)
            return None if folder is None else state_of(folder)
        if not self.module or find_spec(self.module) is None:
            return None
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def branches(self) -> tuple[PeerBranch, ...]:
        """What its adapter asks of it; empty without one. The peer itself is imported at the first call."""
        if not self.adapter:
            return ()
        found: tuple[PeerBranch, ...] = import_module(self.adapter).BRANCHES
        return found

    @property
    def impls(self) -> tuple[str, ...]:
        """The names by which its core is asked for, ``peer:NAME`` or ``peer:NAME:VARIANT``."""
        return tuple(f"peer:{self.name}:{v}" if v else f"peer:{self.name}" for v in self.timed)

    def core(self, impl: str) -> PeerCore:
        """The core of one of its ``impls``; the adapter is imported now, the peer at the first call."""
        cores: dict[str, PeerCore] = import_module(self.adapter).CORES
        return cores[self.timed[self.impls.index(impl)]]


PEERS = (
    Peer(
        "fla-core",
        "fla-core",
        "fla",
        EXTRA,
        "fla.ops.nsa: parallel_nsa, forward, backward and decode in Triton (GPU), and naive_nsa_* by branch "
        "in plain torch, which run anywhere",
        "l = d = l', blocks pooled by their mean, one K and V for all branches; kernels take groups that are "
        "a power of two of at least 16",
        "https://github.com/fla-org/flash-linear-attention",
        "nsabench.peers.fla",
        timed=("", "naive"),
    ),
    Peer(
        "lucidrains",
        "native-sparse-attention-pytorch",
        "native_sparse_attention_pytorch",
        EXTRA,
        "module SparseAttention, training and decode; plain torch, Triton or FlexAttention",
        "own block scores (mean, normalised again), the own block besides the n selected, a window of w + 1 "
        "keys, compressed path not rotated and with a learned key; one head dim",
        "https://github.com/lucidrains/native-sparse-attention-pytorch",
        "nsabench.peers.lucidrains",
    ),
    Peer(
        "xunhaolai",
        "",
        "native_sparse_attention",
        f"{CLONE}/XunhaoLai/native-sparse-attention-triton && "
        "export PYTHONPATH=$PWD/native-sparse-attention-triton:$PYTHONPATH (needs einops)",
        "compressed_attention, topk_sparse_attention, a module, decode, in Triton",
        "a window of w + 1 keys in prefill (asked for w) and w in decode; keeps whole score matrices; waits "
        "for the host; one head dim up to 128",
        "https://github.com/XunhaoLai/native-sparse-attention-triton",
        "nsabench.peers.xunhaolai",
        "ops/triton/topk_sparse_attention.py",
        ("",),
    ),
    Peer(
        "sfnsa",
        "",
        "flash_nsa",
        f"{CLONE}/mdy666/Scalable-Flash-Native-Sparse-Attention && "
        "export PYTHONPATH=$PWD/Scalable-Flash-Native-Sparse-Attention:$PYTHONPATH (needs setuptools<81)",
        "flash_nsa_varlen_func, nsa_decode: the full core, paged decode, context parallel, in Triton",
        "a window of w + 1 keys (asked for w); stores scores cubed in fp16 by default, so small ones vanish "
        "(asked for fp32)",
        "https://github.com/mdy666/Scalable-Flash-Native-Sparse-Attention",
        "nsabench.peers.sfnsa",
        "ops/select_attn.py",
        ("",),
    ),
    Peer(
        "cudnn",
        "nvidia-cudnn-frontend",
        "cudnn",
        "pip install nvidia-cudnn-frontend nvidia-cutlass-dsl",
        "cudnn.native_sparse_attention: selection, compression, sliding window, top-k; selection on SM90 and "
        "later, compression and top-k on SM100 and later",
        "forward only; compression blocks of 16 or 32, one head dim",
        "https://github.com/NVIDIA/cudnn-frontend",
    ),
    Peer(
        "flash-attn",
        "flash-attn",
        "flash_attn",
        "pip install 'nsabench[flash-attn]' (builds with nvcc)",
        "dense, packed, windowed and split-K decode attention; used by the route fa2 and by dense:fa2",
        "not NSA: a dense baseline, and the kernels behind fa2; one head dim (values are padded)",
        "https://github.com/Dao-AILab/flash-attention",
    ),
    Peer(
        "flash-attn-4",
        "flash-attn-4",
        "flash_attn",
        "pip install 'nsabench[fa4]'",
        "dense, windowed and block-sparse attention on SM90 and SM100; used by the route fa4 and dense:fa4",
        "not NSA: a sparse block must equal the tile; its sparse backward at head dim 64 was wrong on SM90 "
        "in some versions",
        "https://github.com/Dao-AILab/flash-attention",
    ),
    Peer(
        "fsa",
        "",
        "",
        "git clone https://github.com/Relaxed-System-Lab/Flash-Sparse-Attention",
        "the selected branch with keys in the outer loop, for groups up to 8",
        "the maximum of token 0 for every row, which overflows; partial sums always in bf16",
        "https://github.com/Relaxed-System-Lab/Flash-Sparse-Attention",
    ),
    Peer(
        "infllm-v2",
        "",
        "",
        "git clone https://github.com/OpenBMB/infllmv2_cuda_impl",
        "block-sparse attention",
        "a different algorithm: not NSA",
        "https://github.com/OpenBMB/infllmv2_cuda_impl",
    ),
    Peer(
        "flash-moba",
        "",
        "",
        "git clone https://github.com/mit-han-lab/flash-moba",
        "block-sparse attention over a mixture of blocks",
        "a different algorithm: not NSA",
        "https://github.com/mit-han-lab/flash-moba",
    ),
    Peer(
        "flashmla",
        "",
        "",
        "git clone https://github.com/deepseek-ai/FlashMLA",
        "token-sparse attention over a latent KV cache",
        "a different algorithm: not NSA",
        "https://github.com/deepseek-ai/FlashMLA",
    ),
    Peer(
        "mslk",
        "",
        "",
        "git clone https://github.com/meta-pytorch/MSLK",
        "sparse attention kernels",
        "a different algorithm: not NSA",
        "https://github.com/meta-pytorch/MSLK",
    ),
    Peer(
        "tilelang",
        "",
        "",
        "git clone https://github.com/tile-ai/tilelang",
        "examples/deepseek_nsa: attention over given block lists",
        "a different algorithm: not NSA",
        "https://github.com/tile-ai/tilelang",
    ),
)
"""All of them that are known, those with an adapter first."""


def timed() -> dict[str, Peer]:
    """The peers whose core can be timed, by the name that asks for it."""
    return {impl: peer for peer in PEERS for impl in peer.impls}


def adapted() -> list[Peer]:
    """The peers that can be asked."""
    return [peer for peer in PEERS if peer.adapter]
