"""Cross-entropy of a frozen output head, by chunks of tokens, so that logits never exist whole.

What and why.  A vocabulary of 128,000 makes a megabyte of logits for two tokens, several times over: in 16 bit, in float32,
and as their gradient.  But all that is wanted is one number and the gradient of the hidden states.  Both are known once a
token's logits are, so a chunk of tokens takes its logits, its loss and its gradient in one go, and the next chunk takes
the same memory.

    forward    Z = H W^T + b,  loss = sum_n (logsumexp(Z_n) - Z_n[t_n]);  at once  G = (softmax(Z) - onehot(t)) W
    backward   dH = g G   for the gradient g of the loss, a number

Layout.  hidden (N, D), weight (V, D), bias (V,) or None, targets (N,) int64, each one a class -> a number, nats.  A chunk's
logits become their own gradient where they lie: onlay/kernels/softmax_gradient.py.
Precision.  Both products in the dtype of the input; log-softmax, loss and g G in float32 (float64 for float64); softmax -
onehot is rounded to the dtype of the input before its product, as autograd rounds the gradient of logits, and G after it.
What the frozen base lets us skip.  The gradient of W, (V, D): with it this would not be one pass of small memory.
Kept for the backward.  G, as large as H.  Without a gradient to come, nothing, and G is not computed.
Costs.  Two products of the ordinary path's size (the third would be the gradient of W); W is read twice a chunk, and the logits
are read three times and written twice.
When it is *not* used.  Where the head trains (full tuning), is adapted, or is not a plain linear layer; where the model does
something to its logits, such as capping or scaling them: training/loss.py asks the model itself.
Sources.  The gradient in the forward is that of Liger Kernel's fused linear cross-entropy (arXiv:2410.10989); not keeping
logits is also the point of Cut Cross-Entropy (arXiv:2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from onlay.kernels.dispatch import runs_fast
from onlay.kernels.softmax_gradient import softmax_gradient_

CHUNK_BYTES = 512 * 2**20
"""Of a chunk's logits, with what is made of them.  In 16 bit, with the fast kernel, that is 2,048 tokens of 128,000 classes: with
fewer of them a GPU waits for W."""
EVEN = 128
"""Large chunks are a multiple of so many rows, as the tiles of a GPU's products are."""


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The same by definition, as transformers computes it: logits in the dtype of the input, the rest in float32."""
    logits = functional.linear(hidden, weight, bias)
    return functional.cross_entropy(logits.to(_wide(hidden)), targets, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Nats of `targets` (N,) under the head (V, D) on hidden (N, D), summed: float32, or float64 for float64.

    All in one dtype and on one device, outside of autocast.  A gradient for `hidden` alone, once.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return _chunks(hidden, weight, bias, targets, None)
    nats: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets)
    return nats


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _rows(row_bytes: int) -> int:
    """Rows of a chunk."""
    rows = max(1, CHUNK_BYTES // row_bytes)
    return rows - rows % EVEN if rows > EVEN else rows


def _logit_bytes(hidden: Tensor) -> int:
    """Alive at a time for one logit: itself, and in the reference its widened form and that one's log-softmax."""
    if runs_fast(hidden):
        return hidden.dtype.itemsize
    wide = _wide(hidden)
    return hidden.dtype.itemsize + wide.itemsize * (1 if wide == hidden.dtype else 2)


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor | None) -> Tensor:
    """The loss; the gradient of `hidden` is written into `grad` (N, D) where one is given."""
    nats = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden))
    size = _rows(weight.shape[0] * _logit_bytes(hidden))
    for start in range(0, hidden.shape[0], size):
        some = slice(start, start + size)
        nats[some] = _chunk(hidden[some], weight, bias, targets[some], None if grad is None else grad[some])
    return nats.sum()


def _chunk(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor | None) -> Tensor:
    """Nats (n,) of targets (n,).  A function of its own, so that all of it is gone when the next chunk begins."""
    logits = functional.linear(hidden, weight, bias)
    nats = softmax_gradient_(logits, targets, gradient=grad is not None)
    if grad is not None:
        torch.mm(logits, weight, out=grad)
    return nats


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        grad = torch.empty_like(hidden)
        nats = _chunks(hidden, weight, bias, targets, grad)
        ctx.save_for_backward(grad)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor, None, None, None]:
        [grad] = ctx.saved_tensors
        if grad.dtype == grad_nats.dtype:
            return grad * grad_nats, None, None, None
        # Multiplied in float32: in the dtype of `grad` the number itself would be rounded, and with it the whole gradient.
        out = torch.empty_like(grad)
        size = _rows(grad.shape[1] * grad_nats.dtype.itemsize)
        for start in range(0, grad.shape[0], size):
            some = slice(start, start + size)
            out[some] = grad[some].to(grad_nats.dtype) * grad_nats
        return out, None, None, None
