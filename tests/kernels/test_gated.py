"""act(gate) * up with the adapters' parts: the reference against autograd in float64, the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from onlay.kernels import gated as op
from tests.kernels.compare import assert_exact, assert_near, draw, in_each_place, updates, widened

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
SHAPES = [(5, 40), (1, 64), (70, 70), (64, 1), (0, 16)]
RANKS = [(0, 0, 0), (1, 0, 5), (16, 70, 1)]


def by_definition(z: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return z / (1 + torch.exp(-z))
    if activation == "gelu":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2


def halves(rows: int, width: int, *, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """gate and up as the halves of one tensor."""
    both = draw(rows, 2 * width, seed=0, dtype=dtype, device=device, scale=2.0)
    return both[:, :width], both[:, width:]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_definition_and_its_backward_is_autograd(
    shape: tuple[int, int], ranks: tuple[int, int, int], activation: op.Activation
) -> None:
    gate, up = halves(*shape)
    given = updates(shape[0], ranks, shape[1:] * 3, seed=1)
    grad = draw(*shape, seed=9)
    y_gate, y_up = (half.clone().requires_grad_() for half in (gate, up))
    z_gate, z_up, d = (
        y if update is None else y + update.hidden @ update.b
        for y, update in zip((y_gate, y_up, grad), given, strict=True)
    )
    p = by_definition(z_gate, activation) * z_up
    expected = torch.autograd.grad(p, [y_gate, y_up], d)
    found = op.gated(gate, up, activation=activation, gate_update=given[0], up_update=given[1])
    assert_exact(found, p.detach())
    again = op.gated_backward(
        gate, up, grad, activation=activation, gate_update=given[0], up_update=given[1], grad_update=given[2]
    )
    assert_exact(again, p.detach())
    assert_exact(gate, expected[0])
    assert_exact(up, expected[1])


@in_each_place
@pytest.mark.parametrize(
    ("activation", "ranks"),
    [("silu", RANKS[0]), ("silu", RANKS[1]), ("silu", RANKS[2]), ("gelu", RANKS[1]), ("gelu_tanh", RANKS[2])],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_err_at_most_twice_as_much(
    shape: tuple[int, int], ranks: tuple[int, int, int], activation: op.Activation, device: str, dtype: torch.dtype
) -> None:
    from onlay.kernels import gated_triton

    given = updates(shape[0], ranks, shape[1:] * 3, seed=1, dtype=dtype, device=device)
    grad = draw(*shape, seed=9, dtype=dtype, device=device)
    results = []
    for forward, backward, form in (
        (gated_triton.gated, gated_triton.gated_backward, lambda value: value),
        (op.reference_gated, op.reference_gated_backward, lambda value: value),
        (op.reference_gated, op.reference_gated_backward, widened),
    ):
        gate, up = (form(half) for half in halves(*shape, dtype=dtype, device=device))
        gate_update, up_update, grad_update = form(given)
        more = {"activation": activation, "gate_update": gate_update, "up_update": up_update}
        p = forward(gate, up, **more)
        again = backward(gate, up, form(grad).clone(), grad_update=grad_update, **more)
        results.append((p, again, gate, up))
    for ours, eager, exact in zip(*results, strict=True):
        assert_near(ours, eager, exact)


@in_each_place
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_the_kernels_stay_finite(activation: op.Activation, device: str, dtype: torch.dtype) -> None:
    from onlay.kernels import gated_triton

    gate = torch.tensor([[-60000.0, -200.0, -90.0, 0.0, 90.0, 200.0, 100.0]], dtype=dtype, device=device)
    up, grad = torch.ones_like(gate), torch.ones_like(gate)
    p = gated_triton.gated(gate, up, activation=activation, gate_update=None, up_update=None)
    assert torch.equal(p, gate.clamp_min(0.0))
    gated_triton.gated_backward(
        gate, up, grad, activation=activation, gate_update=None, up_update=None, grad_update=None
    )
    slope = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]], dtype=dtype, device=device)
    assert torch.equal(gate, slope)
