"""What every model needs from other packages: imported in one go, and named in the records."""

from __future__ import annotations

import logging
import platform
import time
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from onlay import __version__
from onlay.hardware import quick_import

if TYPE_CHECKING:
    import torch

_STACK = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "peft")


def import_stack() -> None:
    """Imports torch, transformers' model classes and PEFT, without the garbage collector looking through them."""
    # PEFT imports bitsandbytes, which tells everybody on a CPU that a kernel for 4 bits is not installed.
    told = logging.getLogger("bitsandbytes")
    before = told.level
    told.setLevel(logging.ERROR)
    try:
        with quick_import():
            for name in _STACK:
                import_module(name)
    finally:
        told.setLevel(before)


def describe_stack(device: torch.device) -> dict[str, str]:
    """The device, the versions and the day: what the numbers of a record depend on."""
    import torch

    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "device": name, "threads": str(torch.get_num_threads()), "python": platform.python_version(),
        "onlay": __version__, **{package: version(package) for package in packages},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
