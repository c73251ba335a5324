"""What the kernels share: the adapters' part of a tile, and the sizes of tiles.  Imported where they run: it needs Triton."""

# ruff: noqa: N803  (compile-time constants are written in capitals)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from onlay.kernels.updates import Update

MOST_RANKS = 64
"""Multiplied at a time in 16 bit: the factors of a step of the ranks' loop then fit the shared memory of every GPU."""
RANKS_SLOW = 16
"""The same where products run outside of the matrix units and take registers instead."""


@triton.jit
def add_product(
    z, rows, live, columns, within, h, h_stride, b, width, S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """z (rows, columns) float32 + h B; z itself with S = 0.  b points to B (S, width)."""
    for start in range(0, S, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        there = inner < S
        hidden = tl.load(h + rows[:, None] * h_stride + inner[None, :], mask=live[:, None] & there[None, :], other=0.0)
        factor = tl.load(
            b + inner[:, None] * width + columns[None, :], mask=there[:, None] & within[None, :], other=0.0
        )
        z = tl.dot(hidden, factor, z, input_precision="ieee")
    return z


@triton.jit
def divided(x, scale):
    """x / scale, rounded to the nearest as a division is, for the price of three products: scale is one for many x (Markstein)."""
    inverse = tl.div_rn(1.0, scale)
    q = x * inverse
    return tl.fma(tl.fma(-q, scale, x), inverse, q)


def parts(y: Tensor, update: Update | None) -> tuple[Tensor, int, Tensor, int]:
    """hidden, its row stride, B and S; without an update S is 0 and y stands for what is never read."""
    if update is None:
        return y, 0, y, 0
    hidden, b = update.hidden, update.b
    assert hidden.stride(1) == 1 and b.is_contiguous() and hidden.dtype == b.dtype and hidden.shape[1] == b.shape[0]
    return hidden, hidden.stride(0), b, b.shape[0]


def multiplies_slowly(y: Tensor) -> bool:
    """Whether products of numbers like these run outside of the matrix units: float32, and GPUs before Ampere, whose Triton has not.

    Tiles are then smaller, or their sums would not fit the registers.
    """
    return y.element_size() > 2 or (y.is_cuda and _capability(y.device) < (8, 0))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def ranks_at_a_time(y: Tensor, *ranks: int) -> int:
    """BLOCK of `add_product`: at least the 16 that a product takes."""
    most = RANKS_SLOW if multiplies_slowly(y) else MOST_RANKS
    return min(most, max(16, power_above(max(ranks))))


def power_above(number: int) -> int:
    """The least power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()
