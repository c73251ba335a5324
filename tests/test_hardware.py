from __future__ import annotations

import gc
import os
import stat
from pathlib import Path

import pytest

from onlay.hardware import (
    Device,
    Hardware,
    find_hardware,
    find_hardware_light,
    free_disk_bytes,
    parse_nvidia_smi,
    quick_import,
)

T4 = Device(name="Tesla T4", memory_bytes=15 * 2**30, compute_capability=(7, 5))
H200 = Device(name="NVIDIA H200", memory_bytes=141 * 2**30, compute_capability=(9, 0))
CSV = "0, GPU-aaaa, Tesla T4, 15360, 7.5, 570.1\n1, GPU-bbbb, NVIDIA H200, 144384, 9.0, 570.1\n"


def hardware(*devices: Device) -> Hardware:
    return Hardware(devices=list(devices), cpu_cores=2, host_memory_bytes=8 * 2**30, platform="Linux x86_64")


def test_bf16_needs_every_gpu_to_have_it() -> None:
    assert hardware(H200).has_bf16
    assert not hardware(H200, T4).has_bf16
    assert not hardware().has_bf16
    assert hardware(H200, T4).device_memory_bytes == 15 * 2**30
    assert hardware().device_memory_bytes == 8 * 2**30


def test_nvidia_smi_is_read() -> None:
    devices, driver = parse_nvidia_smi(CSV, None)
    assert devices == [T4, H200]
    assert driver == "570.1"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", [H200]),
        ("1,0", [H200, T4]),
        ("GPU-bb", [H200]),
        ("", []),
        ("-1", []),
        ("0,7,1", [T4]),
    ],
)
def test_cuda_visible_devices_hides_gpus(visible: str, expected: list[Device]) -> None:
    assert parse_nvidia_smi(CSV, visible)[0] == expected


def test_lines_of_nvidia_smi_without_numbers_are_left_out() -> None:
    assert parse_nvidia_smi("No devices were found\n", None) == ([], None)
    assert parse_nvidia_smi("0, GPU-a, NVIDIA GB10, [N/A], 12.1, 580.1\n", None)[0] == []


@pytest.mark.parametrize(("script", "found"), [(f"printf '{CSV}'", 2), ("echo broken; exit 9", 0)])
def test_the_program_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: int) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(find_hardware_light().devices) == found


def test_both_ways_agree_on_the_host() -> None:
    light, whole = find_hardware_light(), find_hardware()
    assert light.cpu_cores == whole.cpu_cores >= 1
    assert light.host_memory_bytes == whole.host_memory_bytes > 2**28
    assert Hardware.model_validate_json(whole.to_json()) == whole


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert abs(free_disk_bytes(tmp_path / "a" / "b") - free_disk_bytes(tmp_path)) < 2**30


def test_quick_import_leaves_the_collector_as_it_was() -> None:
    assert gc.isenabled()
    with quick_import():
        assert not gc.isenabled()
        with quick_import():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
