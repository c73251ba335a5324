"""NF4: sixteen levels for weights that are normally distributed, with one scale for each block of 64.

What and why.  A block of weights is divided by its largest magnitude and each is replaced by the number of its nearest
level; the levels are quantiles of the normal distribution, so that each is used about as often.  4 bits a weight and 32 a
block make 4.5 bits; with double quantization the scales are stored in 8 bits too and 4.127 remain.

    quantize      s = max |w_i|  (a block of 64),  q_i = argmin_k |w_i / s - CODE_k|
    dequantize    w_i ~ CODE_{q_i} s
    double        s ~ MAP_{p} t + m,  m = mean of all s,  t = max |s - m|  (256 blocks),  p = argmin_k |(s - m) / t - MAP_k|

Layout.  A weight of any shape is read as one line of n numbers; blocks may begin and end within a row, the last one may be
short.  codes (ceil(n / 2),) uint8, the first number of each pair in the upper four bits; scales (ceil(n / 64),).
Precision.  Quantized in float32 (float64 for float64 weights).  CODE and scales are float32, their product is rounded once
to the dtype asked for; in float64 it is exact.  The same number stands for a weight on every device.
When bitsandbytes' kernels are *not* used.  For float64, for an odd number of weights, and to quantize on a CPU, where it has
none.  On a CPU its dequantization is called with a flat shape: with others it mixes up the blocks of some widths.
Sources.  QLoRA (arXiv:2305.14314), section 3 and appendix E; the 8-bit map is that of arXiv:2110.02861, section 2.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from onlay.errors import SetupError

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The paper's table, ascending; float32 numbers."""
BLOCK = 64
SCALE_BLOCK = 256
_MAP_POWERS = 7
_PIECE = 2**18
INSTALL = "python -m pip install 'onlay[quantized]'"


@dataclass(frozen=True, slots=True)
class Nf4:
    """A quantized weight.  n is the number of its elements, blocks = ceil(n / 64)."""

    codes: Tensor
    """(ceil(n / 2),) uint8: two numbers 0..15 a byte."""
    scales: Tensor
    """(blocks,) float32; with double quantization uint8, numbers of the 8-bit map."""
    scale_scales: Tensor | None
    """(ceil(blocks / 256),) float32, with double quantization."""
    scale_mean: Tensor | None
    """() float32, with double quantization."""
    shape: tuple[int, ...]


def quantize(weight: Tensor, *, double_quantization: bool) -> Nf4:
    """A weight of any shape and floating dtype, on its own device.  Raises SetupError when bitsandbytes is missing."""
    kernels = bitsandbytes_kernels()
    if not weight.numel():
        return reference_quantize(weight)  # A launch without blocks is an error that ends the process.
    if weight.dtype == torch.float64:
        packed = reference_quantize(weight)
    elif not weight.is_cuda:
        packed = _quantize_in_pieces(weight)
    else:
        codes, scales = kernels.quantize_4bit.default(weight.contiguous(), BLOCK, "nf4", torch.uint8)
        packed = Nf4(codes.view(-1), scales, None, None, tuple(weight.shape))
    if not double_quantization:
        return packed
    mean = packed.scales.mean()
    numbers, scale_scales = kernels.quantize_blockwise.default(
        packed.scales - mean, dynamic_map(weight.device), SCALE_BLOCK
    )
    return Nf4(packed.codes, numbers, scale_scales, mean, packed.shape)


def _quantize_in_pieces(weight: Tensor) -> Nf4:
    """The same as the reference, bit for bit: counted comparisons on pieces that fit a CPU's cache are four times as fast."""
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=flat.device)
    code = torch.tensor(CODE, dtype=torch.float32)
    middles = ((code[1:] + code[:-1]) / 2).tolist()
    for start in range(0, count, _PIECE):
        relative, own = _relative(flat[start : start + _PIECE].float())
        numbers = torch.zeros(relative.shape, dtype=torch.uint8, device=flat.device)
        for middle in middles:
            numbers += relative > middle
        packed = numbers[::2] << 4 | numbers[1::2]
        scales[start // BLOCK :][: own.numel()] = own
        codes[start // 2 :][: packed.numel()] = packed[: codes.numel() - start // 2]
    return Nf4(codes, scales, None, None, tuple(weight.shape))


def _relative(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers divided by the scale of their block, filled up with zeros to whole blocks, and the scales."""
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    # A block of zeros has no scale to divide by.
    return (blocks * scales.clamp_min(torch.finfo(flat.dtype).tiny).reciprocal()[:, None]).view(-1), scales


def dequantize(packed: Nf4, dtype: torch.dtype) -> Tensor:
    """The weight that `packed` stands for, in its shape."""
    count = math.prod(packed.shape)
    if dtype == torch.float64 or count % 2 or not count:
        return reference_dequantize(packed, dtype)
    kernels = bitsandbytes_kernels()
    flat: Tensor = kernels.dequantize_4bit.default(packed.codes, block_scales(packed), BLOCK, "nf4", (count,), dtype)
    return flat.view(packed.shape)


def block_scales(packed: Nf4) -> Tensor:
    """(blocks,) float32: the scale of each block of 64: product and sum, rounded twice; a GPU's may differ in the last bit."""
    if packed.scale_scales is None or packed.scale_mean is None:
        return packed.scales
    device = packed.scales.device
    if device.type == "cuda":
        scales: Tensor = bitsandbytes_kernels().dequantize_blockwise.default(
            packed.scales, packed.scale_scales, dynamic_map(device), SCALE_BLOCK, torch.float32
        )
        return scales.add_(packed.scale_mean)
    spread = packed.scale_scales.repeat_interleave(SCALE_BLOCK)[: packed.scales.numel()]
    return dynamic_map(device)[packed.scales.int()].mul_(spread).add_(packed.scale_mean)


def reference_quantize(weight: Tensor) -> Nf4:
    """Without double quantization, by definition, in float32 (float64 for float64 weights)."""
    flat = weight.detach().reshape(-1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    relative, scales = _relative(flat)
    code = torch.tensor(CODE, dtype=flat.dtype, device=flat.device)
    numbers = torch.bucketize(relative, (code[1:] + code[:-1]) / 2, out_int32=True)
    numbers = numbers[: flat.numel() + flat.numel() % 2].to(torch.uint8)
    return Nf4(numbers[::2] << 4 | numbers[1::2], scales.float(), None, None, tuple(weight.shape))


def reference_dequantize(packed: Nf4, dtype: torch.dtype) -> Tensor:
    """By definition; exact in float64."""
    count = math.prod(packed.shape)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    code = torch.tensor(CODE, dtype=exact, device=packed.codes.device)
    numbers = torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1)[:count]
    scales = block_scales(packed).to(exact).repeat_interleave(BLOCK)[:count]
    return (code[numbers.int()] * scales).to(dtype).view(packed.shape)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """(256,) float32, ascending: the 8-bit map of bitsandbytes.  Each power of ten is cut as finely as bits are left."""
    low, high = np.float32(0.1), np.float32(1)
    values = [0.0, 1.0]
    for power in range(_MAP_POWERS):
        cuts = 2**power
        # As torch.linspace does it, which made the original: in float32 steps, from either end to the middle.
        step, place = np.float64((high - low) / np.float32(cuts)), np.arange(cuts + 1)
        edges = np.where(2 * place < cuts, low + step * place, high - step * (cuts - place)).astype(np.float32)
        means = np.float32(10.0 ** (power - _MAP_POWERS + 1)) * ((edges[1:] + edges[:-1]) / 2)
        values += [*means, *-means]
    return torch.from_numpy(np.sort(np.array(values, dtype=np.float32))).to(device)


@cache
def bitsandbytes_kernels() -> Any:
    """torch.ops.bitsandbytes.  Raises SetupError when the package is missing."""
    # It warns about an optional kernel for a forward pass that is not used here.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise SetupError("model.storage = nf4 needs bitsandbytes, which is not installed.", INSTALL) from None
    finally:
        log.setLevel(level)
    return torch.ops.bitsandbytes
