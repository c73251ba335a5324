"""Rows of numbers in FP8 (e4m3) with a scale each, and the definition of how they are made.

    scale = max(|x|) / 448 over a row (at least the smallest positive number, so that a row of zeros stays one)
    x ~ numbers * scale,   numbers = e4m3(x / scale), rounded to the nearest

448 is the largest number that e4m3 has; with 3 bits of mantissa a number is off by at most 1/16 of itself, unless it is
below 2^-6 of the scale's unit, where e4m3's steps are 2^-9.
Source: FP8 formats for deep learning (arXiv:2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0
LEAST_AMAX = 1e-12
"""Below this a row is taken for one of zeros."""
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    numbers: Tensor
    """(N, K) float8_e4m3fn, contiguous."""
    scales: Tensor
    """(N,) float32."""

    def wide(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K): the numbers that it stands for."""
        return self.numbers.to(torch.float32).to(dtype) * self.scales[:, None].to(dtype)


def reference_quantize_rows(x: Tensor, *, columns: Tensor | None = None) -> Fp8Rows:
    """By definition, in float32: of x (N, K), or of x * columns (K,)."""
    exact = x.float() if columns is None else x.float() * columns.float()
    # By a tensor: by a number a GPU multiplies with its reciprocal, which rounds otherwise.
    largest = exact.abs().amax(1).clamp_min(LEAST_AMAX) if x.shape[1] else exact.new_zeros(len(x))
    scales = largest / exact.new_full((), LARGEST)
    return Fp8Rows((exact / scales[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scales)
