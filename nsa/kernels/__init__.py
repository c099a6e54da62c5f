"""The branches as Triton kernels for NVIDIA GPUs; on CPUs under TRITON_INTERPRET=1 only."""
