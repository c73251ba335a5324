"""`onlay doctor`: what is installed, what the machine has, what is missing, and the line that puts it right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from onlay.hardware import Hardware, find_hardware_light, free_disk_bytes, quick_import
from onlay.ledger import home
from onlay.model.storage import FP8_CAPABILITY

SUPPORTED_PYTHON = ((3, 11), (3, 12))
OPTIONAL = {
    "tensorboard": "metrics in TensorBoard (training.trackers: [tensorboard])",
    "wandb": "metrics in Weights & Biases (training.trackers: [wandb])",
    "bitsandbytes": "4-bit bases and 8-bit optimizers",
}
_CACHE_BYTES = 5 * 2**30
"""Room for a small base; below this, most downloads fail."""
_HOME_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    name: str
    found: str
    ok: bool
    remedy: str | None = None
    """What to do.  Also set, with `ok`, for an optional part that is missing."""


def examine() -> list[Check]:
    """Every check, in the order to read them.  Versions are read without importing; torch is imported for CUDA."""
    hardware = find_hardware_light()
    checks = [_python()]
    checks += _dependencies()
    checks += _torch(hardware)
    checks += [_cpu(hardware)]
    checks += _disks()
    checks += [_token()]
    checks += [_optional(package, use) for package, use in OPTIONAL.items()]
    return checks


def _python() -> Check:
    version = sys.version_info[:2]
    supported = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHON)
    ok = version in SUPPORTED_PYTHON
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()} (supported: {supported})"
    return Check(
        name="Python", found=found, ok=ok, remedy=None if ok else f"Make a virtual environment with {supported}."
    )


def requirements() -> list[str]:
    """onlay's own requirements: of the installed package, else of the pyproject.toml beside the sources."""
    try:
        return list(importlib.metadata.requires("onlay") or [])
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parent.parent / "pyproject.toml"
        if not project.is_file():
            return []
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("dependencies", []))


def _dependencies() -> list[Check]:
    found = requirements()
    if not found:
        return [Check(name="onlay", found="not installed as a package", ok=False, remedy="python -m pip install onlay")]
    if importlib.util.find_spec("packaging") is None:
        return [Check(name="packaging", found="missing", ok=False, remedy="python -m pip install packaging")]
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in found]
    needed = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [check_requirement(one.name, str(one.specifier)) for one in needed]


def check_requirement(name: str, specifier: str) -> Check:
    """Whether a package is installed in the supported range, by its metadata alone."""
    from packaging.specifiers import SpecifierSet

    supported = specifier or "any version"
    install = f'python -m pip install "{name}{specifier}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, found=f"missing (supported: {supported})", ok=False, remedy=install)
    ok = SpecifierSet(specifier).contains(version, prereleases=True)
    return Check(name=name, found=f"{version} (supported: {supported})", ok=ok, remedy=None if ok else install)


def _torch(hardware: Hardware) -> list[Check]:
    if importlib.util.find_spec("torch") is None:
        return []  # Reported among the dependencies.
    try:
        with quick_import():
            import torch
    except (ImportError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [
            Check(name="torch build", found=f"cannot be imported: {first}", ok=False,
                  remedy="python -m pip install --force-reinstall torch")
        ]  # fmt: skip
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    usable = torch.cuda.is_available()
    driver = f", driver {hardware.driver}" if hardware.driver else ""
    checks = [_build_check(build, driver, usable=usable, seen=hardware.has_cuda, cuda=torch.version.cuda)]
    for index in range(torch.cuda.device_count() if usable else 0):
        found = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if found.major >= 8 else "no bf16: computes in fp16 with loss scaling"
        bf16 += " and FP8" if (found.major, found.minor) >= FP8_CAPABILITY else ""
        words = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute {found.major}.{found.minor}, {bf16}"
        checks.append(Check(name=f"GPU {index}", found=words, ok=True))
    if not usable:
        seen = ", ".join(device.name for device in hardware.devices)
        checks.append(
            Check(name="GPU", found=f"{seen}, not usable" if seen else "none: work runs on the CPU", ok=not seen)
        )
    return checks


def _build_check(build: str, driver: str, *, usable: bool, seen: bool, cuda: str | None) -> Check:
    name, found = "torch build", build + driver
    if usable or not seen:
        return Check(name=name, found=found, ok=True)
    if cuda is None:
        return Check(
            name=name, found=f"{found}, but there is a GPU", ok=False,
            remedy="Install a CUDA build of torch: choose CUDA under Get Started on PyTorch's site for the line.",
        )  # fmt: skip
    return Check(
        name=name, found=f"{found}; CUDA does not start", ok=False,
        remedy=f"Update the NVIDIA driver to one for CUDA {cuda}, or install a torch built for an older CUDA.",
    )  # fmt: skip


def _cpu(hardware: Hardware) -> Check:
    found = f"{hardware.cpu_cores} cores, {hardware.host_memory_bytes / 2**30:.1f} GiB memory"
    ok = hardware.host_memory_bytes >= 2 * 2**30
    return Check(name="CPU", found=found, ok=ok, remedy=None if ok else "At least 2 GiB of memory are needed.")


def _disks() -> list[Check]:
    cache = _hub_cache()
    return [
        _disk("disk for bases", cache, _CACHE_BYTES, "HF_HOME"),
        _disk("disk for onlay", home(), _HOME_BYTES, "ONLAY_HOME"),
    ]


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _disk(name: str, folder: Path, needed_bytes: int, variable: str) -> Check:
    free = free_disk_bytes(folder)
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        return Check(
            name=name, found=f"{folder} cannot be written", ok=False, remedy=f"Set {variable} to a folder of yours."
        )
    ok = free >= needed_bytes
    remedy = None if ok else f"Free disk space, or set {variable} to a folder on a larger disk."
    return Check(name=name, found=f"{free / 2**30:.1f} GiB free at {folder}", ok=ok, remedy=remedy)


def _token() -> Check:
    """Whether there is a token; never which."""
    from huggingface_hub import get_token

    if get_token():
        return Check(name="hub token", found="present", ok=True)
    return Check(
        name="hub token", found="none (needed for gated bases only)", ok=True, remedy="hf auth login, or set HF_TOKEN"
    )


def _optional(package: str, use: str) -> Check:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=package, found=f"not installed; for {use}", ok=True, remedy=install_line(package))
    return Check(name=package, found=version, ok=True)


def install_line(package: str) -> str:
    """Through the extra that holds the package, where onlay has one."""
    for text in requirements():
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", text)
        if extra and re.match(rf"{re.escape(package)}\b", text):
            return f'python -m pip install "onlay[{extra[1]}]"'
    return f"python -m pip install {package}"
