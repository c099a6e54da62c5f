"""What a number depends on: code, packages, CPU, GPUs and switches. Never names, never paths."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import nsabench

_PACKAGES = (
    "torch",
    "triton",
    "flash_attn",
    "flash_attn_3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "numpy",
    "scipy",
    "pandas",
    "nvidia-ml-py",
    "ray",
    "ruptures",
)
_VARIABLES = re.compile(
    "CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|CUDA_LAUNCH_BLOCKING|CUDA_MODULE_LOADING|CUBLAS_WORKSPACE_CONFIG"
    "|NVIDIA_TF32_OVERRIDE|(OMP|MKL|OPENBLAS)_NUM_THREADS|OMP_PROC_BIND|OMP_PLACES|KMP_.*|GOMP_CPU_AFFINITY"
    "|PYTORCH_.*|TORCH_.*|TORCHINDUCTOR_.*|TRITON_.*|NSA_.*"
)
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.-])/|~|[A-Za-z]:\\")


def capture_environment() -> dict[str, Any]:
    """The environment of this process, as JSON can hold it; None for what cannot be read.

    Keys: `commit, dirty, nsabench, python, platform, cpu, torch, packages, gpus, env`. Memory and cache sizes
    are in bytes. `torch` is None where it is not installed, and `gpus` is empty where it sees none. Values of
    environment variables that hold an absolute path are stored as `<path>`.
    """
    commit, dirty = git_revision(Path(__file__).parent)
    return {
        "commit": commit,
        "dirty": dirty,
        "nsabench": nsabench.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu(),
        **_torch(),
        "packages": _packages(),
        "env": _variables(),
    }


def git_revision(path: Path | str) -> tuple[str | None, bool]:
    """Full SHA of the commit the folder `path` is at, and whether tracked files differ from it.

    `(None, False)` where there is no git, no commit, or git does not track the folder (an installed package).
    """
    if _git(path, "ls-files", "--error-unmatch", ".") is None:
        return None, False
    commit = _git(path, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, False
    return commit, bool(_git(path, "status", "--porcelain", "--untracked-files=no"))


def _git(path: Path | str, *arguments: str) -> str | None:
    # Inside a git hook GIT_DIR and friends point at another repository than the folder's own.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(path), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def _cpu() -> dict[str, Any]:
    try:
        affinity: int | None = len(psutil.Process().cpu_affinity() or ()) or None
    except (AttributeError, OSError, psutil.Error):
        affinity = None
    return {
        "model": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "affinity": affinity,
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_model() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError):
        return {"torch": None, "gpus": []}
    about: dict[str, Any] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "driver": None,
    }
    gpus: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        about["cudnn"] = torch.backends.cudnn.version()
        about["driver"] = _driver()
        gpus = [_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    return {"torch": {k: str(v) if k == "version" else v for k, v in about.items()}, "gpus": gpus}


def _gpu(properties: Any) -> dict[str, Any]:
    uuid = getattr(properties, "uuid", None)
    return {
        "name": properties.name,
        # As NVML writes it, so that telemetry rows match.
        "uuid": None if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}",
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
    }


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            version = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # every NVML failure, and a missing library, mean the same: unknown
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _variables() -> dict[str, str]:
    return {
        name: "<path>" if _ABSOLUTE_PATH.search(value) else value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.fullmatch(name) and not _SECRET.search(name)
    }
