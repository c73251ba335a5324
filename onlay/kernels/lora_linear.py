"""A frozen linear layer with its LoRA adapter, as one autograd node, on a CPU.

What and why.  As separate layers an adapter costs a CPU more than the layer it sits on: its products are only R wide,
which a CPU computes at a third of its speed, and each step between them goes through memory.  Two forms, both exact:

    folded     W' = W + s B A;  y = x W'^T;        dx = dy W';   dW' = dy^T x,  dA = s B^T dW',  dB = s dW' A^T
    factored   y = x W^T + s (x A^T) B^T;  with h = s A x^T and g = s B^T dy^T, both (R, T) and so wide:
               dx = dy W + g^T A;   dA = g x,  dB = (h dy)^T

The folded form takes 3 I O operations a token, the factored one 2 I O + 5 R (I + O): the first where the layer is small.
Layout.  x (..., I), W (O, I), A (R, I), B (O, R), bias (O,) or None -> (..., O); T is the product of the leading sizes.
Precision.  Everything in the dtype of the input (float32 or float64).
What the frozen base lets us skip.  The gradient of W (in the folded form it is R wide after two small products).
Kept for the backward.  x, and W' (folded) or h (factored).
When it is *not* used.  Off the CPU, in 16 bit, with dropout or DoRA, with several adapters: PEFT's own forward runs then.
bench/lora_linear.py measures both forms.  Source: LoRA (arXiv:2106.09685), equation 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The same by definition."""
    return functional.linear(x, weight, bias) + scale * functional.linear(functional.linear(x, a), b)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x (..., I) -> (..., O).  Gradients for x, a and b; weight and bias are frozen; can be differentiated once."""
    node = _Folded if folds(*weight.shape, rank=a.shape[0]) else _Factored
    out: Tensor = node.apply(x, weight, bias, a, b, scale)
    return out


def folds(outputs: int, inputs: int, *, rank: int) -> bool:
    """Whether folding the adapter into the weight takes fewer operations a token than keeping it apart."""
    return 3 * outputs * inputs <= 2 * outputs * inputs + 5 * rank * (outputs + inputs)


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        folded = torch.addmm(weight, b, a, alpha=scale)
        ctx.save_for_backward(x, folded, a, b)
        ctx.scale = scale
        return functional.linear(x, folded, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, folded, a, b = ctx.saved_tensors
        grad_x = grad @ folded if ctx.needs_input_grad[0] else None
        grad_folded = grad.flatten(0, -2).t() @ x.flatten(0, -2) * ctx.scale
        return grad_x, None, None, b.t() @ grad_folded, grad_folded @ a.t(), None


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.flatten(0, -2)
        out = functional.linear(rows, weight, bias)
        hidden = (a * scale) @ rows.t()
        out.addmm_(hidden.t(), b.t())
        ctx.save_for_backward(x, weight, a, b, hidden)
        ctx.scale = scale
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, hidden = ctx.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        grad_hidden = (b.t() * ctx.scale) @ grad_rows.t()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_hidden.t(), a).view_as(x)
        return grad_x, None, None, grad_hidden @ rows, (hidden @ grad_rows).t(), None
