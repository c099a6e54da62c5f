"""What a benchmark should know of a machine before it trusts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from nsa.routes import TABLE
from nsabench.commands._sweep import device_of
from nsabench.measure import open_sampler
from nsabench.measure.peaks import Peaks, calibrate
from nsabench.store import capture_environment
from nsabench.store.machine import load_peaks, peaks_file, save_peaks

BUSY_PCT = 20.0
PROBE_S = 0.5


def diagnose() -> dict[str, Any]:
    """``machine``: name -> value; ``findings``: ``level`` (ok, info, warn) and ``text``, one line each."""
    environment = capture_environment()
    cpu, about = environment["cpu"], environment["torch"] or {}
    usable = cpu["affinity"] or cpu["threads"]
    machine: dict[str, Any] = {
        "nsabench": f"{environment['nsabench']}, commit {(environment['commit'] or 'unknown')[:12]}"
        + (" with local changes" if environment["dirty"] else ""),
        "python": environment["python"],
        "platform": environment["platform"],
        "cpu": f"{cpu['model']}, {usable} usable threads, {cpu['memory_bytes'] / 2**30:.0f} GiB",
        "torch": f"{about.get('version')}, {about.get('threads')} threads, "
        f"CUDA {about.get('cuda') or 'not built in'}",
        "packages": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
        "gpus": "; ".join(
            f"{g['name']} ({g['sm_count']} SMs, {g['memory_bytes'] / 2**30:.0f} GiB)"
            for g in environment["gpus"]
        ),
        **{f"peaks of {device}": _peaks_text(peaks) for device, peaks in _peaks(environment).items()},
        "switches": ", ".join(f"{name}={value}" for name, value in environment["env"].items()),
    }
    findings = [
        *_cpu_findings(about, usable),
        *_gpu_findings(environment),
        *_library_findings(environment),
        *_compiler_findings(),
        *_peaks_findings(environment),
    ]
    return {"machine": machine, "findings": findings}


def calibrate_device(device: str, *, tell: Callable[[str], None]) -> None:
    """Measure the peaks of a device and keep them for later runs; PlanError where it is not there."""
    device = device_of(device)
    tell(f"calibrating {device}; other work on this machine would spoil it")
    peaks = calibrate(device, tell=lambda what: tell(f"  {what}"))
    save_peaks(peaks_file(capture_environment(), device), peaks.to_dict())


def _peaks(environment: Mapping[str, Any]) -> dict[str, Peaks | None]:
    """What is known of each device: the CPU, and every GPU that torch sees."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(len(environment["gpus"])))]
    stored = {device: load_peaks(peaks_file(environment, device)) for device in devices}
    return {device: Peaks.from_dict(found) if found else None for device, found in stored.items()}


def _peaks_text(peaks: Peaks | None) -> str:
    if peaks is None:
        return "not measured"
    rates = ", ".join(f"{dtype} {1e3 * rate:.4g}" for dtype, rate in peaks.matmul_tflops.items())
    overheads = {"launch": peaks.launch_us, "event": peaks.event_us, "graph": peaks.graph_us}
    known = "".join(f", {name} {value:.2g} µs" for name, value in overheads.items() if value is not None)
    clock = f"clock {peaks.clock_us:.2g} µs{known}"
    read = "" if peaks.read_gbps is None else f", read {peaks.read_gbps:.4g} GB/s"
    return f"copy {peaks.copy_gbps:.4g} GB/s{read}; matrix product, GFLOP/s: {rates}; {clock}"


def _finding(level: str, text: str) -> dict[str, str]:
    return {"level": level, "text": text}


def _cpu_findings(about: dict[str, Any], usable: int) -> list[dict[str, str]]:
    found = []
    busy = psutil.cpu_percent(interval=PROBE_S)
    if busy > BUSY_PCT:
        found.append(
            _finding(
                "warn",
                f"the CPU is {busy:.0f} % busy with other work: intervals will be wide; wait or stop it",
            )
        )
    else:
        found.append(_finding("ok", f"the CPU is {busy:.0f} % busy"))
    threads = int(about.get("threads") or 1)
    if threads > usable:
        found.append(
            _finding(
                "warn", f"torch uses {threads} threads on {usable} usable cores: set OMP_NUM_THREADS={usable}"
            )
        )
    free = psutil.virtual_memory().available
    found.append(_finding("ok", f"{free / 2**30:.1f} GiB of memory are free"))
    return found


def _gpu_findings(environment: dict[str, Any]) -> list[dict[str, str]]:
    if not environment["gpus"]:
        return [_finding("info", "no GPU is visible to torch: measuring on the CPU")]
    found = []
    for index, gpu in enumerate(environment["gpus"]):
        with open_sampler(f"cuda:{index}") as sampler:
            reading = sampler.edge()
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            _finding(
                "ok", f"cuda:{index} {gpu['name']}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
            )
        )
        if sampler.reason and sampler.reason != "closed":
            found.append(
                _finding(
                    "warn", f"cuda:{index}: no NVML readings ({sampler.reason}); power and clocks stay empty"
                )
            )
            continue
        shown = {
            name: value
            for name, value in reading.items()
            if name not in ("t_s", "gpu_uuid") and value is not None
        }
        found.append(
            _finding(
                "info", f"cuda:{index}: " + ", ".join(f"{name} {value}" for name, value in shown.items())
            )
        )
        if (reading.get("util_pct") or 0) > BUSY_PCT:
            found.append(
                _finding("warn", f"cuda:{index} is {reading['util_pct']:.0f} % busy with other work")
            )
    return found


def _library_findings(environment: dict[str, Any]) -> list[dict[str, str]]:
    if environment["packages"].get("flash_attn"):
        return [
            _finding(
                "ok", f"flash_attn {environment['packages']['flash_attn']} is installed: fa2 routes use it"
            )
        ]
    if not environment["gpus"]:
        return [_finding("info", "flash_attn is not installed; without a GPU nothing would use it")]
    instead = "fa2 routes use the FlashAttention-2 kernels inside torch"
    install = "pip install 'nsabench[flash-attn]'"
    return [_finding("info", f"flash_attn is not installed: {instead}; for the package: {install}")]


def _compiler_findings() -> list[dict[str, str]]:
    row = next(row for row in TABLE if row.backend == "cpp")
    provider = row.provider()
    if provider:
        return [_finding("ok", f"CPU kernels are compiled by {provider}")]
    return [
        _finding(
            "info", "no CPU kernels (cpp): no C++ compiler was found, or it failed: nsabench routes says why"
        )
    ]


def _peaks_findings(environment: Mapping[str, Any]) -> list[dict[str, str]]:
    unknown = [device for device, peaks in _peaks(environment).items() if peaks is None]
    if not unknown:
        return []
    text = f"peaks of {', '.join(unknown)} are not measured: nsabench doctor --calibrate on a quiet machine"
    return [_finding("info", text)]
