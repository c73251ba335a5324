"""Frozen weights as the fused blocks see them: a product forward and one backward, however the weight is kept.

    product        y = x W^T + b
    back_product   dx = dy W

Layout.  x (T, I), dy (T, O) -> (T, O), (T, I); W (O, I) may be the joined outputs of several layers that share their input.
Weights that multiply in FP8 also take rows that their producer has already quantized: of x as it is, of dy with its columns
multiplied by `grad_columns`.
What the frozen base lets us skip.  dW: none of these has a gradient, and none keeps anything between the two products.
Sources.  onlay/kernels/fp8.py, onlay/kernels/nf4.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from onlay.kernels import nf4
from onlay.kernels.fp8 import (
    columns_from_nf4,
    nf4_row_scales,
    product,
    quantize_rows,
    rows_from_nf4,
    transpose,
)
from onlay.kernels.fp8_rows import FP8, Fp8Rows

Rebuild = Callable[[torch.dtype], Tensor]
"""Gives the weight (O, I) in the dtype asked for."""


class Frozen(Protocol):
    rows: int
    """O."""
    columns: int
    """I."""
    fp8: bool
    """Multiplies in FP8, and so takes Fp8Rows."""

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        """x (T, I) -> (T, O) in the dtype of the work, with the bias."""

    def back_product(self, dy: Tensor | Fp8Rows) -> Tensor:
        """dy (T, O) -> (T, I) in the dtype of the work.  Fp8Rows are of dy * grad_columns."""

    @property
    def grad_columns(self) -> Tensor | None:
        """(O,) float32: what dy's columns are multiplied by before they are quantized.  None where it is not FP8."""


class Stored:
    """A weight (O, I) that is kept as it is used."""

    fp8 = False
    grad_columns = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.rows, self.columns = weight.shape
        self.weight, self.bias = weight, None if bias is None else bias.to(weight.dtype)

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        return functional.linear(_plain(x), self.weight, self.bias)

    def back_product(self, dy: Tensor | Fp8Rows) -> Tensor:
        return _plain(dy) @ self.weight


class Rebuilt:
    """A packed weight that is rebuilt in `dtype` for each product."""

    fp8 = False
    grad_columns = None

    def __init__(
        self, rebuild: Rebuild, bias: Tensor | None, dtype: torch.dtype, *, rows: int, columns: int
    ) -> None:  # fmt: skip
        self.rows, self.columns = rows, columns
        self._rebuild, self._dtype = rebuild, dtype
        self.bias = None if bias is None else bias.to(dtype)

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        return functional.linear(_plain(x), self._rebuild(self._dtype), self.bias)

    def back_product(self, dy: Tensor | Fp8Rows) -> Tensor:
        return _plain(dy) @ self._rebuild(self._dtype)


class Fp8:
    """Numbers (O, I) in FP8 with a scale (O,) for each row.

    `keep_transposed` holds the numbers a second time, as the backward product needs them: O I bytes, for the time that
    transposing takes (reading and writing as many).
    """

    fp8 = True

    def __init__(
        self, numbers: Tensor, scales: Tensor, bias: Tensor | None, *, dtype: torch.dtype, keep_transposed: bool = False
    ) -> None:  # fmt: skip
        self.rows, self.columns = numbers.shape
        self.numbers, self.scales, self._dtype = numbers, scales, dtype
        self.bias = None if bias is None else bias.to(dtype)
        self._transposed = transpose(numbers) if keep_transposed else None

    @property
    def grad_columns(self) -> Tensor:
        return self.scales

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        return product(_quantized(x), self.numbers, self.scales, bias=self.bias, dtype=self._dtype)

    def back_product(self, dy: Tensor | Fp8Rows) -> Tensor:
        transposed = transpose(self.numbers) if self._transposed is None else self._transposed
        return product(grad_rows(self, dy), transposed, None, dtype=self._dtype)


class Fp8FromNf4:
    """One or more weights in NF4, joined along their outputs, that become FP8 for each product, already transposed for the backward.

    Keeps the scales of their rows besides (4 bytes a row).
    """

    fp8 = True

    def __init__(self, packed: tuple[nf4.Nf4, ...], bias: Tensor | None, *, dtype: torch.dtype) -> None:
        self._packed, self._dtype = packed, dtype
        self.rows, self.columns = sum(part.shape[0] for part in packed), packed[0].shape[1]
        self.scales = torch.cat([nf4_row_scales(part) for part in packed])
        self.bias = None if bias is None else bias.to(dtype)

    @property
    def grad_columns(self) -> Tensor:
        return self.scales

    def product(self, x: Tensor | Fp8Rows) -> Tensor:
        numbers = torch.empty(self.rows, self.columns, dtype=FP8, device=self.scales.device)
        for part, rows in self._parts():
            rows_from_nf4(part, scales=self.scales[rows], out=numbers[rows])
        return product(_quantized(x), numbers, self.scales, bias=self.bias, dtype=self._dtype)

    def back_product(self, dy: Tensor | Fp8Rows) -> Tensor:
        transposed = torch.empty(self.columns, self.rows, dtype=FP8, device=self.scales.device)
        for part, rows in self._parts():
            columns_from_nf4(part, scales=self.scales[rows], out=transposed[:, rows])
        return product(grad_rows(self, dy), transposed, None, dtype=self._dtype)

    def _parts(self) -> list[tuple[nf4.Nf4, slice]]:
        ends = [sum(part.shape[0] for part in self._packed[: place + 1]) for place in range(len(self._packed))]
        return [(part, slice(end - part.shape[0], end)) for part, end in zip(self._packed, ends, strict=True)]


def grad_rows(frozen: Frozen, dy: Tensor | Fp8Rows) -> Fp8Rows:
    """dy (T, O) as an FP8 weight's `back_product` multiplies it; rows that are already so are passed on."""
    return dy if isinstance(dy, Fp8Rows) else quantize_rows(dy, columns=frozen.grad_columns)


def frozen_product(x: Tensor, frozen: Frozen, bias: Tensor | None) -> Tensor:
    """x (..., I) -> (..., O) as one autograd node, with gradients for x and for `bias`; can be differentiated once.

    `frozen` holds no bias of its own then.  Under autocast x is cast first, as torch does for its own linear layers.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    out: Tensor = _FrozenProduct.apply(x, frozen, bias)
    return out


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Frozen, bias: Tensor | None) -> Tensor:
        ctx.frozen, ctx.bias_dtype = frozen, None if bias is None else bias.dtype
        out = frozen.product(x.reshape(-1, x.shape[-1]))
        if bias is not None:
            out += bias.to(out.dtype)
        return out.view(*x.shape[:-1], frozen.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.reshape(-1, grad.shape[-1])
        # A backward pass begun under autocast must not turn the products to other numbers than the forward's.
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = ctx.frozen.back_product(rows) if ctx.needs_input_grad[0] else None
        grad_bias = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return None if grad_x is None else grad_x.view(*grad.shape[:-1], ctx.frozen.columns), None, grad_bias


def _plain(x: Tensor | Fp8Rows) -> Tensor:
    assert isinstance(x, Tensor), "quantized rows are for weights that multiply in FP8"
    return x


def _quantized(x: Tensor | Fp8Rows) -> Fp8Rows:
    return x if isinstance(x, Fp8Rows) else quantize_rows(x)
