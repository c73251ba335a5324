from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from onlay import doctor
from onlay.doctor import Check, check_requirement, examine
from onlay.hardware import Device, Hardware

GPU = Device(name="Tesla T4", memory_bytes=15 * 2**30, compute_capability=(7, 5))


def test_every_part_is_checked_and_the_token_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONLAY_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    checks = {check.name: check for check in examine()}
    expected = {"Python", "torch", "transformers", "peft", "torch build", "CPU", "disk for bases", "disk for onlay"}
    assert expected | {"hub token", "tensorboard", "wandb", "bitsandbytes"} <= set(checks)
    assert checks["hub token"].found == "present"
    assert "hf_very_secret" not in repr(checks)
    assert checks["Python"].ok
    assert checks["torch"].ok
    assert importlib.metadata.version("torch") in checks["torch"].found
    for check in checks.values():
        assert check.ok or check.remedy or check.name == "GPU"


def test_a_version_out_of_range_comes_with_the_line_that_installs_it() -> None:
    assert check_requirement("packaging", ">=1").ok
    low = check_requirement("packaging", "<1")
    assert (low.ok, low.remedy) == (False, 'python -m pip install "packaging<1"')
    missing = check_requirement("no-such-package", ">=2,<3")
    assert not missing.ok
    assert missing.found == "missing (supported: >=2,<3)"


def test_an_extra_is_named_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["torch>=2", 'no-such-package>=1; extra == "boards"']
    monkeypatch.setattr(doctor, "requirements", lambda: requirements)
    check = doctor._optional("no-such-package", "boards")
    assert check.ok
    assert check.remedy == 'python -m pip install "onlay[boards]"'
    assert doctor._optional("no-such-other", "x").remedy == "python -m pip install no-such-other"


def build_check(*, cuda: str | None, usable: bool, seen: bool) -> Check:
    return doctor._build_check("BUILD", ", driver 1", usable=usable, seen=seen, cuda=cuda)


def test_a_gpu_that_torch_cannot_use_is_not_well() -> None:
    assert build_check(cuda=None, usable=False, seen=False).ok
    assert build_check(cuda="13.0", usable=True, seen=True).ok
    cpu_build = build_check(cuda=None, usable=False, seen=True)
    assert not cpu_build.ok
    assert "CUDA build of torch" in str(cpu_build.remedy)
    old_driver = build_check(cuda="13.0", usable=False, seen=True)
    assert "Update the NVIDIA driver" in str(old_driver.remedy)


def test_a_gpu_beside_a_cpu_build_is_listed_as_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    hardware = Hardware(devices=[GPU], cpu_cores=2, host_memory_bytes=2**33, platform="x", driver="570")
    gpu = doctor._torch(hardware)[-1]
    assert (gpu.name, gpu.ok, gpu.found) == ("GPU", False, "Tesla T4, not usable")


def test_a_full_disk_and_a_folder_without_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = doctor._disk("disk", tmp_path, 2**60, "HF_HOME")
    assert not full.ok
    assert "HF_HOME" in str(full.remedy)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "cannot be written" in doctor._disk("disk", tmp_path, 1, "HF_HOME").found


def test_requirements_come_from_the_package_or_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(text.startswith("torch") for text in doctor.requirements())

    def not_installed(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    assert any(text.startswith("torch") for text in doctor.requirements())
