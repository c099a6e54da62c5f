"""What is recorded about the machine, and what must never be."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import nsabench
from nsabench.store import capture_environment, environment, git_revision


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    path = tmp_path / "repository"
    (path / "package").mkdir(parents=True)
    (path / "package" / "code.py").write_text("x = 1\n")
    git(path, "init", "-q")
    git(path, "add", ".")
    git(path, "commit", "-q", "-m", "first")
    return path


def git(path: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    done = subprocess.run(["git", "-C", path, *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_revision_is_the_commit_and_whether_tracked_files_differ(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert len(commit) == 40
    assert git_revision(repository) == (commit, False)
    assert git_revision(str(repository / "package")) == (commit, False)
    (repository / "results.csv").write_text("untracked")
    assert git_revision(repository) == (commit, False)
    (repository / "package" / "code.py").write_text("x = 2\n")
    assert git_revision(repository / "package") == (commit, True)
    git(repository, "add", ".")
    assert git_revision(repository) == (commit, True)


def test_an_untracked_folder_has_no_revision(repository: Path, tmp_path: Path) -> None:
    """An environment installed inside somebody's repository is not that repository's code."""
    installed = repository / "venv" / "nsabench"
    installed.mkdir(parents=True)
    (installed / "code.py").touch()
    assert git_revision(installed) == (None, False)
    assert git_revision(tmp_path) == (None, False)
    assert git_revision(tmp_path / "missing") == (None, False)


def test_a_repository_without_a_commit_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    assert git_revision(tmp_path) == (None, False)


def test_without_git_there_is_no_revision(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision(repository) == (None, False)


def test_a_git_hook_does_not_lead_astray(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_revision(repository) == (commit, False)


def test_the_environment_says_what_a_number_depends_on() -> None:
    found = capture_environment()
    keys = "commit dirty nsabench python platform cpu torch gpus packages env"
    assert sorted(found) == sorted(keys.split())
    assert json.loads(json.dumps(found)) == found
    assert found["nsabench"] == nsabench.__version__
    assert platform.python_version() in found["python"]
    assert (found["commit"], found["dirty"]) == git_revision(Path(nsabench.__file__).parent)
    assert sorted(found["cpu"]) == ["affinity", "cores", "memory_bytes", "model", "threads"]
    assert found["cpu"]["memory_bytes"] > 2**20
    assert found["cpu"]["threads"] == os.cpu_count()
    assert found["packages"]["numpy"]


def test_torch_is_recorded_where_there_is_one() -> None:
    torch = pytest.importorskip("torch")
    found = capture_environment()
    assert found["torch"]["version"] == str(torch.__version__)
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_machine_without_torch_has_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = capture_environment()
    assert found["torch"] is None
    assert found["gpus"] == []


class FakeCuda:
    """The parts of torch.cuda that are read, for one GPU."""

    properties = SimpleNamespace(
        name="NVIDIA H200",
        uuid="11111111-2222-3333-4444-555555555555",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        total_memory=140 * 2**30,
    )

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_device_properties(self, index: int) -> SimpleNamespace:
        assert index == 0
        return self.properties


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch")
    module.__version__ = "2.13.0"
    module.version = SimpleNamespace(cuda="13.0")
    module.backends = SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91002))
    module.cuda = FakeCuda()
    module.get_num_threads = module.get_num_interop_threads = lambda: 4
    monkeypatch.setitem(sys.modules, "torch", module)


def test_a_gpu_is_recorded_by_uuid_as_nvml_writes_it(
    fake_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml: Any = ModuleType("pynvml")
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlSystemGetDriverVersion = lambda: b"580.65.06"
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = capture_environment()
    assert found["torch"] == {
        "version": "2.13.0",
        "threads": 4,
        "interop_threads": 4,
        "cuda": "13.0",
        "cudnn": 91002,
        "driver": "580.65.06",
    }
    assert found["gpus"] == [
        {
            "name": "NVIDIA H200",
            "uuid": "GPU-11111111-2222-3333-4444-555555555555",
            "capability": "9.0",
            "sm_count": 132,
            "l2_bytes": 50 * 2**20,
            "memory_bytes": 140 * 2**30,
        }
    ]


def test_a_driver_that_cannot_be_asked_is_unknown(fake_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert capture_environment()["torch"]["driver"] is None


def test_switches_are_recorded_and_secrets_and_paths_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if environment._VARIABLES.fullmatch(name):
            monkeypatch.delenv(name)
    values = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "MIG-GPU-1234/1/0,GPU-5678",
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": "/srv/ada/.triton",
        "NSA_USE_FA2_WIN": "1",
        "NSA_HOME": "~/nsa",
        "TORCH_LOGS": "dynamo:file:///srv/log",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NSA_API_KEY": "12345",
        "TORCH_TOKEN": "12345",
        "UNRELATED": "value",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert capture_environment()["env"] == {
        "CUDA_VISIBLE_DEVICES": "MIG-GPU-1234/1/0,GPU-5678",
        "NSA_HOME": "<path>",
        "NSA_USE_FA2_WIN": "1",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_LOGS": "<path>",
        "TRITON_CACHE_DIR": "<path>",
        "TRITON_INTERPRET": "1",
    }


def test_no_host_user_or_path_is_recorded() -> None:
    text = json.dumps(capture_environment())
    assert str(Path.home()) + os.sep not in text
    assert str(Path.cwd()) not in text
    host, user = socket.gethostname(), getpass.getuser()
    for name in (host, user):
        # A name like "cpu" or "root" may be a common word; only as a value of its own would it be a leak.
        assert f'"{name}"' not in text


def test_a_cpu_without_proc_has_a_model_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert environment._cpu_model() == (platform.processor() or platform.machine())
