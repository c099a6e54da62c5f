"""Peaks on disk: kept for the device that they belong to, read back, refused when damaged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from nsabench.store import StoreError
from nsabench.store.machine import load_peaks, peaks_file, save_peaks, stored_peaks

ENVIRONMENT: dict[str, Any] = {
    "cpu": {"model": "AMD EPYC", "affinity": 2},
    "torch": {"version": "2.13.0", "threads": 2, "driver": "580.1"},
    "gpus": [{"uuid": "GPU-1"}, {"uuid": "GPU-2"}],
}


def test_kept_and_read_back(tmp_path: Path) -> None:
    path = peaks_file(ENVIRONMENT, "cpu", tmp_path / "new")
    assert load_peaks(path) is None
    save_peaks(path, {"copy_gbps": 15.3})
    save_peaks(path, {"copy_gbps": 16.5})
    assert load_peaks(path) == {"copy_gbps": 16.5}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("device", "section", "change"),
    [
        ("cpu", "cpu", {"model": "another"}),
        ("cpu", "cpu", {"affinity": 4}),
        ("cpu", "torch", {"threads": 1}),
        ("cpu", "torch", {"version": "2.14"}),
        ("cuda", "torch", {"driver": "590.1"}),
    ],
)
def test_another_machine_has_other_peaks(device: str, section: str, change: dict[str, Any]) -> None:
    other = copy.deepcopy(ENVIRONMENT)
    other[section] |= change
    assert peaks_file(other, device, Path()) != peaks_file(ENVIRONMENT, device, Path())


def test_each_gpu_has_its_own() -> None:
    first, second = (peaks_file(ENVIRONMENT, device, Path()) for device in ("cuda", "cuda:1"))
    assert first == peaks_file(ENVIRONMENT, "cuda:0", Path())
    assert first != second
    assert first.name.startswith("peaks-cuda-")
    with pytest.raises(StoreError, match=r"this machine has 2 GPU\(s\)"):
        peaks_file(ENVIRONMENT, "cuda:2", Path())


@pytest.mark.parametrize("damage", ["{", "[]", ""])
def test_damage_is_said(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "peaks.json"
    path.write_text(damage)
    with pytest.raises(StoreError, match="doctor --calibrate writes it anew"):
        load_peaks(path)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep peaks"):
        save_peaks(tmp_path / "file" / "peaks.json", {})


def test_peaks_by_device_without_those_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = {"torch": {"version": "2", "threads": 2}, "cpu": {"model": "A", "affinity": 2}}
    assert stored_peaks(environment, ["cpu", "cuda"]) == {}
    save_peaks(peaks_file(environment, "cpu"), {"copy_gbps": 3.0})
    assert stored_peaks(environment, ["cpu", "cuda", "cpu"]) == {"cpu": {"copy_gbps": 3.0}}
    peaks_file(environment, "cpu").write_text("{")
    assert stored_peaks(environment, ["cpu"]) == {}
