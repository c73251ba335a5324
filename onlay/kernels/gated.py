"""The product inside a gated MLP, act(gate) * up, forward and backward, with the adapters' part added on the way.

What and why.  gate and up are the widest activations of a layer.  Added by a product of its own, an adapter's part reads and
writes them once more; here it is added while they are in registers, and the backward writes the gradients over them:

    z_g = gate + h_g B_g        z_u = up + h_u B_u        p = act(z_g) z_u
    forward    p
    backward   d = dp + h A;    d_up = d act(z_g);    d_gate = d z_u act'(z_g);    p again, for the gradient of the next adapter

h_g, h_u (T, R) and B (R, I) are the adapters of gate and up; h (T, R) and A (R, I) what the adapter of the layer behind adds to dp.
act is silu, gelu (by erf) or gelu_tanh.
Layout.  gate, up (T, I), each row contiguous, any distance between rows (they may be the halves of one tensor); p (T, I) contiguous.
A program computes a tile.
Precision.  float32 inside (float64 for float64), each result rounded once.
Kept for the backward.  gate and up as the base computed them, and the h of each adapter: not z, not p.
When it is *not* used.  For other activations and MLPs without a gate: transformers' own module runs.
Source: GLU variants (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from onlay.kernels.dispatch import runs_fast
from onlay.kernels.normalise import wide
from onlay.kernels.updates import Update

Activation = Literal["silu", "gelu", "gelu_tanh"]


def gated(
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation,
    gate_update: Update | None = None,
    up_update: Update | None = None,
) -> Tensor:
    """p (T, I)."""
    if runs_fast(gate):
        from onlay.kernels.gated_triton import gated as fast

        return fast(gate, up, activation=activation, gate_update=gate_update, up_update=up_update)
    return reference_gated(gate, up, activation=activation, gate_update=gate_update, up_update=up_update)


def gated_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    *,
    activation: Activation,
    gate_update: Update | None = None,
    up_update: Update | None = None,
    grad_update: Update | None = None,
) -> Tensor:
    """p (T, I); d_gate and d_up are written over gate and up.  p may be written over `grad`."""
    if runs_fast(gate):
        from onlay.kernels.gated_triton import gated_backward as fast

        return fast(
            gate, up, grad, activation=activation, gate_update=gate_update, up_update=up_update,
            grad_update=grad_update
        )  # fmt: skip
    return reference_gated_backward(
        gate, up, grad, activation=activation, gate_update=gate_update, up_update=up_update,
        grad_update=grad_update
    )  # fmt: skip


def added(y: Tensor, update: Update | None) -> Tensor:
    """y + h B in the precision of the work."""
    return wide(y) if update is None else wide(y) + wide(update.hidden) @ wide(update.b)


def act(z: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return functional.silu(z)
    return functional.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def act_backward(d: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """d act'(z)"""
    found: Tensor
    if activation == "silu":
        found = torch.ops.aten.silu_backward(d, z)
    else:
        found = torch.ops.aten.gelu_backward(d, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return found


def reference_gated(
    gate: Tensor, up: Tensor, *, activation: Activation, gate_update: Update | None, up_update: Update | None
) -> Tensor:  # fmt: skip
    return (act(added(gate, gate_update), activation) * added(up, up_update)).to(gate.dtype)


def reference_gated_backward(
    gate: Tensor, up: Tensor, grad: Tensor, *, activation: Activation, gate_update: Update | None,
    up_update: Update | None, grad_update: Update | None,
) -> Tensor:  # fmt: skip
    z_gate, z_up, d = added(gate, gate_update), added(up, up_update), added(grad, grad_update)
    acted = act(z_gate, activation)
    p = (acted * z_up).to(gate.dtype)
    d_up = d * acted
    gate.copy_(act_backward(d * z_up, z_gate, activation))
    up.copy_(d_up)
    return p
