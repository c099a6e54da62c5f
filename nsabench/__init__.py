"""nsabench measures Native Sparse Attention: how fast, on which backend, and whether it was right."""

__version__ = "0.1.0"
