"""What the kernels of a decoding step are given: onlay/kernels/decode.py and decode_triton.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LEAST_HALF = 16
"""Of a head's width: the least that a matrix product of a kernel takes."""
MOST_ROWS = 64
"""Of one program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The adapters' part of a projection: hidden (N, S) of any row stride, masked, and B (S, O)."""

    hidden: Tensor
    b: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadNorm:
    """RMSNorm over each head: weight (D,)."""

    weight: Tensor
    eps: float
