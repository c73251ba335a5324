"""What this machine has: GPUs with their memory, CPU cores, host memory, free disk.

`find_hardware_light` asks the system alone (nvidia-smi, /proc) and answers fast; `find_hardware` asks torch, which knows
whether the GPUs can be used by this installation.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from onlay.records import Record

_BF16_CAPABILITY = (8, 0)
"""Since Ampere.  Older GPUs (T4: 7.5) run bfloat16 by emulation only."""
_NVIDIA_SMI_SECONDS = 10


class Device(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        return self.compute_capability >= _BF16_CAPABILITY


class Hardware(Record):
    """The devices that work can run on.  `devices` are CUDA GPUs; without any, the CPU does the work."""

    kind: ClassVar[str] = "hardware"
    devices: list[Device]
    cpu_cores: int
    """Cores that this process may use, which in a container are fewer than the machine's."""
    host_memory_bytes: int
    platform: str
    driver: str | None = None
    """Version of the NVIDIA driver, where one answers."""

    @property
    def has_cuda(self) -> bool:
        return bool(self.devices)

    @property
    def has_bf16(self) -> bool:
        """Every GPU computes in bfloat16.  False without a GPU."""
        return self.has_cuda and all(device.has_bf16 for device in self.devices)

    @property
    def device_memory_bytes(self) -> int:
        """Memory of the smallest GPU, or of the host without one: what a base has to fit into."""
        return min((device.memory_bytes for device in self.devices), default=self.host_memory_bytes)


@contextmanager
def quick_import() -> Iterator[None]:
    """Pauses the garbage collector while large packages are imported.

    torch and transformers make a million objects that all stay; collecting among them takes a quarter of the time of
    their import (3.0 s with, 2.2 s without, on two cores).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def find_hardware() -> Hardware:
    """The devices that the installed torch can use.  Imports torch (a second)."""
    with quick_import():
        import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            Device(name=found.name, memory_bytes=found.total_memory, compute_capability=(found.major, found.minor))
        )
    return _hardware(devices, driver=None)


def find_hardware_light() -> Hardware:
    """The devices that the system names, without torch: a GPU listed here may still be unusable for a CPU-only torch."""
    devices, driver = _ask_nvidia_smi()
    return _hardware(devices, driver)


def free_disk_bytes(path: str | Path) -> int:
    """Free bytes on the disk that `path` is on, or would be on once made."""
    path = Path(path).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _hardware(devices: list[Device], driver: str | None) -> Hardware:
    return Hardware(
        devices=devices,
        cpu_cores=_cpu_cores(),
        host_memory_bytes=_host_memory_bytes(),
        platform=f"{platform.system()} {platform.machine()}",
        driver=driver,
    )


def _ask_nvidia_smi() -> tuple[list[Device], str | None]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    query = "index,uuid,name,memory.total,compute_cap,driver_version"
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return [], None
    return parse_nvidia_smi(done.stdout if done.returncode == 0 else "", os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_nvidia_smi(text: str, visible: str | None) -> tuple[list[Device], str | None]:
    """Devices and driver from nvidia-smi's CSV; `visible` is the value of CUDA_VISIBLE_DEVICES."""
    found: list[tuple[str, str, Device]] = []
    driver = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 6 or not cells[3].isdigit():
            continue  # A message of the tool's, or a GPU that shares the host's memory and reports none.
        index, uuid, name, mebibytes, capability, driver = cells
        major, _, minor = capability.partition(".")
        if not (major.isdigit() and minor.isdigit()):
            continue
        device = Device(name=name, memory_bytes=int(mebibytes) * 2**20, compute_capability=(int(major), int(minor)))
        found.append((index, uuid, device))
    if visible is None:
        return [device for _, _, device in found], driver
    chosen = []
    for wanted in (part.strip() for part in visible.split(",")):
        match = [device for index, uuid, device in found if wanted and (index == wanted or uuid.startswith(wanted))]
        if not match:
            break  # As CUDA does: the first unknown entry hides itself and everything after it.
        chosen.append(match[0])
    return chosen, driver


def _cpu_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = _read_words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _host_memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read_words(Path("/sys/fs/cgroup/memory.max"))
    return min(total, int(limit[0])) if limit and limit[0].isdigit() else total


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []  # No such limit on this system.
