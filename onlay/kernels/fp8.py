"""Products of a frozen weight in FP8: rows in e4m3 with a scale each, forward and backward, and weights that come as NF4.

What and why.  A GPU with FP8 multiplies e4m3 numbers twice as fast as 16-bit ones, and they take half the memory.  The numbers
and how a row is quantized are defined in onlay/kernels/fp8_rows.py; W_OI is kept as numbers Q_OI and a scale s_O for each row.

    forward    x ~ X_TI t_T                        y = t_T (X Q^T) s_O + b
    backward   dx = dy W = (dy * s_O) Q:           dy * s_O ~ G_TO u_T,    dx = u_T (G Q)

Both directions use the very same numbers: the scales of W's rows go into dy before that is quantized, so the backward needs no
second quantization of W along its columns, only Q^T in memory (both operands of an FP8 product must be contiguous along the
inner size): a transposed copy that is kept, or made on the fly.
Layout.  x (T, K) with contiguous rows at any distance; numbers (O, I) contiguous; products (T, O).  I and O are multiples of 16.
Precision.  Rows are quantized in float32, a number is off by 1/16 of itself at most; sums of products in float32 (with the
tensor cores' fast accumulation on a GPU), scaled and rounded once, to bfloat16 on a GPU.  On a CPU the same numbers are
multiplied wide.
From NF4.  Each number is e4m3(level * block scale / row scale).  Every block of NF4 has a level of +-1, so the largest
magnitude of a row is the largest of its blocks' scales, which is known without looking at the codes.  (A block of zeros has
none; double quantization may give it a scale other than zero, and the row's scale is then larger than it need be, never
smaller.)  One pass reads 0.5 byte a weight and writes 1.  Where I % 64 != 0 blocks run over the ends of rows: the weight is
rebuilt in float32 and its rows are quantized.
What the frozen base lets us skip.  Scales that follow the weight from step to step, and its gradient.
When it is *not* used.  For float64 (callers multiply wide), below compute capability 8.9, and for sizes that are no multiples
of 16.
Sources.  FP8 formats for deep learning (arXiv:2209.05433); QLoRA (arXiv:2305.14314) for NF4.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels import nf4
from onlay.kernels.dispatch import runs_fast
from onlay.kernels.fp8_rows import FP8, LARGEST, LEAST_AMAX, Fp8Rows, reference_quantize_rows

STEP = 16
"""Both sizes of a weight must be multiples of it: what torch._scaled_mm takes."""


def fits(outputs: int, inputs: int) -> bool:
    """Whether a weight of this shape can be multiplied in FP8."""
    return outputs % STEP == 0 and inputs % STEP == 0 and outputs > 0 and inputs > 0


def quantize_rows(x: Tensor, *, columns: Tensor | None = None) -> Fp8Rows:
    """x (T, K), or x * columns (K,), in FP8 with a scale for each row.  The same numbers on every device."""
    if runs_fast(x) and x.numel():
        from onlay.kernels.fp8_triton import quantize_rows as fast

        return fast(x, columns=columns)
    return reference_quantize_rows(x, columns=columns)


def transpose(numbers: Tensor) -> Tensor:
    """(O, I) of one byte each -> (I, O), contiguous."""
    if runs_fast(numbers) and numbers.numel():
        from onlay.kernels.fp8_triton import transpose as fast

        return fast(numbers)
    return numbers.t().contiguous()


def product(
    x: Fp8Rows, numbers: Tensor, scales: Tensor | None, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """(T, O) in `dtype`: x (T, I) times numbers (O, I), scaled by scales (O,) (None: ones), plus bias (O,)."""
    rows, outputs = len(x.numbers), len(numbers)
    if not rows:
        return x.scales.new_zeros(0, outputs, dtype=dtype)
    if not numbers.is_cuda:
        return reference_product(x, numbers, scales, bias=bias, dtype=dtype)
    scales = _ones(outputs, numbers.device) if scales is None else scales
    # The rowwise kernels write bfloat16 and nothing else.
    out = torch._scaled_mm(
        x.numbers, numbers.t(), x.scales.view(-1, 1), scales.view(1, -1),
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    if bias is not None:
        out += bias
    return out.to(dtype)


def reference_product(
    x: Fp8Rows, numbers: Tensor, scales: Tensor | None, *, bias: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """By definition, in float32 (exact products; in float64 for float64), rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Under autocast a product of float32 would be one of 16 bits.
    with torch.autocast(numbers.device.type, enabled=False):
        out = functional.linear(x.numbers.to(wide), numbers.to(wide)) * x.scales.to(wide)[:, None]
    out = out if scales is None else out * scales.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


def nf4_row_scales(packed: nf4.Nf4) -> Tensor:
    """(O,) float32: the scales of the rows that `rows_from_nf4` makes.  They are small: worth keeping beside the codes."""
    outputs, inputs = packed.shape
    if inputs % nf4.BLOCK:
        return quantize_rows(nf4.dequantize(packed, torch.float32)).scales
    largest = nf4.block_scales(packed).view(outputs, inputs // nf4.BLOCK).abs().amax(1)
    return largest.clamp_min(LEAST_AMAX) / largest.new_full((), LARGEST)


def rows_from_nf4(
    packed: nf4.Nf4, *, scales: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weight (O, I) as numbers (O, I) in FP8 and the scales (O,) of its rows.

    `scales`: those of `nf4_row_scales`, if they are known.  `out`: where the numbers go, rows of another tensor perhaps.
    """
    return _from_nf4(packed, scales=scales, out=out, transposed=False)


def columns_from_nf4(
    packed: nf4.Nf4, *, scales: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `rows_from_nf4`, the same numbers transposed: (I, O).  `out` may be some columns of another tensor."""
    return _from_nf4(packed, scales=scales, out=out, transposed=True)


def _from_nf4(
    packed: nf4.Nf4, *, scales: Tensor | None, out: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    outputs, inputs = packed.shape
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    out = torch.empty(shape, dtype=FP8, device=packed.codes.device) if out is None else out
    assert out.shape == shape and out.dtype == FP8
    whole_blocks = inputs % nf4.BLOCK == 0
    if not whole_blocks or not runs_fast(packed.codes) or not out.numel():
        rows = reference_rows_from_nf4(packed) if whole_blocks else quantize_rows(nf4.dequantize(packed, torch.float32))
        # Bytes, because not every device copies FP8 with strides.
        numbers = rows.numbers.view(torch.uint8)
        out.view(torch.uint8).copy_(numbers.t() if transposed else numbers)
        return out, rows.scales
    from onlay.kernels.fp8_triton import from_nf4 as fast

    scales = nf4_row_scales(packed) if scales is None else scales
    fast(packed, scales, out, transposed=transposed)
    return out, scales


def reference_rows_from_nf4(packed: nf4.Nf4) -> Fp8Rows:
    """By definition, in float32.  I must be a multiple of 64."""
    scales = nf4_row_scales(packed)
    weight = nf4.reference_dequantize(packed, torch.float32)
    return Fp8Rows((weight / scales[:, None]).clamp(-LARGEST, LARGEST).to(FP8), scales)
