"""Whether an op's fast kernel runs here, or its reference."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def runs_fast(tensor: Tensor) -> bool:
    """On a GPU with Triton; on a CPU only in Triton's interpreter, which is for tests."""
    if tensor.dtype == torch.float64 or not has_triton():
        return False
    return tensor.is_cuda or (is_interpreted() and tensor.device.type == "cpu")


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
