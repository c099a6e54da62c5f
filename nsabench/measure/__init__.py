"""Measuring one step: timers, peak memory, NVML, and the shares of its stages. Knows no attention."""

from nsabench.measure.backward import backward_shares
from nsabench.measure.choice import choose_iters, make_timer
from nsabench.measure.device import MeasureError, gpu_uuid, gpus_alike, resolve_device
from nsabench.measure.kineto import KinetoTimer
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
)

__all__ = [
    "STAGES",
    "CaptureError",
    "CpuTimer",
    "EventTimer",
    "GraphTimer",
    "HostTimer",
    "KinetoTimer",
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
    "gpus_alike",
    "make_timer",
    "open_sampler",
    "peak_memory",
    "resolve_device",
]
