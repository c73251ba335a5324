"""Cross-entropy of a chunk of logits and its gradient, written over them.

What and why.  `chunked_loss.py` computes a chunk of logits, their loss and the gradient of the hidden states at once.  In plain
torch that widens them to float32 and goes over them six times; here they are read twice and written once, where they lie:

    nats_n = logsumexp(z_n) - z_n[t_n]            z_n <- softmax(z_n) - onehot(t_n)

Layout.  z (N, V), rows contiguous; targets (N,) int64, each 0 <= t < V; nats (N,) float32.  A program computes one row.
Precision.  float32 inside (float64 for float64); the gradient is rounded to the dtype of z, as autograd rounds it.
Source: the one-pass logsumexp is that of online softmax (arXiv:1805.02867).
"""

from __future__ import annotations

import torch
from torch import Tensor

from onlay.kernels.dispatch import runs_fast
from onlay.kernels.normalise import wide


def softmax_gradient_(logits: Tensor, targets: Tensor, *, gradient: bool = True) -> Tensor:
    """nats (N,); with `gradient` the logits (N, V) become their gradient, without it they stay."""
    if runs_fast(logits):
        from onlay.kernels.softmax_gradient_triton import softmax_gradient_ as fast

        return fast(logits, targets, gradient=gradient)
    return reference_softmax_gradient_(logits, targets, gradient=gradient)


def reference_softmax_gradient_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    logs = torch.log_softmax(wide(logits), -1)
    nats = -logs.gather(1, targets[:, None])[:, 0]
    if gradient:
        chances = logs.exp_()
        chances.scatter_add_(1, targets[:, None], chances.new_full((1, 1), -1.0).expand(len(targets), 1))
        logits.copy_(chances)
    return nats
