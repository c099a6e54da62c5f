"""doctor --calibrate: measured once, kept for this machine, shown from then on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nsabench.measure import peaks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new home, and a calibration that takes a moment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"_COPY_LEAST": 2**20, "_COPY_MOST": 2**20, "_TRY_S": 0.01, "_LONG_S": 0.0}.items():
        monkeypatch.setattr(peaks, name, value)


def test_peaks_are_measured_once_and_kept(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = json.loads(call("doctor", "--json").out)
    assert before["machine"]["peaks of cpu"] == "not measured"
    assert any("doctor --calibrate" in finding["text"] for finding in before["findings"])

    done = call("doctor", "--calibrate", "--json")
    assert done.code == 0
    assert "copy bandwidth" in done.err
    after = json.loads(done.out)
    assert after["machine"]["peaks of cpu"].startswith("copy ")
    assert not any("doctor --calibrate" in finding["text"] for finding in after["findings"])
    assert (
        json.loads(call("doctor", "--json").out)["machine"]["peaks of cpu"]
        == after["machine"]["peaks of cpu"]
    )
    (kept,) = (tmp_path / "home" / ".cache" / "nsabench").glob("peaks-cpu-*.json")
    assert set(json.loads(kept.read_text())["matmul_tflops"]) == {"fp64", "fp32", "fp16", "bf16"}


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there(call, device: str) -> None:  # type: ignore[no-untyped-def]
    done = call("doctor", "--calibrate", "--device", device)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"nsabench: --device: '{device}'")
    assert done.err.count("\n") == 1


def test_damaged_peaks_are_said(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert call("doctor", "--calibrate").code == 0
    (kept,) = (tmp_path / "home" / ".cache" / "nsabench").glob("peaks-cpu-*.json")
    kept.write_text("{")
    done = call("doctor")
    assert done.code == 2
    assert "doctor --calibrate writes it anew" in done.err
    assert call("doctor", "--calibrate").code == 0
