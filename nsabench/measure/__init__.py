"""Measuring one step: timers, peak memory, NVML, and the shares of its stages. Knows no attention."""

from nsabench.measure.backward import backward_shares
from nsabench.measure.device import MeasureError, gpu_uuid, resolve_device
from nsabench.measure.memory import PeakMemory, available_bytes, peak_memory
from nsabench.measure.nvml import NvmlSampler, open_sampler
from nsabench.measure.stages import STAGES, Shares, StageRecorder
from nsabench.measure.timers import (
    CaptureError,
    CpuTimer,
    EventTimer,
    GraphTimer,
    HostTimer,
    Timer,
    choose_iters,
    make_timer,
)

__all__ = [
    "STAGES",
    "CaptureError",
    "CpuTimer",
    "EventTimer",
    "GraphTimer",
    "HostTimer",
    "MeasureError",
    "NvmlSampler",
    "PeakMemory",
    "Shares",
    "StageRecorder",
    "Timer",
    "available_bytes",
    "backward_shares",
    "choose_iters",
    "gpu_uuid",
    "make_timer",
    "open_sampler",
    "peak_memory",
    "resolve_device",
]
